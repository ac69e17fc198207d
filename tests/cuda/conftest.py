"""The CUDA device: over the emulated driver, or on a real GPU. Left out where there is no PyCUDA."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sharednorm_server.device.base import Device
from tests.support.kernels import cuda


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a test out where there is no PyCUDA."""
    if not cuda.available():
        pytest.skip(cuda.NEEDS_PYCUDA)


@pytest.fixture
def device() -> Iterator[Device]:
    """Give the first GPU; what a test leaves on it fails the test."""
    cuda.prepare()
    from sharednorm_server.device.cuda.device import CudaDevice

    before = cuda.held()
    device = CudaDevice()
    yield device
    device.close()
    assert cuda.held() == before
