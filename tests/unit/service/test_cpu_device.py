"""The CPU device gives the arithmetic's numbers, and the same bits each time."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sharednorm.arithmetic.select import arithmetic
from sharednorm.arithmetic.thread_pool import num_threads, set_num_threads
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState
from sharednorm.core.types import Array, LayerKind
from sharednorm.errors import LimitExceeded, UnsupportedDType
from sharednorm_server.device.base import DeviceTensor, Incoming, Output
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
    y, batch = trained.output.array(), trained.moments
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
    y, batch = trained.output.array(), trained.moments
    assert device.normalize_batch(x, batch, state(), CONFIG).array().tobytes() == y.tobytes()


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_evaluate(device: CpuDevice, name: str) -> None:
    x, now = oracle.random_tensor(3, SHAPE, name), state()
    y = device.evaluate(device.load(x), now, CONFIG).array()
    mean, var, scale, bias = (each.astype(float) for each in (now.mean, now.var, now.scale, now.bias))
    expected = oracle.normalized(x, mean, var, scale, bias, 1e-3)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=oracle.rounding(name), atol=4e-6)


@pytest.mark.parametrize("input_grad", [True, False])
def test_backward(device: CpuDevice, input_grad: bool) -> None:
    x, grad, now = oracle.random_tensor(4, SHAPE), oracle.random_tensor(5, SHAPE), state()
    loaded = device.load(x)
    batch = device.forward(loaded, now, CONFIG).moments
    found = device.backward(loaded, device.load(grad), batch, now.scale, CONFIG, input_grad=input_grad)
    dx, scale_grad, bias_grad = found.input, found.scale, found.bias
    expected = oracle.gradients(x, grad, now.scale.astype(float), 1e-3)
    np.testing.assert_allclose(scale_grad, expected[1], rtol=2e-6, atol=1e-4)
    np.testing.assert_allclose(bias_grad, expected[2], rtol=2e-6, atol=1e-4)
    if input_grad:
        assert dx is not None
        close(dx.array(), expected[0], atol=4e-6)
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


# --- Tensors that arrive in parts -------------------------------------------------------------------


def fill(incoming: Incoming, x: Array, step: int = 1000) -> DeviceTensor:
    data = x.reshape(-1).view(np.uint8)
    begin = 0
    while begin < data.nbytes:
        room = incoming.space(step)
        assert 1 <= room.nbytes <= step
        room[:] = data[begin : begin + room.nbytes].data
        incoming.filled(room.nbytes)
        begin += room.nbytes
    assert incoming.nbytes == begin
    return incoming.finish()


def parts_of(output: Output | None, most: int = 512) -> bytes:
    assert output is not None
    found = [bytes(part) for part in output.parts(most)]
    assert all(len(part) == most for part in found[:-1])
    return b"".join(found)


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_a_tensor_in_parts_gives_the_bits_of_the_whole(device: CpuDevice, name: str) -> None:
    x, grad, now = oracle.random_tensor(4, SHAPE, name), oracle.random_tensor(5, SHAPE, name), state()
    whole = device.load(x)
    expected = device.forward(whole, now, CONFIG)
    tensor = fill(device.receive(SHAPE, name, train=True), x)
    trained = device.forward(tensor, now, CONFIG)
    assert trained.moments.mean.tobytes() == expected.moments.mean.tobytes()
    assert trained.moments.m2.tobytes() == expected.moments.m2.tobytes()
    assert parts_of(trained.output) == expected.output.array().tobytes()
    assert parts_of(device.evaluate(tensor, now, CONFIG)) == device.evaluate(whole, now, CONFIG).array().tobytes()
    batch = expected.moments
    wanted = device.backward(whole, device.load(grad), batch, now.scale, CONFIG, input_grad=True)
    assert wanted.input is not None
    for inputs, grads in (
        (whole, fill(device.receive_gradient(whole, batch), grad)),
        (fill(device.receive_input(device.load(grad), batch), x), device.load(grad)),
    ):
        found = device.backward(inputs, grads, batch, now.scale, CONFIG, input_grad=True)
        assert (found.scale.tobytes(), found.bias.tobytes()) == (wanted.scale.tobytes(), wanted.bias.tobytes())
        assert parts_of(found.input) == wanted.input.array().tobytes()


def test_outputs_where_they_were_asked_for(device: CpuDevice) -> None:
    x, now = oracle.random_tensor(4, SHAPE), state()
    loaded, out = device.load(x), np.empty_like(x)
    expected = device.forward(loaded, now, CONFIG)
    assert device.forward(loaded, now, CONFIG, out).output.array() is out
    assert out.tobytes() == expected.output.array().tobytes()
    batch, arrived = expected.moments, fill(device.receive(SHAPE, "float32", train=True), x)
    computations: tuple[Callable[[], Output | None], ...] = (
        lambda: device.evaluate(loaded, now, CONFIG, out),
        lambda: device.normalize_batch(loaded, batch, now, CONFIG, out),
        lambda: device.backward(loaded, loaded, batch, now.scale, CONFIG, input_grad=True, out=out).input,
        lambda: device.forward(arrived, now, CONFIG, out).output,
    )
    for compute in computations:
        out[...] = np.nan
        output = compute()
        assert output is not None
        assert (output.shape, output.dtype_name, output.nbytes) == (SHAPE, "float32", x.nbytes)
        assert output.array() is out
        assert np.isfinite(out).all()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_declaring_gigabytes_costs_nothing_and_sending_little_costs_little(device: CpuDevice) -> None:
    before = resident_bytes()
    incoming = device.receive((1, 1, 1 << 14, 1 << 14), "float32", train=True)
    incoming.space(1024)[:] = bytes(1024)
    incoming.filled(1024)
    assert resident_bytes() - before < 16 << 20


def test_more_than_the_machine_has_is_refused_as_a_limit(device: CpuDevice) -> None:
    with pytest.raises(LimitExceeded, match="no memory for a float32 tensor"):
        device.receive((1, 1, 1 << 30, 1 << 29), "float32", train=True)
