"""The element types of arrays, and the choices that configure a layer."""

from __future__ import annotations

import enum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""A tensor: float32, float16 or bfloat16, channels on axis 1."""

Vector: TypeAlias = npt.NDArray[np.float32]
"""One float32 per channel, shape (C,)."""

Wide: TypeAlias = npt.NDArray[np.float64]
"""One float64 per channel, shape (C,)."""


class LayerKind(enum.Enum):
    """A member of the family; the value is the rank of the tensors that it takes."""

    BATCH_NORM = 2
    BATCH_NORM_1D = 3
    BATCH_NORM_2D = 4
    BATCH_NORM_3D = 5

    @property
    def rank(self) -> int:
        """Number of axes of an input, batch and channels included."""
        return self.value

    @property
    def state_rank(self) -> int:
        """Number of axes of scale, bias, mean and var: (1, C, 1, 1), and (1, C, 1, 1, 1) in 3D."""
        return max(4, self.value)

    @property
    def label(self) -> str:
        """PuzzleLib's name of it: "BatchNorm", "BatchNorm1D", "BatchNorm2D" or "BatchNorm3D"."""
        return "BatchNorm" if self is LayerKind.BATCH_NORM else f"BatchNorm{self.value - 2}D"


class Averaging(enum.Enum):
    """How the running statistics take in a batch, with f = max(initFactor / n, minFactor).

    STANDARD is `running = (1 - f) * running + f * batch`, as cuDNN, torch and PuzzleLib's code compute
    it. PRINTED has the two weights the other way round, as PuzzleLib's documentation prints it.
    """

    STANDARD = "standard"
    PRINTED = "printed"


class NonFinitePolicy(enum.Enum):
    """What a training batch with a NaN or an infinity does: it is refused, or used like any other."""

    REFUSE = "refuse"
    ALLOW = "allow"
