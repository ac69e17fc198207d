"""How fast a local layer is: forward in training and evaluation, and backward, against torch on the CPU.

`python -m benchmarks.local` prints a table and writes benchmarks/results/local.json. The sides of a row take turns
call by call in a random order, on the same tensors, with the same number of threads; each keeps its last output, as
a network would.
Absolute times differ from machine to machine, so quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.remote import machine, summary
from sharednorm import BatchNorm2D
from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from sharednorm.arithmetic.thread_pool import set_num_threads
from sharednorm.core.types import Array

SHAPES = (
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (8, 64, 112, 112),
)
RESULTS = Path(__file__).parent / "results" / "local.json"
EPSILON = 1e-5
PASSES = ("train", "eval", "backward")

Calls = dict[str, Callable[[], object]]


def torch_calls(x: Array, grad: Array) -> Calls:
    """Return the three passes of a torch layer: forwards without gradients, a backward with those of the parameters."""
    train, evaluate = torch.nn.BatchNorm2d(x.shape[1]), torch.nn.BatchNorm2d(x.shape[1]).eval()
    tensor, upper = torch.from_numpy(x), torch.from_numpy(grad)
    leaf = tensor.detach().requires_grad_()
    output = torch.nn.BatchNorm2d(x.shape[1])
    result = output(leaf)

    def without_gradients(layer: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return layer(tensor)

        return call

    def backward() -> object:
        return torch.autograd.grad(result, (leaf, output.weight, output.bias), upper, retain_graph=True)

    return {
        "train, torch": without_gradients(train),
        "eval, torch": without_gradients(evaluate),
        "backward, torch": backward,
    }


def layer_calls(x: Array, grad: Array) -> Calls:
    """Return the three passes of a layer of this library."""
    train, evaluate, differentiate = (BatchNorm2D(x.shape[1]) for _ in range(3))
    evaluate.evalMode()
    differentiate(x)
    return {
        "train, layer": lambda: train(x),
        "eval, layer": lambda: evaluate(x),
        "backward, layer": lambda: differentiate.backward(grad),
    }


def arithmetic_calls(compute: Arithmetic, x: Array, grad: Array) -> Calls:
    """Return the three passes of one implementation of the arithmetic, and the moments alone."""
    ones, zeros = np.ones(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
    batch = compute.moments(x)
    var = batch.biased_var
    return {
        f"train, {compute.name}": lambda: compute.forward(x, ones, zeros, EPSILON),
        f"eval, {compute.name}": lambda: compute.normalize(x, batch.mean, var, ones, zeros, EPSILON),
        f"backward, {compute.name}": lambda: compute.backward(x, grad, batch, ones, EPSILON),
        f"moments, {compute.name}": lambda: compute.moments(x),
    }


def measure(calls: Calls, seconds: float) -> dict[str, dict[str, float]]:
    """Return percentiles of each call's time in ms; the calls take turns until the time is spent."""
    kept = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, random = list(calls), np.random.default_rng(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["moments, numpy"]) < 7:
        # In another order each time, since a call leaves the caches and the other side's threads in some state.
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            kept[name] = calls[name]()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: summary(taken) for name, taken in times.items()}


def ratios(row: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how many times faster the layer is than torch, and than the arithmetic with NumPy."""
    p50 = {name: taken["p50"] for name, taken in row.items()}
    return {
        f"{each}, {other} / layer": round(p50[f"{each}, {other}"] / p50[f"{each}, layer"], 2)
        for other in ("torch", "numpy")
        for each in PASSES
    }


def geometric_means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each ratio over the shapes."""
    names = rows[0]["ratios"]
    return {name: round(math.exp(sum(math.log(row["ratios"][name]) for row in rows) / len(rows)), 2) for name in names}


def measured(shapes: tuple[tuple[int, ...], ...], seconds: float) -> Iterator[dict[str, Any]]:
    """Measure each shape."""
    for shape in shapes:
        random = np.random.default_rng(0)
        x, grad = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
        calls = torch_calls(x, grad) | layer_calls(x, grad)
        for name in ("numba", "numpy"):
            calls |= arithmetic_calls(arithmetic(name), x, grad)
        row = measure(calls, seconds)
        yield {"shape": shape, "bytes": x.nbytes, "ms": row, "ratios": ratios(row)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure local layers against torch.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="only the first N shapes")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side; default %(default)s")
    parser.add_argument("--seconds", type=float, default=12, help="time to spend on a shape; default %(default)s")
    arguments = parser.parse_args()
    about = machine()
    torch.set_num_threads(arguments.threads)
    set_num_threads(arguments.threads)
    print(f"float32, {arguments.threads} threads, medians in ms; x is how many times faster than torch the layer is")
    print(f"{'':20}" + "".join(f"{each:>36}" for each in PASSES) + f"{'moments':>9}")
    print(f"{'shape':20}" + f"{'layer':>8}{'numba':>8}{'torch':>8}{'numpy':>7}    x" * 3 + f"{'numba':>9}")
    rows = []
    for row in measured(SHAPES[: arguments.shapes], arguments.seconds):
        rows.append(row)
        print(line(row), flush=True)
    means = geometric_means(rows)
    print("geometric means: " + "; ".join(f"{name} {value:g}" for name, value in means.items()))
    report = {
        "machine": about | {"threads": arguments.threads},
        "geometric means": means,
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    parts = [f"{'x'.join(map(str, row['shape'])):20}"]
    for each in PASSES:
        layer, numba, peer, plain = (
            row["ms"][f"{each}, {side}"]["p50"] for side in ("layer", "numba", "torch", "numpy")
        )
        parts.append(f"{layer:8.2f}{numba:8.2f}{peer:8.2f}{plain:7.1f}{row['ratios'][f'{each}, torch / layer']:5.1f}")
    return "".join(parts) + f"{row['ms']['moments, numba']['p50']:9.2f}"


if __name__ == "__main__":
    main()
