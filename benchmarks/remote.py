"""What a remote layer costs: a server process on this machine, against a local torch layer and a bare echo.

`python -m benchmarks.remote` prints a table and writes benchmarks/results/remote.json. All of a row is measured
in turns within the same minute; absolute times differ from machine to machine, so quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sharednorm
from benchmarks.peers.echo import EchoClient, cut
from sharednorm.codec import wire
from sharednorm.core.types import Array

SHAPES = (
    (8, 16, 4, 4),
    (16, 64, 14, 14),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (32, 2048, 7, 7),
    (8, 64, 112, 112),
)
RESULTS = Path(__file__).parent / "results" / "remote.json"

# Each call is repeated until so many seconds have been spent on a row, but so often at least and at most.
ROW_SECONDS = 20.0
LEAST, MOST = 7, 400

Calls = dict[str, Callable[[], object]]


class Child(NamedTuple):
    """A process that listens: the line that it has printed, and its number."""

    line: str
    pid: int


class Server(NamedTuple):
    """A server process: where it listens, and its number."""

    address: str
    pid: int


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Child]:
    """Run a Python module that prints one line when it listens."""
    with subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            yield Child(child.stdout.readline().strip(), child.pid)
        finally:
            child.kill()


@contextlib.contextmanager
def server(listen: str, *options: str) -> Iterator[Server]:
    """Run `sharednorm serve`."""
    state = () if "--state" in options else ("--state", "memory:")
    with process("sharednorm_server", "serve", "--listen", listen, "--log-level", "warning", *state, *options) as child:
        yield Server(child.line.partition(" listening on ")[2].partition(", device")[0], child.pid)


def start_seconds() -> float:
    """Return the time from the start of a server process to the answer to its first training step."""
    began = time.perf_counter()
    with server("127.0.0.1:0") as running, sharednorm.connect(running.address) as hub:
        hub.BatchNorm2D(16, name="bn")(np.random.default_rng(0).normal(size=SHAPES[0]).astype(np.float32))
        return time.perf_counter() - began


def torch_calls(x: Array) -> Calls:
    """Return forwards of a local torch layer, without gradients."""
    import torch  # noqa: PLC0415 - only this program needs it

    train, evaluate = torch.nn.BatchNorm2d(x.shape[1]), torch.nn.BatchNorm2d(x.shape[1]).eval()
    tensor = torch.from_numpy(x)

    def without_gradients(layer: Any) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return layer(tensor)

        return call

    return {"torch train": without_gradients(train), "torch eval": without_gradients(evaluate)}


def remote_calls(hub: sharednorm.Hub, x: Array, transport: str) -> Calls:
    """Return forwards of a remote layer."""
    name = "x".join(map(str, x.shape))
    train, evaluate = hub.BatchNorm2D(x.shape[1], name=name), hub.layer(name)
    train.trainMode()
    evaluate.evalMode()
    return {f"{transport} train": lambda: train(x), f"{transport} eval": lambda: evaluate(x)}


def echo_calls(client: EchoClient, x: Array, transport: str) -> Calls:
    """Return echoes of a tensor's bytes, in the way that a tensor of that size travels."""
    data = x.tobytes()
    if len(data) <= wire.MAX_UNARY_BYTES:
        return {f"{transport} echo": lambda: client.whole(data)}
    chunks = cut(data)
    return {
        f"{transport} echo": lambda: client.overlapped(chunks),
        f"{transport} echo, once received": lambda: client.received(chunks),
    }


def measure(calls: Calls) -> dict[str, dict[str, float]]:
    """Return the 10th, 50th and 90th percentile of each call's time in ms; the calls take turns.

    A turn is two calls, of which the second counts: the first meets caches and free memory as another call left
    them, which is what a program that does this all the time never sees.
    """
    once = 0.0
    for call in calls.values():
        call()
        began = time.perf_counter()
        call()
        once += time.perf_counter() - began
    rounds = int(min(MOST, max(LEAST, ROW_SECONDS / once / 2)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: summary(taken) for name, taken in times.items()}


def summary(taken: list[float]) -> dict[str, float]:
    """Return percentiles, and of how many values."""
    low, middle, high = (round(float(value), 4) for value in np.percentile(taken, (10, 50, 90)))
    return {"p10": low, "p50": middle, "p90": high, "repeats": len(taken)}


def ratios(row: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how many times longer a remote forward takes than torch's, and than the echo."""
    p50 = {name: taken["p50"] for name, taken in row.items()}
    found = {}
    for transport in ("tcp", "unix"):
        for mode in ("train", "eval"):
            remote = p50[f"{transport} {mode}"]
            found[f"{transport} {mode} / torch {mode}"] = round(remote / p50[f"torch {mode}"], 2)
            found[f"{transport} {mode} / {transport} echo"] = round(remote / p50[f"{transport} echo"], 2)
    return found


def machine() -> dict[str, object]:
    """Return what the figures were measured on and with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    packages = ("sharednorm", "numpy", "numba", "grpcio", "protobuf", "torch")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)),
        "load before": round(os.getloadavg()[0], 2),  # of other programs: near 0 where figures are to be quoted
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages if any(distributions(name=name))},
    }


def rows(shapes: tuple[tuple[int, ...], ...]) -> Iterator[dict[str, Any]]:
    """Measure each shape."""
    random = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        remote, echo = {}, {}
        for transport, listen in (("tcp", "127.0.0.1:0"), ("unix", f"unix:{directory}")):
            path = "" if transport == "tcp" else "/sharednorm"
            running = stack.enter_context(server(listen + path))
            remote[transport] = stack.enter_context(sharednorm.connect(running.address))
            path = "" if transport == "tcp" else "/echo"
            echo[transport] = EchoClient(stack.enter_context(process("benchmarks.peers.echo", listen + path)).line)
        for shape in shapes:
            x = random.normal(1, 2, shape).astype(np.float32)
            calls = torch_calls(x)
            for transport, hub in remote.items():
                calls |= remote_calls(hub, x, transport) | echo_calls(echo[transport], x, transport)
            row = measure(calls)
            yield {"shape": shape, "bytes": x.nbytes, "ms": row, "ratios": ratios(row)}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure remote layers against torch and a bare echo.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="only the first N shapes")
    arguments = parser.parse_args()
    found = machine()
    start_seconds()  # whatever is compiled is compiled now
    starts = sorted(start_seconds() for _ in range(3))
    print(f"server start to first answer, warm: {starts[1]:.2f} s")
    results = []
    for row in rows(SHAPES[: arguments.shapes]):
        results.append(row)
        print(f"\n{row['shape']}, {row['bytes'] / 1e6:.3g} MB; ms, p50 (p10 to p90)")
        for name, taken in row["ms"].items():
            print(f"  {name:26} {taken['p50']:9.3f}  ({taken['p10']:.3f} to {taken['p90']:.3f})")
        print("  " + "; ".join(f"{name} {value:g}" for name, value in row["ratios"].items()))
    report = {
        "machine": found,
        "server start to first answer, warm, s": [round(s, 3) for s in starts],
        "rows": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
