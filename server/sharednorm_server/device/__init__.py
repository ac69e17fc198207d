"""Devices: what computes. A device knows no RPC, no name of a layer, and no store.

Inputs are brought to the device once, by `load`, and stay there for as long as somebody holds what it
returned; outputs come back as NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sharednorm.config import Array, LayerConfig, Vector
from sharednorm.state import LayerState, Moments, RunningStatistics


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

    output: Array
    moments: Moments
    statistics: RunningStatistics | None = None


class DeviceTensor(Protocol):
    """A tensor where the device computes. It is not changed any more."""

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies there."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype_name(self) -> str:
        """Its element type: "float32", "float16" or "bfloat16"."""
        ...


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

    def forward(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> TrainedBatch:
        """Normalize a batch by its own statistics, with the state's scale and bias."""
        ...

    def normalize_batch(self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch whose moments are known, with the state's scale and bias."""
        ...

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch by the state's running statistics, with its scale and bias."""
        ...

    def backward(
        self, x: DeviceTensor, grad: Array, batch: Moments, scale: Vector, config: LayerConfig, *, input_grad: bool
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward: of its input (None unless asked for), scale and bias."""
        ...
