"""The pinned chunks: whoever waits for one is woken by everything that may let it go on, failures too."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sharednorm.errors import DeviceLost, DeviceOutOfMemory, SharedNormError
from tests.support.kernels import cuda


class Pinning:
    """Stands for the GPU's thread while chunks are made, so that a test decides how each attempt ends, and when."""

    def __init__(self, outcomes: list[SharedNormError | None], together: int) -> None:
        self._outcomes = iter(outcomes)
        self._barrier = threading.Barrier(together)
        self._lock = threading.Lock()

    def call(self, _: Callable[..., Any]) -> Any:
        """Make a chunk, or fail, once so many threads are here."""
        self._barrier.wait(10)
        with self._lock:
            outcome = next(self._outcomes)
        if outcome is not None:
            raise outcome
        return np.empty(8, np.uint8)


def takers(staging: Any, number: int) -> list[str]:
    """Take a chunk in each of some threads, give it back, and return how each ended."""
    ends: list[str] = []

    def take() -> None:
        try:
            staging.give_back(staging.take())
        except SharedNormError as error:
            ends.append(error.reason)
        else:
            ends.append("done")

    threads = [threading.Thread(target=take, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(ends) == number, "a thread waits for ever"
    return sorted(ends)


@pytest.fixture
def staging_on() -> Callable[[Any], Any]:
    cuda.prepare()
    from sharednorm_server.device.cuda.staging import Staging

    return Staging


def test_a_gpu_that_is_lost_while_all_chunks_are_made_leaves_nobody_waiting(staging_on: Callable[[Any], Any]) -> None:
    # 16 make a chunk each, and 4 wait for one of those.
    pinning = Pinning([DeviceLost("gone")] * 20, 4)
    assert takers(staging_on(pinning), 20) == ["DEVICE_LOST"] * 20


def test_two_who_find_no_memory_at_once_both_hear_of_it(staging_on: Callable[[Any], Any]) -> None:
    pinning = Pinning([DeviceOutOfMemory("none")] * 2, 2)
    assert takers(staging_on(pinning), 2) == ["DEVICE_OUT_OF_MEMORY"] * 2


def test_those_that_there_are_have_to_do(staging_on: Callable[[Any], Any]) -> None:
    pinning = Pinning([None, *[DeviceOutOfMemory("none")] * 4], 1)
    staging = staging_on(pinning)
    first = staging.take()
    waiting = threading.Thread(target=lambda: staging.give_back(staging.take()))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()  # there is memory for one chunk only, and somebody has it
    assert not staging.wait_idle(0)
    staging.give_back(first)
    waiting.join(10)
    assert not waiting.is_alive()
    assert staging.wait_idle(1)
