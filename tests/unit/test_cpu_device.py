"""The CPU device gives the arithmetic's numbers, and the same bits each time."""

from __future__ import annotations

import numpy as np
import pytest

from sharednorm.config import LayerConfig, LayerKind
from sharednorm.errors import UnsupportedDType
from sharednorm.normalization import arithmetic, num_threads, set_num_threads
from sharednorm.state import LayerState
from sharednorm_server.device.cpu import CpuDevice
from tests.support import oracle
from tests.support.service import close

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 5, epsilon=1e-3)
SHAPE = (4, 5, 7, 3)


def state() -> LayerState:
    random = np.random.default_rng(7)
    scale, bias, mean = (random.normal(1.0, 0.5, 5).astype(np.float32) for _ in range(3))
    var = random.uniform(0.5, 2.0, 5).astype(np.float32)
    return LayerState(scale, bias, mean, var, np.zeros(5, np.float32), np.zeros(5, np.float32))


@pytest.fixture(params=["numpy", "numba"])
def device(request: pytest.FixtureRequest) -> CpuDevice:
    return CpuDevice(arithmetic(request.param))


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_forward(device: CpuDevice, name: str) -> None:
    x, now = oracle.random_tensor(1, SHAPE, name), state()
    trained = device.forward(device.load(x), now, CONFIG)
    y, batch = trained.output, trained.moments
    count, mean, m2 = oracle.batch_moments(x)
    expected = oracle.normalized(x, mean, m2 / count, now.scale.astype(float), now.bias.astype(float), 1e-3)
    assert (y.shape, y.dtype, batch.count) == (x.shape, x.dtype, count)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=oracle.rounding(name), atol=4e-6)
    np.testing.assert_allclose(batch.mean, mean, rtol=1e-7)
    np.testing.assert_allclose(batch.m2, m2, rtol=1e-6)


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_normalize_batch_repeats_the_bits_of_forward(device: CpuDevice, name: str) -> None:
    x = device.load(oracle.random_tensor(2, SHAPE, name))
    trained = device.forward(x, state(), CONFIG)
    y, batch = trained.output, trained.moments
    assert device.normalize_batch(x, batch, state(), CONFIG).tobytes() == y.tobytes()


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_evaluate(device: CpuDevice, name: str) -> None:
    x, now = oracle.random_tensor(3, SHAPE, name), state()
    y = device.evaluate(device.load(x), now, CONFIG)
    mean, var, scale, bias = (each.astype(float) for each in (now.mean, now.var, now.scale, now.bias))
    expected = oracle.normalized(x, mean, var, scale, bias, 1e-3)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=oracle.rounding(name), atol=4e-6)


@pytest.mark.parametrize("input_grad", [True, False])
def test_backward(device: CpuDevice, input_grad: bool) -> None:
    x, grad, now = oracle.random_tensor(4, SHAPE), oracle.random_tensor(5, SHAPE), state()
    loaded = device.load(x)
    batch = device.forward(loaded, now, CONFIG).moments
    dx, scale_grad, bias_grad = device.backward(loaded, grad, batch, now.scale, CONFIG, input_grad=input_grad)
    expected = oracle.gradients(x, grad, now.scale.astype(float), 1e-3)
    np.testing.assert_allclose(scale_grad, expected[1], rtol=2e-6, atol=1e-4)
    np.testing.assert_allclose(bias_grad, expected[2], rtol=2e-6, atol=1e-4)
    if input_grad:
        close(dx, expected[0], atol=4e-6)
    else:
        assert dx is None


def test_a_loaded_tensor_describes_itself_and_is_no_copy(device: CpuDevice) -> None:
    x = oracle.random_tensor(6, SHAPE, "bfloat16")
    loaded = device.load(x)
    assert (loaded.shape, loaded.dtype_name, loaded.nbytes) == (SHAPE, "bfloat16", x.nbytes)
    assert np.shares_memory(loaded.array, x)


def test_another_element_type_is_refused(device: CpuDevice) -> None:
    with pytest.raises(UnsupportedDType, match="float64"):
        device.load(np.zeros(SHAPE))


def test_it_says_what_it_is() -> None:
    before = num_threads()
    try:
        assert CpuDevice(arithmetic("numpy"), threads=1).description == "cpu (numpy, 1 thread)"
        assert CpuDevice(arithmetic("numpy"), threads=2).description == "cpu (numpy, 2 threads)"
        assert num_threads() == 2
    finally:
        set_num_threads(before)


def test_another_devices_tensor_is_a_defect(device: CpuDevice) -> None:
    class Foreign:
        nbytes, shape, dtype_name = 4, (1,), "float32"

    with pytest.raises(TypeError, match="Foreign"):
        device.evaluate(Foreign(), state(), CONFIG)
