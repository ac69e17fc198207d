"""Tensors on the wire: the one place where they become bytes, and bytes become tensors.

A message that carries a tensor has its elements in field 15, behind everything else. Python's protobuf
runtime copies such a field several times, so this module frames it by hand: `encode` joins the small
fields, which the runtime serializes, with the array's own memory, and `decode` finds the field in the
received bytes and leaves it where it is. One copy each way, and on the wire an ordinary protobuf message.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from sharednorm.codec.protobuf_wire import field_header, find_field, varint
from sharednorm.core.dtypes import check_dtype, dtype_of
from sharednorm.core.types import Array
from sharednorm.errors import InvalidShape, LimitExceeded, MalformedMessage, UnsupportedDType
from sharednorm.v1 import tensor_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

    M = TypeVar("M", bound=Message)
else:
    M = TypeVar("M")

PROTOCOL = 3
"""Version of the contract that this library speaks."""

DATA_FIELD = 15
"""Number of the field that carries a tensor's bytes, in every message that has one."""

DEFAULT_CHUNK_BYTES = 1 << 20
MAX_UNARY_BYTES = 1 << 20
"""Larger tensors travel as streams."""

MAX_RANK = 8
"""Most axes that a shape may name; the layers take at most 5."""

# Of the largest element. Received bytes objects begin at a multiple of 16, and so a field that begins at a
# multiple of 4 of its message can be used as an array where it lies.
_ALIGN = 4

_OFFSET_TAG = b"\x10"  # field 2, a varint

_DTYPES = {
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
    "bfloat16": tensor_pb2.DATA_TYPE_BFLOAT16,
}
_DTYPE_NAMES = {int(number): name for name, number in _DTYPES.items()}
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


# --- Type and shape ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorLayout:
    """A tensor's type and shape, checked.

    Attributes:
        dtype_name: "float32", "float16" or "bfloat16".
        shape: Sizes of the axes, each at least 1.
        nbytes: Bytes of all elements.
    """

    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self.dtype_name]


def spec_of(array: Array) -> tensor_pb2.TensorSpec:
    """Describe an array.

    Raises:
        UnsupportedDType: Its elements are not float32, float16 or bfloat16.
    """
    return spec(check_dtype(array.dtype), array.shape)


def spec(dtype_name: str, shape: tuple[int, ...]) -> tensor_pb2.TensorSpec:
    """Describe a tensor of the element type "float32", "float16" or "bfloat16"."""
    return tensor_pb2.TensorSpec(dtype=_DTYPES[dtype_name], shape=shape)


def layout_of(spec: tensor_pb2.TensorSpec, max_bytes: int, *, limit: str = "max_tensor_bytes") -> TensorLayout:
    """Check a received type and shape. Nothing is allocated, and no number overflows.

    Args:
        spec: What the message says.
        max_bytes: Most bytes that the tensor may have.
        limit: What that limit is called, for the message.

    Raises:
        UnsupportedDType: The element type is not set, or unknown.
        InvalidShape: There are more than 8 axes, or one whose size is not at least 1.
        LimitExceeded: The tensor has more than `max_bytes`.
    """
    name = _DTYPE_NAMES.get(int(spec.dtype))
    if name is None:
        raise UnsupportedDType(
            f"Unsupported dtype: the message says element type {int(spec.dtype)} (expected: {', '.join(_DTYPES)})"
        )
    rank = len(spec.shape)
    if not 1 <= rank <= MAX_RANK:
        raise InvalidShape(f"the message's shape has {rank} axes (expected: 1 to {MAX_RANK})")
    shape = tuple(int(size) for size in spec.shape)
    if min(shape) < 1:
        raise InvalidShape(f"the message's shape is {shape} (expected: every size at least 1)")
    nbytes = math.prod(shape) * _ITEM_BYTES[name]
    if nbytes > max_bytes:
        raise LimitExceeded(
            f"a {name} tensor of shape {shape} has {nbytes} bytes (expected: at most {limit} = {max_bytes})",
            {"limit": limit, "value": str(max_bytes)},
        )
    return TensorLayout(name, shape, nbytes)


# --- Arrays and bytes -------------------------------------------------------------------------------


def payload(array: Array) -> memoryview:
    """Return an array's elements as they travel: row-major, little-endian bytes.

    It is the array's own memory where that already is so, and a copy otherwise. Bits are kept, those of
    NaNs included.

    Raises:
        UnsupportedDType: The elements are not float32, float16 or bfloat16.
    """
    check_dtype(array.dtype)
    # As integers of that size: bfloat16 exports no buffer, and no conversion can touch the bits.
    integers = np.dtype(f"u{array.dtype.itemsize}")
    bits = np.asarray(array).view(integers.newbyteorder(array.dtype.byteorder))
    wire_order = np.ascontiguousarray(bits, dtype=integers.newbyteorder("<"))
    return wire_order.reshape(-1).view(np.uint8).data


