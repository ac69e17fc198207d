"""What a request means: steps of layers, and their gradients. Knows no transport; keeping layers is `catalog`.

Steps of one layer happen in one order, those of different layers at the same time. A step computes outside its
layer's lock, with the parameters of one moment, and holds the lock only to see that they still are the layer's,
to take the batch into the statistics, and to have that kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from sharednorm._version import __version__
from sharednorm.core.dtypes import check_dtype
from sharednorm.core.state import require_initialized, step
from sharednorm.core.types import Array, Vector
from sharednorm.core.validation import is_finite
from sharednorm.errors import (
    BackwardWithoutForward,
    DeviceOutOfMemory,
    InvalidConfiguration,
    MalformedMessage,
)
from sharednorm_server.device.base import Device, DeviceTensor, Incoming, Output, TrainedBatch
from sharednorm_server.layers.activation_cache import ActivationCache, SavedInput
from sharednorm_server.layers.admission import ByteBudget
from sharednorm_server.layers.idempotency import DEFAULT_MAX_SESSIONS, same_step, step_change, step_in
from sharednorm_server.layers.layer import Layer
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.registry import DEFAULT_MAX_LAYERS, DEFAULT_MAX_STALENESS
from sharednorm_server.layers.requests import (
    BackwardAnswer,
    BackwardCall,
    ForwardAnswer,
    ForwardCall,
    ServiceFigures,
    ServiceInfo,
    Wanted,
    always,
)
from sharednorm_server.layers.training_service import MomentsService, require_wanted
from sharednorm_server.layers.validation import check_facts, require_same_tensor, same_parameters, same_statistics
from sharednorm_server.store.base import AnyStore, LayerKey, LayerRecord
from sharednorm_server.store.records import LastChange
from sharednorm_server.store.snapshots import SnapshotPolicy

# A step whose layer got other parameters meanwhile computes its output again, outside the lock so often,
# then inside it, so that a stream of updates cannot keep it from ever happening.
_PATIENCE = 3

T = TypeVar("T")


@dataclass(frozen=True)
class CheckedForward:
    """A forward that can be done, with its layer, which has been looked up.

    Attributes:
        call: What to do.
        layer: The layer.
        train: Whether the call trains it.
    """

    call: ForwardCall
    layer: Layer
    train: bool


@dataclass(frozen=True)
class CheckedBackward:
    """A backward that can be done, with its layer, which has been looked up.

    Attributes:
        call: What to do.
        layer: The layer.
    """

    call: BackwardCall
    layer: Layer


class LayerService(MomentsService):
    """Keeps layers and computes with them. Every method may be called from many threads at once.

    A method that raises has changed nothing.

    Args:
        store: What remembers.
        placement: What computes.
        activation_cache_bytes: Most bytes of forward inputs that the server caches for backwards.
        max_inflight_bytes: Most bytes of tensors that arrive in parts, of all running calls.
        max_sessions: Sessions whose last changes each layer remembers.
        policy: When snapshots are taken; None: as it is by default.
        max_layers: Layers of a namespace.
        max_staleness: Longest time, in seconds, that a copy of a layer is used without asking the shared store.
    """

    def __init__(
        self,
        store: AnyStore,
        placement: Placement,
        activation_cache_bytes: int,
        max_inflight_bytes: int = 8 << 30,
        max_sessions: int = DEFAULT_MAX_SESSIONS,
        policy: SnapshotPolicy | None = None,
        max_layers: int = DEFAULT_MAX_LAYERS,
        max_staleness: float = DEFAULT_MAX_STALENESS,
    ) -> None:
        super().__init__(store, max_sessions, policy, max_layers, max_staleness)
        self._placement = placement
        self._saved = ActivationCache(activation_cache_bytes)
        self._in_flight = ByteBudget("max_inflight_bytes", max_inflight_bytes)

    @property
    def info(self) -> ServiceInfo:
        """What the service is made of."""
        return ServiceInfo(__version__, self._placement.description, self._store.description, self._store.identity)

    @property
    def figures(self) -> ServiceFigures:
        """What it holds and has done, now."""
        saved, store = self._saved, self._store.counts
        return ServiceFigures(
            self._layers.steps, len(self._layers.alive()), saved.nbytes, saved.evictions, self._in_flight.used,
            self._placement.used_bytes, store.commits, store.changes, store.seconds,
        )  # fmt: skip

    def on_device_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called once a device has failed for good, and with it the service; it gets the reason."""
        self._placement.on_lost(callback)

    def on_store_failed(self, callback: Callable[[str], None]) -> None:
        """Have a function called once the store has failed for good, and with it the service; it gets the reason."""
        self._store.on_failed(callback)

    def on_store_trouble(self, callback: Callable[[str], None]) -> None:
        """Have a function called when the store cannot be used for now, with the reason, and with "" when it can."""
        self._store.on_trouble(callback)

    def close(self) -> None:
        """Let go of devices and store, after the last call."""
        self._placement.close()
        self._store.close()

    def delete_layer(self, key: LayerKey) -> Layer:
        """Forget a layer, and the inputs kept for it."""
        deleted = super().delete_layer(key)
        self._saved.release_if(lambda entry: entry.layer.parent is deleted)
        return deleted

    def admitted(self, nbytes: int) -> AbstractContextManager[None]:
        """Admit a call whose tensors arrive in parts, for as long as it needs them.

        Raises:
            ServerBusy: There is no room now.
            LimitExceeded: There never is.
        """
        return self._in_flight.admitted(nbytes)

    def forget_keeper(self, keeper: str) -> None:
        """Drop the inputs that must not outlive somebody."""
        self._saved.release_if(lambda entry: entry.keeper == keeper)

    # --- Forward ------------------------------------------------------------------------------------

    def check_forward(self, call: ForwardCall, shape: tuple[int, ...]) -> CheckedForward:
        """Look up the layer of a forward, and raise what `forward` would raise for any input of that shape."""
        layer = self._layers.find(call.key)
        record = layer.latest
        train = _trains(call, record)
        if not train and call.train is None and call.call is not None:
            # The layer's default may have been another one when the step was taken.
            key, content = call.call, step_in(call.key.domain)
            train = layer.attempt(lambda _: layer.find_change(key, content)) is not None
        record.config.check_shape(shape, train=train)
        require_initialized(record.state, str(call.key))
        return CheckedForward(call, layer, train)

    def receive_forward(self, checked: CheckedForward, shape: tuple[int, ...], dtype_name: str) -> Incoming:
        """Make room for the input of a forward, of the shape that was checked, which arrives in parts."""
        train = checked.train
        return self._compute(checked.layer, lambda device: device.receive(shape, dtype_name, train=train))

    def arrived(self, checked: CheckedForward) -> CheckedForward:
        """Look an evaluation's layer up again, whose input may have been long on its way; a step needs no such care.

        The store is asked only where this server's copy of the layer is older than it may be.

        Raises:
            LayerNotFound: The layer has been deleted meanwhile.
        """
        if checked.train:
            return checked
        return replace(checked, layer=self._layers.find(replace(checked.call.key, strong=False)))

    def forward(
        self, call: ForwardCall, x: Array | DeviceTensor, wanted: Wanted = always, out: Array | None = None
    ) -> ForwardAnswer:
        """Normalize a tensor; in training, take it into the layer's statistics.

        Args:
            call: What to do.
            x: The input, which nobody writes to any more.
            wanted: Asked before a step is applied.
            out: Where the output has to be, if it is asked for as a whole.

        Raises:
            InvalidShape, UnsupportedDType, TooFewValues: The layer takes no such input.
            LayerEmpty: The layer has no state yet.
            NonFiniteInput: The batch is not finite, and the layer refuses that.
            CallCancelled: The client does not wait for the step any more.
        """
        return self.checked_forward(self.check_forward(call, x.shape), x, wanted, out)

    def checked_forward(
        self, checked: CheckedForward, x: Array | DeviceTensor, wanted: Wanted = always, out: Array | None = None
    ) -> ForwardAnswer:
        """Do what `forward` does, of an input of the shape that was checked.

        Args:
            checked: What `check_forward` gave.
            x: The input, which nobody writes to any more; or what `receive_forward` gave, filled and finished.
            wanted: Asked before a step is applied.
            out: Where the output has to be, if it is asked for as a whole.

        Raises:
            UnsupportedDType: The layer takes no such input.
            NonFiniteInput: The batch is not finite, and the layer refuses that.
            CallCancelled: The client does not wait for the step any more.
        """
        layer, call = checked.layer, checked.call
        tensor = self._load(layer, x)
        if checked.train:
            return self._step(layer, call, tensor, wanted, out)
        return self._evaluate(layer, call, tensor, out)

    def _compute(self, layer: Layer, compute: Callable[[Device], T]) -> T:
        """Compute on a layer's device; if that has no room, once more without the inputs that are kept there."""
        device = self._placement.of(layer.key)
        try:
            return compute(device)
        except DeviceOutOfMemory:
            pass  # out of this block the error is gone, and with it what its frames hold of the device
        self._saved.release_if(lambda entry: self._placement.of(entry.layer.key) is device)
        return compute(device)

    def _evaluate(self, layer: Layer, call: ForwardCall, x: DeviceTensor, out: Array | None) -> ForwardAnswer:
        record = layer.committed()
        output = self._compute(layer, lambda device: device.evaluate(x, record.state, record.config, out))
        self._release(layer, call)
        return ForwardAnswer(output, False, record.state.version, record.state.num_of_props)

    def _step(
        self, layer: Layer, call: ForwardCall, x: DeviceTensor, wanted: Wanted, out: Array | None
    ) -> ForwardAnswer:
        record = layer.latest
        config = record.config
        first = used = record.state
        trained = self._compute(layer, lambda device: device.forward(x, first, config, out))
        before: LastChange | None = None
        races = 0

        def act(record: LayerRecord) -> ForwardAnswer | LayerRecord | None:
            nonlocal before, used, trained
            before = None if call.call is None else layer.find_change(call.call, step_in(call.key.domain))
            if before is not None or not _trains(call, record):
                return None  # the default has become eval meanwhile, and whoever set it may have read the statistics
            if not same_statistics(first, record.state):
                trained = replace(trained, statistics=None)  # another step came first
            if not same_parameters(used, record.state):
                if races < _PATIENCE:
                    return record
                used, trained = record.state, self._with_parameters(layer, record, x, trained, out)
            return self._commit_step(layer, record, call, x, trained, wanted)

        while isinstance(found := layer.attempt(act), LayerRecord):
            used, trained = found.state, self._with_parameters(layer, found, x, trained, out)
            races += 1
        if found is not None:
            return found
        if before is not None:
            return self._replay(layer, call, x, trained, before, out)
        return self._evaluate(layer, call, x, out)

    def _replay(
        self,
        layer: Layer,
        call: ForwardCall,
        x: DeviceTensor,
        trained: TrainedBatch,
        before: LastChange,
        out: Array | None,
    ) -> ForwardAnswer:
        """Give the answer of a step again, made anew from what it has stored."""
        taken, record = same_step(before, trained.moments), layer.committed()
        used = record.with_state(replace(record.state, scale=taken.scale, bias=taken.bias))
        again = self._with_parameters(layer, used, x, trained, out)
        return self._answered(layer, call, x, again, before, taken.scale, replayed=True)

    def _with_parameters(
        self, layer: Layer, record: LayerRecord, x: DeviceTensor, trained: TrainedBatch, out: Array | None
    ) -> TrainedBatch:
        """Make the output of a training forward again, with the parameters that the layer has now."""
        output: Output = self._compute(
            layer, lambda device: device.normalize_batch(x, trained.moments, record.state, record.config, out)
        )
        return replace(trained, output=output)

    def _commit_step(
        self,
        layer: Layer,
        record: LayerRecord,
        call: ForwardCall,
        x: DeviceTensor,
        trained: TrainedBatch,
        wanted: Wanted,
    ) -> ForwardAnswer:
        # Under the layer's lock: the record is the current one, and the output was made with its parameters.
        batch = trained.moments
        state = step(record.state, record.config, batch, trained.statistics)
        require_wanted(wanted)
        change = step_change(call.call, call.key.domain, batch, state)
        layer.commit(record.with_state(state), call.call, change)
        return self._answered(layer, call, x, trained, change, state.scale, replayed=False)

    def _answered(
        self,
        layer: Layer,
        call: ForwardCall,
        x: DeviceTensor,
        trained: TrainedBatch,
        change: LastChange,
        scale: Vector,
        *,
        replayed: bool,
    ) -> ForwardAnswer:
        self._release(layer, call)  # before the next one is kept: their handle needs room for one only
        batch = trained.moments
        token = self._saved.put(SavedInput(layer, x, batch, scale, call.keeper)) if call.keep_input else ""
        return ForwardAnswer(
            trained.output, True, change.version, change.num_of_props, token, batch, scale, replayed=replayed
        )

    def _release(self, layer: Layer, call: ForwardCall) -> None:
        if call.release_input:
            self._saved.release(call.release_input, layer)

    # --- Backward -----------------------------------------------------------------------------------

    def check_backward(self, call: BackwardCall, shape: tuple[int, ...], dtype_name: str) -> CheckedBackward:
        """Look up the layer of a backward, and raise what `backward` would raise for any such gradient."""
        layer = self._layers.find(call.key)
        self._check_backward(layer, call, shape, dtype_name)
        return CheckedBackward(call, layer)

    def receive_gradient(self, checked: CheckedBackward, shape: tuple[int, ...], dtype_name: str) -> Incoming:
        """Make room for a gradient that arrives in parts.

        Raises:
            InputEvicted: The forward's input is not kept any more.
        """
        layer = checked.layer
        saved = self._check_backward(layer, checked.call, shape, dtype_name)
        if saved is None:
            return self._compute(layer, lambda device: device.receive(shape, dtype_name, train=False))
        return self._compute(layer, lambda device: device.receive_gradient(saved.x, saved.moments))

    def receive_input(self, checked: CheckedBackward, grad: DeviceTensor) -> Incoming:
        """Make room for a forward's input that arrives behind its gradient, which is here."""
        layer, facts = checked.layer, checked.call.forward
        if facts is None:
            raise MalformedMessage("an input is sent again without saved_forward")
        return self._compute(layer, lambda device: device.receive_input(grad, facts.moments))

    def backward(
        self,
        call: BackwardCall,
        grad: Array | DeviceTensor,
        x: Array | DeviceTensor | None = None,
        wanted: Wanted = always,
        out: Array | None = None,
    ) -> BackwardAnswer:
        """Return the gradients of one training forward, and add those of scale and bias to the layer's.

        A kept input stays kept. Statistics do not change.

        Args:
            call: What to do.
            grad: Gradient with respect to the output, shape and element type of the input.
            x: The input, if `call.forward` is there.
            wanted: Asked before gradients are added.
            out: Where the gradient of the input has to be, if it is asked for as a whole.

        Raises:
            InputEvicted: The forward's input is not kept any more.
            BackwardWithoutForward: The call names no forward.
            InvalidShape, UnsupportedDType: The gradient is not one of that forward.
            InvalidConfiguration: `scale` or `momentum` is not finite.
            MalformedMessage: The forward that came along contradicts itself, or has no input.
            CallCancelled: Nobody waits for the gradients any more.
        """
        return self.checked_backward(CheckedBackward(call, self._layers.find(call.key)), grad, x, wanted, out)

    def checked_backward(
        self,
        checked: CheckedBackward,
        grad: Array | DeviceTensor,
        x: Array | DeviceTensor | None = None,
        wanted: Wanted = always,
        out: Array | None = None,
    ) -> BackwardAnswer:
        """Do what `backward` does, and raise what it raises, with the layer that was looked up.

        Args:
            checked: What `check_backward` gave.
            grad: The gradient; or what `receive_gradient` gave, filled and finished.
            x: The input, if it was sent; or what `receive_input` gave, filled and finished.
            wanted: Asked before gradients are added.
            out: Where the gradient of the input has to be, if it is asked for as a whole.
        """
        layer, call = checked.layer, checked.call
        dtype_name = check_dtype(grad.dtype) if isinstance(grad, np.ndarray) else grad.dtype_name
        saved = self._check_backward(layer, call, grad.shape, dtype_name)
        if saved is None:
            saved = self._sent_again(layer, call, x)
        config = layer.latest.config
        kept, upper = saved, self._load(layer, grad)
        gradients = self._compute(
            layer,
            lambda device: device.backward(
                kept.x, upper, kept.moments, kept.scale, config, input_grad=call.input_grad, out=out
            ),
        )
        if not config.affine:
            return BackwardAnswer(gradients.input, None, None)
        replayed = call.param_grads and self.accumulate(layer, call, gradients.scale, gradients.bias, wanted)
        return BackwardAnswer(gradients.input, gradients.scale, gradients.bias, replayed=replayed)

    def _load(self, layer: Layer, x: Array | DeviceTensor) -> DeviceTensor:
        if isinstance(x, np.ndarray):
            return self._compute(layer, lambda device: device.load(x))
        return x

    def _check_backward(
        self, layer: Layer, call: BackwardCall, shape: tuple[int, ...], dtype_name: str
    ) -> SavedInput | None:
        for name, value in (("scale", call.scale), ("momentum", call.momentum)):
            if not is_finite(value):
                raise InvalidConfiguration(f"{name} is {value!r} (expected: a finite number)")
        config = layer.latest.config
        config.check_shape(shape, train=True, what="Grad")
        if call.forward is not None:
            check_facts(call.forward, config)
            require_same_tensor(call.forward.shape, call.forward.dtype_name, shape, dtype_name)
            return None
        if not call.saved_input:
            raise BackwardWithoutForward("backward needs a forward: set saved_input, or saved_forward and the input")
        saved = self._saved.get(call.saved_input, layer)
        require_same_tensor(saved.x.shape, saved.x.dtype_name, shape, dtype_name)
        return saved

    def _sent_again(self, layer: Layer, call: BackwardCall, x: Array | DeviceTensor | None) -> SavedInput:
        facts = call.forward
        tensor = None if x is None else self._load(layer, x)
        if facts is None or tensor is None or (tensor.shape, tensor.dtype_name) != (facts.shape, facts.dtype_name):
            raise MalformedMessage("saved_forward needs the forward's input beside it, of the type and shape it says")
        return SavedInput(layer, tensor, facts.moments, facts.scale)


def _trains(call: ForwardCall, record: LayerRecord) -> bool:
    return record.train if call.train is None else call.train
