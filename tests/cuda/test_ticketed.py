"""Maps that fit neither a block nor a cluster, through a server on a GPU that is small enough to have some."""

from __future__ import annotations

import numpy as np
import pytest

import sharednorm
from sharednorm_kernels import DeviceLimits, plan
from tests.support import oracle
from tests.support.kernels import cuda
from tests.support.processes.server import server_process

SMALL = "multiprocessors=2,capability=8.0,shared=49152"
SHAPE = (2, 8, 128, 128)


@pytest.mark.skipif(cuda.REAL, reason="the small GPU is the emulated driver's: they need PyCUDA on it")
@pytest.mark.parametrize("name", oracle.DTYPES)
def test_large_maps_on_a_small_gpu(name: str) -> None:
    x, grad = oracle.random_tensor(1, SHAPE, name), oracle.random_tensor(2, SHAPE, name)
    planned = plan(SHAPE, x.itemsize, DeviceLimits(2, 49_152, 233_472, (8, 0)))
    assert planned.forward is not None
    assert planned.backward is not None
    assert planned.forward.kind == planned.backward.kind == "ticketed"
    env = {**cuda.environment(), "SHAREDNORM_EMULATED_DEVICE": SMALL}
    with server_process("--device", "cuda", env=env) as server:
        with sharednorm.connect(server.address) as hub:
            bn = hub.BatchNorm2D(8, name="bn", sscale=0.0)
            y = bn(x)
            bn.backward(grad)
            count, mean, m2 = oracle.batch_moments(x)
            expected = oracle.normalized(x, mean, m2 / count, np.ones(8), np.zeros(8), bn.epsilon)
            dx, _, bias_grad = oracle.gradients(x, grad, np.ones(8), bn.epsilon)
            rtol = oracle.rounding(name)
            np.testing.assert_allclose(y.astype(float), expected, rtol=rtol, atol=4e-6)
            np.testing.assert_allclose(np.asarray(bn.grad).astype(float), dx, rtol=rtol, atol=4e-6)
            np.testing.assert_allclose(bn.mean.ravel(), mean, rtol=1e-6)
            np.testing.assert_allclose(bn.vars["bias"].grad.ravel(), bias_grad, rtol=1e-5)
        assert server.stop() == 0, server.log()
