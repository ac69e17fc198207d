"""Devices: what computes. A device knows no RPC, no name of a layer, and no store.

Tensors come in and go out as NumPy arrays. What a training forward leaves behind for its backward stays
with the device as a `SavedInput`, which the caller keeps, counts and drops.
"""

from __future__ import annotations

from typing import Protocol

from sharednorm.config import Array, LayerConfig, Vector
from sharednorm.state import LayerState, Moments


class SavedInput(Protocol):
    """The input of a training forward, kept where the device computes."""

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies there."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The input's shape."""
        ...

    @property
    def dtype_name(self) -> str:
        """The input's element type: "float32", "float16" or "bfloat16"."""
        ...


class Device(Protocol):
    """What computes. Every method may be called from many threads at once."""

    @property
    def description(self) -> str:
        """For people: what it is, for example "cpu (numba, 8 threads)"."""
        ...

    def save(self, x: Array) -> SavedInput:
        """Keep an input for a backward."""
        ...

    def train(self, x: Array, state: LayerState, config: LayerConfig) -> tuple[Array, Moments]:
        """Normalize a batch by its own statistics, with the state's scale and bias; return them with the output."""
        ...

    def evaluate(self, x: Array, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch by the state's running statistics."""
        ...

    def backward(
        self, saved: SavedInput, grad: Array, batch: Moments, scale: Vector, config: LayerConfig, *, input_grad: bool
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward: of its input (None unless asked for), scale and bias."""
        ...
