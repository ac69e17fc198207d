"""Devices: what computes. A device knows no RPC, no name of a layer, and no store.

Inputs are brought to the device once, whole by `load` or as they arrive by `receive`, and stay there for as long as
somebody holds what came of it. Outputs come back whole, or in parts, each of which is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, RunningAverages
from sharednorm.core.types import Array, Vector
from sharednorm_server.device.tensor_io import DeviceTensor, Incoming, Output

__all__ = ["Device", "DeviceFault", "DeviceTensor", "Gradients", "Incoming", "Output", "TrainedBatch"]


class DeviceFault(Exception):
    """A device has refused what it was asked to do, which is a defect; it goes on. Its log has the details."""


@dataclass(frozen=True)
class TrainedBatch:
    """What a training forward computed.

    Attributes:
        output: Shape and element type of the input.
        moments: Moments of the batch.
        statistics: The running statistics that follow from those of the state that the forward was given, where
            the device keeps them; None where whoever commits the step may as well compute them.
    """

    output: Output
    moments: Moments
    statistics: RunningAverages | None = None


@dataclass(frozen=True)
class Gradients:
    """What a backward computed: the gradients of the input (None unless asked for), of scale, and of bias."""

    input: Output | None
    scale: Vector
    bias: Vector


class Device(Protocol):
    """What computes. Every method may be called from many threads at once. Shapes have been checked.

    Same input, same device: same bits; also `normalize_batch` returns the bits that `forward` did.

    Raises:
        DeviceOutOfMemory: It has no room for the call. What others hold of it may be what is too much.
        DeviceLost: It has failed for good.
    """

    @property
    def description(self) -> str:
        """For people: what it is, for example "cpu (numba, 8 threads)"."""
        ...

    @property
    def used_bytes(self) -> int:
        """Bytes of its own memory that are held now; 0 if it has none of its own."""
        ...

    def warm_up(self) -> None:
        """Get ready, so that the first call does not wait; called once, before the server listens."""
        ...

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called, from any thread, once the device has failed for good; it gets the reason."""
        ...

    def close(self) -> None:
        """Let go of the device, after the last call."""
        ...

    def load(self, x: Array) -> DeviceTensor:
        """Bring a tensor to the device. The caller writes to `x` no more: it may be referenced, not copied.

        Raises:
            LimitExceeded: The device cannot compute with a tensor of that shape.
        """
        ...

    def receive(self, shape: tuple[int, ...], dtype_name: str, *, train: bool) -> Incoming:
        """Make room for a tensor that arrives bit by bit.

        Args:
            shape: Its shape.
            dtype_name: Its element type.
            train: Whether it is the input of a training forward, so that its moments may be taken as it arrives.

        Raises:
            LimitExceeded: The device cannot compute with a tensor of that shape, or there is no memory for it.
        """
        ...

    def receive_gradient(self, x: DeviceTensor, batch: Moments) -> Incoming:
        """Make room for the gradient of a forward of `x`, of its shape and type; raises what `receive` raises."""
        ...

    def receive_input(self, grad: DeviceTensor, batch: Moments) -> Incoming:
        """Make room for a forward's input, of which the gradient is here already; raises what `receive` raises."""
        ...

    def forward(
        self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> TrainedBatch:
        """Normalize a batch by its own statistics, with the state's scale and bias.

        `out`, here and below, is where an output that is asked for as a whole has to be; contiguous.
        """
        ...

    def normalize_batch(
        self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> Output:
        """Normalize a batch whose moments are known, with the state's scale and bias."""
        ...

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None) -> Output:
        """Normalize a batch by the state's running statistics, with its scale and bias."""
        ...

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
        ...
