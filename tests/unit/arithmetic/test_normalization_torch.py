"""Both implementations against `torch.nn.functional.batch_norm` and its autograd."""

from __future__ import annotations

import numpy as np
import pytest

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from tests.support import oracle

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

EPSILON = 1e-5
SHAPES = [(7, 31), (2, 127, 2), (31, 2, 1), (5, 3, 10, 10), (2, 31, 7, 7), (3, 2, 33, 127), (2, 3, 2, 31, 7)]


@pytest.fixture(params=["numpy", "numba"])
def compute(request: pytest.FixtureRequest) -> Arithmetic:
    return arithmetic(request.param)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_train_and_backward(compute: Arithmetic, shape: tuple[int, ...]) -> None:
    x, grad = oracle.random_tensor(1, shape), oracle.random_tensor(2, shape)
    rng = np.random.default_rng(3)
    scale, bias = (rng.normal(1, 0.3, shape[1]).astype(np.float32) for _ in range(2))
    inputs = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (x, scale, bias)]
    wanted = torch.nn.functional.batch_norm(inputs[0], None, None, inputs[1], inputs[2], training=True, eps=EPSILON)
    gradients = torch.autograd.grad(wanted, inputs, torch.tensor(grad, dtype=torch.float64))
    y, batch = compute.forward(x, scale, bias, EPSILON)
    np.testing.assert_allclose(y, wanted.detach().numpy(), rtol=1e-6, atol=2e-6)
    for found, right in zip(compute.backward(x, grad, batch, scale, EPSILON), gradients, strict=True):
        assert found is not None
        np.testing.assert_allclose(found, right.numpy(), rtol=2e-6, atol=2e-6 * np.sqrt(x.size))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eval(compute: Arithmetic, shape: tuple[int, ...]) -> None:
    x = oracle.random_tensor(1, shape)
    rng = np.random.default_rng(4)
    mean, var = rng.normal(2, 1, shape[1]).astype(np.float32), rng.uniform(0.1, 9, shape[1]).astype(np.float32)
    scale, bias = (rng.normal(1, 0.3, shape[1]).astype(np.float32) for _ in range(2))
    wanted = torch.nn.functional.batch_norm(*(torch.tensor(each) for each in (x, mean, var, scale, bias)), eps=EPSILON)
    found = compute.normalize(x, mean.astype(np.float64), var.astype(np.float64), scale, bias, EPSILON)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-6, atol=3e-6)
