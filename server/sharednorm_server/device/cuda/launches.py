"""What a forward, an evaluation and a backward are as launches. For the GPU's thread; everything is an address.

The kernels themselves, their parameters and their layouts are described in sharednorm_kernels/sharednorm.cu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sharednorm_kernels import Fused, Plan, View, finish_geometry
from sharednorm_server.device.cuda.module import Kernels

_F32, _F64, _COUNTER = 4, 8, 4


class Launcher(Protocol):
    """Where launches go: a `Gpu`, for example."""

    kernels: Kernels
    computing: Any
    """The pycuda.driver.Stream of the launches."""

    def scratch(self, nbytes: int) -> int:
        """Return the address of memory that stays until the launches that follow are done."""
        ...


@dataclass(frozen=True)
class Tensors:
    """The tensors of one computation: how they are computed, their element type, the input's address."""

    plan: Plan
    dtype_name: str
    x: int


@dataclass(frozen=True)
class Affine:
    """A layer's scale and bias, float32 (C,), and its epsilon."""

    scale: int
    bias: int
    epsilon: float


@dataclass(frozen=True)
class Statistics:
    """Running mean and variance before and after a step, float32 (C,), and what the batch weighs in them."""

    old_mean: int
    old_var: int
    new_mean: int
    new_var: int
    weight: float

    @property
    def arguments(self) -> tuple[float, ...]:
        """The kernels' arguments."""
        return self.old_mean, self.old_var, self.new_mean, self.new_var, self.weight


def forward(gpu: Launcher, tensors: Tensors, affine: Affine, statistics: Statistics, y: int, moments: int) -> None:
    """Normalize a batch by its own statistics; write output, moments and running statistics.

    Args:
        gpu: The GPU.
        tensors: The input.
        affine: Scale, bias, epsilon.
        statistics: The running statistics.
        y: The output, like the input.
        moments: Mean and m2 of the batch, float64 (2, C).
    """
    plan, view, dtype = tensors.plan, tensors.plan.view, tensors.dtype_name
    if plan.forward is not None:
        launch = plan.forward
        gpu.kernels.launch(
            gpu.computing, f"forward_{launch.kind}", dtype, launch.geometry,
            tensors.x, y, affine.scale, affine.bias, affine.epsilon, *statistics.arguments, moments,
            *_ticketed_scratch(gpu, launch, view, coefficients=3), *view.arguments, *_sharing(launch),
        )  # fmt: skip
        return
    reduce, apply = plan.reduce, plan.apply
    parts = gpu.scratch(2 * _F64 * view.maps * reduce.parts)
    coefficients = gpu.scratch(3 * _F32 * view.maps)
    gpu.kernels.launch(
        gpu.computing, "moments", dtype, reduce, tensors.x, parts, *view.arguments, *reduce.arguments
    )  # fmt: skip
    gpu.kernels.launch(
        gpu.computing, "finish_forward", dtype, finish_geometry(view.maps),
        parts, affine.scale, affine.bias, affine.epsilon, *statistics.arguments, moments, coefficients,
        *view.arguments, reduce.image_parts, reduce.area_parts,
    )  # fmt: skip
    gpu.kernels.launch(
        gpu.computing, "apply", dtype, apply, tensors.x, coefficients, y, *view.arguments, *apply.arguments
    )


def normalize(gpu: Launcher, tensors: Tensors, affine: Affine, moments: int, y: int) -> None:
    """Normalize a batch by its moments, float64 (2, C), which are known; the bits are those of its forward."""
    view, launch = tensors.plan.view, tensors.plan.apply
    gpu.kernels.launch(
        gpu.computing, "normalize", tensors.dtype_name, launch,
        tensors.x, moments, float(view.count), affine.scale, affine.bias, affine.epsilon, y,
        *view.arguments, *launch.arguments,
    )  # fmt: skip


def evaluate(gpu: Launcher, tensors: Tensors, affine: Affine, mean: int, var: int, y: int) -> None:
    """Normalize a batch by running statistics, float32 (C,)."""
    view, launch = tensors.plan.view, tensors.plan.apply
    gpu.kernels.launch(
        gpu.computing, "evaluate", tensors.dtype_name, launch,
        tensors.x, mean, var, affine.scale, affine.bias, affine.epsilon, y, *view.arguments, *launch.arguments,
    )  # fmt: skip


def backward(
    gpu: Launcher, tensors: Tensors, grad: int, moments: int, scale: int, epsilon: float, dx: int | None, params: int
) -> None:
    """Compute the gradients of a training forward.

    Args:
        gpu: The GPU.
        tensors: The forward's input.
        grad: Gradient of the output, like the input.
        moments: Of the batch, float64 (2, C).
        scale: What the forward used, float32 (C,).
        epsilon: The layer's.
        dx: Where the gradient of the input goes; None: nowhere.
        params: Where the gradients of scale and bias go, float32 (2, C).
    """
    plan, view, dtype = tensors.plan, tensors.plan.view, tensors.dtype_name
    bias_grad = params + _F32 * view.maps
    if plan.backward is not None and dx is not None:
        launch = plan.backward
        gpu.kernels.launch(
            gpu.computing, f"backward_{launch.kind}", dtype, launch.geometry,
            tensors.x, grad, dx, moments, scale, epsilon, params, bias_grad,
            *_ticketed_scratch(gpu, launch, view, coefficients=4), *view.arguments, *_sharing(launch),
        )  # fmt: skip
        return
    reduce, apply = plan.reduce, plan.apply
    parts = gpu.scratch(2 * _F64 * view.maps * reduce.parts)
    coefficients = gpu.scratch(4 * _F32 * view.maps)
    gpu.kernels.launch(
        gpu.computing, "backward_sums", dtype, reduce,
        tensors.x, grad, moments, parts, *view.arguments, *reduce.arguments,
    )  # fmt: skip
    gpu.kernels.launch(
        gpu.computing, "finish_backward", None, finish_geometry(view.maps),
        parts, reduce.parts, moments, float(view.count), scale, epsilon, coefficients, params, bias_grad, view.maps,
    )  # fmt: skip
    if dx is not None:
        gpu.kernels.launch(
            gpu.computing, "backward_apply", dtype, apply,
            tensors.x, grad, coefficients, dx, *view.arguments, *apply.arguments,
        )  # fmt: skip


def _ticketed_scratch(gpu: Launcher, launch: Fused, view: View, *, coefficients: int) -> tuple[int, ...]:
    """Return what a ticketed kernel needs besides: coefficients, parts, and counters that are zero."""
    if launch.kind != "ticketed":
        return ()
    counters = gpu.scratch(_COUNTER * (1 + view.maps))
    gpu.kernels.clear(gpu.computing, counters, 1 + view.maps)
    parts = gpu.scratch(2 * _F64 * view.maps * launch.geometry.parts)
    return gpu.scratch(coefficients * _F32 * view.maps), parts, counters


def _sharing(launch: Fused) -> tuple[int, ...]:
    return (*launch.geometry.arguments, launch.lag) if launch.kind == "ticketed" else launch.geometry.arguments
