"""What PyTorch's autograd needs of a shared batch normalization; tensors are views of NumPy arrays and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from sharednorm.arithmetic.formulas import InputGradient, affine
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.arrays import results
from sharednorm.core.dtypes import dtype_of
from sharednorm.core.types import Array, Vector, Wide
from sharednorm.layers.backend import ForwardResult, Parameters, SavedForward
from sharednorm.remote.backends.server_compute import RemoteBackend

Grads = tuple[torch.Tensor | None, ...]


class Trainer(Protocol):
    """What trains with tensors of this process; `ClientComputeBackend` is one."""

    def forward(
        self,
        x: Array,
        *,
        train: bool | None,
        release: str,
        out: Array | None,
        parameters: Parameters | None = None,
    ) -> ForwardResult:
        """Normalize a training batch, with these parameters."""
        ...

    def gradients(self, saved: SavedForward, grad: Array, *, input_grad: bool) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of x, scale and bias."""
        ...


class LocalBatches:
    """A `Trainer` without a layer: for batches that no running statistics take in.

    Args:
        epsilon: Added to the variance before the square root.
    """

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon

    def forward(
        self,
        x: Array,
        *,
        train: bool | None,
        release: str,
        out: Array | None,
        parameters: Parameters | None = None,
    ) -> ForwardResult:
        """Normalize a batch by its own moments."""
        del train, release
        assert parameters is not None
        data, batch = arithmetic().forward(x, *parameters, self._epsilon, out)
        return ForwardResult(data, SavedForward(x, batch, parameters[0], 0))

    def gradients(self, saved: SavedForward, grad: Array, *, input_grad: bool) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of x, scale and bias."""
        return arithmetic().backward(saved.x, grad, saved.moments, saved.scale, self._epsilon, input_grad=input_grad)


class TrainHere(torch.autograd.Function):
    """A training forward whose tensors stay in this process."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, trainer: Trainer
    ) -> torch.Tensor:
        """Normalize and scale in one pass."""
        y, out = _like(x)
        parameters = _parameters(x.shape[1], weight, bias)
        result = trainer.forward(as_array(x), train=True, release="", out=out, parameters=parameters)
        ctx.trainer = trainer
        # The tensor is kept by autograd alone, which sees when it is changed before its backward. No backward needs the
        # bias, which may be changed.
        ctx.save_for_backward(x, weight)
        ctx.dtypes = _dtypes(weight, bias)
        assert result.saved is not None
        ctx.saved = replace(result.saved, x=np.empty(0, np.float32))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Grads:
        """Return the gradients of x, weight and bias."""
        x, _ = ctx.saved_tensors
        saved = replace(ctx.saved, x=as_array(x))
        found, *vectors = ctx.trainer.gradients(saved, as_array(grad), input_grad=ctx.needs_input_grad[0])
        return *_grads(found, vectors, ctx.dtypes), None


class TrainThere(torch.autograd.Function):
    """A training forward whose tensors travel to the server; without scale and bias, which are not there."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, backend: RemoteBackend) -> torch.Tensor:
        """Normalize."""
        y, saved = normalized_there(x, backend, train=True)
        ctx.backend = backend
        ctx.save_for_backward(x)
        assert saved is not None
        ctx.saved = replace(saved, x=np.empty(0, np.float32))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Grads:
        """Return the gradient of x."""
        (x,) = ctx.saved_tensors
        found = ctx.backend.backward(
            replace(ctx.saved, x=as_array(x)),
            as_array(grad),
            param_grads=False,
            input_grad=True,
            scale=1.0,
            momentum=0.0,
        )
        assert found.grad is not None
        return as_tensor(found.grad), None


class Evaluate(torch.autograd.Function):
    """A forward by given statistics, which do not depend on the batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        statistics: tuple[Wide, Wide],
        epsilon: float,
    ) -> torch.Tensor:
        """Normalize and scale."""
        y, out = _like(x)
        scale, offset = _parameters(x.shape[1], weight, bias)
        if x.numel():
            arithmetic().normalize(as_array(x), *statistics, scale, offset, epsilon, out)
        ctx.save_for_backward(x, weight)
        ctx.dtypes, ctx.statistics, ctx.epsilon = _dtypes(weight, bias), statistics, epsilon
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Grads:
        """Return the gradients: that of x is `grad * weight / sqrt(var + epsilon)`."""
        x, weight = ctx.saved_tensors
        (mean, var), array, upper = ctx.statistics, as_array(x), as_array(grad)
        scale, zeros = _parameters(x.shape[1], weight, None)
        found, sums = None, (np.zeros_like(mean), np.zeros_like(mean))
        if x.numel():
            by = affine(mean, var, scale, zeros, ctx.epsilon)
            if ctx.needs_input_grad[0]:
                found = arithmetic().differentiate(array, upper, InputGradient(by.hi, by.factor, zeros, zeros))
            sums = arithmetic().gradient_sums(array, upper, mean)
        elif ctx.needs_input_grad[0]:
            found = np.empty_like(array)
        scale_grad = (sums[1] / np.sqrt(var + ctx.epsilon)).astype(np.float32)
        return *_grads(found, (scale_grad, sums[0].astype(np.float32)), ctx.dtypes), None, None


def normalized_there(
    x: torch.Tensor, backend: RemoteBackend, *, train: bool
) -> tuple[torch.Tensor, SavedForward | None]:
    """Have the server normalize a tensor; return the result, in the memory format of x, and what a backward needs."""
    if x.is_contiguous():
        result = backend.forward(as_array(x), train=train, release="", out=None)
        return as_tensor(result.data), result.saved
    y = torch.empty_like(x)
    return y, backend.forward(as_array(x), train=train, release="", out=as_array(y)).saved


def as_array(x: torch.Tensor) -> Array:
    """Return a tensor on the CPU as an array, which shares its memory."""
    x = x.detach().resolve_neg()  # NumPy has no tensors whose sign is changed as they are read
    if x.dtype == torch.bfloat16:  # a type that NumPy has not
        shared: Array = x.view(torch.int16).numpy().view(dtype_of("bfloat16"))
        return shared
    array: Array = x.numpy()
    return array


def as_tensor(array: Array) -> torch.Tensor:
    """Return an array as a tensor, which shares its memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _like(x: torch.Tensor) -> tuple[torch.Tensor, Array]:
    # Memory for a result, in the memory format of x. Contiguous ones come from where large results are reused.
    if x.is_contiguous():
        array = results.empty(tuple(x.shape), as_array(x).dtype)
        return as_tensor(array), array
    y = torch.empty_like(x)
    return y, as_array(y)


def _parameters(maps: int, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Parameters:
    scale = np.ones(maps, np.float32) if weight is None else _vector(weight)
    return scale, np.zeros(maps, np.float32) if bias is None else _vector(bias)


def _vector(parameter: torch.Tensor) -> Vector:
    # A copy: an optimizer may change it before the backward that uses it.
    vector: Vector = parameter.detach().to(dtype=torch.float32, device="cpu", copy=True).numpy()
    return vector


def _dtypes(*parameters: torch.Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if parameter is None else parameter.dtype for parameter in parameters)


def _grads(found: Array | None, vectors: Sequence[Vector], dtypes: Sequence[torch.dtype | None]) -> Grads:
    first = None if found is None else as_tensor(found)
    pairs = zip(vectors, dtypes, strict=True)
    return first, *(None if dtype is None else torch.from_numpy(vector).to(dtype) for vector, dtype in pairs)
