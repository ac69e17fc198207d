"""The emulated driver's own tests: left out where PyCUDA is not installed, which `make test CUDA=1` builds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.emulation.build import build
from tests.emulation.load import count, fail, load
from tests.emulation.process import active

NEEDS_PYCUDA = "they need PyCUDA, which make test CUDA=1 builds"
PLANTED = Path(__file__).parent / "planted"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test out where there is no PyCUDA."""
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip(NEEDS_PYCUDA)


@pytest.fixture
def cuda() -> Iterator[Any]:
    """PyCUDA's driver module with a current context; what a test leaves in it fails the test."""
    load()
    import pycuda.driver as cuda

    cuda.init()
    context = cuda.Device(0).retain_primary_context()
    context.push()
    before = count("allocations"), count("pinned")
    yield cuda
    fail()
    after = count("allocations"), count("pinned")
    context.pop()
    context.detach()
    assert after == before


@pytest.fixture(scope="session")
def image() -> bytes:
    return build([PLANTED / "vector.cu"], active())


class Vector:
    """4000 values on the device, and the kernel that doubles them and sums each block's."""

    def __init__(self, cuda: Any, image: bytes) -> None:
        self.cuda = cuda
        self.x = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
        self.y = np.zeros_like(self.x)
        self.sums = np.zeros(16)
        self.function = cuda.module_from_buffer(image).get_function("scale_and_sum")
        self.memory = [cuda.to_device(self.x), cuda.mem_alloc(self.y.nbytes), cuda.mem_alloc(self.sums.nbytes)]

    def launch(self, stream: Any = None) -> None:
        arguments = [*self.memory, np.float32(2), np.uint32(self.x.size)]
        self.function(*arguments, block=(256, 1, 1), grid=(16, 1), shared=64, stream=stream)

    def results(self) -> tuple[Any, Any]:
        self.cuda.memcpy_dtoh(self.y, self.memory[1])
        self.cuda.memcpy_dtoh(self.sums, self.memory[2])
        return self.y, self.sums

    def free(self) -> None:
        for memory in self.memory:
            memory.free()


@pytest.fixture
def vector(cuda: Any, image: bytes) -> Iterator[Vector]:
    vector = Vector(cuda, image)
    yield vector
    fail()
    vector.free()
