"""The modules: torch's BatchNorm1d, 2d and 3d, whose running statistics are a layer on a server."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from sharednorm.coordination.group import Group
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import FieldName, StateUpdate
from sharednorm.core.types import LayerKind
from sharednorm.errors import InvalidConfiguration, UnsupportedDType
from sharednorm.remote.backends.client_compute import ClientComputeBackend
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.handle import RemoteBatchNorm
from sharednorm.remote.hub import Hub
from sharednorm.remote.lazy_handle import LayerLink
from sharednorm.remote.options import HandleOptions
from sharednorm.torch.autograd import Evaluate, LocalBatches, TrainHere, TrainThere, as_array, normalized_there

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

# The shared buffers, and the fields of a layer's state that they mirror.
_BUFFERS: dict[str, FieldName] = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "num_of_props"}


class SharedBatchNorm(nn.Module):
    """What the three modules have in common."""

    _kind: ClassVar[LayerKind]
    _ranks: ClassVar[tuple[int, ...]]
    _version = 2  # of the state_dict, as PyTorch counts it for its own modules

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hub: Hub,
        name: str,
        compute: str = "client",
        max_staleness: float = 0.0,
        wire_dtype: str | None = None,
        group: Group | None = None,
        nonfinite: str = "refuse",
        push: str = "sync",
        max_pending: int | None = None,
        domain: str = "",
    ) -> None:
        require_hub(hub)
        handling = HandleOptions.parse(compute, max_staleness, wire_dtype, group, push, max_pending)
        config = config_of(self._kind, num_features, eps, momentum, nonfinite)
        super().__init__()
        self._begin(affine, track_running_stats, momentum)
        if affine:
            self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self._link = LayerLink(hub._create(config, 0.0, name, False, False, handling, domain))

    def _begin(self, affine: bool, track_running_stats: bool, momentum: float | None) -> None:
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self._momentum = momentum

    @property
    def _remote(self) -> RemoteBackend:
        return self._link.backend

    # --- What it is -----------------------------------------------------------------------------------------

    @property
    def layer(self) -> RemoteBatchNorm:
        """The handle of the layer on the server, which has the statistics; its scale is 1 and its bias 0.

        A module that was unpickled connects now, if it has not yet, and raises what `sharednorm.connect` does.
        """
        return self._link.layer

    @property
    def name(self) -> str:
        """The layer's name on the server."""
        return self._link.name

    @property
    def num_features(self) -> int:
        """Channels, C."""
        return self._link.config.maps

    @property
    def eps(self) -> float:
        """Added to the variance before the square root. It is the layer's, and never changes."""
        return self._link.config.epsilon

    @property
    def momentum(self) -> float | None:
        """Weight of a new batch in the running statistics; None: all batches have the same. It never changes."""
        return self._momentum

    @property
    def running_mean(self) -> torch.Tensor | None:
        """The running mean, float32 (C,), as the server has it now; None without `track_running_stats`."""
        return self._statistic("running_mean")

    @property
    def running_var(self) -> torch.Tensor | None:
        """The running variance, float32 (C,), as the server has it now; None without `track_running_stats`."""
        return self._statistic("running_var")

    @property
    def num_batches_tracked(self) -> torch.Tensor | None:
        """Batches, of all processes, that the server has taken in; None without `track_running_stats`."""
        return self._statistic("num_batches_tracked")

    def extra_repr(self) -> str:
        """Return the arguments, which layer it is, on which server, and where tensors are computed with."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, compute={self._link.compute!r}, layer={self._link.text}"
        )

    # --- Normalizing ----------------------------------------------------------------------------------------

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as PyTorch names it
        """Normalize a batch.

        In training by the batch's mean and biased variance, which the shared running statistics then take in; with a
        group, by those of the union of all members' batches. In evaluation by the shared running statistics.

        Args:
            input: float32, float16 or bfloat16, on the CPU: (N, C) or (N, C, L), (N, C, H, W), (N, C, D, H, W) as the
                module asks; any strides.

        Returns:
            A tensor of the same shape, type and memory format.

        Raises:
            UnsupportedDType: Not a tensor, another element type, a sparse tensor, or one on another device.
            InvalidShape, TooFewValues, NonFiniteInput: As the layer raises them.
            SharedNormError: What a call to the server raises.
        """
        x = self._checked(input)
        output = self._train(x) if self.training or not self.track_running_stats else self._evaluate(x)
        return cast("torch.Tensor", output.view(input.shape) if x is not input else output)

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise UnsupportedDType(
                f"the input is a {type(x).__module__}.{type(x).__name__} (expected: a torch.Tensor; "
                "torch.as_tensor(...) makes one of an array)"
            )
        if x.layout != torch.strided:
            raise UnsupportedDType(f"the input is a {x.layout} tensor (expected: a dense one; x.to_dense() makes one)")
        if x.device.type != "cpu":
            raise UnsupportedDType(
                f"the input is on {x.device} (expected: the CPU; move it there, or keep torch's own module on a GPU)"
            )
        if x.dim() not in self._ranks:
            wanted = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {wanted} input (got {x.dim()}D input)")
        if x.dtype not in {torch.float32, torch.float16, torch.bfloat16}:
            raise UnsupportedDType(
                f"the input is of {x.dtype} (expected: float32, float16 or bfloat16; for example model.float())"
            )
        x = x.unsqueeze(-1) if x.dim() < self._kind.rank else x
        trains = self.training or not self.track_running_stats
        together = self.training and self._remote.together
        self._link.config.check_shape(tuple(x.shape), train=trains, together=together)
        return x

    def _train(self, x: torch.Tensor) -> torch.Tensor:
        backend = self._remote
        if not self.training or not (self.track_running_stats or backend.together):
            # Nobody is told of a batch that no statistics take in.
            return cast("torch.Tensor", TrainHere.apply(x, self.weight, self.bias, LocalBatches(self.eps)))
        if isinstance(backend, ClientComputeBackend):
            return cast("torch.Tensor", TrainHere.apply(x, self.weight, self.bias, backend))
        return self._scaled(cast("torch.Tensor", TrainThere.apply(x, backend)))

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        backend = self._remote
        differentiable = torch.is_grad_enabled() and (
            x.requires_grad or (self.weight is not None and self.weight.requires_grad)
        )
        if isinstance(backend, ClientComputeBackend) or differentiable:
            # A backward needs the statistics of the forward, so that they are read; then the tensor need not travel.
            state = backend.statistics()
            statistics = state.mean.astype(np.float64), state.var.astype(np.float64)
            return cast("torch.Tensor", Evaluate.apply(x, self.weight, self.bias, statistics, self.eps))
        return self._scaled(normalized_there(x, backend, train=False)[0])

    def _scaled(self, normalized: torch.Tensor) -> torch.Tensor:
        if self.weight is None:
            return normalized
        shape = (1, -1, *(1,) * (normalized.dim() - 2))
        scaled = normalized * self.weight.view(shape) + self.bias.view(shape)
        return cast("torch.Tensor", scaled.to(normalized.dtype))

    # --- Statistics -----------------------------------------------------------------------------------------

    def _statistic(self, name: str) -> torch.Tensor | None:
        if not self.track_running_stats:
            return None
        return self._tensors(name)[name]

    def _tensors(self, *names: str) -> dict[str, torch.Tensor]:
        chosen = {name: _BUFFERS[name] for name in names or _BUFFERS}
        found = self._remote.read_fields(*chosen.values())
        return {name: _tensor(found[field]) for name, field in chosen.items()}

    def reset_running_stats(self) -> None:
        """Set the shared statistics back to those of a new layer, for everybody."""
        if self.track_running_stats:
            maps = self.num_features
            self._remote.update(StateUpdate(mean=np.zeros(maps), var=np.ones(maps), num_of_props=0))

    def reset_parameters(self) -> None:
        """Set this module's weight to 1 and its bias to 0, and the shared statistics back, for everybody."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.track_running_stats:
            destination.update({prefix + name: value for name, value in self._tensors().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        given = {}
        if self.track_running_stats:
            given = {name: rest.pop(prefix + name) for name in STATISTICS if prefix + name in rest}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not self.track_running_stats:
            return
        # As with PyTorch's own, the count stays what it is if the checkpoint is older than that PyTorch counts batches.
        needed = STATISTICS if (local_metadata.get("version") or 1) >= 2 else STATISTICS[:2]
        missing = [name for name in needed if name not in given]
        missing_keys += [prefix + name for name in missing] if strict else []
        wrong = [
            f"size mismatch for {prefix + name}: its shape is {tuple(given[name].shape)} in the checkpoint "
            f"(expected: {shape}, as in the current model)"
            for name, shape in zip(STATISTICS, ((self.num_features,), (self.num_features,), ()), strict=True)
            if name in given and tuple(given[name].shape) != shape
        ]
        error_msgs += wrong
        if given and not wrong:
            self._remote.update(update_from(given))


class BatchNorm1d(SharedBatchNorm):
    """`torch.nn.BatchNorm1d` whose running statistics are a layer on a server; for (N, C) and (N, C, L).

    Args:
        num_features: Channels, C.
        eps: Added to the variance before the square root.
        momentum: Weight of a new batch in the running statistics, 0 to 1; None: all batches have the same weight.
        affine: Whether the module has a weight and a bias, which begin as 1 and 0.
        track_running_stats: Whether running statistics are kept, and used in evaluation.
        device: Of weight and bias; the CPU.
        dtype: Of weight and bias.
        hub: The server.
        name: The layer's name there. All processes that give it share the statistics.
        compute: "client": tensors stay in this process, and their moments travel. "server": tensors travel, and are
            multiplied by the weight here; with half-precision tensors that is one rounding more.
        max_staleness: With "client": seconds for which evaluation may use cached statistics.
        wire_dtype: With "server": what float32 tensors travel in, "bfloat16" or "float16".
        group: With "client": the processes whose training batches are normalized by their union, as by
            `torch.nn.SyncBatchNorm`. As there, gradients of weight and bias are those of the own batch, for DDP to
            average.
        nonfinite: What a NaN or an infinity in a training batch does: "refuse" raises NonFiniteInput, and the shared
            statistics stay as they were; "allow" does as PyTorch.
        push: With "client": "async" has moments sent in the background, while training goes on.
        max_pending: With "async": how many steps training may be ahead of the server.
        domain: Whose running statistics these are, of those that the layer keeps; "": its own.

    Raises:
        InvalidConfiguration: An argument is out of its range.
        ConfigurationMismatch: The name is taken by a layer of another configuration.
        SharedNormError: What a call to the server raises.
    """

    _kind, _ranks = LayerKind.BATCH_NORM_1D, (2, 3)


class BatchNorm2d(SharedBatchNorm):
    """`torch.nn.BatchNorm2d` whose running statistics are a layer on a server; for (N, C, H, W). See `BatchNorm1d`."""

    _kind, _ranks = LayerKind.BATCH_NORM_2D, (4,)


class BatchNorm3d(SharedBatchNorm):
    """`torch.nn.BatchNorm3d` whose running statistics are a layer on a server; (N, C, D, H, W). See `BatchNorm1d`."""

    _kind, _ranks = LayerKind.BATCH_NORM_3D, (5,)


def _tensor(value: object) -> torch.Tensor:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else torch.tensor(value, dtype=torch.long)


def require_hub(hub: object) -> None:
    """Raise InvalidConfiguration unless `hub` is a `sharednorm.Hub`."""
    if not isinstance(hub, Hub):
        raise InvalidConfiguration(f"hub is {ascii(hub)[:60]} (expected: what sharednorm.connect(...) returns)")


def config_of(kind: LayerKind, num_features: int, eps: float, momentum: float | None, nonfinite: str) -> LayerConfig:
    """Return the configuration of the layer that a module of these arguments uses."""
    # f = max(initFactor / n, minFactor): the momentum at every step, or 1 / n.
    first, least = (1.0, 0.0) if momentum is None else (momentum, momentum)
    return LayerConfig.parse(kind, num_features, eps, first, least, False, "standard", nonfinite)


def update_from(given: dict[str, torch.Tensor]) -> StateUpdate:
    """Return the change of a layer that a module's buffers, by their names in a state_dict, stand for."""
    mean, var, count = (given.get(name) for name in STATISTICS)
    return StateUpdate(
        mean=None if mean is None else as_array(mean.detach().float()),
        var=None if var is None else as_array(var.detach().float()),
        num_of_props=None if count is None else int(count),
    )
