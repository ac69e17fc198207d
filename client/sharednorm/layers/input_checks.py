"""What may be passed to a layer's forward and backward, checked before its backend is called."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm.core.dtypes import check_dtype, dtype_of
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Array
from sharednorm.errors import InplaceInTraining, InvalidShape, UnsupportedDType


def check_data(
    data: Array, config: LayerConfig, calctype: np.dtype[Any] | None, *, train: bool, together: bool
) -> Array:
    """Return a forward's input as a plain array, which shares the memory of `data`.

    With `together`, batches of others are normalized with it, so that it may be empty.

    Raises:
        UnsupportedDType: Not a NumPy array, or an element type that the layer does not take.
        InvalidShape: Wrong rank, another number of maps, or an empty axis.
        TooFewValues: One value a map in training.
    """
    x = _plain(data, "Data")
    config.check_shape(x.shape, train=train, together=together)
    check_dtype(x.dtype, calctype)
    return x


def check_grad(grad: Array, x: Array, config: LayerConfig) -> Array:
    """Return a backward's gradient as a plain array, which shares the memory of `grad`.

    Raises:
        UnsupportedDType: Not a NumPy array, or another element type than that of the forward's input x.
        InvalidShape: Another shape than x's.
    """
    given = _plain(grad, "Grad")
    config.check_shape(given.shape, train=False, what="Grad", together=x.size == 0)
    if given.shape != x.shape:
        raise InvalidShape(f"Grad has shape {given.shape} (expected: {x.shape}, the shape of the forward's data)")
    check_dtype(given.dtype, x.dtype.newbyteorder("="))
    return given


def check_out(out: Array, x: Array, *, train: bool) -> Array:
    """Return where a forward's output goes as a plain array, which shares the memory of `out`.

    Raises:
        UnsupportedDType: Not a NumPy array, or another element type than the input's.
        InvalidShape: Another shape than the input's, or read-only.
        InplaceInTraining: It overlaps the input of a training forward.
    """
    given = _plain(out, "out")
    if given.shape != x.shape:
        raise InvalidShape(f"out has shape {given.shape} (expected: {x.shape}, the shape of the data)")
    if given.dtype.newbyteorder("=") != x.dtype.newbyteorder("="):
        raise UnsupportedDType(f"out has dtype {given.dtype} (expected: {x.dtype}, that of the data)")
    if not given.flags.writeable:
        raise InvalidShape("out is read-only (expected: an array that can be written)")
    if train and np.may_share_memory(given, x):
        raise InplaceInTraining("out overlaps the data, which backward needs (expected: other memory, or evalMode())")
    return given


def check_writable(x: Array) -> None:
    """Check that an in-place layer can write to its input.

    Raises:
        InvalidShape: The array is read-only.
    """
    if not x.flags.writeable:
        raise InvalidShape(
            "Data is read-only, and the layer is in place (expected: a writable array; pass data.copy())"
        )


def dtype_from(given: npt.DTypeLike) -> np.dtype[Any]:
    """Return the element type that `calcMode` was given, in the machine's byte order.

    Raises:
        UnsupportedDType: It is none of those that layers take.
    """
    # np.dtype(None) is float64, which nobody means.
    if given is None:
        raise UnsupportedDType("Unsupported dtype None (expected: float32, float16 or bfloat16)")
    if given == "bfloat16":
        return dtype_of("bfloat16")
    try:
        dtype = np.dtype(given)
    except TypeError as error:
        raise UnsupportedDType(f"Unsupported dtype {given!r} (expected: float32, float16 or bfloat16)") from error
    return dtype_of(check_dtype(dtype))


def _plain(value: Array, what: str) -> Array:
    # A masked array's mask would be ignored without a word.
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):
        raise UnsupportedDType(
            f"{what} is a {type(value).__module__}.{type(value).__name__} (expected: a NumPy array; "
            "convert it with numpy.asarray(...), or .numpy() for a tensor on the CPU)"
        )
    return np.asarray(value)
