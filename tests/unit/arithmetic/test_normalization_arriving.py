"""Tensors that arrive bit by bit, and results that are asked for in parts: the same bits as in one piece."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.types import Array
from tests.support import oracle

# Rows, columns, columns with folds and a rest, several units of columns, one channel, one value a row.
SHAPES = (
    (3, 2, 33, 40),
    (5, 3, 130, 131),
    (32, 8, 7, 7),
    (70, 300, 3),
    (9, 700),
    (131, 5),
    (2051, 3, 1, 2),
    (4, 1, 1),
    (300, 40, 16, 16),
    (8, 260, 5, 3),
)


@pytest.fixture(params=("numpy", "numba"))
def compute(request: pytest.FixtureRequest) -> Arithmetic:
    return arithmetic(request.param)


def cuts(size: int, seed: int) -> list[int]:
    inner = np.random.default_rng(seed).integers(0, size + 1, 9).tolist()
    return sorted({0, size, *inner})


def parameters(channels: int) -> tuple[Array, Array]:
    random = np.random.default_rng(5)
    return random.normal(1, 0.3, channels).astype(np.float32), random.normal(0, 1, channels).astype(np.float32)


def written(write: object, shape: tuple[int, ...], dtype: np.dtype[np.generic], seed: int) -> Array:
    size = int(np.prod(shape))
    result = np.empty(size, dtype)
    for begin, end in pairwise(cuts(size, seed)):
        part = np.empty(end - begin, dtype)
        write(begin, end, part)  # type: ignore[operator]
        result[begin:end] = part
    return result.reshape(shape)


@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_and_parts_of_a_forward(compute: Arithmetic, shape: tuple[int, ...], name: str) -> None:
    x = oracle.random_tensor(1, shape, name)
    scale, bias = parameters(shape[1])
    expected, moments = compute.forward(x, scale, bias, 1e-5)
    memory = np.full_like(x, np.nan)
    arriving = compute.arriving(memory)
    for begin, end in pairwise(cuts(x.size, 2)):
        memory.reshape(-1)[begin:end] = x.reshape(-1)[begin:end]
        arriving.arrived(end)
    found = arriving.moments()
    assert found.count == moments.count
    assert found.mean.tobytes() == moments.mean.tobytes()
    assert found.m2.tobytes() == moments.m2.tobytes()
    write = compute.normalizing(memory, found.mean, found.biased_var, scale, bias, 1e-5)
    assert written(write, shape, x.dtype, 3).tobytes() == expected.tobytes()


@pytest.mark.parametrize("late", ["x", "grad"])
@pytest.mark.parametrize("name", oracle.DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_parts_of_a_backward(compute: Arithmetic, shape: tuple[int, ...], name: str, late: str) -> None:
    x, grad = oracle.random_tensor(1, shape, name), oracle.random_tensor(2, shape, name)
    scale, bias = parameters(shape[1])
    _, moments = compute.forward(x, scale, bias, 1e-5)
    expected, *expected_vectors = compute.backward(x, grad, moments, scale, 1e-5)
    assert expected is not None
    here = {"x": x, "grad": grad}
    whole = here[late]
    memory = here[late] = np.full_like(whole, np.nan)
    arriving = compute.arriving_gradient(here["x"], here["grad"], moments)
    for begin, end in pairwise(cuts(x.size, 4)):
        memory.reshape(-1)[begin:end] = whole.reshape(-1)[begin:end]
        arriving.arrived(end)
    vectors = arriving.parameter_gradients(scale, 1e-5)
    assert [vector.tobytes() for vector in vectors] == [vector.tobytes() for vector in expected_vectors]
    assert written(arriving.write, shape, x.dtype, 6).tobytes() == expected.tobytes()


@pytest.mark.parametrize("shape", [(4, 3, 7, 5), (32, 64, 28, 28)], ids=str)
def test_results_where_they_were_asked_for(compute: Arithmetic, shape: tuple[int, ...]) -> None:
    x, grad = oracle.random_tensor(1, shape, "float32"), oracle.random_tensor(2, shape, "float32")
    scale, bias = parameters(shape[1])
    expected, moments = compute.forward(x, scale, bias, 1e-5)
    out = np.empty_like(x)
    result, _ = compute.forward(x, scale, bias, 1e-5, out)
    assert result is out
    assert out.tobytes() == expected.tobytes()
    expected_grad, *_ = compute.backward(x, grad, moments, scale, 1e-5)
    overwritten = grad.copy()
    for given, target in (
        (grad, np.empty_like(x)),
        (grad, np.empty(shape[::-1], x.dtype).T),
        (overwritten, overwritten),
    ):
        found, *_ = compute.backward(x, given, moments, scale, 1e-5, out=target)
        assert found is target
        np.testing.assert_array_equal(target, expected_grad)
