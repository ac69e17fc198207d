"""Shared memory while the server looks for more of it: what other threads have, and what they can have, is theirs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.transport.deadline import Deadline
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.direct.shared_memory import Region, SharedMemory, SharedMemorySession
from tests.support.inside import exchange_of
from tests.support.processes.server import in_process

SECONDS, SOON = 10, 5
LARGE = 1 << 22


def test_other_threads_do_not_wait_while_the_server_looks_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found, allocate = threading.Event(), threading.Event(), SharedMemory.allocate

    def slowly(memory: SharedMemory, session: SharedMemorySession, nbytes: int) -> tuple[Region, int]:
        if nbytes >= LARGE:
            asked.set()
            assert found.wait(SECONDS)
        return allocate(memory, session, nbytes)

    monkeypatch.setattr(SharedMemory, "allocate", slowly)
    config, dtype = ServerConfig(listen=f"unix:{tmp_path / 'socket'}"), np.dtype(np.float32)
    with (
        in_process(config) as server,
        sharednorm.connect(server.address, transport="shm") as hub,
        ThreadPoolExecutor(4) as threads,
    ):
        way = exchange_of(hub)._ways._way
        assert way is not None
        assert way.regions is not None
        regions = way.regions
        mine, given_back = (regions.empty((1000,), dtype, Deadline(SECONDS)) for _ in range(2))
        del given_back
        large = threads.submit(regions.empty, (LARGE,), dtype, Deadline(SECONDS))
        assert asked.wait(SECONDS)
        try:
            assert threads.submit(regions.find, mine).result(SOON) is not None
            again = threads.submit(regions.empty, (1000,), dtype, Deadline(SECONDS)).result(SOON)
            assert not large.done()
        finally:
            found.set()
        arrays = [mine, again, large.result(SECONDS)]
        assert len({regions.find(array) for array in arrays} - {None}) == 3


def test_regions_that_threads_ask_for_at_the_same_time_are_their_own(tmp_path: Path) -> None:
    config, dtype = ServerConfig(listen=f"unix:{tmp_path / 'socket'}"), np.dtype(np.float32)
    with (
        in_process(config) as server,
        sharednorm.connect(server.address, transport="shm") as hub,
        ThreadPoolExecutor(4) as threads,
    ):
        way = exchange_of(hub)._ways._way
        assert way is not None
        assert way.regions is not None
        regions = way.regions

        def use(thread: int) -> None:
            rng, end = np.random.default_rng(thread), time.monotonic() + SECONDS
            for step in range(100):
                array = regions.empty((int(rng.integers(1, 1 << 18)),), dtype, Deadline(SECONDS))
                array[:] = thread * 1000 + step
                assert regions.find(array) is not None
                if step % 10 == 0:
                    regions.abandon(array)
                assert (array == thread * 1000 + step).all()
                assert time.monotonic() < end

        for future in [threads.submit(use, thread) for thread in range(4)]:
            future.result(SECONDS)
        assert regions._reused(1 << 40) is None  # of all that came back, none is as large
        regions._free_all(0, Deadline(SECONDS))
        assert (regions._starts, regions._regions) == ([], {})
