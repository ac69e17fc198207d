"""Streams are promised no order but that of their events: any other order of their work must give the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sharednorm_kernels import plan
from tests.emulation.process import run
from tests.support.kernels import cuda

SUITE = ("tests/cuda/test_device.py", "tests/cuda/test_memory.py")


@pytest.mark.slow
@pytest.mark.skipif(cuda.REAL, reason="the order is the emulated driver's: they need PyCUDA on it")
@pytest.mark.parametrize("order", ["eager", "random:1", "random:2", "random:3"])
def test_the_device_is_right_in_every_order_of_its_streams(order: str) -> None:
    settings = {"SHAREDNORM_EMULATED_STREAMS": order, "SHAREDNORM_LEFT_OUT": "nothing", "PYTEST_ADDOPTS": ""}
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE], settings=settings)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


def test_a_computation_waits_for_the_copies_into_its_input(device: Any) -> None:
    # All of it in one task, in which nobody asks how far the copy is: nothing but the event orders the two streams.
    from sharednorm_server.device.cuda import launches
    from sharednorm_server.device.cuda.context import Gpu, Part
    from sharednorm_server.device.cuda.worker import Issued

    x = np.arange(2 * 3 * 8, dtype=np.float32).reshape(2, 3, 8)
    ones, zeros = np.ones(3, np.float32), np.zeros(3, np.float32)

    def task(gpu: Gpu) -> Issued[Any]:
        source, target = gpu.pin(x.nbytes), gpu.pin(x.nbytes)
        source[:] = x.reshape(-1).view(np.uint8)
        before, after = gpu.allocate(x.nbytes), gpu.allocate(x.nbytes)
        gpu.copy_in(source, before, 0)
        tensors = launches.Tensors(plan(x.shape, 4, gpu.limits), "float32", gpu.wait_for_copies_into(before))
        affine = launches.Affine(gpu.vector(ones), gpu.vector(zeros), 1e-5)
        launches.evaluate(gpu, tensors, affine, gpu.vector(zeros), gpu.vector(ones), after.address)
        return Issued(gpu.copy_out([Part(after, 0, x.nbytes)], target), (target, before, after))

    target = device._worker.submit(task).result()[0]
    np.testing.assert_allclose(target.view(np.float32).reshape(x.shape), x, rtol=1e-4)
