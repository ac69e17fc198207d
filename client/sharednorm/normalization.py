"""The arithmetic of batch normalization: moments, merge, apply, backward.

Two implementations stand behind one `Arithmetic`: NumPy, always there, and numba, compiled and threaded.
Both centre their sums, accumulate in float64 in an order that the shape alone fixes, and apply a mean as a
(hi, lo) pair of float32. So a result is the same, bit for bit, from run to run and for any number of threads.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sharednorm._threads import Threads
from sharednorm.config import Array, Vector
from sharednorm.errors import InvalidConfiguration
from sharednorm.state import Moments

Wide = npt.NDArray[np.float64]

ARITHMETIC_VARIABLE = "SHAREDNORM_ARITHMETIC"
INSTALL_NUMBA = "pip install 'sharednorm[fast]'"
_LARGEST = float(np.finfo(np.float32).max)

threads = Threads()
"""The one team of this process; what NumPy computes does not use it."""


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


def arithmetic(name: str | None = None) -> Arithmetic:
    """Return an implementation.

    Args:
        name: "numpy", "numba", or None: what the environment variable SHAREDNORM_ARITHMETIC names, else numba
            where it is installed, else NumPy.

    Raises:
        InvalidConfiguration: Another name, or numba is asked for and not installed.
    """
    chosen = name or os.environ.get(ARITHMETIC_VARIABLE)
    if not chosen:
        chosen = "numba" if importlib.util.find_spec("numba") else "numpy"
    if chosen == "numpy":
        from sharednorm._numpy_arithmetic import NumpyArithmetic  # noqa: PLC0415 - the modules need each other

        return NumpyArithmetic()
    if chosen != "numba":
        raise InvalidConfiguration(f"there is no arithmetic {chosen!r} (expected: 'numpy' or 'numba')")
    if not importlib.util.find_spec("numba"):
        raise InvalidConfiguration(f"the arithmetic 'numba' needs the package numba: {INSTALL_NUMBA}")
    from sharednorm._numba_arithmetic import NumbaArithmetic  # noqa: PLC0415 - importing numba takes a moment

    return NumbaArithmetic()


def num_threads() -> int:
    """Return how many threads one call of the compiled arithmetic uses.

    By default as many as this process may use processors; the environment variable SHAREDNORM_NUM_THREADS
    sets another number. No result depends on it.

    Raises:
        InvalidConfiguration: SHAREDNORM_NUM_THREADS is not an integer of at least 1.
    """
    return threads.count


def set_num_threads(count: int) -> None:
    """Set how many threads one call of the compiled arithmetic uses, the caller's included.

    Raises:
        InvalidConfiguration: It is not an integer of at least 1.
    """
    threads.resize(count)


def merge(parts: Sequence[Moments]) -> Moments:
    """Return the moments of several batches taken as one, in float64, merged pairwise in the given order.

    The formula is that of Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979: it adds deviations and never subtracts squares of means.

    Args:
        parts: At least one; each with the same channels and at least one value a channel.

    Raises:
        ValueError: `parts` is empty.
    """
    if not parts:
        raise ValueError("there are no moments to merge (expected: at least one)")
    count = parts[0].count
    mean, m2 = parts[0].mean.astype(np.float64), parts[0].m2.astype(np.float64)
    # A non-finite channel stays non-finite without a warning: whoever asked for the moments decides about it.
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts[1:]:
            total = count + part.count
            delta = part.mean - mean
            mean += delta * (part.count / total)
            m2 += part.m2 + delta * delta * (count * (part.count / total))
            count = total
    return Moments(count, mean, m2)


@dataclass(frozen=True)
class Affine:
    """A normalization in float32: `y = (x - hi) * factor + offset`, per channel.

    The mean is hi + lo, both float32; `offset` holds bias - lo * factor. Rounding the mean to hi alone would
    cost half a unit of its last place times the factor: 0.05 for a mean of 1e4 and a sigma of 1e-2.
    """

    hi: Vector
    factor: Vector
    offset: Vector


@dataclass(frozen=True)
class InputGradient:
    """The gradient of an input in float32: `dx = grad * factor + (x - hi) * slope + offset`, per channel."""

    hi: Vector
    factor: Vector
    slope: Vector
    offset: Vector


def affine(mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float) -> Affine:
    """Return the coefficients that normalize by a mean and a variance; float32 (C,) each."""
    with np.errstate(over="ignore", invalid="ignore"):
        factor = _clip(scale / np.sqrt(np.asarray(var, np.float64) + epsilon))
        hi, lo = _split(mean)
        return Affine(hi, factor, _clip(bias - lo * factor))


def input_gradient(batch: Moments, scale: Vector, epsilon: float, sum_grad: Wide, sum_product: Wide) -> InputGradient:
    """Return the coefficients of a backward from its two sums, `grad` and `grad * (x - mean)`; float32 (C,) each."""
    with np.errstate(over="ignore", invalid="ignore"):
        inv_std = 1.0 / np.sqrt(batch.biased_var + epsilon)
        factor = scale * inv_std
        slope = _clip(-factor * inv_std * inv_std * (sum_product / batch.count))
        hi, lo = _split(batch.mean)
        return InputGradient(hi, _clip(factor), slope, _clip(-factor * (sum_grad / batch.count) - lo * slope))


def parameter_gradients(batch: Moments, epsilon: float, sum_grad: Wide, sum_product: Wide) -> tuple[Vector, Vector]:
    """Return the gradients of scale and bias from the two sums of a backward; float32 (C,)."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale_grad = sum_product / np.sqrt(batch.biased_var + epsilon)
        return scale_grad.astype(np.float32), sum_grad.astype(np.float32)


def _split(mean: Wide) -> tuple[Vector, Wide]:
    wide = np.asarray(mean, np.float64)
    hi = wide.astype(np.float32)
    return hi, wide - hi


def _clip(values: Wide) -> Vector:
    # A tiny epsilon and no variance give factors beyond float32; infinity times a deviation of 0 would be NaN.
    return np.minimum(np.maximum(values, -_LARGEST), _LARGEST).astype(np.float32)  # half the time of `np.clip`
