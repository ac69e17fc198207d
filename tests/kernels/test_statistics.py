"""Moments alone, apply alone, running statistics, and what a batch that is not finite does."""

from __future__ import annotations

import numpy as np
import pytest

from sharednorm_kernels import entry, finish_geometry, map_geometry, plan
from tests.support.kernels.kernel_checks import H200, VERSIONS, Array, batch_of, run_version
from tests.support.kernels.kernel_run import Batch, Buffer, Kernels
from tests.support.oracle import DTYPES, batch_moments, normalized, rounding

SHAPE = (6, 5, 11, 13)


def _with(value: float, channel: int, name: str) -> Batch:
    made = batch_of(SHAPE, name)
    x = made.x.copy()
    x[3, channel, 4, 5] = value
    return Batch(x, made.grad, name, made.scale, made.bias)


@pytest.mark.parametrize("name", DTYPES)
def test_moments_alone(kernels: Kernels, name: str) -> None:
    batch = batch_of(SHAPE, name)
    launch = plan(SHAPE, batch.x.itemsize, H200).reduce
    parts = Buffer((batch.view.maps, launch.parts, 2), np.float64)
    kernels.run(entry("moments", name), launch, batch.inputs, parts, *batch.view.arguments, *launch.arguments)
    kernels.run(
        entry("finish_moments", name), finish_geometry(batch.view.maps),
        parts, batch.moments, *batch.view.arguments, launch.image_parts, launch.area_parts,
    )  # fmt: skip
    _, mean, m2 = batch_moments(batch.x)
    np.testing.assert_allclose(batch.moments.values, [mean, m2], rtol=1e-12)


@pytest.mark.parametrize("name", DTYPES)
def test_apply_alone_by_running_statistics(kernels: Kernels, name: str) -> None:
    batch = batch_of(SHAPE, name)
    launch = plan(SHAPE, batch.x.itemsize, H200).apply
    kernels.run(
        entry("evaluate", name), launch,
        batch.inputs, batch.old_mean, batch.old_var, batch.scales, batch.biases, batch.epsilon, batch.outputs,
        *batch.view.arguments, *launch.arguments,
    )  # fmt: skip
    expected = normalized(batch.x, batch.old_mean.values, batch.old_var.values, batch.scale, batch.bias, batch.epsilon)
    np.testing.assert_allclose(batch.outputs.values.astype(np.float64), expected, rtol=rounding(name), atol=2e-6)


def test_moments_of_other_batches_can_be_applied(kernels: Kernels) -> None:
    # What several processes merged: the mean needs both of its halves, the count is theirs.
    maps, count = 7, 1000.0
    mean, m2 = 1e4 + np.arange(maps) / 7000, count * np.linspace(1e-4, 2e-4, maps)
    scale, bias = np.linspace(0.5, 2, maps, dtype=np.float32), np.linspace(-1, 1, maps, dtype=np.float32)
    coefficients = Buffer((3, maps), np.float32)
    kernels.run(
        "affine_of_moments", map_geometry(maps),
        Buffer.of([mean, m2], np.float64), count, Buffer.of(scale, np.float32), Buffer.of(bias, np.float32),
        1e-5, coefficients, maps,
    )  # fmt: skip
    hi, factor, offset = coefficients.values
    x = np.float32(1e4 + 0.01)
    y = (x - hi).astype(np.float64) * factor + offset
    expected = (np.float64(x) - mean) / np.sqrt(m2 / count + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=3e-7, atol=2e-6)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", DTYPES)
def test_a_channel_that_is_not_finite_shows_in_its_moments_and_stays_alone(
    kernels: Kernels, name: str, value: float, version: str
) -> None:
    batch, clean = _with(value, 2, name), _with(1.0, 2, name)
    run_version(batch, kernels, version)
    run_version(clean, kernels, version)
    others = [0, 1, 3, 4]
    for mine, theirs in (
        (batch.outputs, clean.outputs),
        (batch.input_grads, clean.input_grads),
        (batch.moments, clean.moments),
    ):
        np.testing.assert_array_equal(_channels(mine.values, others), _channels(theirs.values, others))
    assert not np.isfinite(batch.moments.values[:, 2]).all()
    old_before = np.linspace(-1, 1, 5, dtype=np.float32)
    np.testing.assert_array_equal(batch.old_mean.values, old_before)  # the running statistics stay as they were


@pytest.mark.parametrize("version", VERSIONS)
def test_a_variance_beyond_float32_shows_in_the_moments(kernels: Kernels, version: str) -> None:
    batch = _with(3e38, 4, "float32")
    run_version(batch, kernels, version)
    np.testing.assert_allclose(batch.moments.values, batch_moments(batch.x)[1:], rtol=1e-12)
    assert batch.moments.values[1, 4] / (batch.view.count - 1) > np.finfo(np.float32).max


def _channels(values: Array, channels: list[int]) -> Array:
    return values[:, channels]
