"""The peer of a group: batch normalization over torch's gloo ranks, written by hand.

`torch.nn.SyncBatchNorm` refuses tensors of the CPU, so this is what one writes instead: one all-reduce of count, sums
and sums of squares in the forward, and one of the two sums of the backward. There are two forms of it: the formulas
as they stand in a paper, and with the fewest passes over the tensor that torch's functions allow.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist

# How long gloo waits for a rank that does not come.
TIMEOUT = datetime.timedelta(seconds=60)
EPSILON = 1e-5
MOMENTUM = 0.1
_OVER = (0, 2, 3)


def join(path: str, rank: int, ranks: int) -> None:
    """Be a rank; they find each other by a file."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks, timeout=TIMEOUT)


def leave() -> None:
    """Be none any more."""
    dist.destroy_process_group()


def all_reduce(values: Any) -> Any:
    """Add up a tensor over the ranks, in place."""
    dist.all_reduce(values)
    return values


class GlooBatchNorm:
    """A layer for images (N, C, H, W).

    Args:
        maps: C.
        fewest: Whether to make the fewest passes over the tensor.
    """

    def __init__(self, maps: int, *, fewest: bool) -> None:
        self.weight, self.bias = torch.ones(maps), torch.zeros(maps)
        self.mean, self.var = torch.zeros(maps), torch.ones(maps)
        self.grad: Any = None
        self.data: Any = None
        self._fewest = fewest
        self._saved: Any = None

    def forward(self, x: Any) -> Any:
        """Normalize this rank's part of a batch by the moments of the whole, and take these into the statistics."""
        maps = x.shape[1]
        if self._fewest:
            planes = x.view(-1, x.shape[2] * x.shape[3])
            squares = torch.linalg.vector_norm(planes, dim=1).square_().view(-1, maps).sum(0)
        else:
            squares = (x * x).sum(_OVER)
        sums = all_reduce(torch.cat([x.new_tensor([x.numel() // maps]), x.sum(_OVER), squares]).double())
        count = sums[0]
        mean = sums[1 : 1 + maps] / count
        var = sums[1 + maps :] / count - mean * mean
        self.mean.lerp_(mean.float(), MOMENTUM)
        self.var.lerp_((var * (count / (count - 1))).float(), MOMENTUM)
        mean, var = mean.float(), var.float()
        factor = torch.rsqrt(var + EPSILON)
        if self._fewest:
            self.data = torch.nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, EPSILON)
        else:
            self.data = (x - _wide(mean)) * _wide(factor) * _wide(self.weight) + _wide(self.bias)
        self._saved = x, mean, factor, float(count)
        return self.data

    def backward(self, grad: Any) -> Any:
        """Return the gradients of the last forward: of x, and of weight and bias, which are those of the whole."""
        x, mean, factor, count = self._saved
        maps = x.shape[1]
        total = grad.sum(_OVER)
        if self._fewest:
            products = torch.bmm(x.view(-1, 1, x[0, 0].numel()), grad.view(-1, x[0, 0].numel(), 1))
            product = products.view(-1, maps).sum(0) - mean * total
        else:
            product = (grad * (x - _wide(mean))).sum(_OVER)
        sums = all_reduce(torch.cat([total, product]).double())
        bias_grad, product = sums[:maps].float(), sums[maps:].float()
        by = product * factor * factor / count
        if self._fewest:
            # factor * weight * (grad - bias_grad / count - (x - mean) * by): the part of x first, then that of grad.
            scale = factor * self.weight
            result = torch.addcmul(_wide(scale * (mean * by - bias_grad / count)), x, _wide(-scale * by))
            self.grad = result.addcmul_(grad, _wide(scale))
        else:
            centered = grad - _wide(bias_grad / count) - (x - _wide(mean)) * _wide(by)
            self.grad = centered * _wide(factor * self.weight)
        return self.grad, product * factor, bias_grad


def _wide(vector: Any) -> Any:
    return vector.view(1, -1, 1, 1)
