"""Tensors on the way into and out of the arithmetic: contiguous, native, seen as (N, C, S)."""

from __future__ import annotations

import math

import numpy as np

from sharednorm.core.buffer_pool import ResultMemory
from sharednorm.core.dtypes import check_dtype
from sharednorm.core.types import Array
from sharednorm.errors import InvalidShape, UnsupportedDType

results = ResultMemory()
"""Where the results of this process lie."""


def contiguous(x: Array) -> Array:
    """Return a tensor as a C-contiguous array in the machine's byte order: itself if it is one, else a copy.

    Raises:
        UnsupportedDType: It is not float32, float16 or bfloat16.
    """
    check_dtype(x.dtype)
    return np.ascontiguousarray(x, dtype=x.dtype if x.dtype.isnative else x.dtype.newbyteorder("="))


def planes(x: Array) -> Array:
    """Return a contiguous tensor (N, C, ...) as a view (N, C, S), S the product of the other sizes."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def output(x: Array, out: Array | None) -> Array:
    """Return a C-contiguous array for a result of the shape and type of x: `out` where it can be written as it goes.

    `x` is contiguous and native already. An `out` of other strides, or one that overlaps x without being
    x, cannot be: then the result is a new array, which the caller copies to `out`.

    Raises:
        InvalidShape: `out` has another shape than x, or cannot be written.
        UnsupportedDType: `out` has another element type than x.
    """
    if out is None:
        return results.empty(x.shape, x.dtype)
    if out.shape != x.shape:
        raise InvalidShape(f"out has shape {out.shape} (expected: {x.shape})")
    if out.dtype.newbyteorder("=") != x.dtype:
        raise UnsupportedDType(f"out has dtype {out.dtype} (expected: {x.dtype})")
    if not out.flags.writeable:
        raise InvalidShape("out is read-only (expected: an array that can be written)")
    same = out.ctypes.data == x.ctypes.data
    usable = out.flags.c_contiguous and out.dtype.isnative and (same or not np.may_share_memory(out, x))
    return out if usable else results.empty(x.shape, x.dtype)


def placed(result: Array, out: Array | None) -> Array:
    """Return a result where it was asked for: what `output` gave, filled, is copied to `out` if it is not that."""
    if out is None:
        return result
    if result is not out:
        np.copyto(out, result)
    return out
