"""Tensors to messages and back: the same meaning as with stock protobuf classes, and no copy too many."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sharednorm.codec.wire import TensorLayout, as_array, decode, encode, layout_of, payload, spec_of
from sharednorm.core.dtypes import DTYPE_NAMES, dtype_of
from sharednorm.core.types import Array
from sharednorm.errors import LimitExceeded, MalformedMessage, UnsupportedDType
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2

SIZES = [0, 1, 3, 4, 127, 128, (1 << 14) - 1, 1 << 14, (1 << 21) - 4, 1 << 21, (1 << 21) + 5]


def request(name: str = "stem/bn") -> service_pb2.ForwardRequest:
    spec = tensor_pb2.TensorSpec(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 3])
    ref = layer_pb2.LayerRef(namespace="default", name=name)
    return service_pb2.ForwardRequest(ref=ref, mode=layer_pb2.MODE_TRAIN, input=spec, keep_input=True)


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


# --- Messages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_stock_classes_read_what_encode_writes(size: int) -> None:
    data, expected = random_bytes(size), request()
    expected.data = data
    encoded = encode(request(), memoryview(data))
    assert type(encoded) is bytes
    assert service_pb2.ForwardRequest.FromString(encoded) == expected


@pytest.mark.parametrize("size", SIZES)
def test_decode_reads_what_stock_classes_write(size: int) -> None:
    data, sent = random_bytes(size), request()
    sent.data = data
    message, view = decode(service_pb2.ForwardRequest, sent.SerializeToString())
    assert message == request()
    assert bytes(view) == data


def test_several_payloads_are_one_field() -> None:
    encoded = encode(request(), memoryview(b"gradient"), memoryview(b""), memoryview(b"input"))
    assert service_pb2.ForwardRequest.FromString(encoded).data == b"gradientinput"


def test_without_a_payload_the_field_is_absent() -> None:
    stock = request().SerializeToString()
    assert encode(request()) == stock
    assert encode(request(), memoryview(b"")) == stock
    message, data = decode(service_pb2.ForwardRequest, stock)
    assert message == request()
    assert data.nbytes == 0


def test_a_message_of_nothing_but_a_payload() -> None:
    encoded = encode(service_pb2.BackwardResponse(), memoryview(b"data"))
    assert service_pb2.BackwardResponse.FromString(encoded) == service_pb2.BackwardResponse(data=b"data")


@pytest.mark.parametrize("buffer", [b"\x7a", b"\x7a\x05data", b"\xff" * 30, b"\x00\x00"])
def test_bytes_that_are_no_message_are_refused_by_name(buffer: bytes) -> None:
    with pytest.raises(MalformedMessage, match=r"not a sharednorm\.v1\.ForwardRequest"):
        decode(service_pb2.ForwardRequest, buffer)


def test_more_than_protobuf_allows_is_refused_before_it_is_copied() -> None:
    huge = np.empty(1 << 31, np.uint8)  # address space, never touched
    tracemalloc.start()
    with pytest.raises(LimitExceeded, match=str((1 << 31) - 1)):
        encode(request(), huge.data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 16
    tracemalloc.stop()


# --- Copies -----------------------------------------------------------------------------------------


def peak_of(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [4, 1 << 10, 1 << 14, 1 << 21, 1 << 23])
def test_decode_and_as_array_leave_the_bytes_where_they_are(size: int) -> None:
    data = random_bytes(size)
    buffer = encode(request_before(size), memoryview(data))
    view = decode(service_pb2.ForwardRequest, buffer)[1]
    assert view.obj is buffer
    received = as_array(TensorLayout("float32", (size // 4,), size), view)
    assert np.shares_memory(received, np.frombuffer(buffer, np.uint8))
    assert received.tobytes() == data


def test_sending_and_receiving_copy_once() -> None:
    tensor = np.zeros((2, 3, 512, 512), np.float32)
    message, layout = request_before(tensor.nbytes), layout_of(spec_of(tensor), tensor.nbytes)
    buffer = encode(message, payload(tensor))
    assert peak_of(lambda: encode(message, payload(tensor))) < tensor.nbytes + 5000
    assert peak_of(lambda: as_array(layout, decode(service_pb2.ForwardRequest, buffer)[1])) < 5000


def request_before(size: int) -> service_pb2.ForwardRequest:
    """Return a request behind which that many bytes are aligned; large ones are not behind every request."""
    for name in ("a", "ab", "abc", "abcd"):
        buffer = encode(request(name), memoryview(bytes(size)))
        if view_is_aligned(decode(service_pb2.ForwardRequest, buffer)[1]):
            return request(name)
    raise AssertionError(f"{size} bytes are never aligned")


def view_is_aligned(view: memoryview) -> bool:
    return np.frombuffer(view, np.uint8).ctypes.data % 4 == 0


@pytest.mark.parametrize("name_length", range(1, 9))
@pytest.mark.parametrize("size", [4, 400, (1 << 14) - 4])
def test_a_small_tensor_arrives_aligned_behind_any_header(name_length: int, size: int) -> None:
    buffer = encode(request("n" * name_length), memoryview(bytes(size)))
    view = decode(service_pb2.ForwardRequest, buffer)[1]
    assert view_is_aligned(view)
    assert np.shares_memory(
        as_array(TensorLayout("float32", (size // 4,), size), view), np.frombuffer(buffer, np.uint8)
    )


# --- Arrays -----------------------------------------------------------------------------------------


def packed(array: Array) -> bytes:
    """Return an array's elements by the definition of its type, without NumPy's help."""
    values = [float(value) for value in array.ravel()]
    if array.dtype.itemsize == 4:
        return struct.pack(f"<{len(values)}f", *values)
    if array.dtype.newbyteorder("=") == np.float16:
        return struct.pack(f"<{len(values)}e", *values)
    return b"".join(struct.pack("<f", value)[2:] for value in values)


def unaligned(array: Array) -> Array:
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    result: Array = np.ndarray(array.shape, array.dtype, memory.data)
    result[...] = array
    return result


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda x: x,
    "Fortran order": np.asfortranarray,
    "channels last": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "negative strides": lambda x: x[::-1, :, ::-1],
    "slices": lambda x: x[:, ::2, 1:],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "big-endian, reversed": lambda x: x.astype(x.dtype.newbyteorder(">"))[..., ::-1],
    "unaligned": unaligned,
    "empty": lambda x: x[:0],
}


def sample(dtype_name: str, shape: tuple[int, ...] = (2, 3, 4, 5)) -> Array:
    return np.random.default_rng(3).normal(size=shape).astype(dtype_of(dtype_name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_any_array_travels_as_row_major_little_endian_elements(dtype_name: str, layout: str) -> None:
    array = LAYOUTS[layout](sample(dtype_name))
    assert bytes(payload(array)) == packed(array)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "empty"])
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
def test_any_array_comes_back_with_its_type_shape_and_values(dtype_name: str, layout: str) -> None:
    array = LAYOUTS[layout](sample(dtype_name))
    received = as_array(layout_of(spec_of(array), array.nbytes), payload(array))
    assert received.dtype == dtype_of(dtype_name)
    assert received.dtype.isnative
    assert received.flags.c_contiguous
    assert received.flags.aligned
    np.testing.assert_array_equal(received.astype(np.float64), array.astype(np.float64), strict=True)


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001])
@pytest.mark.parametrize("order", ["<", ">"])
def test_bits_are_kept(bits: int, order: str) -> None:
    array = np.array([bits], f"{order}u4").view(f"{order}f4").reshape(1, 1)
    received = as_array(layout_of(spec_of(array), 4), payload(array))
    assert int(received.view(np.uint32)[0, 0]) == bits


ZERO_COPY: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda x: x,
    "one row of a larger array": lambda x: x[1:],
    "axes of size 1 with any strides": lambda x: x[:1, :1, ::2][:, :, :1],
    "2d": lambda x: x.reshape(6, 20),
}


@pytest.mark.skipif(sys.byteorder == "big", reason="copies are needed")
@pytest.mark.parametrize("layout", ZERO_COPY)
@pytest.mark.parametrize("dtype_name", DTYPE_NAMES)
@pytest.mark.parametrize("writable", [True, False])
def test_a_contiguous_array_is_sent_from_its_own_memory(dtype_name: str, layout: str, writable: bool) -> None:
    array = ZERO_COPY[layout](sample(dtype_name))
    array.setflags(write=writable)
    view = payload(array)
    assert np.shares_memory(np.frombuffer(view, np.uint8), array)
    assert view.nbytes == array.nbytes
    assert (view.format, view.ndim) == ("B", 1)
    assert view.readonly is not writable


def test_subclasses_of_arrays_travel_by_their_elements(tmp_path: Any) -> None:
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 3))
    mapped[...] = 7
    assert bytes(payload(mapped)) == packed(np.full((2, 3), 7, np.float32))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint8, np.complex64, np.bool_, object, "S4", "f4,f4", "V4"])
def test_other_element_types_are_refused(dtype: Any) -> None:
    array = np.zeros((2, 3), dtype)
    for function in (payload, spec_of):
        with pytest.raises(UnsupportedDType, match="expected: float32, float16, bfloat16"):
            function(array)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=5), elements=st.floats(width=32, allow_nan=True)))
def test_any_values_survive(array: Array) -> None:
    message = service_pb2.ForwardRequest(input=spec_of(array))
    got, view = decode(service_pb2.ForwardRequest, encode(message, payload(array)))
    received = as_array(layout_of(got.input, array.nbytes), view)
    assert received.shape == array.shape
    assert received.tobytes() == array.tobytes()


@pytest.mark.parametrize("size", [0, 23, 25, 48])
def test_a_header_that_declares_another_size_than_the_data_has(size: int) -> None:
    with pytest.raises(MalformedMessage, match=rf"carries {size} bytes, .* shape \(2, 3\) has 24"):
        as_array(TensorLayout("float32", (2, 3), 24), memoryview(bytes(size)))


def test_received_arrays_are_writable_only_if_their_memory_is() -> None:
    layout = TensorLayout("float16", (2, 2), 8)
    assert not as_array(layout, memoryview(bytes(8))).flags.writeable
    memory = bytearray(8)
    as_array(layout, memoryview(memory))[0, 0] = 1
    assert memory[:2] == struct.pack("<e", 1)


def test_data_at_an_odd_place_is_copied_to_a_good_one() -> None:
    data = random_bytes(25)
    array = as_array(TensorLayout("float32", (6,), 24), memoryview(data)[1:])
    assert array.flags.aligned
    assert array.tobytes() == data[1:]


def test_bfloat16_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UnsupportedDType, match="pip install"):
        as_array(TensorLayout("bfloat16", (2,), 4), memoryview(bytes(4)))
