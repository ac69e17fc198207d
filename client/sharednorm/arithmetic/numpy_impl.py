"""The arithmetic with NumPy alone, block by block, so that nothing wider than a block is ever copied."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from sharednorm.arithmetic.base import WriteRange
from sharednorm.arithmetic.formulas import Affine, InputGradient, affine, input_gradient, merge, parameter_gradients
from sharednorm.core.arrays import contiguous, output, placed, planes
from sharednorm.core.state import Moments
from sharednorm.core.types import Array, Vector, Wide

# Values in a block: 512 KiB in float64, which stays in a core's cache between the passes over it.
BLOCK = 1 << 16

Slices = tuple[slice, slice, slice]


class NumpyArithmetic:
    """`Arithmetic` with NumPy: one thread, no compilation."""

    @property
    def name(self) -> str:
        """Which one: numpy."""
        return "numpy"

    def moments(self, x: Array) -> Moments:
        """Return the moments of a batch, per channel."""
        return _moments(planes(contiguous(x)))

    def normalize(
        self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> Array:
        """Return (x - mean) / sqrt(var + epsilon) * scale + bias, into `out` (which may be x) if given."""
        source = contiguous(x)
        result = output(source, out)
        _apply(planes(source), affine(mean, var, scale, bias, epsilon), planes(result))
        return placed(result, out)

    def forward(
        self, x: Array, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> tuple[Array, Moments]:
        """Return the batch normalized by its own mean and biased variance, into `out` if given, and its moments."""
        source = contiguous(x)
        batch = _moments(planes(source))
        return self.normalize(source, batch.mean, batch.biased_var, scale, bias, epsilon, out), batch

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
        """Return the gradients of one forward: of x (None unless `input_grad`), of scale, and of bias."""
        whole = contiguous(x)
        source, grads = planes(whole), planes(contiguous(grad))
        sum_grad, sum_product = _gradient_sums(source, grads, batch.mean)
        scale_grad, bias_grad = parameter_gradients(batch, epsilon, sum_grad, sum_product)
        if not input_grad:
            return None, scale_grad, bias_grad
        result = output(whole, out if out is None or not np.may_share_memory(out, grad) else None)
        _differentiate(source, grads, input_gradient(batch, scale, epsilon, sum_grad, sum_product), planes(result))
        return placed(result, out), scale_grad, bias_grad

    def gradient_sums(self, x: Array, grad: Array, mean: Wide) -> tuple[Wide, Wide]:
        """Return the sums of `grad` and of `grad * (x - mean)`."""
        return _gradient_sums(planes(contiguous(x)), planes(contiguous(grad)), mean)

    def differentiate(self, x: Array, grad: Array, by: InputGradient, out: Array | None = None) -> Array:
        """Return the gradient of the input, into `out` if given."""
        whole = contiguous(x)
        result = output(whole, out if out is None or not np.may_share_memory(out, grad) else None)
        _differentiate(planes(whole), planes(contiguous(grad)), by, planes(result))
        return placed(result, out)

    def arriving(self, x: Array) -> _ArrivingInput:
        """Return what takes the moments of a tensor once its memory has been filled."""
        return _ArrivingInput(x)

    def arriving_gradient(self, x: Array, grad: Array, batch: Moments) -> _ArrivingGradient:
        """Return a backward of two tensors, the memory of one of which is being filled."""
        return _ArrivingGradient(x, grad, batch)

    def normalizing(self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float) -> WriteRange:
        """Return what writes parts of a result."""
        by, flat = affine(mean, var, scale, bias, epsilon), x.reshape(-1)

        def write(begin: int, end: int, out: Array) -> None:
            for start in range(begin, end, BLOCK):
                values = slice(start, min(start + BLOCK, end))
                c = _channels(x, values)
                with np.errstate(over="ignore", invalid="ignore"):
                    y = np.subtract(flat[values], by.hi[c], dtype=np.float32)
                    y *= by.factor[c]
                    y += by.offset[c]
                    out[start - begin : values.stop - begin] = y

        return write


class _ArrivingInput:
    """`normalization.ArrivingInput`, which waits until all is there."""

    def __init__(self, x: Array) -> None:
        self._x = x

    def arrived(self, values: int) -> None:
        """Do nothing yet."""

    def moments(self) -> Moments:
        """Return the moments."""
        return _moments(planes(self._x))


class _ArrivingGradient:
    """`normalization.ArrivingGradient`, which waits until all is there."""

    def __init__(self, x: Array, grad: Array, batch: Moments) -> None:
        self._x, self._grad, self._batch = x, grad, batch
        self._by: InputGradient | None = None

    def arrived(self, values: int) -> None:
        """Do nothing yet."""

    def parameter_gradients(self, scale: Vector, epsilon: float) -> tuple[Vector, Vector]:
        """Return the gradients of scale and bias."""
        sums = _gradient_sums(planes(self._x), planes(self._grad), self._batch.mean)
        self._by = input_gradient(self._batch, scale, epsilon, *sums)
        return parameter_gradients(self._batch, epsilon, *sums)

    def write(self, begin: int, end: int, out: Array) -> None:
        """Write values of the input's gradient."""
        assert self._by is not None, "write before parameter_gradients"
        by, x, grad = self._by, self._x.reshape(-1), self._grad.reshape(-1)
        for start in range(begin, end, BLOCK):
            values = slice(start, min(start + BLOCK, end))
            c = _channels(self._x, values)
            with np.errstate(over="ignore", invalid="ignore"):
                dx = np.subtract(x[values], by.hi[c], dtype=np.float32)
                dx *= by.slope[c]
                dx += np.multiply(grad[values], by.factor[c], dtype=np.float32)
                dx += by.offset[c]
                out[start - begin : values.stop - begin] = dx


