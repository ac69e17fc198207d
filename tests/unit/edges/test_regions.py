"""Memory that a server shares: sealed, counted, and named by its session alone."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest

from sharednorm.codec import wire
from sharednorm.errors import LimitExceeded, MalformedMessage
from sharednorm_server.direct.shared_memory import InRegions, SharedMemory, SharedMemorySession

PAGE = mmap.PAGESIZE
LAYOUT = wire.TensorLayout("float32", (2, 3, 4), 96)


@pytest.fixture
def memory() -> SharedMemory:
    return SharedMemory(8 * PAGE, 12 * PAGE, lambda _: None)


@pytest.fixture
def session(memory: SharedMemory) -> Iterator[SharedMemorySession]:
    opened = memory.open()
    yield opened
    opened.close()
    gc.collect()
    assert memory.used == 0


def allocate(session: SharedMemorySession, nbytes: int) -> int:
    region, descriptor = session.allocate(nbytes)
    os.close(descriptor)
    return region.number


def test_a_region_is_the_same_memory_on_both_sides(session: SharedMemorySession) -> None:
    region, descriptor = session.allocate(100)
    with mmap.mmap(descriptor, PAGE) as theirs:
        theirs[:5] = b"hello"
        assert region.memory[:5] == b"hello"
    os.close(descriptor)


def test_nobody_can_take_pages_away_or_unseal_it(session: SharedMemorySession) -> None:
    _, descriptor = session.allocate(2 * PAGE)
    for size in (0, PAGE, 3 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(descriptor)


def test_bytes_are_counted_until_nobody_uses_them(memory: SharedMemory, session: SharedMemorySession) -> None:
    number = allocate(session, PAGE + 1)
    assert memory.used == session.used == 2 * PAGE
    (array,) = InRegions(session, (number, 0, 0, 0, 0, 0)).arrays([LAYOUT])
    session.free(number)
    session.free(number)
    gc.collect()
    assert memory.used == 2 * PAGE  # a call, or an input that is kept, has it
    del array
    gc.collect()
    assert memory.used == session.used == 0


def test_a_session_and_all_together_have_so_much(memory: SharedMemory, session: SharedMemorySession) -> None:
    allocate(session, 8 * PAGE)
    with pytest.raises(LimitExceeded, match=f"shared_memory_bytes_per_client = {8 * PAGE}"):
        session.allocate(1)
    other = memory.open()
    allocate(other, 4 * PAGE)
    with pytest.raises(LimitExceeded, match=f"shared_memory_bytes = {12 * PAGE}"):
        other.allocate(1)
    other.close()
    gc.collect()
    assert memory.used == 8 * PAGE


def test_the_end_of_a_session_is_told_and_takes_its_memory_along() -> None:
    forgotten: list[str] = []
    memory = SharedMemory(1 << 20, 1 << 20, forgotten.append)
    session = memory.open()
    allocate(session, 1)
    assert memory.find(session.id) is session
    session.close()
    session.close()
    assert memory.find(session.id) is None
    assert forgotten == [session.keeper] * 2
    gc.collect()
    assert memory.used == 0


def test_more_than_the_machine_has() -> None:
    memory = SharedMemory(1 << 62, 1 << 62, lambda _: None)
    session = memory.open()
    with pytest.raises(LimitExceeded, match="no memory for"):
        session.allocate(1 << 60)
    assert (memory.used, session.used) == (0, 0)


@pytest.mark.parametrize("number", [0, 2, 1 << 63])
def test_a_region_that_there_is_not(session: SharedMemorySession, number: int) -> None:
    allocate(session, 1)
    with pytest.raises(MalformedMessage, match=f"no region {number}"):
        InRegions(session, (number, 0, 0, 0, 1, 0)).arrays([LAYOUT])


def test_another_sessions_region(memory: SharedMemory, session: SharedMemorySession) -> None:
    other = memory.open()
    allocate(other, 1)
    assert allocate(other, 1) == 2
    allocate(session, 1)
    with pytest.raises(MalformedMessage, match="no region 2"):
        InRegions(session, (2, 0, 0, 0, 0, 0)).arrays([LAYOUT])
    other.close()


@pytest.mark.parametrize("offset", [PAGE - 95, PAGE, PAGE + 4, 1 << 40, (1 << 64) - 4, 1, 2, 3])
def test_a_place_that_is_not_in_a_region(session: SharedMemorySession, offset: int) -> None:
    number = allocate(session, 1)
    tensors = InRegions(session, (number, offset, 0, 0, number, offset))
    with pytest.raises(MalformedMessage, match="are not in a region of"):
        tensors.arrays([LAYOUT])
    with pytest.raises(MalformedMessage, match=r"are not in a region of|overlaps"):
        tensors.out(LAYOUT, over_input=True)


def test_a_tensor_ends_where_its_region_does(session: SharedMemorySession) -> None:
    number = allocate(session, 1)
    (x,) = InRegions(session, (number, PAGE - 96, 0, 0, 0, 0)).arrays([LAYOUT])
    x[...] = 1
    assert session.regions[number].memory[-4:] == np.float32(1).tobytes()


@pytest.mark.parametrize(
    ("inputs", "output", "over_input", "fine"),
    [
        ((1, 0, 0, 0), (1, 96), False, True),
        ((1, 96, 0, 0), (1, 0), False, True),
        ((1, 0, 0, 0), (2, 0), False, True),
        ((1, 0, 0, 0), (1, 0), True, True),
        ((1, 0, 0, 0), (1, 0), False, False),
        ((1, 0, 0, 0), (1, 92), True, False),
        ((1, 92, 0, 0), (1, 0), True, False),
        ((2, 0, 1, 4), (1, 0), True, False),
    ],
)
def test_where_an_output_may_be(
    session: SharedMemorySession, inputs: tuple[int, ...], output: tuple[int, int], over_input: bool, fine: bool
) -> None:
    allocate(session, 1)
    allocate(session, 1)
    tensors = InRegions(session, (*inputs, *output))
    if fine:
        out = tensors.out(LAYOUT, over_input=over_input)
        assert out is not None
        assert out.flags.writeable
    else:
        with pytest.raises(MalformedMessage, match="overlaps"):
            tensors.out(LAYOUT, over_input=over_input)
