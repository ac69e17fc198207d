"""One process of a group, and of gloo's ranks: `python -m benchmarks.group_rank PLAN RANK RANKS ADDRESS FILE`.

It measures calls of both in turns, and prints its times as JSON. PLAN is "steps", "barrier" or "network". All ranks do
the same, in the same order: each call waits for all of them. No one call may take longer than a minute.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

import sharednorm
from benchmarks.peers import gloo_batch_norm
from sharednorm.arithmetic.select import arithmetic
from sharednorm.arithmetic.thread_pool import set_num_threads
from sharednorm.codec import convert
from sharednorm.core.state import Moments
from sharednorm.core.types import Array
from sharednorm.v1 import layer_pb2

SHAPE = (16, 64, 56, 56)
MAPS = SHAPE[1]
LAYERS = 20
ROUNDS = {"steps": 60, "barrier": 400, "network": 60}

Calls = dict[str, Callable[[], object]]


def steps(hub: sharednorm.Hub, group: sharednorm.Group, rank: int) -> Calls:
    """Return steps of a layer, forward alone and with backward: the group's, and gloo's in both forms."""
    random = np.random.default_rng(rank)
    x, grad = (random.normal(1 + rank, 2, SHAPE).astype(np.float32) for _ in range(2))
    ours = hub.BatchNorm2D(MAPS, name="step", compute="client", group=group, sscale=0.0)
    written, fewest = (gloo_batch_norm.GlooBatchNorm(MAPS, fewest=each) for each in (False, True))
    tensor, upper = torch.from_numpy(x), torch.from_numpy(grad)
    _agree(ours, (written, fewest), x, grad)

    def our_pass() -> None:
        ours(x)
        ours.backward(grad)

    def pass_of(layer: gloo_batch_norm.GlooBatchNorm) -> Callable[[], None]:
        def both() -> None:
            layer.forward(tensor)
            layer.backward(upper)

        return both

    return {
        "group, forward": lambda: ours(x),
        "gloo, forward": lambda: written.forward(tensor),
        "gloo, fewest passes, forward": lambda: fewest.forward(tensor),
        "group, forward and backward": our_pass,
        "gloo, forward and backward": pass_of(written),
        "gloo, fewest passes, forward and backward": pass_of(fewest),
    }


def barrier(hub: sharednorm.Hub, group: sharednorm.Group, rank: int) -> Calls:
    """Return one meeting of all members, without a tensor: the group's, and gloo's with as many values."""
    batch = _batch(rank)
    meet = _meeting(hub, group, "barrier")
    values = torch.zeros(1 + 2 * MAPS, dtype=torch.float64)
    return {"group": lambda: meet(batch), "gloo": lambda: gloo_batch_norm.all_reduce(values)}


def network(hub: sharednorm.Hub, group: sharednorm.Group, rank: int) -> Calls:
    """Return the meetings of a pass through many layers."""
    batch = _batch(rank)
    meetings = [_meeting(hub, group, f"network/{number}") for number in range(LAYERS)]
    values = torch.zeros(1 + 2 * MAPS, dtype=torch.float64)

    def ours() -> None:
        for meet in meetings:
            meet(batch)

    def gloo() -> None:
        for _ in meetings:
            gloo_batch_norm.all_reduce(values)

    return {"group": ours, "gloo": gloo}


def _agree(ours: sharednorm.Layer, theirs: tuple[gloo_batch_norm.GlooBatchNorm, ...], x: Array, grad: Array) -> None:
    # What is compared has to compute the same.
    out = ours(x)
    ours.backward(grad)
    assert ours.grad is not None
    for layer in theirs:
        layer.forward(torch.from_numpy(x))
        layer.backward(torch.from_numpy(grad))
        assert np.abs(layer.data.numpy() - out).max() < 1e-4
        assert np.abs(layer.grad.numpy() - ours.grad).max() < 1e-4


def _batch(rank: int) -> Moments:
    return arithmetic().moments(np.random.default_rng(rank).normal(size=(8, MAPS)).astype(np.float32))


def _meeting(
    hub: sharednorm.Hub, group: sharednorm.Group, name: str
) -> Callable[[Moments], tuple[Moments, Array, Array]]:
    # From the moments of a part to those of the union, and the parameters: all of a step that is not about tensors.
    layer = hub.BatchNorm(MAPS, name=name, compute="client", group=group)
    ref: layer_pb2.LayerRef = layer._backend._ref  # type: ignore[attr-defined]  # what the layer itself calls with

    def meet(part: Moments) -> tuple[Moments, Array, Array]:
        answer = group.moments(ref, part)
        return (
            convert.moments_from_proto(answer.moments, MAPS),
            convert.vector_from_proto(answer.scale, MAPS),
            convert.vector_from_proto(answer.bias, MAPS),
        )

    return meet


def take_turns(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Return the times of calls in ms, which take turns in a random order, the same of all ranks.

    A turn is two calls, of which the second counts: the first brings the ranks together, and caches and free memory
    into the state that this call leaves them in.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, random = list(calls), np.random.default_rng(0)
    for call in calls.values():
        call()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            calls[name]()
            began = time.perf_counter()
            calls[name]()
            times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    """Measure and print."""
    plan, rank, ranks, address, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    # One thread a rank, on either side: a machine of two processors has one for each of two ranks.
    torch.set_num_threads(1)
    set_num_threads(1)
    gloo_batch_norm.join(path, rank, ranks)
    with sharednorm.connect(address, timeout=60.0) as hub, torch.no_grad():
        group = sharednorm.Group(plan, size=ranks, rank=rank, timeout=60.0)
        calls = {"steps": steps, "barrier": barrier, "network": network}[plan](hub, group, rank)
        print(json.dumps(take_turns(calls, ROUNDS[plan])))
    gloo_batch_norm.leave()


if __name__ == "__main__":
    main()
