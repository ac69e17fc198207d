"""The passes that `kernels` compares, ours and torch's, on buffers of the GPU; and whether ours are right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from sharednorm_kernels import Plan
from sharednorm_server.device.cuda import launches as compute
from sharednorm_server.device.cuda.module import Kernels

TRIPS = {"train": 2, "eval": 2, "backward": 3}
"""How often each pass has to move the tensor."""
EPSILON, WEIGHT = 1e-5, 0.1

Call = Callable[[int], object]
"""Does one pass on the buffers of a set's number."""


@dataclass
class Set:
    """One set of buffers of one shape."""

    x: torch.Tensor
    grad: torch.Tensor
    y: torch.Tensor
    dx: torch.Tensor


@dataclass
class Layer:
    """A layer's vectors, and what our kernels write about a batch; float32 (C,) but for the moments."""

    scale: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    new_mean: torch.Tensor
    new_var: torch.Tensor
    moments: torch.Tensor
    param_grads: torch.Tensor

    @classmethod
    def create(cls, maps: int, device: str) -> Layer:
        """Return a layer with random parameters and statistics."""
        scale, bias, mean, var = (torch.rand(maps, device=device) + 0.5 for _ in range(4))
        moments = torch.empty((2, maps), dtype=torch.float64, device=device)
        new_mean, new_var, param_grads = (torch.empty(maps * size, device=device) for size in (1, 1, 2))
        return cls(scale, bias, mean, var, new_mean, new_var, moments, param_grads)


@dataclass
class Launches:
    """Launches our kernels into the legacy default stream, with scratch memory that is used again and again."""

    kernels: Kernels
    device: str = "cuda"
    computing: Any = None
    _scratch: list[torch.Tensor] = field(default_factory=list)
    _next: int = 0

    def scratch(self, nbytes: int) -> int:
        """Return memory; one stream does its work in order, so a few buffers suffice for ever."""
        if self._next == len(self._scratch):
            self._scratch.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        if self._scratch[self._next].numel() < nbytes:
            self._scratch[self._next] = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        address = int(self._scratch[self._next].data_ptr())
        self._next += 1
        return address

    def begin(self) -> None:
        """Begin a pass, which uses the scratch memory from the first buffer on."""
        self._next = 0


def our_calls(launches: Launches, sets: list[Set], layer: Layer, dtype_name: str, how: Plan) -> dict[str, Call]:
    """Return the three passes of our kernels."""
    affine = compute.Affine(layer.scale.data_ptr(), layer.bias.data_ptr(), EPSILON)
    statistics = compute.Statistics(
        layer.mean.data_ptr(), layer.var.data_ptr(), layer.new_mean.data_ptr(), layer.new_var.data_ptr(), WEIGHT
    )
    tensors = [compute.Tensors(how, dtype_name, each.x.data_ptr()) for each in sets]
    moments = layer.moments.data_ptr()

    def train(number: int) -> None:
        launches.begin()
        compute.forward(launches, tensors[number], affine, statistics, sets[number].y.data_ptr(), moments)

    def evaluate(number: int) -> None:
        launches.begin()
        y = sets[number].y.data_ptr()
        compute.evaluate(launches, tensors[number], affine, layer.mean.data_ptr(), layer.var.data_ptr(), y)

    def backward(number: int) -> None:
        launches.begin()
        compute.backward(
            launches, tensors[number], sets[number].grad.data_ptr(), moments, layer.scale.data_ptr(), EPSILON,
            sets[number].dx.data_ptr(), layer.param_grads.data_ptr(),
        )  # fmt: skip

    return {"train": train, "eval": evaluate, "backward": backward}


def torch_calls(sets: list[Set], layer: Layer, *, cudnn: bool) -> dict[str, Call]:
    """Return the three passes of torch, with cuDNN or with its own kernels."""
    kept: list[object] = [None] * len(sets)  # outputs live as long as ours do
    weight, bias = layer.scale.clone().requires_grad_(), layer.bias.clone().requires_grad_()

    def normalize(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, *, training: bool) -> torch.Tensor:
        mean, var = (layer.new_mean, layer.new_var) if training else (layer.mean, layer.var)
        return torch.nn.functional.batch_norm(x, mean, var, scale, offset, training, WEIGHT, EPSILON)

    def forward(training: bool) -> Call:
        def call(number: int) -> None:
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=cudnn):
                kept[number] = normalize(sets[number].x, layer.scale, layer.bias, training=training)

        return call

    with torch.backends.cudnn.flags(enabled=cudnn):
        leaves = [each.x.detach().requires_grad_() for each in sets]
        outputs = [normalize(leaf, weight, bias, training=True) for leaf in leaves]

    def backward(number: int) -> None:
        with torch.backends.cudnn.flags(enabled=cudnn):
            kept[number] = torch.autograd.grad(
                outputs[number], (leaves[number], weight, bias), sets[number].grad, retain_graph=True
            )

    return {"train": forward(training=True), "eval": forward(training=False), "backward": backward}


# --- Right, and the same twice ---------------------------------------------------------------------------


def expected(one: Set, layer: Layer) -> dict[str, torch.Tensor]:
    """Return output in training and evaluation, and the gradient of the input, in float64."""
    x, grad = one.x.double(), one.grad.double()
    axes = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1]

    def spread(vector: torch.Tensor) -> torch.Tensor:
        return vector.double().view(1, -1, *(1,) * (x.ndim - 2))

    mean = x.mean(axes, keepdim=True)
    inverse = (x.var(axes, unbiased=False, keepdim=True) + EPSILON).rsqrt()
    hat = (x - mean) * inverse
    scale, bias = spread(layer.scale), spread(layer.bias)
    evaluated = (x - spread(layer.mean)) * (spread(layer.var) + EPSILON).rsqrt() * scale + bias
    sums, products = grad.sum(axes, keepdim=True), (grad * hat).sum(axes, keepdim=True)
    return {
        "train": hat * scale + bias,
        "eval": evaluated,
        "backward": scale * inverse * (grad - sums / count - hat * products / count),
    }


def verify(calls: dict[str, Call], one: Set, layer: Layer) -> dict[str, float]:
    """Run each pass of ours twice on the first set, on poisoned outputs; return the largest absolute errors.

    Raises:
        AssertionError: An output was not written, is wrong, or differs between the runs.
    """
    wanted, errors = expected(one, layer), {}
    rounding = {torch.float32: 1.2e-6, torch.float16: 4.9e-4, torch.bfloat16: 3.95e-3}[one.x.dtype]
    for name in TRIPS:  # in this order: a backward needs the moments of a forward
        output = one.dx if name == "backward" else one.y
        runs = []
        for _ in range(2):
            output.fill_(math.nan)
            calls[name](0)
            runs.append(output.clone())
        difference = (runs[0].double() - wanted[name]).abs()
        errors[name] = float(difference.max())
        assert bool((difference <= 4e-6 + rounding * wanted[name].abs()).all()), f"{name} is wrong: {errors[name]}"
        assert torch.equal(runs[0].view(torch.uint8), runs[1].view(torch.uint8)), f"{name} differs between runs"
    return errors
