"""Hard data: large means, outliers, constants, tiny and huge values."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sharednorm_kernels import plan
from tests.support.kernels.kernel_checks import H200, SMALL, Array, batch_of, check
from tests.support.kernels.kernel_run import Batch, Kernels
from tests.support.oracle import batch_moments, normalized

SHAPE = (8, 2, 32, 32)
Data = Callable[[np.random.Generator], Array]


def _large_mean(random: np.random.Generator) -> Array:
    return random.normal(1e4, 1e-2, SHAPE)


def _first_value_far_away(random: np.random.Generator) -> Array:
    x = random.normal(0, 1, SHAPE)
    x[0, :, 0, 0] = 1e4
    return x


def _last_value_far_away(random: np.random.Generator) -> Array:
    x = random.normal(0, 1, SHAPE)
    x[-1, :, -1, -1] = -1e6
    return x


def _two_levels(random: np.random.Generator) -> Array:
    return np.where(random.random(SHAPE) < 0.5, 4096.0, 4096.0 + 2**-11)


def _tiny(random: np.random.Generator) -> Array:
    return random.normal(0, 1e-40, SHAPE)


def _huge(random: np.random.Generator) -> Array:
    return random.normal(0, 1e30, SHAPE)


def _run(kernels: Kernels, x: Array, version: str) -> Batch:
    made = batch_of(SHAPE, "float32")
    batch = Batch(x.astype(np.float32), made.grad, "float32", made.scale, made.bias)
    if version == "naive":
        batch.naive(kernels)
    elif version == "split":
        planned = plan(SHAPE, 4, H200)
        batch.split(kernels, planned.reduce, planned.apply)
    else:
        planned = plan(SHAPE, 4, SMALL)
        assert planned.forward is not None
        assert planned.backward is not None
        batch.fused(kernels, planned.forward, planned.backward)
    return batch


@pytest.mark.parametrize("version", ["naive", "split", "resident"])
@pytest.mark.parametrize("data", [_large_mean, _first_value_far_away, _last_value_far_away, _two_levels, _tiny, _huge])
def test_hard_data(kernels: Kernels, data: Data, version: str) -> None:
    batch = _run(kernels, data(np.random.default_rng(5)), version)
    count, mean, m2 = batch_moments(batch.x)
    np.testing.assert_allclose(batch.moments.values[1], m2, rtol=2e-9)
    y = normalized(batch.x, mean, m2 / count, batch.scale, batch.bias, batch.epsilon)
    np.testing.assert_allclose(batch.outputs.values, y, rtol=4e-7, atol=2e-6)


@pytest.mark.parametrize("version", ["naive", "split", "resident"])
@pytest.mark.parametrize("data", [_large_mean, _first_value_far_away])
def test_gradients_of_hard_data(kernels: Kernels, data: Data, version: str) -> None:
    check(_run(kernels, data(np.random.default_rng(6)), version), statistics=False)


@pytest.mark.parametrize("version", ["naive", "split", "resident"])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e4, 1e-42])
def test_constants_have_no_variance_and_give_the_bias(kernels: Kernels, value: float, version: str) -> None:
    batch = _run(kernels, np.full(SHAPE, value), version)
    assert (batch.moments.values[0] == np.float64(np.float32(value))).all()
    assert (batch.moments.values[1] == 0).all()
    assert (batch.outputs.values == batch.bias.reshape(1, -1, 1, 1)).all()
