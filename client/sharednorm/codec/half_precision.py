"""float32 tensors that travel in 16 bits: half the bytes, and 8 or 11 of 24 significant bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharednorm.core.arrays import results
from sharednorm.core.dtypes import dtype_of
from sharednorm.core.types import Array
from sharednorm.errors import InvalidConfiguration, NonFiniteInput

WIRE_DTYPES = ("float16", "bfloat16")


def wire_dtype_of(given: object) -> np.dtype[Any] | None:
    """Return the element type that float32 tensors travel in; None: as they are.

    Raises:
        InvalidConfiguration: It is none of those.
        UnsupportedDType: It is bfloat16, and `ml_dtypes` is not installed.
    """
    if given is None:
        return None
    if given not in WIRE_DTYPES:
        raise InvalidConfiguration(
            f"wire_dtype is {ascii(given)[:60]} (expected: None, {' or '.join(map(repr, WIRE_DTYPES))})"
        )
    return dtype_of(str(given))


def narrowed(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return a float32 tensor in 16 bits, each value rounded to nearest, ties to even.

    Raises:
        NonFiniteInput: It has finite values that float16 has not. (bfloat16 has the range of float32.)
    """
    result = results.empty(x.shape, dtype)
    try:
        with np.errstate(over="raise", under="ignore", invalid="ignore"):
            np.copyto(result, x, casting="same_kind")
    except FloatingPointError:
        raise NonFiniteInput(
            "Data has values beyond 65504, the largest of float16, in which they were to travel (expected: smaller "
            'ones; wire_dtype="bfloat16" has the range of float32)'
        ) from None
    return result


def widened(x: Array, out: Array | None) -> Array:
    """Return a tensor of 16 bits as float32, which changes no value; into `out` if given."""
    result = results.empty(x.shape, np.dtype(np.float32)) if out is None else out
    np.copyto(result, x, casting="same_kind")
    return result
