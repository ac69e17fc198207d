"""Modules of `sharednorm.torch` and PyTorch's own, made, fed and compared alike."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import sharednorm
from tests.support import oracle

torch = pytest.importorskip("torch")

KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
COMPUTE = ["client", "server"]
SHAPES = {"BatchNorm1d": (6, 4, 5), "BatchNorm2d": (3, 4, 5, 6), "BatchNorm3d": (2, 4, 3, 4, 2)}
names = (f"torch/{number}" for number in itertools.count())


def ours(hub: sharednorm.Hub, kind: str, *args: Any, **options: Any) -> Any:
    from sharednorm import torch as adapter

    return getattr(adapter, kind)(*args, **{"hub": hub, "name": next(names), **options})


def theirs(kind: str, *args: Any, **options: Any) -> Any:
    return getattr(torch.nn, kind)(*args, **options)


def tensor(seed: int, shape: tuple[int, ...], dtype: Any = None) -> Any:
    return torch.tensor(oracle.random_tensor(seed, shape), dtype=dtype)


def close(found: Any, right: Any, atol: float) -> None:
    np.testing.assert_allclose(found.detach().double().numpy(), right.detach().double().numpy(), rtol=1e-5, atol=atol)


def step(module: Any, x: Any, grad: Any) -> tuple[Any, Any]:
    x = x.detach().clone().requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    y = module(x)
    y.backward(grad)
    return y, x.grad


def same_step(module: Any, wide: Any, x: Any, grad: Any, atol: float = 1e-5) -> None:
    """Check a step of ours against PyTorch's own in float64."""
    y, x_grad = step(module, x, grad)
    right, right_grad = step(wide, x.double(), grad.double())
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    close(y, right, atol)
    close(x_grad, right_grad, atol)
    for found, expected in zip(module.parameters(), wide.parameters(), strict=True):
        assert found.grad.dtype == found.dtype
        close(found.grad, expected.grad, atol * max(1.0, x.numel() ** 0.5))
