"""The arithmetic of batch normalization: moments, merge, apply, backward."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from sharednorm.config import Array, Vector
from sharednorm.state import Moments

Wide = npt.NDArray[np.float64]


class Arithmetic(Protocol):
    """One implementation of the arithmetic.

    Tensors are float32, float16 or bfloat16, channels on axis 1, any strides and byte order; results are new
    C-contiguous arrays of the same shape and element type, in the machine's byte order. Shapes have been checked.
    """

    @property
    def name(self) -> str:
        """Which one: numpy or numba."""
        ...

    def moments(self, x: Array) -> Moments:
        """Return the moments of a batch, per channel."""
        ...

    def normalize(
        self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> Array:
        """Return (x - mean) / sqrt(var + epsilon) * scale + bias, into `out` (which may be x) if given."""
        ...

    def forward(self, x: Array, scale: Vector, bias: Vector, epsilon: float) -> tuple[Array, Moments]:
        """Return the batch normalized by its own mean and biased variance, and its moments."""
        ...

    def backward(
        self, x: Array, grad: Array, batch: Moments, scale: Vector, epsilon: float, *, input_grad: bool = True
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of one forward: of x (None unless `input_grad`), of scale, and of bias."""
        ...


def arithmetic(name: str | None = None) -> Arithmetic:
    """Return an implementation: "numpy", "numba", or None for numba where it is installed."""
    raise SystemExit(name)
