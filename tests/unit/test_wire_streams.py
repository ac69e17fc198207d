"""Tensors in chunks: cut, framed, and put together again, or refused."""

from __future__ import annotations

import resource
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharednorm.errors import LimitExceeded, MalformedMessage
from sharednorm.v1 import service_pb2
from sharednorm.wire import Assembler, chunks, decode, encode_chunk

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


# --- Putting together -------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.integers(1, 50), st.integers(0, 200))
def test_whatever_was_cut_is_put_together(data: bytes, chunk_bytes: int, seam: int) -> None:
    assembler = Assembler(len(data))
    for offset, chunk in chunks([memoryview(data)[:seam], memoryview(data)[seam:]], chunk_bytes):
        message, view = decode(service_pb2.ForwardStreamRequest, encode_chunk(offset, chunk))
        assembler.add(message.offset, view)
    whole = assembler.finish()
    assert bytes(whole) == data
    assert not whole.readonly


def assembler_with(nbytes: int, *parts: bytes) -> Assembler:
    assembler, offset = Assembler(nbytes), 0
    for part in parts:
        assembler.add(offset, memoryview(part))
        offset += len(part)
    return assembler


@pytest.mark.parametrize(
    ("offset", "chunk", "words"),
    [
        (5, b"ab", "begins at byte 5 .expected: 4"),
        (0, b"ab", "begins at byte 0 .expected: 4"),
        (3, b"ab", "begins at byte 3 .expected: 4"),
        ((1 << 64) - 1, b"ab", "begins at byte 18446744073709551615"),
        (4, b"abcdefg", "ends at byte 11 of a tensor of 10"),
        (4, b"", "is empty"),
        (7, b"", "is empty"),
    ],
    ids=["gap", "repeat", "overlap", "far away", "overrun", "empty", "empty and far"],
)
def test_a_chunk_that_does_not_fit_is_refused_and_changes_nothing(offset: int, chunk: bytes, words: str) -> None:
    assembler = assembler_with(10, b"0123")
    with pytest.raises(MalformedMessage, match=words):
        assembler.add(offset, memoryview(chunk))
    assembler.add(4, memoryview(b"456789"))
    assert bytes(assembler.finish()) == b"0123456789"


def test_nothing_fits_behind_the_end() -> None:
    assembler = assembler_with(4, b"0123")
    for offset in (4, 0):
        with pytest.raises(MalformedMessage):
            assembler.add(offset, memoryview(b"x"))
    assert bytes(assembler.finish()) == b"0123"


@pytest.mark.parametrize("parts", [(), (b"0",), (b"0123", b"45678")])
def test_a_stream_that_ends_early_is_refused(parts: tuple[bytes, ...]) -> None:
    received = sum(map(len, parts))
    with pytest.raises(MalformedMessage, match=f"ended after {received} of 10 bytes"):
        assembler_with(10, *parts).finish()


def test_a_tensor_without_bytes_needs_no_chunk_and_takes_none() -> None:
    with pytest.raises(MalformedMessage, match="ends at byte 1 of a tensor of 0"):
        assembler_with(0, b"x")
    assert assembler_with(0).finish().nbytes == 0


def test_the_whole_is_memory_of_its_own() -> None:
    sent = bytearray(b"0123")
    assembler = assembler_with(4, bytes(sent))
    whole = assembler.finish()
    whole[0] = 0
    assert sent == b"0123"
    assert np.frombuffer(whole, np.float32).flags.aligned


# --- What a peer's words cost -----------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_declaring_gigabytes_costs_nothing_and_sending_little_costs_little() -> None:
    tracemalloc.start()
    assembler = Assembler(1 << 33)
    assert tracemalloc.get_traced_memory()[1] < 10_000
    tracemalloc.stop()
    del assembler
    assembler = Assembler(1 << 30)
    before = resident_bytes()
    assembler.add(0, memoryview(bytes(1 << 10)))
    assert resident_bytes() - before < 16 << 20


def test_more_than_the_machine_has_is_refused_as_a_limit() -> None:
    with pytest.raises(LimitExceeded, match=f"no memory for a tensor of {1 << 62} bytes"):
        Assembler(1 << 62).add(0, memoryview(b"x"))