def as_array(layout: TensorLayout, data: memoryview) -> Array:
    """Return received bytes as an array: the same memory, writable only if that is.

    Bytes that do not begin at a multiple of the element's size, as a foreign encoder may send them, are copied,
    because compiled code expects aligned arrays. So are all on a big-endian machine.

    Raises:
        MalformedMessage: There are more or fewer bytes than the layout says.
        UnsupportedDType: It is bfloat16, and `ml_dtypes` is not installed.
    """
    if data.nbytes != layout.nbytes:
        raise MalformedMessage(
            f"the message carries {data.nbytes} bytes, and a {layout.dtype_name} tensor of shape {layout.shape} "
            f"has {layout.nbytes}"
        )
    dtype = dtype_of(layout.dtype_name)
    bits = np.frombuffer(data, dtype=f"<u{dtype.itemsize}")
    return np.require(bits, f"=u{dtype.itemsize}", "A").view(dtype).reshape(layout.shape)


def to_native(array: Array) -> None:
    """Turn an array whose memory was filled with received bytes into what those mean: on most machines, it is that."""
    if sys.byteorder == "big":
        array.view(f"u{array.dtype.itemsize}").byteswap(inplace=True)


# --- Messages ---------------------------------------------------------------------------------------


def encode(message: Message, *payloads: memoryview) -> bytes:
    """Serialize a message whose field 15 is the payloads, one behind the other.

    Args:
        message: The other fields; its own field 15 is not set.
        payloads: Bytes of field 15. Without any byte the field is absent.

    Raises:
        LimitExceeded: The field would be larger than protobuf allows, 2 GiB.
    """
    size = sum(view.nbytes for view in payloads)
    head = message.SerializeToString()
    if not size:
        return head
    # grpcio needs exactly bytes; a single join is the only copy.
    return b"".join((head, field_header(DATA_FIELD, size, behind=len(head), align=_ALIGN), *payloads))


def parse(cls: type[M], buffer: bytes) -> M:
    """Parse a message that carries no tensor.

    Raises:
        MalformedMessage: protobuf refuses the bytes.
    """
    try:
        return cls.FromString(buffer)
    except (DecodeError, UnicodeDecodeError) as error:  # the latter by protobuf's pure Python runtime
        raise MalformedMessage(f"the bytes are not a {cls.DESCRIPTOR.full_name}: {error}") from error


def decode(cls: type[M], buffer: bytes, parse: Callable[[type[M], bytes], M] = parse) -> tuple[M, memoryview]:
    """Parse a message; its field 15 comes back as a view of the buffer, and is empty in the message.

    It means the same as `cls.FromString(buffer)` for any bytes: of several fields 15 the last counts.

    Args:
        cls: The message's.
        buffer: Its bytes.
        parse: Parses all of it but field 15, or all of it where that is not easily found.

    Raises:
        MalformedMessage: protobuf refuses the bytes.
    """
    found = find_field(buffer, DATA_FIELD)
    if found is None:
        message = parse(cls, buffer)
        field = cls.DESCRIPTOR.fields_by_number[DATA_FIELD].name
        data = memoryview(getattr(message, field))
        message.ClearField(field)
        return message, data
    others, start, end = found
    return parse(cls, others), memoryview(buffer)[start:end]


# --- Chunks of a stream -----------------------------------------------------------------------------


def chunks(payloads: Sequence[memoryview], chunk_bytes: int) -> Iterator[tuple[int, memoryview]]:
    """Cut payloads, taken one behind the other, into views of at most `chunk_bytes`, each with its offset."""
    offset = 0
    for view in payloads:
        for begin in range(0, view.nbytes, chunk_bytes):
            chunk = view[begin : begin + chunk_bytes]
            yield offset, chunk
            offset += chunk.nbytes


def encode_chunk(offset: int, chunk: memoryview) -> bytes:
    """Serialize a message of any of the four streams that carries a chunk."""
    place = _OFFSET_TAG + varint(offset) if offset else b""
    return b"".join((place, field_header(DATA_FIELD, chunk.nbytes), chunk))


class ChunkOrder:
    """Checks that chunks come in order, without gaps, and as many bytes as were announced.

    Args:
        nbytes: Size of the whole, already checked against the limits.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._received = 0

    def take(self, offset: int, nbytes: int) -> None:
        """Take note of the next chunk.

        Raises:
            MalformedMessage: It is empty, does not begin where the last one ended, or goes beyond the end.
        """
        if not nbytes:
            raise MalformedMessage("a chunk is empty (expected: at least 1 byte)")
        if offset != self._received:
            raise MalformedMessage(f"a chunk begins at byte {offset} (expected: {self._received})")
        end = offset + nbytes
        if end > self._nbytes:
            raise MalformedMessage(f"a chunk ends at byte {end} of a tensor of {self._nbytes}")
        self._received = end

    def finish(self) -> None:
        """Take note of the stream's end.

        Raises:
            MalformedMessage: Bytes are missing.
        """
        if self._received != self._nbytes:
            raise MalformedMessage(f"the stream ended after {self._received} of {self._nbytes} bytes")
