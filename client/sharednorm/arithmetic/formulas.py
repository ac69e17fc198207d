"""The formulas of batch normalization that do not touch a tensor: merged moments, and coefficients per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharednorm.core.state import Moments
from sharednorm.core.types import Vector, Wide

_LARGEST = float(np.finfo(np.float32).max)


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
    # A non-finite channel stays non-finite without a warning: the caller decides about it.
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
