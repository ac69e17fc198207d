"""What a layer on a server's GPU costs a program on the same host, which has no GPU of its own or does not use it.

`python -m benchmarks.gpu.calls` prints a table and writes benchmarks/results/gpu-calls-NAME-DATE.json. All of a row
is measured in turns: calls to a server with `--device cuda`, over shared memory and over TCP; a local torch layer on
the CPU; and torch on the GPU in this process, with the copies there and back, from ordinary memory and from memory
that is pinned for ever. The last is what a server cannot beat that has one copy more on either side.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sharednorm
from benchmarks.gpu.kernels import about, result_file
from benchmarks.remote import Calls, measure, server, torch_calls
from sharednorm.core.types import Array

SHAPES = ((8, 16, 4, 4), (16, 64, 14, 14), (32, 64, 56, 56), (32, 256, 56, 56))


def gpu_calls(x: Array) -> Calls:
    """Return training forwards by torch on the GPU of a tensor that lies in the host's memory, and comes back there."""
    layer = torch.nn.BatchNorm2d(x.shape[1], device="cuda")
    pinned, back = torch.from_numpy(x).pin_memory(), torch.empty(x.shape).pin_memory()

    def pageable() -> object:
        with torch.no_grad():
            return layer(torch.from_numpy(x).cuda()).cpu()

    def from_pinned() -> object:
        with torch.no_grad():
            back.copy_(layer(pinned.to("cuda", non_blocking=True)), non_blocking=True)
        torch.cuda.synchronize()
        return back

    return {"torch on the GPU": pageable, "torch on the GPU, pinned": from_pinned}


def remote_calls(hub: sharednorm.Hub, x: Array, transport: str) -> Calls:
    """Return a training step's calls to a server's GPU."""
    name = f"{transport}/{'x'.join(map(str, x.shape))}"
    train, evaluate = hub.BatchNorm2D(x.shape[1], name=name), hub.layer(name)
    train.trainMode()
    evaluate.evalMode()
    both = hub.BatchNorm2D(x.shape[1], name=f"{name}/backward")
    both.trainMode()
    there = hub.empty(x.shape)
    there[...] = x

    def backward() -> None:
        both.backward(both(x))

    found: dict[str, Callable[[], object]] = {
        f"{transport} train": lambda: train(x),
        f"{transport} eval": lambda: evaluate(x),
        f"{transport} train and backward": backward,
    }
    if transport == "shm":
        found["shm train, hub.empty"] = lambda: train(there)
    return found


def rows(shapes: tuple[tuple[int, ...], ...]) -> Iterator[dict[str, Any]]:
    """Measure each shape."""
    random = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        hubs = {}
        for transport, listen in (("shm", f"unix:{directory}/sharednorm"), ("direct", "127.0.0.1:0")):
            running = stack.enter_context(server(listen, "--device", "cuda"))
            hubs[transport] = stack.enter_context(sharednorm.connect(running.address, transport=transport))
        for shape in shapes:
            x = random.normal(1, 2, shape).astype(np.float32)
            calls = torch_calls(x) | gpu_calls(x)
            for transport, hub in hubs.items():
                calls |= remote_calls(hub, x, transport)
            yield {"shape": shape, "bytes": x.nbytes, "ms": measure(calls)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure calls to a server's GPU against torch.")
    parser.add_argument("--output", type=Path, help="directory to write to; default benchmarks/results")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="only the first N shapes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "there is no GPU that torch can use: nothing is measured\n")
    found = []
    for row in rows(SHAPES[: arguments.shapes]):
        found.append(row)
        print(f"\n{row['shape']}, {row['bytes'] / 1e6:.3g} MB; ms, p50 (p10 to p90)")
        for name, taken in row["ms"].items():
            print(f"  {name:26} {taken['p50']:9.3f}  ({taken['p10']:.3f} to {taken['p90']:.3f})", flush=True)
    target = result_file("gpu-calls", arguments.output)
    target.write_text(json.dumps({"machine": about(), "rows": found}, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
