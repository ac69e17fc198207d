"""The arithmetic of batch normalization: moments, merge, apply, backward.

Two implementations stand behind one `Arithmetic`: NumPy, always there, and numba, compiled and threaded.
Both centre their sums, accumulate in float64 in an order that the shape alone fixes, and apply a mean as a
(hi, lo) pair of float32. So a result is the same, bit for bit, from run to run and for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sharednorm.arithmetic.formulas import InputGradient
from sharednorm.core.state import Moments
from sharednorm.core.types import Array, Vector, Wide

WriteRange = Callable[[int, int, Array], None]
"""Writes the values from one number up to another of a result, counted in C order, into a contiguous 1-D array."""


class ArrivingInput(Protocol):
    """The moments of a batch that arrives, taken as it does: the bits that `Arithmetic.moments` gives for the whole."""

    def arrived(self, values: int) -> None:
        """Say that so many values, counted in C order from the first, are there; never fewer than before."""
        ...

    def moments(self) -> Moments:
        """Return the moments, when all values are there."""
        ...


class ArrivingGradient(Protocol):
    """A backward whose input or gradient arrives: the bits that `Arithmetic.backward` gives for the whole."""

    def arrived(self, values: int) -> None:
        """Say that so many values of both, counted in C order from the first, are there; never fewer than before."""
        ...

    def parameter_gradients(self, scale: Vector, epsilon: float) -> tuple[Vector, Vector]:
        """Return the gradients of scale and bias, when all values are there."""
        ...

    def write(self, begin: int, end: int, out: Array) -> None:
        """Write values of the input's gradient, as `WriteRange` does, after `parameter_gradients`."""
        ...


class Arithmetic(Protocol):
    """One implementation of the arithmetic.

    Tensors are float32, float16 or bfloat16, channels on axis 1, any strides and byte order; results are new
    C-contiguous arrays of the same shape and element type, in the machine's byte order. Shapes have been checked.
    Every method may be called from many threads at once.
    """

    @property
    def name(self) -> str:
        """Which one: numpy or numba."""
        ...

    def moments(self, x: Array) -> Moments:
        """Return the moments of a batch, per channel.

        A channel that holds a NaN or an infinity has a mean or an m2 that is not finite; no other channel does.
        """
        ...

    def normalize(
        self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> Array:
        """Return (x - mean) / sqrt(var + epsilon) * scale + bias, into `out` (which may be x) if given."""
        ...

    def forward(
        self, x: Array, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> tuple[Array, Moments]:
        """Return the batch normalized by its own mean and biased variance, into `out` if given, and its moments."""
        ...

    def backward(
        self,
        x: Array,
        grad: Array,
        batch: Moments,
        scale: Vector,
        epsilon: float,
        *,
        input_grad: bool = True,
        out: Array | None = None,
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of one forward: of x (None unless `input_grad`; into `out` if given), scale, and bias.

        With xhat = (x - mean) * inv_std and means over a channel,
        `dx = scale * inv_std * (grad - mean(grad) - xhat * mean(grad * xhat))`; Ioffe & Szegedy 2015, section 3.
        """
        ...

    def gradient_sums(self, x: Array, grad: Array, mean: Wide) -> tuple[Wide, Wide]:
        """Return the two sums of a backward: of `grad`, and of `grad * (x - mean)`; float64 (C,) each.

        With `differentiate`, the two halves of `backward`: between them the sums of others may be added.
        """
        ...

    def differentiate(self, x: Array, grad: Array, by: InputGradient, out: Array | None = None) -> Array:
        """Return the gradient of the input, into `out` if given."""
        ...

    def arriving(self, x: Array) -> ArrivingInput:
        """Return what takes the moments of a tensor while its memory, C-contiguous and native, is being filled."""
        ...

    def arriving_gradient(self, x: Array, grad: Array, batch: Moments) -> ArrivingGradient:
        """Return a backward of two C-contiguous, native tensors, the memory of one of which is being filled."""
        ...

    def normalizing(self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float) -> WriteRange:
        """Return what writes parts of a result: the bits that `normalize` gives. `x` is C-contiguous and native."""
        ...
