"""A device whose time is told to the calls that it works for.

What it gives is asked for later, in parts perhaps and by another thread: that time is the same call's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments
from sharednorm.core.types import Array, Vector
from sharednorm_server.device.base import Device, DeviceTensor, Gradients, Incoming, Output, TrainedBatch
from sharednorm_server.observability.instrumentation import DEVICE, current, spending


class TimedDevice:
    """Has another device compute.

    Args:
        device: Which.
    """

    def __init__(self, device: Device) -> None:
        self._device = device

    @property
    def description(self) -> str:
        """The other's."""
        return self._device.description

    @property
    def used_bytes(self) -> int:
        """The other's."""
        return self._device.used_bytes

    def warm_up(self) -> None:
        """Get the other ready."""
        self._device.warm_up()

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called once the other has failed for good."""
        self._device.on_lost(callback)

    def close(self) -> None:
        """Let go of the other."""
        self._device.close()

    def load(self, x: Array) -> DeviceTensor:
        """Bring a tensor to the device."""
        with spending(DEVICE, "load"):
            return self._device.load(x)

    def receive(self, shape: tuple[int, ...], dtype_name: str, *, train: bool) -> Incoming:
        """Make room for a tensor that arrives bit by bit."""
        with spending(DEVICE, "receive"):
            return _Incoming(self._device.receive(shape, dtype_name, train=train))

    def receive_gradient(self, x: DeviceTensor, batch: Moments) -> Incoming:
        """Make room for the gradient of a forward."""
        with spending(DEVICE, "receive"):
            return _Incoming(self._device.receive_gradient(x, batch))

    def receive_input(self, grad: DeviceTensor, batch: Moments) -> Incoming:
        """Make room for a forward's input, of which the gradient is here already."""
        with spending(DEVICE, "receive"):
            return _Incoming(self._device.receive_input(grad, batch))

    def forward(
        self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> TrainedBatch:
        """Normalize a batch by its own statistics."""
        with spending(DEVICE, "forward"):
            trained = self._device.forward(x, state, config, out)
        return replace(trained, output=_Output(trained.output))

    def normalize_batch(
        self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> Output:
        """Normalize a batch whose moments are known."""
        with spending(DEVICE, "normalize"):
            return _Output(self._device.normalize_batch(x, batch, state, config, out))

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None) -> Output:
        """Normalize a batch by the state's running statistics."""
        with spending(DEVICE, "evaluate"):
            return _Output(self._device.evaluate(x, state, config, out))

    def backward(
        self,
        x: DeviceTensor,
        grad: DeviceTensor,
        batch: Moments,
        scale: Vector,
        config: LayerConfig,
        *,
        input_grad: bool,
        out: Array | None = None,
    ) -> Gradients:
        """Return the gradients of a training forward."""
        with spending(DEVICE, "backward"):
            found = self._device.backward(x, grad, batch, scale, config, input_grad=input_grad, out=out)
        return found if found.input is None else replace(found, input=_Output(found.input))


class _Incoming:
    def __init__(self, incoming: Incoming) -> None:
        self._incoming, self._seen = incoming, current()

    @property
    def nbytes(self) -> int:
        return self._incoming.nbytes

    def space(self, most: int) -> memoryview:
        with spending(DEVICE, "", self._seen):
            return self._incoming.space(most)

    def filled(self, nbytes: int) -> None:
        with spending(DEVICE, "", self._seen):
            self._incoming.filled(nbytes)

    def finish(self) -> DeviceTensor:
        with spending(DEVICE, "", self._seen):
            return self._incoming.finish()


class _Output:
    def __init__(self, output: Output) -> None:
        self._output, self._seen = output, current()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._output.shape

    @property
    def dtype_name(self) -> str:
        return self._output.dtype_name

    @property
    def nbytes(self) -> int:
        return self._output.nbytes

    def array(self) -> Array:
        with spending(DEVICE, "give", self._seen):
            return self._output.array()

    def parts(self, most: int) -> Iterator[memoryview]:
        parts = self._output.parts(most)
        while True:
            with spending(DEVICE, "", self._seen):
                part = next(parts, None)
            if part is None:
                return
            yield part
