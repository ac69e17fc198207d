"""Conversion of models: torch's batch normalization into shared modules, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import nn

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.validation import check_domain, check_name
from sharednorm.errors import InvalidConfiguration, InvalidName
from sharednorm.remote.hub import Hub
from sharednorm.remote.lazy_handle import LayerLink
from sharednorm.remote.options import HandleOptions
from sharednorm.torch.modules import (
    STATISTICS,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    SharedBatchNorm,
    config_of,
    require_hub,
    update_from,
)

_Make: TypeAlias = Callable[[], nn.Module]
_OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(
    model: nn.Module,
    hub: Hub,
    prefix: str = "",
    *,
    load: bool = False,
    synchronized: type[SharedBatchNorm] = BatchNorm2d,
    **options: Any,
) -> nn.Module:
    """Replace a model's BatchNorm1d, 2d, 3d and SyncBatchNorm modules by shared ones.

    The layer of a module is named by the prefix and the module's path, "resnet/layer1.0.bn1" say. A layer that does not
    exist begins with the module's statistics; one that does keeps its own, for others use it.

    Args:
        model: The model, which is changed. Parameters stay the same objects.
        hub: The server.
        prefix: What the layers' names begin with.
        load: Whether layers that exist take over the module's statistics, too.
        synchronized: What a SyncBatchNorm becomes, which does not say what it takes.
        options: `compute`, `max_staleness`, `wire_dtype`, `group`, `nonfinite`, `push`, `max_pending` and `domain` of
            the new modules; see `BatchNorm1d`.

    Returns:
        The model; the new module, if the model is a batch normalization itself.

    Raises:
        InvalidConfiguration: A module is lazy, or of a class derived from these, which might do something else; an
            option is not one of those above, or out of its range. Nothing was changed or created.
        InvalidName: A layer could not have its name. Nothing was changed or created.
        SharedNormError: What a call to the server raises. The model was not changed.
    """
    require_hub(hub)

    def shared(old: nn.Module, path: str) -> _Make | None:
        if isinstance(old, SharedBatchNorm) or not isinstance(old, nn.modules.batchnorm._BatchNorm):
            return None
        kind = synchronized if type(old) is nn.SyncBatchNorm else _OURS.get(type(old))
        if kind is None:
            raise InvalidConfiguration(
                f"{path or 'the model'} is a {type(old).__name__} (expected: BatchNorm1d, BatchNorm2d, BatchNorm3d or "
                "SyncBatchNorm; run a lazy module once before)"
            )
        return _shared(kind, old, hub, prefix + path, load, options)

    return _replaced(model, shared)


def revert(model: nn.Module) -> nn.Module:
    """Replace a model's shared modules by PyTorch's own, with the statistics that the server has now.

    Args:
        model: The model, which is changed. Parameters stay the same objects; the layers stay on the server.

    Returns:
        The model; the new module, if the model is a shared one itself.

    Raises:
        InvalidConfiguration: A module is of a class derived from the shared ones, which might do something else.
        SharedNormError: What a call to the server raises. The model was not changed.
    """

    def own(old: nn.Module, path: str) -> _Make | None:
        if not isinstance(old, SharedBatchNorm):
            return None
        kind = _THEIRS.get(type(old))
        if kind is None:
            raise InvalidConfiguration(
                f"{path or 'the model'} is a {type(old).__name__} (expected: BatchNorm1d, BatchNorm2d or BatchNorm3d "
                "of sharednorm.torch; a class derived from these might do something else)"
            )
        return lambda: _own(kind, old)

    return _replaced(model, own)


def _replaced(model: nn.Module, replacement: Callable[[nn.Module, str], _Make | None]) -> nn.Module:
    # All modules are looked at before any is made, and all are made before the first is put in its place.
    makers = {id(module): replacement(module, path) for path, module in model.named_modules()}
    made = {number: make() for number, make in makers.items() if make is not None}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            new = None if child is None else made.get(id(child))
            if new is not None:
                setattr(parent, name, new)
    return made.get(id(model), model)


def _shared(
    kind: type[SharedBatchNorm], old: nn.Module, hub: Hub, name: str, load: bool, options: dict[str, Any]
) -> _Make:
    known = {
        "compute": "client",
        "max_staleness": 0.0,
        "wire_dtype": None,
        "group": None,
        "nonfinite": "refuse",
        "push": "sync",
        "max_pending": None,
        "domain": "",
    }
    unknown = set(options) - set(known)
    if unknown:
        raise InvalidConfiguration(f"there is no option {min(unknown)!r} (expected: {', '.join(known)})")
    chosen = {**known, **options}
    nonfinite, domain = chosen.pop("nonfinite"), check_domain(chosen.pop("domain"))
    handling = HandleOptions.parse(**chosen)
    config = config_of(kind._kind, old.num_features, old.eps, old.momentum, nonfinite)
    if not name:
        raise InvalidName(
            "the model is a batch normalization itself: pass prefix='...', which becomes the layer's name"
        )
    check_name(name)
    return lambda: _take_over(kind, old, load, hub, (config, name, handling, domain))


def _take_over(
    kind: type[SharedBatchNorm],
    old: nn.Module,
    load: bool,
    hub: Hub,
    layer: tuple[LayerConfig, str, HandleOptions, str],
) -> SharedBatchNorm:
    config, name, handling, domain = layer
    begin = None
    if old.track_running_stats:
        begin = update_from({each: getattr(old, each) for each in STATISTICS})
    new = kind.__new__(kind)
    nn.Module.__init__(new)
    new._begin(old.affine, old.track_running_stats, old.momentum)
    new.register_parameter("weight", old.weight)
    new.register_parameter("bias", old.bias)
    new._link = LayerLink(hub._create(config, 0.0, name, False, False, handling, domain, begin))
    if load and begin is not None:
        new._remote.update(begin)
    return cast("SharedBatchNorm", new.train(old.training))


def _own(kind: type[nn.Module], old: SharedBatchNorm) -> nn.Module:
    # Statistics of the type of the parameters, without which PyTorch's own do not compute.
    like = {} if old.weight is None else {"device": old.weight.device, "dtype": old.weight.dtype}
    new = kind(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, **like)
    new.weight, new.bias = old.weight, old.bias
    if old.track_running_stats:
        for name, value in old._tensors().items():
            getattr(new, name).copy_(value)
    return new.train(old.training)
