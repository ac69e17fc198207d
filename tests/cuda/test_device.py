"""What the CUDA device computes: against float64 NumPy, and bit for bit where that is promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, StateUpdate, blank_state, step, updated
from sharednorm.core.types import Averaging, LayerKind
from sharednorm.errors import LimitExceeded, UnsupportedDType
from sharednorm_server.device.base import Device, DeviceTensor, Incoming
from tests.support import oracle
from tests.support.kernels.cuda import REAL

# One map in a warp, in a block, in a cluster of two and of eight, and one too large for either.
SHAPES = [(4, 3, 5, 2), (32, 5, 7, 7), (2, 1, 127, 31), (3, 2, 1025), (7, 130), (8, 2, 64, 64), (2, 3, 3, 5, 7)]


def config_of(shape: tuple[int, ...], averaging: Averaging = Averaging.STANDARD) -> LayerConfig:
    return LayerConfig(LayerKind.BATCH_NORM_2D, shape[1], epsilon=1e-3, averaging=averaging)


def state_of(shape: tuple[int, ...], config: LayerConfig, steps: int = 3) -> LayerState:
    random = np.random.default_rng(shape[1])
    drawn: dict[str, Any] = {name: random.normal(1, 0.3, shape[1]) for name in ("scale", "bias", "mean")}
    update = StateUpdate(**drawn, var=random.uniform(0.5, 2, shape[1]), num_of_props=steps)
    return updated(blank_state(config), config, update)


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(device: Device, shape: tuple[int, ...], name: str) -> None:
    x, grad = oracle.random_tensor(1, shape, name), oracle.random_tensor(2, shape, name)
    config = config_of(shape)
    now = state_of(shape, config)
    tensor = device.load(x)
    trained = device.forward(tensor, now, config)
    count, mean, m2 = oracle.batch_moments(x)
    expected = oracle.normalized(x, mean, m2 / count, now.scale.astype(float), now.bias.astype(float), 1e-3)
    y = trained.output.array()
    assert (y.shape, y.dtype, trained.moments.count) == (x.shape, x.dtype, count)
    close(y, expected, name)
    np.testing.assert_allclose(trained.moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(trained.moments.m2, m2, rtol=1e-9)
    found = device.backward(tensor, device.load(grad), trained.moments, now.scale, config, input_grad=True)
    wanted = oracle.gradients(x, grad, now.scale.astype(float), 1e-3)
    assert found.input is not None
    close(found.input.array(), wanted[0], name)
    size = np.abs(grad.astype(float)).sum() / shape[1]
    np.testing.assert_allclose(found.scale, wanted[1], rtol=1e-6, atol=1e-7 * size)
    np.testing.assert_allclose(found.bias, wanted[2], rtol=1e-6, atol=1e-7 * size)


def close(actual: Any, expected: Any, name: str) -> None:
    np.testing.assert_allclose(np.asarray(actual).astype(float), expected, rtol=oracle.rounding(name), atol=4e-6)


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_evaluate(device: Device, name: str) -> None:
    shape = SHAPES[1]
    x, config = oracle.random_tensor(3, shape, name), config_of(shape)
    now = state_of(shape, config)
    mean, var, scale, bias = (each.astype(float) for each in (now.mean, now.var, now.scale, now.bias))
    expected = oracle.normalized(x, mean, var, scale, bias, 1e-3)
    close(device.evaluate(device.load(x), now, config).array(), expected, name)


@pytest.mark.parametrize("averaging", Averaging)
@pytest.mark.parametrize("steps", [0, 1, 3, 50])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_statistics_of_the_device_are_those_of_the_state_bit_for_bit(
    device: Device, shape: tuple[int, ...], steps: int, averaging: Averaging
) -> None:
    config = config_of(shape, averaging)
    now = state_of(shape, config, steps)
    trained = device.forward(device.load(oracle.random_tensor(4, shape)), now, config)
    expected = step(now, config, trained.moments)
    assert trained.statistics is not None
    assert trained.statistics.mean.tobytes() == expected.mean.tobytes()
    assert trained.statistics.var.tobytes() == expected.var.tobytes()


def test_a_chain_of_steps_uses_the_statistics_that_stayed_on_the_device(device: Device) -> None:
    shape = SHAPES[1]
    config = config_of(shape)
    now = state_of(shape, config)
    for seed in range(5):
        x = oracle.random_tensor(seed, shape)
        trained = device.forward(device.load(x), now, config)
        expected = step(now, config, trained.moments)
        now = step(now, config, trained.moments, trained.statistics)
        assert (now.mean.tobytes(), now.var.tobytes()) == (expected.mean.tobytes(), expected.var.tobytes())
    evaluated = device.evaluate(device.load(x), now, config).array()
    assert evaluated.tobytes() == device.evaluate(device.load(x), expected, config).array().tobytes()


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_normalize_batch_repeats_the_bits_of_forward(device: Device, shape: tuple[int, ...], name: str) -> None:
    config, tensor = config_of(shape), device.load(oracle.random_tensor(5, shape, name))
    now = state_of(shape, config)
    trained = device.forward(tensor, now, config)
    again = device.forward(tensor, now, config)
    expected = trained.output.array().tobytes()
    assert again.output.array().tobytes() == expected
    assert device.normalize_batch(tensor, trained.moments, now, config).array().tobytes() == expected


def test_gradients_of_the_parameters_alone(device: Device) -> None:
    shape = SHAPES[1]
    x, grad, config = oracle.random_tensor(6, shape), oracle.random_tensor(7, shape), config_of(shape)
    now, tensor = state_of(shape, config), device.load(x)
    moments = device.forward(tensor, now, config).moments
    found = device.backward(tensor, device.load(grad), moments, now.scale, config, input_grad=False)
    expected = oracle.gradients(x, grad, now.scale.astype(float), 1e-3)
    assert found.input is None
    np.testing.assert_allclose(found.scale, expected[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.bias, expected[2], rtol=1e-5, atol=1e-4)


def test_a_large_mean_and_a_small_spread(device: Device) -> None:
    # The hard row of the design's table: mean 1e4, standard deviation 1e-2.
    x = np.random.default_rng(8).normal(1e4, 1e-2, (16, 3, 28, 28)).astype(np.float32)
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    trained = device.forward(device.load(x), blank_state(config), config)
    count, mean, m2 = oracle.batch_moments(x)
    expected = oracle.normalized(x, mean, m2 / count, np.ones(3), np.zeros(3), config.epsilon)
    assert np.abs(trained.output.array() - expected).max() <= 2e-6
    np.testing.assert_allclose(trained.moments.m2, m2, rtol=2e-9)


def test_tensors_of_several_chunks(device: Device) -> None:
    # 9.7 MB: two whole chunks of pinned memory and a part of one, in and out.
    x = np.random.default_rng(9).normal(size=(2, 3, 901, 449)).astype(np.float32)
    grad, config = x[::-1].copy(), LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    tensor, now = device.load(x), blank_state(config)
    trained = device.forward(tensor, now, config)
    _, mean, m2 = oracle.batch_moments(x)
    expected = oracle.normalized(x, mean, m2 / trained.moments.count, np.ones(3), np.zeros(3), config.epsilon)
    close(trained.output.array(), expected, "float32")
    found = device.backward(tensor, device.load(grad), trained.moments, now.scale, config, input_grad=True)
    assert found.input is not None
    close(found.input.array(), oracle.gradients(x, grad, np.ones(3), config.epsilon)[0], "float32")


@pytest.mark.parametrize("shape", [(2, 3, 901, 449), (2, 3, 5, 7)], ids=["several chunks", "small"])
def test_a_tensor_in_parts_gives_the_bits_of_the_whole(device: Device, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    config, now = config_of(shape), blank_state(config_of(shape))
    whole = device.forward(device.load(x), now, config)
    expected = whole.output.array()

    def filled(incoming: Incoming) -> DeviceTensor:
        data, begin = x.reshape(-1).view(np.uint8), 0
        while begin < data.nbytes:
            room = incoming.space(300_001)
            room[:] = data[begin : begin + room.nbytes].data
            incoming.filled(room.nbytes)
            begin += room.nbytes
        return incoming.finish()

    tensor = filled(device.receive(shape, "float32", train=True))
    trained = device.forward(tensor, now, config)
    assert b"".join(bytes(part) for part in trained.output.parts(700_000)) == expected.tobytes()
    assert trained.moments.mean.tobytes() == whole.moments.mean.tobytes()
    out = np.empty_like(x)
    assert device.evaluate(tensor, now, config, out).array() is out
    wanted = device.backward(tensor, device.load(x), whole.moments, now.scale, config, input_grad=True).input
    again = filled(device.receive_input(device.load(x), whole.moments))
    grad = filled(device.receive_gradient(tensor, whole.moments))
    found = device.backward(again, grad, whole.moments, now.scale, config, input_grad=True).input
    assert wanted is not None
    assert found is not None
    assert b"".join(bytes(part) for part in found.parts(1 << 20)) == wanted.array().tobytes()


def test_arrays_of_other_strides_are_no_other_tensors(device: Device) -> None:
    x = oracle.random_tensor(10, (4, 5, 6, 3)).transpose(0, 3, 1, 2)
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    one = device.forward(device.load(x), blank_state(config), config)
    other = device.forward(device.load(np.ascontiguousarray(x)), blank_state(config), config)
    assert one.output.array().tobytes() == other.output.array().tobytes()


def test_another_element_type_is_refused(device: Device) -> None:
    with pytest.raises(UnsupportedDType, match="float64"):
        device.load(np.zeros(SHAPES[0]))


def test_a_shape_beyond_the_kernels_is_refused_before_anything_is_allocated(device: Device) -> None:
    huge: Any = np.broadcast_to(np.float16(1), (1, 1, 2**31 + 8))
    with pytest.raises(LimitExceeded, match="too large for 32-bit sizes"):
        device.load(huge)


def test_another_devices_tensor_is_a_defect(device: Device) -> None:
    class Foreign:
        nbytes, shape, dtype_name = 4, (1,), "float32"

    config = LayerConfig(LayerKind.BATCH_NORM_2D, 1)
    with pytest.raises(TypeError, match="Foreign"):
        device.evaluate(Foreign(), blank_state(config), config)


def test_it_says_what_it_is_and_that_it_works(device: Device) -> None:
    assert device.description.startswith("cuda:0 (")
    assert REAL or device.description == "cuda:0 (Emulated H200)"
    device.warm_up()
