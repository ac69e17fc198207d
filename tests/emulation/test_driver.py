"""The emulated driver under the unmodified PyCUDA: memory, limits, and what it refuses."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.emulation.load import count, load
from tests.emulation.process import run


def test_a_kernel_runs(vector: Any) -> None:
    vector.launch()
    y, sums = vector.results()
    np.testing.assert_array_equal(y, 2 * vector.x)
    padded = np.concatenate([vector.x, np.zeros(96)]).reshape(16, 256)
    np.testing.assert_allclose(sums, padded.sum(axis=1), rtol=1e-12)


def test_prepared_calls_and_raw_addresses(vector: Any) -> None:
    vector.function.prepare("PPPfI")
    addresses = [int(memory) for memory in vector.memory]
    vector.function.prepared_call((16, 1), (256, 1, 1), *addresses, 3.0, vector.x.size, shared_size=64)
    np.testing.assert_array_equal(vector.results()[0], np.float32(3) * vector.x)


def test_everything_that_pycuda_links_against_is_there(cuda: Any) -> None:
    extension = sys.modules["pycuda._driver"].__file__
    assert extension is not None
    command = ["nm", "-D", "--undefined-only", extension]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True)
    wanted = {line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-1].startswith("cu")}
    assert len(wanted) > 100
    assert [name for name in sorted(wanted) if not hasattr(load(), name)] == []


def test_what_nothing_uses_says_so(cuda: Any) -> None:
    with pytest.raises(cuda.Error, match="operation not supported"):
        cuda.mem_alloc_pitch(16, 16, 4)


def test_the_device(cuda: Any) -> None:
    device = cuda.Device(0)
    assert device.name() == "Emulated H200"
    assert device.compute_capability() == (9, 0)
    assert device.get_attribute(cuda.device_attribute.MULTIPROCESSOR_COUNT) == 132
    assert device.get_attribute(cuda.device_attribute.MAX_SHARED_MEMORY_PER_BLOCK) == 49152
    with pytest.raises(cuda.Error, match="invalid device ordinal"):
        cuda.Device(1)


def test_another_device() -> None:
    settings = {"SHAREDNORM_EMULATED_DEVICE": "capability=8.0,memory=4096,multiprocessors=3"}
    code = (
        "from tests.emulation.load import load; load(); import pycuda.driver as cuda; cuda.init();"
        "it = cuda.Device(0); print(it.compute_capability(), it.total_memory(), it.multiprocessor_count)"
    )
    assert run(["-c", code], settings=settings).stdout.strip() == "(8, 0) 4096 3"
    clusters = run(["-m", "tests.emulation.launch", "cluster_with_barrier"], settings={
        "SHAREDNORM_EMULATED_DEVICE": "capability=8.0"
    })  # fmt: skip
    assert "no kernel image is available" in clusters.stderr


def test_no_device() -> None:
    done = run(["-m", "tests.emulation.launch", "with_barrier"], settings={"SHAREDNORM_EMULATED_DEVICES": "0"})
    assert "no CUDA-capable device is detected" in done.stderr


def test_memory_begins_full_of_nan_and_is_counted(cuda: Any) -> None:
    available, total = cuda.mem_get_info()
    memory = cuda.mem_alloc(4096)
    assert cuda.mem_get_info() == (available - 4096, total)
    assert count("bytes") == 4096
    values = np.zeros(1024, np.float32)
    cuda.memcpy_dtoh(values, memory)
    assert np.isnan(values).all()
    with pytest.raises(cuda.MemoryError):
        cuda.mem_alloc(total)
    memory.free()
    assert count("bytes") == 0


def test_fills_and_copies_on_the_device(cuda: Any) -> None:
    first, second = cuda.mem_alloc(64), cuda.mem_alloc(64)
    cuda.memset_d32(first, 7, 16)
    cuda.memset_d8(int(first) + 60, 1, 4)
    cuda.memcpy_dtod(second, first, 64)
    values = np.zeros(16, np.uint32)
    cuda.memcpy_dtoh(values, second)
    assert values.tolist() == [7] * 15 + [0x01010101]
    first.free()
    second.free()


@pytest.mark.parametrize("offset", [1, 60, -1])
def test_a_copy_out_of_bounds(cuda: Any, capfd: pytest.CaptureFixture[str], offset: int) -> None:
    memory = cuda.mem_alloc(64)
    values = np.zeros(16, np.uint32)
    copies: list[Callable[[], object]] = [
        lambda: cuda.memcpy_htod(int(memory) + offset, values),
        lambda: cuda.memcpy_dtoh(values, int(memory) + offset),
        lambda: cuda.memset_d8(int(memory) + offset, 0, 64),
    ]
    for copy in copies:
        with pytest.raises(cuda.LogicError, match="invalid argument"):
            copy()
        assert "out of bounds" in capfd.readouterr().err
    memory.free()


def test_use_after_free_and_a_second_free(cuda: Any, capfd: pytest.CaptureFixture[str]) -> None:
    memory = cuda.mem_alloc(64)
    address = int(memory)
    memory.free()
    with pytest.raises(cuda.LogicError):
        cuda.memcpy_htod(address, np.zeros(4))
    assert "used after free" in capfd.readouterr().err
    assert load().cuMemFree_v2(ctypes.c_uint64(address)) == 1
    assert "freed twice?" in capfd.readouterr().err


def test_a_second_free_of_pinned_memory(cuda: Any, capfd: pytest.CaptureFixture[str]) -> None:
    pinned = cuda.pagelocked_empty(16, np.float32)
    assert np.isnan(pinned).all()
    address = pinned.ctypes.data
    del pinned
    assert count("pinned") == 0
    assert load().cuMemFreeHost(ctypes.c_void_p(address)) == 1
    assert "freed twice?" in capfd.readouterr().err


def test_a_thread_without_a_context(cuda: Any) -> None:
    problems: list[Exception] = []

    def allocate() -> None:
        try:
            cuda.mem_alloc(16)
        except cuda.Error as error:
            problems.append(error)

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join(10)
    assert "context" in str(problems[0])
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(load().cuCtxSynchronize()))
    thread.start()
    thread.join(10)
    assert status == [201]


@pytest.mark.parametrize(
    ("block", "grid", "shared"),
    [
        ((1025, 1, 1), (1, 1), 0),
        ((64, 32, 1), (1, 1), 0),
        ((1, 1, 65), (1, 1), 0),
        ((32, 1, 1), (1, 65536), 0),
        ((32, 1, 1), (0, 1), 0),
        ((32, 1, 1), (1, 1), 49153),
    ],
)
def test_a_launch_beyond_the_limits(vector: Any, block: Any, grid: Any, shared: int) -> None:
    arguments = [*vector.memory, np.float32(2), np.uint32(0)]
    with pytest.raises(vector.cuda.LogicError, match="invalid argument"):
        vector.function(*arguments, block=block, grid=grid, shared=shared)


def test_more_shared_memory_has_to_be_asked_for(vector: Any) -> None:
    attribute = vector.cuda.function_attribute.MAX_DYNAMIC_SHARED_SIZE_BYTES
    with pytest.raises(vector.cuda.LogicError, match="invalid argument"):
        vector.function.set_attribute(attribute, 232449)
    vector.function.set_attribute(attribute, 232448)
    arguments = [*vector.memory, np.float32(2), np.uint32(vector.x.size)]
    vector.function(*arguments, block=(256, 1, 1), grid=(16, 1), shared=232448)
    np.testing.assert_array_equal(vector.results()[0], 2 * vector.x)


def test_wrong_arguments(vector: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (vector.memory, [*vector.memory, np.float64(2), np.uint32(0)]):
        with pytest.raises(vector.cuda.LogicError, match="invalid argument"):
            vector.function(*arguments, block=(32, 1, 1), grid=(1, 1))
        assert "takes 32 bytes of arguments" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("image", "problem"),
    [(b"\x50\xed\x55\xba" + bytes(100), "no kernel image"), (bytes(100), "device kernel image is invalid")],
)
def test_an_image_for_something_else(cuda: Any, image: bytes, problem: str) -> None:
    with pytest.raises(cuda.Error, match=problem):
        cuda.module_from_buffer(image)


def test_an_unknown_kernel(cuda: Any, image: bytes) -> None:
    with pytest.raises(cuda.LogicError, match="named symbol not found"):
        cuda.module_from_buffer(image).get_function("no_such_kernel")


def test_a_module_that_goes_gives_back_the_stacks_of_its_threads(vector: Any, cuda: Any, image: bytes) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    counts = []
    for _ in range(5):
        other = type(vector)(cuda, image)
        other.launch()
        other.results()
        during = mappings()
        other.free()
        del other
        gc.collect()
        counts.append((during, mappings()))
    assert all(during - after >= 256 for during, after in counts)  # a stack, and the page before it, for each thread
    assert counts[-1][1] - counts[0][1] < 4 * 16  # the image itself stays


def test_a_context_that_goes_with_memory_in_it(capfd: pytest.CaptureFixture[str], cuda: Any) -> None:
    library = load()
    context, address = ctypes.c_void_p(), ctypes.c_uint64()
    assert library.cuCtxCreate_v4(ctypes.byref(context), None, 0, 0) == 0
    assert library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(16)) == 0
    assert library.cuCtxDetach(context) == 0
    assert "leak: destroyed with 1 device allocations" in capfd.readouterr().err


def test_an_unknown_count() -> None:
    with pytest.raises(ValueError, match="does not count 'dogs'"):
        count("dogs")
