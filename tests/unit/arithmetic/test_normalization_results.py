"""The memory of large results: used again, but never while anything still refers to it."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.buffer_pool import IDLE_BYTES, LARGE_BYTES, ResultMemory
from tests.support import oracle

FLOAT = np.dtype(np.float32)
LARGE = (LARGE_BYTES // 4,)


def address(array: oracle.Array) -> int:
    return int(array.ctypes.data)


def test_comes_back_when_the_last_reference_is_gone() -> None:
    memory = ResultMemory()
    first = memory.empty(LARGE, FLOAT)
    where = address(first)
    del first
    assert address(memory.empty(LARGE, FLOAT)) == where


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[5:7],
        lambda array: array.reshape(2, -1).T,
        lambda array: array.view(np.uint8)[::-1],
        memoryview,
        lambda array: memoryview(array)[3:],
        lambda array: np.frombuffer(memoryview(array).cast("B"), np.uint8),
        lambda array: np.asarray(array).flat,
        lambda array: iter([array[0:1]]),
    ],
)
def test_does_not_come_back_before(hold: Callable[[oracle.Array], object]) -> None:
    memory = ResultMemory()
    array = memory.empty(LARGE, FLOAT)
    where = address(array)
    held = hold(array)
    del array
    gc.collect()
    assert address(memory.empty(LARGE, FLOAT)) != where
    assert held is not None


@pytest.mark.torch
def test_does_not_come_back_before_a_tensor_of_it_is_gone() -> None:
    torch = pytest.importorskip("torch")
    memory = ResultMemory()
    array = memory.empty(LARGE, FLOAT)
    where = address(array)
    tensor = torch.from_numpy(array).view(2, -1)[1]
    del array
    assert address(memory.empty(LARGE, FLOAT)) != where
    assert tensor.numel() == LARGE[0] // 2


def test_a_result_is_an_ordinary_array() -> None:
    array = ResultMemory().empty((4, LARGE[0]), FLOAT)
    assert type(array) is np.ndarray
    assert array.shape == (4, LARGE[0])
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert array.flags.aligned
    array[...] = 3
    assert float(pickle.loads(pickle.dumps(array[:, :2])).sum()) == 24


def test_a_block_serves_a_slightly_smaller_result() -> None:
    memory = ResultMemory()
    large = memory.empty((LARGE[0] + LARGE[0] // 8,), FLOAT)
    where = address(large)
    del large
    found = memory.empty(LARGE, FLOAT)
    assert address(found) == where
    assert found.shape == LARGE
    del found
    assert address(memory.empty((2 * LARGE[0],), FLOAT)) != where


def test_what_is_kept_is_bounded() -> None:
    memory = ResultMemory()
    arrays = [memory.empty(LARGE, FLOAT) for _ in range(3 * IDLE_BYTES // LARGE_BYTES)]
    places = [address(array) for array in arrays]
    del arrays
    assert sum(block.nbytes for block in memory._idle) == IDLE_BYTES
    again = [memory.empty(LARGE, FLOAT) for _ in range(IDLE_BYTES // LARGE_BYTES)]
    assert {address(array) for array in again} <= set(places)
    assert memory._idle == []
    enormous = memory.empty((IDLE_BYTES // 4 + 1,), FLOAT)
    del enormous
    assert memory._idle == []


def test_small_results_are_numpys() -> None:
    memory = ResultMemory()
    small = memory.empty((LARGE[0] - 1,), FLOAT)
    assert small.flags.owndata
    del small
    assert memory._idle == []


def test_a_block_that_comes_back_while_the_lock_is_held_is_let_go() -> None:
    memory = ResultMemory()
    array = memory.empty(LARGE, FLOAT)
    with memory._lock:
        del array
        other = memory.empty(LARGE, FLOAT)
    assert memory._idle == []
    assert other.shape == LARGE


def test_two_threads_never_get_the_same_block() -> None:
    memory = ResultMemory()

    def use(number: int) -> bool:
        for turn in range(20):
            array = memory.empty(LARGE, FLOAT)
            array[::4096] = 100 * number + turn
            if not (array[::4096] == 100 * number + turn).all():
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(4), timeout=60))


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_results_of_two_calls_do_not_share_memory(name: str) -> None:
    compute: Arithmetic = arithmetic(name)
    x = oracle.random_tensor(1, (2, 3, 1200, 1200))
    ones = np.ones(3, np.float32)
    kept, batch = compute.forward(x, ones, ones, 1e-5)
    before = kept.copy()
    for _ in range(3):
        dx, _, _ = compute.backward(x, kept, batch, ones, 1e-5)
        y = compute.normalize(x, batch.mean, batch.m2, ones, ones, 1e-5)
        assert dx is not None
        assert not np.shares_memory(dx, y)
    np.testing.assert_array_equal(kept, before)
