"""Frames of a direct connection, cut anywhere on their way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharednorm.codec import frames


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(10)
        other.settimeout(10)
        yield one, other


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.binary(max_size=70_000), st.sampled_from(["start", "take", "into"])), min_size=1, max_size=5),
    st.lists(st.floats(0, 1), max_size=6),
)
def test_whatever_is_cut_is_read_again(reads: list[tuple[bytes, str]], places: list[float]) -> None:
    one, other = socket.socketpair()
    with one, other:
        reader = frames.Reader(other)
        stream = b"".join(part for part, _ in reads)
        cuts = sorted(int(place * len(stream)) for place in places)

        def send() -> None:
            begin = 0
            for cut in [*cuts, len(stream)]:
                one.sendall(stream[begin:cut])
                begin = cut

        thread = threading.Thread(target=send)
        thread.start()
        for part, how in reads:
            if how == "start" and 0 < len(part) < 1000:
                assert bytes(reader.start(len(part))) == part
            elif how == "take":
                assert reader.take(len(part)) == part
            else:
                room = bytearray(len(part))
                reader.take_into(memoryview(room))
                assert room == part
        thread.join(10)
        assert not reader.waiting


def test_the_other_side_has_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    reader = frames.Reader(other)
    one.sendall(b"abc")
    one.close()
    with pytest.raises(EOFError):
        reader.start(4)
    with pytest.raises(EOFError):
        reader.take(5)


def test_a_large_frame_is_sent_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    one.settimeout(None)
    parts: list[bytes | memoryview] = [b"head", memoryview(bytes(range(256)) * 20_000), b"", b"tail"]
    thread = threading.Thread(target=frames.send, args=(one, *parts))
    thread.start()
    assert frames.Reader(other).take(5_120_008) == b"".join(parts)
    thread.join(10)


def test_a_read_may_take_so_long_and_no_longer(pair: tuple[socket.socket, socket.socket]) -> None:
    _, other = pair
    other.settimeout(None)
    frames.set_timeout(other, socket.SO_RCVTIMEO, 0.05)
    with pytest.raises(BlockingIOError):
        other.recv(1)


def test_the_sizes_are_those_of_the_documentation() -> None:
    assert (frames.GREETING.size, frames.REQUEST.size) == (24, 24)
    assert (frames.PLACES.size, frames.REPLY.size, frames.ALLOCATE.size) == (48, 16, 16)
    assert len(frames.MAGIC) == 16
