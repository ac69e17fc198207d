"""The element types that a tensor may have."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from sharednorm.errors import UnsupportedDType

DTYPE_NAMES = ("float32", "float16", "bfloat16")


@lru_cache(maxsize=64)
def _name_of(dtype: np.dtype[Any]) -> str:
    # NumPy puts the name together at each call, which takes as long as a small call's arithmetic.
    return str(dtype.name)


def check_dtype(dtype: np.dtype[Any], calctype: np.dtype[Any] | None = None) -> str:
    """Check an element type and return its name, "float32", "float16" or "bfloat16".

    Either byte order is accepted; results are always in the machine's.

    Args:
        dtype: The tensor's.
        calctype: The one that the layer was told to expect, or None for any.

    Raises:
        UnsupportedDType: It is none of the three, or not `calctype`.
    """
    name = _name_of(dtype)
    if calctype is not None and name != _name_of(calctype):
        raise UnsupportedDType(f"Expected dtype {calctype}, got {dtype}")
    if name not in DTYPE_NAMES:
        raise UnsupportedDType(
            f"Unsupported dtype {dtype} (expected: {', '.join(DTYPE_NAMES)}; convert with .astype(np.float32))"
        )
    return name


def dtype_of(name: str) -> np.dtype[Any]:
    """Return the NumPy type of one of `DTYPE_NAMES`, in the machine's byte order.

    Raises:
        UnsupportedDType: It is bfloat16, and `ml_dtypes` is not installed; or another name.
    """
    if name == "bfloat16":
        try:
            import ml_dtypes  # noqa: PLC0415 - optional
        except ModuleNotFoundError as error:
            raise UnsupportedDType(
                "bfloat16 needs the package ml_dtypes: pip install 'sharednorm[bfloat16]'"
            ) from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    if name not in DTYPE_NAMES:
        raise UnsupportedDType(f"Unsupported dtype {name!r} (expected: {', '.join(DTYPE_NAMES)})")
    return np.dtype(name)
