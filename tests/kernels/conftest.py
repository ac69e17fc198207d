"""The kernels, compiled for the host; with SHAREDNORM_TEST_GPU=1 those of the fatbin, on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.kernels import cuda
from tests.support.kernels.device_kernels import DeviceKernels
from tests.support.kernels.kernel_image import NEEDED, can_compile, compiled_image
from tests.support.kernels.kernel_run import Kernels


@pytest.fixture(scope="session")
def kernels() -> Iterator[Kernels | DeviceKernels]:
    if cuda.REAL:
        on_gpu = DeviceKernels()
        yield on_gpu
        on_gpu.close()
    elif can_compile():
        yield Kernels(compiled_image())
    else:
        pytest.skip(NEEDED)
