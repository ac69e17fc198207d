"""What a request means: layers, their steps and their gradients. Knows no transport.

Steps of one layer happen in one order, those of different layers at the same time. A step computes outside its
layer's lock, with the parameters of one moment, and holds the lock only to see that they still are the layer's,
to take the batch into the statistics, and to have that kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TypeVar

import numpy as np

from sharednorm._version import __version__
from sharednorm.config import Array, LayerConfig, Vector, check_dtype, is_finite
from sharednorm.errors import (
    BackwardWithoutForward,
    CallCancelled,
    DeviceOutOfMemory,
    InvalidConfiguration,
    MalformedMessage,
)
from sharednorm.state import (
    LayerState,
    StateUpdate,
    accumulate_gradients,
    initial_state,
    require_initialized,
    step,
    update_params,
    updated,
)
from sharednorm_server.checks import check_facts, require_same_config, require_same_tensor
from sharednorm_server.device import Device, DeviceTensor, TrainedBatch
from sharednorm_server.layers import Layer, LayerRegistry
from sharednorm_server.paging import name_of_token, page_size, token_of_name
from sharednorm_server.placement import Placement
from sharednorm_server.requests import (
    BackwardAnswer,
    BackwardCall,
    ForwardAnswer,
    ForwardCall,
    ServiceInfo,
    Wanted,
    always,
)
from sharednorm_server.saved_inputs import SavedInput, SavedInputs
from sharednorm_server.store import LayerKey, LayerRecord, Store

# A step whose layer got other parameters meanwhile computes its output again, outside the lock so often,
# then inside it, so that a stream of updates cannot keep it from ever happening.
_PATIENCE = 3

T = TypeVar("T")


class LayerService:
    """Keeps layers and computes with them. Every method may be called from many threads at once.

    A method that raises has changed nothing.

    Args:
        store: What remembers.
        placement: What computes.
        saved_input_bytes: Most bytes of inputs that are kept for backwards.
    """

    def __init__(self, store: Store, placement: Placement, saved_input_bytes: int) -> None:
        self._store = store
        self._placement = placement
        self._layers = LayerRegistry(store)
        self._saved = SavedInputs(saved_input_bytes)

    @property
    def info(self) -> ServiceInfo:
        """What the service is made of."""
        return ServiceInfo(__version__, self._placement.description, self._store.description)

    def on_device_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called once a device has failed for good, and with it the service; it gets the reason."""
        self._placement.on_lost(callback)

    def close(self) -> None:
        """Let go of devices and store, after the last call."""
        self._placement.close()
        self._store.close()

    # --- Layers -------------------------------------------------------------------------------------

    def create_layer(
        self, key: LayerKey, config: LayerConfig, initial: StateUpdate, *, sscale: float, empty: bool
    ) -> tuple[LayerRecord, bool]:
        """Create a layer, or find the one of that name; return it, and whether this call created it.

        Args:
            key: Its name.
            config: What it, or the one that exists, is configured with.
            initial: State of a new layer. What it leaves open: scale ~ N(1, sscale), bias 0, mean 0, variance 1.
            sscale: Standard deviation of the initial scale.
            empty: Whether a new layer waits for a state.

        Raises:
            ConfigurationMismatch: It exists with another configuration.
            InvalidConfiguration, InvalidShape, LayerEmpty: The state of a new layer is not one.
        """

        def make() -> LayerRecord:
            state = initial_state(config, sscale, np.random.default_rng(), empty=empty)
            return LayerRecord(
                replace(key, uid=secrets.token_hex(8)),
                config,
                updated(state, config, initial) if _sets_anything(initial) else state,
            )

        record, created = self._layers.create(key, make)
        require_same_config(record.config, config, key)
        return record, created

    def get_layer(self, key: LayerKey) -> LayerRecord:
        """Return all of a layer, of one moment.

        Raises:
            LayerNotFound: There is none of that name. So does every other method that takes a key.
        """
        return self._layers.find(key).record

    def list_layers(self, namespace: str, size: int, page_token: str) -> tuple[list[LayerRecord], str]:
        """Return a page of a namespace's layers, in the order of their names, and the token of the next page.

        Args:
            namespace: Whose layers.
            size: Most layers, 1 to 1000; 0 for 100.
            page_token: "" for the first page.

        Raises:
            InvalidConfiguration: The page size is out of its range.
            InvalidPageToken: The token is none that this method gave for this namespace.
        """
        most = page_size(size)
        records = self._layers.page(namespace, name_of_token(namespace, page_token), most + 1)
        page = records[:most]
        return page, token_of_name(namespace, page[-1].key.name) if len(records) > most else ""

    def delete_layer(self, key: LayerKey) -> None:
        """Forget a layer, and the inputs kept for it."""
        deleted = self._layers.delete(key)
        self._saved.release_if(lambda layer: layer is deleted)

    def set_train(self, key: LayerKey, train: bool) -> LayerRecord:
        """Set the mode of calls that choose none; return the layer."""
        return self._layers.find(key).change(lambda record: replace(record, train=train))

    def set_state(self, key: LayerKey, update: StateUpdate) -> LayerRecord:
        """Replace parts of a layer's state, all at once; return the layer.

        Raises:
            InvalidShape, InvalidConfiguration, LayerEmpty: The new values are not a state of this layer.
        """
        return self._change_state(key, lambda record: updated(record.state, record.config, update))

    def update_params(self, key: LayerKey, learn_rate: float) -> LayerRecord:
        """Add `learn_rate` times the gradients to scale and bias; return the layer.

        Raises:
            InvalidConfiguration: `learn_rate` is not finite.
            LayerEmpty: The layer has no state yet.
        """

        def change(record: LayerRecord) -> LayerState:
            require_initialized(record.state, str(key))
            return update_params(record.state, record.config, learn_rate)

        return self._change_state(key, change)

    def _change_state(self, key: LayerKey, change: Callable[[LayerRecord], LayerState]) -> LayerRecord:
        return self._layers.find(key).change(lambda record: replace(record, state=change(record)))

    # --- Forward ------------------------------------------------------------------------------------

    def check_forward(self, call: ForwardCall, shape: tuple[int, ...]) -> None:
        """Raise what `forward` would raise for any input of that shape."""
        self._forward_layer(call, shape)

    def forward(self, call: ForwardCall, x: Array, wanted: Wanted = always) -> ForwardAnswer:
        """Normalize a tensor; in training, take it into the layer's statistics.

        Args:
            call: What to do.
            x: The input, which nobody writes to any more.
            wanted: Asked before a step is applied.

        Raises:
            InvalidShape, UnsupportedDType, TooFewValues: The layer takes no such input.
            LayerEmpty: The layer has no state yet.
            NonFiniteInput: The batch is not finite, and the layer refuses that.
            CallCancelled: Nobody waits for the step any more.
        """
        layer, train = self._forward_layer(call, x.shape)
        tensor = self._compute(layer, lambda device: device.load(x))
        return self._step(layer, call, tensor, wanted) if train else self._evaluate(layer, call, tensor)

    def _compute(self, layer: Layer, compute: Callable[[Device], T]) -> T:
        """Compute on a layer's device; if that has no room, once more without the inputs that are kept there."""
        device = self._placement.of(layer.key)
        try:
            return compute(device)
        except DeviceOutOfMemory:
            pass  # out of this block the error is gone, and with it what its frames hold of the device
        self._saved.release_if(lambda other: self._placement.of(other.key) is device)
        return compute(device)

    def _forward_layer(self, call: ForwardCall, shape: tuple[int, ...]) -> tuple[Layer, bool]:
        layer = self._layers.find(call.key)
        record = layer.record
        train = _trains(call, record)
        record.config.check_shape(shape, train=train)
        require_initialized(record.state, str(call.key))
        return layer, train

    def _evaluate(self, layer: Layer, call: ForwardCall, x: DeviceTensor) -> ForwardAnswer:
        record = layer.record
        output = self._compute(layer, lambda device: device.evaluate(x, record.state, record.config))
        self._release(layer, call)
        return ForwardAnswer(output, False, record.state.version, record.state.num_of_props)

    def _step(self, layer: Layer, call: ForwardCall, x: DeviceTensor, wanted: Wanted) -> ForwardAnswer:
        record = layer.record
        config = record.config
        first = used = record.state
        trained = self._compute(layer, lambda device: device.forward(x, first, config))
        attempt = 0
        while True:
            with layer.exclusive() as record:
                if not _trains(call, record):
                    break  # the default has become eval meanwhile, and whoever set it may have read the statistics
                if not _same_statistics(first, record.state):
                    trained = replace(trained, statistics=None)  # another step came first
                if not _same_parameters(used, record.state) and attempt >= _PATIENCE:
                    used, trained = record.state, self._with_parameters(layer, record, x, trained)
                if _same_parameters(used, record.state):
                    return self._commit_step(layer, record, call, x, trained, wanted)
            used, trained = record.state, self._with_parameters(layer, record, x, trained)
            attempt += 1
        return self._evaluate(layer, call, x)

    def _with_parameters(
        self, layer: Layer, record: LayerRecord, x: DeviceTensor, trained: TrainedBatch
    ) -> TrainedBatch:
        """Make the output of a training forward again, with the parameters that the layer has now."""
        output = self._compute(
            layer, lambda device: device.normalize_batch(x, trained.moments, record.state, record.config)
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
        output, batch = trained.output, trained.moments
        state = step(record.state, record.config, batch, trained.statistics)
        _require_wanted(wanted)
        layer.commit(replace(record, state=state))
        self._release(layer, call)  # before the next one is kept: their handle needs room for one only
        token = self._saved.put(SavedInput(layer, x, batch, state.scale)) if call.keep_input else ""
        return ForwardAnswer(output, True, state.version, state.num_of_props, token, batch, state.scale)

    def _release(self, layer: Layer, call: ForwardCall) -> None:
        if call.release_input:
            self._saved.release(call.release_input, layer)

    # --- Backward -----------------------------------------------------------------------------------

    def check_backward(self, call: BackwardCall, shape: tuple[int, ...], dtype_name: str) -> None:
        """Raise what `backward` would raise for any gradient of that shape and element type."""
        layer = self._layers.find(call.key)
        self._check_backward(layer, call, shape, dtype_name)

    def backward(
        self, call: BackwardCall, grad: Array, x: Array | None = None, wanted: Wanted = always
    ) -> BackwardAnswer:
        """Return the gradients of one training forward, and add those of scale and bias to the layer's.

        A kept input stays kept. Statistics do not change.

        Args:
            call: What to do.
            grad: Gradient with respect to the output, shape and element type of the input.
            x: The input, if `call.forward` is there.
            wanted: Asked before gradients are added.

        Raises:
            InputEvicted: The forward's input is not kept any more.
            BackwardWithoutForward: The call names no forward.
            InvalidShape, UnsupportedDType: The gradient is not one of that forward.
            InvalidConfiguration: `scale` or `momentum` is not finite.
            MalformedMessage: The forward that came along contradicts itself, or has no input.
            CallCancelled: Nobody waits for the gradients any more.
        """
        layer = self._layers.find(call.key)
        saved = self._check_backward(layer, call, grad.shape, check_dtype(grad.dtype))
        if saved is None:
            saved = self._sent_again(layer, call, x)
        config = layer.record.config
        kept = saved
        input_grad, scale_grad, bias_grad = self._compute(
            layer,
            lambda device: device.backward(kept.x, grad, kept.moments, kept.scale, config, input_grad=call.input_grad),
        )
        if not config.affine:
            return BackwardAnswer(input_grad, None, None)
        if call.param_grads:
            self._accumulate(layer, call, scale_grad, bias_grad, wanted)
        return BackwardAnswer(input_grad, scale_grad, bias_grad)

    def _check_backward(
        self, layer: Layer, call: BackwardCall, shape: tuple[int, ...], dtype_name: str
    ) -> SavedInput | None:
        for name, value in (("scale", call.scale), ("momentum", call.momentum)):
            if not is_finite(value):
                raise InvalidConfiguration(f"{name} is {value!r} (expected: a finite number)")
        config = layer.record.config
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

    def _sent_again(self, layer: Layer, call: BackwardCall, x: Array | None) -> SavedInput:
        facts = call.forward
        if facts is None or x is None or (x.shape, check_dtype(x.dtype)) != (facts.shape, facts.dtype_name):
            raise MalformedMessage("saved_forward needs the forward's input beside it, of the type and shape it says")
        tensor = self._compute(layer, lambda device: device.load(x))
        return SavedInput(layer, tensor, facts.moments, facts.scale)

    def _accumulate(
        self, layer: Layer, call: BackwardCall, scale_grad: Vector, bias_grad: Vector, wanted: Wanted
    ) -> None:
        def change(record: LayerRecord) -> LayerRecord:
            state = accumulate_gradients(record.state, scale_grad, bias_grad, scale=call.scale, momentum=call.momentum)
            _require_wanted(wanted)
            return replace(record, state=state)

        layer.change(change)


def _trains(call: ForwardCall, record: LayerRecord) -> bool:
    return record.train if call.train is None else call.train


def _same_parameters(one: LayerState, other: LayerState) -> bool:
    # States are immutable, and one that follows from another shares what did not change.
    return one.scale is other.scale and one.bias is other.bias


def _same_statistics(one: LayerState, other: LayerState) -> bool:
    return one.mean is other.mean and one.var is other.var and one.num_of_props == other.num_of_props


def _sets_anything(update: StateUpdate) -> bool:
    return any(getattr(update, field.name) is not None for field in fields(update))


def _require_wanted(wanted: Wanted) -> None:
    if not wanted():
        raise CallCancelled("the call was given up before it changed anything")
