"""Failures on demand, and leaks at exit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.emulation.load import count, fail
from tests.emulation.process import run

ALLOCATE = """
from tests.emulation.load import load
load()
import pycuda.driver as cuda
cuda.init()
context = cuda.Device(0).retain_primary_context()
context.push()
memory = cuda.mem_alloc(48)
import ctypes
load().cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(48))
memory.free()
context.pop()
"""


def test_the_nth_allocation(cuda: Any) -> None:
    fail("allocation:2,allocation:3")
    first = cuda.mem_alloc(16)
    with pytest.raises(cuda.MemoryError):  # PyCUDA collects garbage and asks once more
        cuda.mem_alloc(16)
    last = cuda.mem_alloc(16)
    first.free()
    last.free()


def test_one_allocation_that_fails_is_asked_for_again(cuda: Any) -> None:
    before = count("total_allocations")
    fail("allocation:1")
    cuda.mem_alloc(16).free()
    assert count("total_allocations") == before + 2


def test_pinned_allocations_and_all_from_the_nth(cuda: Any) -> None:
    fail("allocation:1+")
    for _ in range(3):
        with pytest.raises(cuda.MemoryError):
            cuda.pagelocked_empty(16, np.float32)


def test_the_nth_launch_is_refused_and_nothing_runs(vector: Any) -> None:
    fail("launch:2")
    vector.launch()
    vector.cuda.memset_d32(vector.memory[1], 0, vector.x.size)
    with pytest.raises(vector.cuda.LaunchError, match="too many resources"):
        vector.launch()
    assert not vector.results()[0].any()
    vector.launch()
    assert vector.results()[0].any()


def test_a_launch_that_faults_loses_the_device_when_it_runs(vector: Any) -> None:
    fail("fault:1")
    stream = vector.cuda.Stream()
    vector.launch(stream)
    for _ in range(2):
        with pytest.raises(vector.cuda.LogicError, match="illegal memory access"):
            stream.synchronize()
    with pytest.raises(vector.cuda.LogicError, match="illegal memory access"):
        vector.cuda.mem_alloc(16)


def test_a_device_that_is_lost(vector: Any) -> None:
    fail("lost:2")
    vector.cuda.Context.synchronize()
    for _ in range(2):
        with pytest.raises(vector.cuda.LaunchError, match="unspecified launch failure"):
            vector.cuda.mem_get_info()


def test_failures_from_the_environment() -> None:
    settings = {"SHAREDNORM_EMULATED_FAIL": "launch:7,allocation:1+"}
    done = run(["-m", "tests.emulation.launch", "with_barrier"], settings=settings)
    assert "MemoryError" in done.stderr
    done = run(["-m", "tests.emulation.launch", "with_barrier"], settings={"SHAREDNORM_EMULATED_FAIL": "launch:1"})
    assert "LaunchError" in done.stderr


@pytest.mark.parametrize(("mode", "status", "said"), [("report", 0, True), ("fail", 86, True), ("ignore", 0, False)])
def test_memory_that_is_left_at_exit(mode: str, status: int, said: bool) -> None:
    done = run(["-c", ALLOCATE], settings={"SHAREDNORM_EMULATED_LEAKS": mode})
    assert done.returncode == status, done.stderr
    assert ("leak: 1 device and 0 pinned allocations, 48 bytes" in done.stderr) is said


def test_calls_are_counted(vector: Any) -> None:
    launches, copies = count("total_launches"), count("total_copies")
    vector.launch()
    vector.results()
    assert (count("total_launches"), count("total_copies")) == (launches + 1, copies + 2)
