"""Streams: work that nobody waits for is seen to be missing, and order holds only where it was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.emulation.process import run

# Copies in, doubles and copies out on three streams; the events between them are there or not.
PIPELINE = """
import sys
from pathlib import Path
import numpy as np
from tests.emulation.build import build
from tests.emulation.load import load
load()
import pycuda.driver as cuda
cuda.init()
context = cuda.Device(0).retain_primary_context()
context.push()
function = cuda.module_from_buffer(build([Path("tests/emulation/planted/vector.cu")])).get_function("scale_and_sum")
source, result = cuda.pagelocked_empty(256, np.float32), cuda.pagelocked_empty(256, np.float32)
source[:] = np.arange(256)
x, y, sums = cuda.mem_alloc(1024), cuda.mem_alloc(1024), cuda.mem_alloc(8)
streams = [cuda.Stream(1) for _ in range(3)]  # 1: not ordered with the legacy stream
events = [cuda.Event(), cuda.Event()]
ordered = sys.argv[1] == "ordered"
cuda.memcpy_htod_async(x, source, streams[0])
events[0].record(streams[0])
if ordered:
    streams[1].wait_for_event(events[0])
function(x, y, sums, np.float32(2), np.uint32(256), block=(256, 1, 1), grid=(1, 1), shared=64, stream=streams[1])
events[1].record(streams[1])
if ordered:
    streams[2].wait_for_event(events[1])
cuda.memcpy_dtoh_async(result, y, streams[2])
streams[2].synchronize()
print("right" if np.array_equal(result, 2 * np.arange(256)) else "wrong")
context.synchronize()
del function, x, y, sums, streams, events, source, result
context.pop()
context.detach()
"""


def test_asynchronous_work_waits_for_a_synchronization(vector: Any) -> None:
    cuda = vector.cuda
    stream, result = cuda.Stream(), cuda.pagelocked_zeros(vector.x.size, np.float32)
    vector.launch(stream)
    cuda.memcpy_dtoh_async(result, vector.memory[1], stream)
    assert not result.any()
    stream.synchronize()
    np.testing.assert_array_equal(result, 2 * vector.x)


def test_a_pinned_source_is_read_when_the_copy_runs_and_other_memory_at_once(vector: Any) -> None:
    cuda = vector.cuda
    stream = cuda.Stream()
    for source, expected in ((cuda.pagelocked_zeros(4, np.float32), 1), (np.zeros(4, np.float32), 0)):
        cuda.memcpy_htod_async(vector.memory[0], source, stream)
        source[:] = 1
        stream.synchronize()
        result = np.full(4, 9, np.float32)
        cuda.memcpy_dtoh(result, vector.memory[0])
        assert result.tolist() == [expected] * 4


def test_memory_that_is_not_pinned_is_written_before_the_call_returns(vector: Any) -> None:
    stream, result = vector.cuda.Stream(), np.zeros_like(vector.x)
    vector.launch(stream)
    vector.cuda.memcpy_dtoh_async(result, vector.memory[1], stream)
    np.testing.assert_array_equal(result, 2 * vector.x)


def test_the_legacy_stream_waits_for_blocking_streams(vector: Any) -> None:
    stream = vector.cuda.Stream()
    vector.launch(stream)
    np.testing.assert_array_equal(vector.results()[0], 2 * vector.x)


def test_events_tell_when_they_are_reached(vector: Any) -> None:
    cuda = vector.cuda
    stream, start, end = cuda.Stream(), cuda.Event(), cuda.Event()
    start.record(stream)
    vector.launch(stream)
    end.record(stream)
    assert not end.query()
    end.synchronize()
    assert end.query()
    assert end.time_since(start) >= 0
    assert stream.is_done()


def test_polling_makes_progress(vector: Any) -> None:
    stream, event = vector.cuda.Stream(), vector.cuda.Event()
    vector.launch(stream)
    event.record(stream)
    assert [event.query() for _ in range(3)] == [False, False, True]
    vector.launch(stream)
    assert [stream.is_done() for _ in range(2)] == [False, True]


def test_events_order_streams() -> None:
    for mode in ("lazy", "eager", "random:1", "random:2", "random:3"):
        done = run(["-c", PIPELINE, "ordered"], settings={"SHAREDNORM_EMULATED_STREAMS": mode})
        assert (done.returncode, done.stdout.strip()) == (0, "right"), (mode, done.stderr)


def test_missing_events_are_seen() -> None:
    done = run(["-c", PIPELINE, "unordered"])
    assert (done.returncode, done.stdout.strip()) == (0, "wrong"), done.stderr
    modes = [f"random:{seed}" for seed in range(4)]
    results = [run(["-c", PIPELINE, "unordered"], settings={"SHAREDNORM_EMULATED_STREAMS": mode}) for mode in modes]
    assert "wrong" in {done.stdout.strip() for done in results}


def test_pinned_memory_that_a_copy_still_needs() -> None:
    code = (
        "from tests.emulation.load import load; load(); import numpy as np; import pycuda.driver as cuda; cuda.init()\n"
        "context = cuda.Device(0).retain_primary_context(); context.push()\n"
        "stream, memory, source = cuda.Stream(), cuda.mem_alloc(64), cuda.pagelocked_zeros(16, np.float32)\n"
        "cuda.memcpy_htod_async(memory, source, stream)\n"
        "source.base.free()\n"
    )
    done = run(["-c", code])
    assert done.returncode == -6
    assert "cuMemFreeHost: use after free: a copy that has not run yet" in done.stderr


@pytest.mark.parametrize("name", ["STREAMS", "SCHEDULE", "DEVICE", "FAIL"])
def test_a_setting_that_means_nothing(name: str) -> None:
    setting = f"SHAREDNORM_EMULATED_{name}"
    done = run(["-m", "tests.emulation.launch", "with_barrier"], settings={setting: "sideways"})
    assert done.returncode == -6
    assert f"{setting}" in done.stderr
    assert "sideways" in done.stderr
