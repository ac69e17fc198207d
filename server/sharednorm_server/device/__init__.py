"""Devices: what computes. A device knows no RPC, no name of a layer, and no store.

Inputs are brought to the device once, by `load`, and stay there for as long as somebody holds what it
returned; outputs come back as NumPy arrays.
"""

from __future__ import annotations

from typing import Protocol

from sharednorm.config import Array, LayerConfig, Vector
from sharednorm.state import LayerState, Moments


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
    """

    @property
    def description(self) -> str:
        """For people: what it is, for example "cpu (numba, 8 threads)"."""
        ...

    def warm_up(self) -> None:
        """Get ready, so that the first call does not wait; called once, before the server listens."""
        ...

    def load(self, x: Array) -> DeviceTensor:
        """Bring a tensor to the device. The caller writes to `x` no more: it may be referenced, not copied."""
        ...

    def forward(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> tuple[Array, Moments]:
        """Normalize a batch by its own statistics, with the state's scale and bias; return them with the output."""
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
