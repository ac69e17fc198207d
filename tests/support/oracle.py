"""Batch normalization in plain float64 NumPy: what the library is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Wide = npt.NDArray[np.float64]
Array = npt.NDArray[Any]

KINDS = ("BatchNorm", "BatchNorm1D", "BatchNorm2D", "BatchNorm3D")
SPATIAL: dict[str, tuple[int, ...]] = {
    "BatchNorm": (),
    "BatchNorm1D": (7,),
    "BatchNorm2D": (5, 3),
    "BatchNorm3D": (2, 3, 5),
}
DTYPES = ("float32", "float16", "bfloat16")


def dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy type of a name, bfloat16 included."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def rounding(name: str) -> float:
    """Return the largest relative error of rounding to a type once, and a little more."""
    return {"float32": 6e-7, "float16": 4.9e-4, "bfloat16": 3.95e-3}[name]


def shape_of(kind: str, maps: int, batch: int = 4) -> tuple[int, ...]:
    """Return a shape that a kind takes."""
    return (batch, maps, *SPATIAL[kind])


def random_tensor(seed: int, shape: tuple[int, ...], name: str = "float32") -> Array:
    """Return values around 2 with a spread of 3."""
    values = np.random.default_rng(seed).normal(2.0, 3.0, shape)
    return values.astype(np.float32).astype(dtype(name))


def per_channel(values: npt.ArrayLike, rank: int) -> Wide:
    """Return C values of any shape as an array that broadcasts against a tensor of that rank."""
    return np.asarray(values, np.float64).reshape(1, -1, *(1,) * (rank - 2))


def batch_moments(x: Array) -> tuple[int, Wide, Wide]:
    """Return count, mean and sum of squared deviations of each channel."""
    wide = np.moveaxis(np.asarray(x).astype(np.float64), 1, 0).reshape(x.shape[1], -1)
    mean = wide.mean(axis=1)
    mean = mean + (wide - mean[:, None]).mean(axis=1)
    return wide.shape[1], mean, ((wide - mean[:, None]) ** 2).sum(axis=1)


def normalized(
    x: Array, mean: npt.ArrayLike, var: npt.ArrayLike, scale: npt.ArrayLike, bias: npt.ArrayLike, epsilon: float
) -> Wide:
    """Return (x - mean) / sqrt(var + epsilon) * scale + bias."""
    centre, spread, factor, offset = (per_channel(each, x.ndim) for each in (mean, var, scale, bias))
    return (np.asarray(x).astype(np.float64) - centre) / np.sqrt(spread + epsilon) * factor + offset


def gradients(x: Array, grad: Array, scale: Wide, epsilon: float) -> tuple[Wide, Wide, Wide]:
    """Return the gradients of a training forward: of x, scale and bias (Ioffe & Szegedy 2015, section 3)."""
    count, mean, m2 = batch_moments(x)
    axes = (0, *range(2, x.ndim))
    deviation = np.sqrt(m2 / count + epsilon)
    unit = normalized(x, mean, m2 / count, np.ones_like(mean), np.zeros_like(mean), epsilon)
    upper = np.asarray(grad).astype(np.float64)
    bias_grad, scale_grad = upper.sum(axis=axes), (upper * unit).sum(axis=axes)
    inner = upper - per_channel(bias_grad / count, x.ndim) - unit * per_channel(scale_grad / count, x.ndim)
    return inner * per_channel(scale / deviation, x.ndim), scale_grad, bias_grad


@dataclass
class Model:
    """A layer as a person would write it from the documentation, in float64."""

    maps: int
    epsilon: float = 1e-5
    init_factor: float = 1.0
    min_factor: float = 0.1
    averaging: str = "standard"
    affine: bool = True
    scale: Wide = field(init=False)
    bias: Wide = field(init=False)
    mean: Wide = field(init=False)
    var: Wide = field(init=False)
    scale_grad: Wide = field(init=False)
    bias_grad: Wide = field(init=False)
    steps: int = 0
    saved: tuple[Array, Wide] | None = None

    def __post_init__(self) -> None:
        """Begin as a new layer does, with scale 1."""
        self.scale, self.var = np.ones(self.maps), np.ones(self.maps)
        self.bias, self.mean = np.zeros(self.maps), np.zeros(self.maps)
        self.scale_grad, self.bias_grad = np.zeros(self.maps), np.zeros(self.maps)

    def train(self, x: Array) -> Wide:
        """Return a training forward's output and take its batch into the statistics."""
        count, mean, m2 = batch_moments(x)
        self.steps += 1
        factor = min(1.0, max(self.init_factor / self.steps, self.min_factor))
        new, old = (factor, 1 - factor) if self.averaging == "standard" else (1 - factor, factor)
        self.mean = old * self.mean + new * mean
        self.var = old * self.var + new * (m2 / (count - 1))
        self.saved = (x.copy(), self.scale.copy())
        return normalized(x, mean, m2 / count, self.scale, self.bias, self.epsilon)

    def evaluate(self, x: Array) -> Wide:
        """Return an eval forward's output."""
        self.saved = None
        return normalized(x, self.mean, self.var, self.scale, self.bias, self.epsilon)

    def backward(self, grad: Array, *, scale: float = 1.0, momentum: float = 0.0, accumulate: bool = True) -> Wide:
        """Return the gradient of the last training forward's input; accumulate those of scale and bias."""
        assert self.saved is not None
        x, used = self.saved
        result, scale_grad, bias_grad = gradients(x, grad, used, self.epsilon)
        if accumulate and self.affine:
            self.scale_grad = scale * scale_grad + momentum * self.scale_grad
            self.bias_grad = scale * bias_grad + momentum * self.bias_grad
        return result

    def update_params(self, rate: float) -> None:
        """Add the gradients to scale and bias."""
        if self.affine:
            self.scale = self.scale + rate * self.scale_grad
            self.bias = self.bias + rate * self.bias_grad
