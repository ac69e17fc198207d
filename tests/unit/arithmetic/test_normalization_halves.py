"""A backward in two halves, between which the sums of others may be added: against float64, and against the whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.formulas import input_gradient, merge
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.state import Moments
from sharednorm.errors import InvalidShape
from tests.support import oracle

EPSILON = 1e-5
SHAPES = [(2, 1), (7, 3), (4, 5, 1), (3, 2, 127), (5, 3, 7, 9), (2, 33, 16, 16), (2, 3, 4, 5, 6), (1, 2, 300, 300)]


@pytest.fixture(params=["numpy", "numba"])
def compute(request: pytest.FixtureRequest) -> Arithmetic:
    return arithmetic(request.param)


def tensors(shape: tuple[int, ...], name: str, seed: int = 0) -> tuple[oracle.Array, oracle.Array, Any]:
    x, grad = oracle.random_tensor(seed, shape, name), oracle.random_tensor(seed + 1, shape, name)
    scale = np.random.default_rng(seed + 2).normal(1, 0.2, shape[1]).astype(np.float32)
    return x, grad, scale


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sums(compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
    x, grad, _ = tensors(shape, name)
    mean = np.random.default_rng(5).normal(2, 1, shape[1])  # not of this batch: the mean of some union
    sum_grad, sum_product = compute.gradient_sums(x, grad, mean)
    axes = (0, *range(2, x.ndim))
    wide = grad.astype(np.float64)
    products = wide * (x.astype(np.float64) - oracle.per_channel(mean, x.ndim))
    assert sum_grad.dtype == sum_product.dtype == np.float64
    assert sum_grad.shape == sum_product.shape == (shape[1],)
    np.testing.assert_allclose(sum_grad, wide.sum(axis=axes), rtol=0, atol=3e-7 * np.abs(wide).sum(axis=axes).max())
    scale = np.abs(products).sum(axis=axes).max()
    np.testing.assert_allclose(sum_product, products.sum(axis=axes), rtol=0, atol=3e-7 * scale)


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_halves_are_the_whole(compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
    x, grad, scale = tensors(shape, name, seed=10)
    batch = compute.moments(x)
    whole, _, _ = compute.backward(x, grad, batch, scale, EPSILON)
    sums = compute.gradient_sums(x, grad, batch.mean)
    by = input_gradient(batch, scale, EPSILON, *sums)
    assert whole is not None
    halves = compute.differentiate(x, grad, by)
    assert halves.dtype == x.dtype
    np.testing.assert_array_equal(halves.astype(np.float32), whole.astype(np.float32))


def test_the_parts_of_a_batch_are_the_batch(compute: Arithmetic) -> None:
    x, grad, scale = tensors((9, 6, 5, 4), "float32", seed=20)
    cuts = [slice(0, 1), slice(1, 2), slice(2, 9)]
    union = merge([compute.moments(x[cut]) for cut in cuts])
    sums = np.sum([compute.gradient_sums(x[cut], grad[cut], union.mean) for cut in cuts], axis=0)
    by = input_gradient(union, scale, EPSILON, sums[0], sums[1])
    result = np.concatenate([compute.differentiate(x[cut], grad[cut], by) for cut in cuts])
    expected, _, _ = oracle.gradients(x, grad, scale.astype(np.float64), EPSILON)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_where_the_result_goes(compute: Arithmetic) -> None:
    x, grad, scale = tensors((4, 3, 5, 6), "float32", seed=30)
    batch = compute.moments(x)
    by = input_gradient(batch, scale, EPSILON, *compute.gradient_sums(x, grad, batch.mean))
    expected = compute.differentiate(x, grad, by)
    for out in (np.empty_like(x), np.empty_like(np.asfortranarray(x)), x.copy(), grad):
        given = x if out is not grad else x.copy()
        result = compute.differentiate(given, grad, by, out)
        assert result is out
        np.testing.assert_array_equal(out, expected)
    with pytest.raises(InvalidShape):
        compute.differentiate(x, expected, by, np.empty((1, 3, 5, 6), np.float32))


def test_over_itself(compute: Arithmetic) -> None:
    x, grad, scale = tensors((4, 3, 5, 6), "float32", seed=40)
    batch = Moments(4 * 30, np.zeros(3), np.ones(3))
    by = input_gradient(batch, scale, EPSILON, *compute.gradient_sums(x, grad, batch.mean))
    expected = compute.differentiate(x, grad, by)
    assert compute.differentiate(x, grad, by, x) is x
    np.testing.assert_array_equal(x, expected)
