"""The kernels, compiled for the host."""

from __future__ import annotations

import pytest

from tests.support.kernel_image import NEEDED, can_compile, compiled_image
from tests.support.kernel_run import Kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if not can_compile():
        pytest.skip(NEEDED)
    return Kernels(compiled_image())
