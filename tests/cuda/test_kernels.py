"""The kernels through PyCUDA and a driver, launched as their own tests launch them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sharednorm_kernels import plan
from tests.support.kernels.device_kernels import DeviceKernels
from tests.support.kernels.kernel_checks import H200, SMALL, batch_of, check
from tests.support.oracle import DTYPES


@pytest.fixture
def kernels() -> Iterator[DeviceKernels]:
    kernels = DeviceKernels()
    yield kernels
    kernels.close()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 127), (4, 3, 16, 16), (2, 31, 5)])
def test_every_version(kernels: DeviceKernels, shape: tuple[int, ...], name: str) -> None:
    batch = batch_of(shape, name)
    batch.naive(kernels)
    check(batch, statistics=False)
    planned = plan(shape, batch.x.itemsize, H200)
    batch = batch_of(shape, name)
    batch.split(kernels, planned.reduce, planned.apply)
    check(batch)
    planned = plan(shape, batch.x.itemsize, SMALL)
    assert planned.forward is not None
    assert planned.backward is not None
    batch = batch_of(shape, name)
    batch.fused(kernels, planned.forward, planned.backward)
    check(batch)


def test_a_kernel_that_is_not_there(kernels: DeviceKernels) -> None:
    assert kernels.has("moments_f32")
    assert not kernels.has("moments_f64")
