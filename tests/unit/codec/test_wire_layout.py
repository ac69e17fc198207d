"""Type and shape of a tensor as a message declares them: refused before anything is allocated."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sharednorm.codec.wire import TensorLayout, layout_of, spec_of
from sharednorm.errors import InvalidShape, LimitExceeded, UnsupportedDType
from sharednorm.v1 import tensor_pb2


def spec(*shape: int, dtype: int = tensor_pb2.DATA_TYPE_FLOAT32) -> tensor_pb2.TensorSpec:
    message = tensor_pb2.TensorSpec(shape=shape)
    message.dtype = tensor_pb2.DataType.ValueType(dtype)
    return message


@pytest.mark.parametrize(
    ("dtype", "number"), [(np.float32, 1), (np.float16, 2), (ml_dtypes.bfloat16, 3), (">f4", 1), (">f2", 2)]
)
def test_a_description_has_type_and_shape(dtype: Any, number: int) -> None:
    assert spec_of(np.zeros((4, 5, 6), dtype)) == spec(4, 5, 6, dtype=number)


def test_a_layout_is_type_shape_and_size() -> None:
    assert layout_of(spec(2, 3, 4), 96) == TensorLayout("float32", (2, 3, 4), 96)
    assert layout_of(spec(2, 3, dtype=tensor_pb2.DATA_TYPE_FLOAT16), 12) == TensorLayout("float16", (2, 3), 12)
    assert layout_of(spec(7, dtype=tensor_pb2.DATA_TYPE_BFLOAT16), 14) == TensorLayout("bfloat16", (7,), 14)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (-1, 3), (2, -3), (-2, -3), (-(1 << 63), 2), (1,) * 9])
def test_impossible_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidShape, match="expected:"):
        layout_of(spec(*shape), 1 << 62)


@pytest.mark.parametrize("shape", [(25,), (2, 13), (1 << 62, 1 << 62), (1 << 31, 1 << 31, 4), ((1 << 63) - 1,) * 8])
def test_shapes_beyond_the_limit_name_it(shape: tuple[int, ...]) -> None:
    with pytest.raises(LimitExceeded, match="expected: at most max_unary_bytes = 96") as caught:
        layout_of(spec(*shape), 96, limit="max_unary_bytes")
    assert caught.value.metadata == {"limit": "max_unary_bytes", "value": "96"}


@pytest.mark.parametrize("dtype", [0, 4, 17, -1, (1 << 31) - 1])
def test_unknown_element_types(dtype: int) -> None:
    with pytest.raises(UnsupportedDType, match=f"element type {dtype} "):
        layout_of(spec(2, 3, dtype=dtype), 1000)


def test_refusing_a_million_axes_allocates_nothing() -> None:
    message = tensor_pb2.TensorSpec(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1] * 1_000_000)
    tracemalloc.start()
    with pytest.raises(InvalidShape, match="1000000 axes"):
        layout_of(message, 1 << 40)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
