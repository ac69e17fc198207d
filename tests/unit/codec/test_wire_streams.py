"""Tensors in chunks: cut, framed, and put together again, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharednorm.codec.wire import ChunkOrder, chunks, decode, encode_chunk
from sharednorm.errors import MalformedMessage
from sharednorm.v1 import service_pb2

STREAMED = (
    service_pb2.ForwardStreamRequest,
    service_pb2.ForwardStreamResponse,
    service_pb2.BackwardStreamRequest,
    service_pb2.BackwardStreamResponse,
)


# --- Cutting ----------------------------------------------------------------------------------------


def test_chunks_are_cut_in_order_with_their_offsets() -> None:
    cut = [(offset, bytes(view)) for offset, view in chunks([memoryview(b"abcdefg")], 3)]
    assert cut == [(0, b"abc"), (3, b"def"), (6, b"g")]


def test_a_chunk_never_spans_two_payloads_and_is_never_empty() -> None:
    payloads = [memoryview(part) for part in (b"abcd", b"", b"efghi")]
    assert [(offset, bytes(view)) for offset, view in chunks(payloads, 3)] == [
        (0, b"abc"), (3, b"d"), (4, b"efg"), (7, b"hi"),
    ]  # fmt: skip
    assert list(chunks([memoryview(b"")], 3)) == []
    assert list(chunks([], 3)) == []


def test_chunks_are_views() -> None:
    data = bytes(100)
    assert all(view.obj is data for _, view in chunks([memoryview(data)], 7))


# --- Framing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 127, 128, 1 << 20, 1 << 35, (1 << 63) + 5, (1 << 64) - 1])
@pytest.mark.parametrize("size", [1, 127, 128, 1 << 14, 1 << 20])
@pytest.mark.parametrize("cls", STREAMED, ids=lambda cls: cls.__name__)
def test_a_chunk_is_the_message_that_stock_classes_write(cls: Any, size: int, offset: int) -> None:
    chunk = np.random.default_rng(size).bytes(size)
    encoded = encode_chunk(offset, memoryview(chunk))
    assert type(encoded) is bytes
    assert encoded == cls(offset=offset, chunk=chunk).SerializeToString()
    message, view = decode(cls, encoded)
    assert (message.offset, message.HasField("header"), message.chunk) == (offset, False, b"")
    assert view.obj is encoded
    assert view == chunk


# --- Order ------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.integers(1, 50), st.integers(0, 200))
def test_whatever_was_cut_is_put_together(data: bytes, chunk_bytes: int, seam: int) -> None:
    order, whole = ChunkOrder(len(data)), bytearray()
    for offset, chunk in chunks([memoryview(data)[:seam], memoryview(data)[seam:]], chunk_bytes):
        message, view = decode(service_pb2.ForwardStreamRequest, encode_chunk(offset, chunk))
        order.take(message.offset, view.nbytes)
        whole += view
    order.finish()
    assert whole == data


def order_after(nbytes: int, *parts: int) -> ChunkOrder:
    order, offset = ChunkOrder(nbytes), 0
    for part in parts:
        order.take(offset, part)
        offset += part
    return order


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        (5, 2, "begins at byte 5 .expected: 4"),
        (0, 2, "begins at byte 0 .expected: 4"),
        (3, 2, "begins at byte 3 .expected: 4"),
        ((1 << 64) - 1, 2, "begins at byte 18446744073709551615"),
        (4, 7, "ends at byte 11 of a tensor of 10"),
        (4, 0, "is empty"),
        (7, 0, "is empty"),
    ],
    ids=["gap", "repeat", "overlap", "far away", "overrun", "empty", "empty and far"],
)
def test_a_chunk_that_does_not_fit_is_refused_and_changes_nothing(offset: int, size: int, words: str) -> None:
    order = order_after(10, 4)
    with pytest.raises(MalformedMessage, match=words):
        order.take(offset, size)
    order.take(4, 6)
    order.finish()


def test_nothing_fits_behind_the_end() -> None:
    order = order_after(4, 4)
    for offset in (4, 0):
        with pytest.raises(MalformedMessage):
            order.take(offset, 1)
    order.finish()


@pytest.mark.parametrize("parts", [(), (1,), (4, 5)])
def test_a_stream_that_ends_early_is_refused(parts: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessage, match=f"ended after {sum(parts)} of 10 bytes"):
        order_after(10, *parts).finish()


def test_a_tensor_without_bytes_needs_no_chunk_and_takes_none() -> None:
    with pytest.raises(MalformedMessage, match="ends at byte 1 of a tensor of 0"):
        order_after(0, 1)
    order_after(0).finish()