def _channels(x: Array, values: slice) -> np.ndarray[Any, np.dtype[np.int64]]:
    # The channel of each of consecutive values.
    numbers = np.arange(values.start, values.stop)
    numbers //= math.prod(x.shape[2:])
    numbers %= x.shape[1]
    return numbers


def blocks(shape: tuple[int, ...]) -> Iterator[Slices]:
    """Cut (N, C, S) into blocks of at most `BLOCK` values: samples first, then channels, then space."""
    samples, channels, space = shape
    step_s = min(space, BLOCK)
    step_c = min(channels, max(1, BLOCK // step_s))
    step_n = max(1, BLOCK // (step_s * step_c))
    for c in range(0, channels, step_c):
        for n in range(0, samples, step_n):
            for s in range(0, space, step_s):
                yield slice(n, n + step_n), slice(c, c + step_c), slice(s, s + step_s)


def _moments(x: Array) -> Moments:
    samples, channels, space = x.shape
    parts: dict[int, list[Moments]] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(x.shape):
            parts.setdefault(block[1].start, []).append(_block_moments(x[block].astype(np.float64)))
    mean, m2 = np.empty(channels), np.empty(channels)
    for start, found in parts.items():
        merged = merge(found)
        mean[start : start + len(merged.mean)] = merged.mean
        m2[start : start + len(merged.m2)] = merged.m2
    return Moments(samples * space, mean, m2)


def _block_moments(values: np.ndarray[Any, np.dtype[np.float64]]) -> Moments:
    count = values.shape[0] * values.shape[2]
    # Two passes over the block. The first value as an origin keeps the mean of a constant exact; what the rounding
    # of the mean leaves in the deviations is taken out again (Chan, Golub & LeVeque 1983, the corrected algorithm).
    origin = values[0, :, 0].copy()
    values -= origin[:, None]
    mean = values.sum(axis=(0, 2)) / count
    values -= mean[:, None]
    rest = values.sum(axis=(0, 2))
    m2 = np.einsum("ncs,ncs->c", values, values) - rest * rest / count
    return Moments(count, origin + mean, m2)


def _apply(x: Array, by: Affine, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(x.shape):
            c = block[1]
            y = np.subtract(x[block], by.hi[c, None], dtype=np.float32)
            y *= by.factor[c, None]
            y += by.offset[c, None]
            out[block] = y


def _gradient_sums(x: Array, grad: Array, mean: Wide) -> tuple[Wide, Wide]:
    sum_grad, sum_product = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(x.shape):
            c = block[1]
            g = grad[block].astype(np.float64)
            sum_grad[c] += g.sum(axis=(0, 2))
            g *= x[block].astype(np.float64) - mean[c, None]
            sum_product[c] += g.sum(axis=(0, 2))
    return sum_grad, sum_product


def _differentiate(x: Array, grad: Array, by: InputGradient, out: Array) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks(x.shape):
            c = block[1]
            dx = np.subtract(x[block], by.hi[c, None], dtype=np.float32)
            dx *= by.slope[c, None]
            dx += np.multiply(grad[block], by.factor[c, None], dtype=np.float32)
            dx += by.offset[c, None]
            out[block] = dx
