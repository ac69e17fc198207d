"""How fast the CUDA kernels are: training forward, evaluation and backward, against torch on the same GPU.

`python -m benchmarks.gpu.kernels` prints a table and writes benchmarks/results/gpu-kernels-NAME-DATE.json. Both
sides run in the legacy
default stream of one process, on buffers of the same sizes, and take turns. What is done so that the numbers mean
something:

- Each call takes the next of several sets of buffers, inputs and outputs, that together are at least three times the
  L2, so nothing is found in the cache that a network would not find there. torch's outputs stay alive as long.
- A kernel that spins for 2 ms comes before the first event, so that Python has put all calls into the queue before the
  first of them begins: what is measured is the GPU.
- Before, outputs are poisoned with NaN; after, they are compared with float64 and, bit for bit, with another run.
- The floor is the bandwidth of a copy of 1 GiB from device to device, measured in the same run: a forward and an
  evaluation move the tensor twice, a backward three times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pycuda.driver as cuda
import torch

from benchmarks.gpu.passes import TRIPS, Call, Launches, Layer, Set, our_calls, torch_calls, verify
from benchmarks.remote import machine
from sharednorm_kernels import fatbin, plan
from sharednorm_server.device.cuda.context import limits_of
from sharednorm_server.device.cuda.module import Kernels

PER_IMAGE = (
    (64, 112, 112),
    (64, 56, 56),
    (256, 56, 56),
    (128, 28, 28),
    (512, 28, 28),
    (1024, 14, 14),
    (2048, 7, 7),
)
SHAPES = tuple((images, *sizes) for images in (32, 256) for sizes in PER_IMAGE)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).parents[1] / "results"

_REPEATS, _WARM_SECONDS, _CALLS, _SPIN_SECONDS = 30, 0.5, 20, 2e-3
_LEAST_SETS, _MOST_BYTES = 2, 24 << 30


def seconds_of(call: Call, sets: int, spin: int) -> float:
    """Return the seconds that the GPU needs for a call, over a round of calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(spin)
    begin.record()
    for number in range(_CALLS):
        call(number % sets)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3 / _CALLS


def percentiles(times: list[float]) -> dict[str, float]:
    """Return the median and the 10th and 90th percentile in microseconds."""
    ordered = sorted(times)
    places = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    return {name: round(1e6 * ordered[round(place * (len(ordered) - 1))], 2) for name, place in places.items()}


def measure(calls: dict[str, Call], sets: int, spin: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return percentiles of each side's time; the sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        end = time.monotonic() + _WARM_SECONDS / len(calls)
        while time.monotonic() < end:
            seconds_of(call, sets, spin)
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(seconds_of(call, sets, spin))
    return {name: percentiles(taken) for name, taken in times.items()}


def spin_cycles() -> int:
    """Return how many cycles of torch's spin kernel take 2 ms."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first one wakes the clocks
        begin.record()
        torch.cuda._sleep(10_000_000)
        end.record()
        end.synchronize()
    return int(10_000_000 * _SPIN_SECONDS / (float(begin.elapsed_time(end)) * 1e-3))


def copy_bandwidth(spin: int) -> float:
    """Return bytes a second, read and written, of a copy of 1 GiB on the device."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    for _ in range(10):
        target.copy_(source)
    times = [seconds_of(lambda _: target.copy_(source), 1, spin) for _ in range(10)]
    return float(2 * source.numel() / sorted(times)[len(times) // 2])


# --- Rows ------------------------------------------------------------------------------------------------


def make_sets(shape: tuple[int, ...], dtype: torch.dtype, l2_bytes: int, device: str = "cuda") -> list[Set]:
    """Return so many sets of buffers that no pass finds the last one's bytes in the cache."""
    nbytes = math.prod(shape) * dtype.itemsize
    number = max(_LEAST_SETS, min(math.ceil(3 * l2_bytes / (2 * nbytes)), _MOST_BYTES // (4 * nbytes), _CALLS))
    sets = []
    for _ in range(number):
        x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
        sets.append(Set(x * 2 + 1, grad, torch.empty_like(x), torch.empty_like(x)))
    return sets


def rows(dtypes: list[str], shapes: tuple[tuple[int, ...], ...], repeats: int) -> Iterator[dict[str, Any]]:
    """Measure each shape and element type."""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    cuda.init()
    device = cuda.Device(torch.cuda.current_device())
    limits = limits_of(device)
    context = device.retain_primary_context()  # torch's
    context.push()
    try:
        launches = Launches(Kernels(fatbin(), limits.shared_bytes))
        l2_bytes = device.get_attribute(cuda.device_attribute.L2_CACHE_SIZE)
        spin = spin_cycles()
        bandwidth = copy_bandwidth(spin)
        for shape in shapes:
            for dtype_name in dtypes:
                sets = make_sets(shape, DTYPES[dtype_name], l2_bytes)
                layer = Layer.create(shape[1], "cuda")
                how = plan(shape, sets[0].x.element_size(), limits)
                ours = our_calls(launches, sets, layer, dtype_name, how)
                errors = verify(ours, sets[0], layer)
                sides = {"ours": ours} | {
                    f"torch, {name}": torch_calls(sets, layer, cudnn=cudnn)
                    for name, cudnn in (("cuDNN", True), ("native", False))
                }
                yield row(shape, dtype_name, sets, sides, spin, bandwidth, repeats) | {"errors": errors}
                del sets, layer, ours, sides
                torch.cuda.empty_cache()
    finally:
        context.pop()


def row(
    shape: tuple[int, ...], dtype_name: str, sets: list[Set], sides: dict[str, dict[str, Call]], spin: int,
    bandwidth: float, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Measure one shape and element type."""
    nbytes = sets[0].x.numel() * sets[0].x.element_size()
    passes = {}
    for name, trips in TRIPS.items():
        times = measure({side: calls[name] for side, calls in sides.items()}, len(sets), spin, repeats)
        ours = times["ours"]["p50"]
        faster = min(taken["p50"] for side, taken in times.items() if side != "ours")
        passes[name] = {
            "us": times,
            "percent of copy": round(100 * trips * nbytes / (ours * 1e-6) / bandwidth, 1),
            "faster torch / ours": round(faster / ours, 2),
        }
    return {"shape": shape, "dtype": dtype_name, "bytes": nbytes, "copy GB/s": round(bandwidth / 1e9), "passes": passes}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the goals are about: ratios, and how near the floor of two trips the large tensors are."""
    ratios = [each["faster torch / ours"] for one in found for each in one["passes"].values()]
    large = [
        one["passes"][name]["percent of copy"] for one in found for name in ("train", "eval") if one["bytes"] >= 95e6
    ]
    return {
        "faster torch / ours, geometric mean (goal: 1.5)": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 2),
        "faster torch / ours, least (goal: above 1)": min(ratios),
        "percent of copy at 100 MB and more, least of train and eval (goal: 80)": min(large, default=None),
    }


def line(one: dict[str, Any]) -> str:
    """Return one line of the table."""
    text = f"{'x'.join(map(str, one['shape'])):18}{one['dtype']:>9}{one['bytes'] / 1e6:7.1f}"
    for each in one["passes"].values():
        us = {side: taken["p50"] for side, taken in each["us"].items()}
        text += f" |{us['ours']:8.1f}{us['torch, cuDNN']:8.1f}{us['torch, native']:8.1f}"
        text += f"{each['faster torch / ours']:6.2f}{each['percent of copy']:6.0f}%"
    return text


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure the CUDA kernels against torch.")
    parser.add_argument("--output", type=Path, help="directory to write to; default benchmarks/results")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), metavar="N", help="only the first N shapes")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=_REPEATS, help="rounds of each side; default %(default)s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "there is no GPU that torch can use: nothing is measured\n")
    found_on = about()
    print(", ".join(f"{name} {value}" for name, value in found_on.items()))
    print(
        f"{'shape':18}{'':>9}{'MB':>7}"
        + "".join(f" |{name:>8}{'cuDNN':>8}{'native':>8}{'x':>6}{'copy':>7}" for name in TRIPS)
    )
    found = []
    for one in rows(arguments.dtypes, SHAPES[: arguments.shapes], arguments.repeats):
        found.append(one)
        print(line(one), flush=True)
    report = {"machine": found_on, "summary": summary(found), "rows": found}
    for name, value in summary(found).items():
        print(f"{name}: {value}")
    target = result_file("gpu-kernels", arguments.output)
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


def about() -> dict[str, Any]:
    """Return what the figures were measured on and with."""
    return machine() | {
        "GPU": torch.cuda.get_device_properties(0).name,
        "driver": _driver(),
        "CUDA of the driver": cuda.get_driver_version(),
        "cuDNN": torch.backends.cudnn.version(),
    }


def result_file(kind: str, directory: Path | None) -> Path:
    """Return the file that the results go to, of this GPU and this day; its directory is there."""
    label = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_properties(0).name.lower()).strip("-")
    directory = directory or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{kind}-{label}-{datetime.date.today().isoformat()}.json"


def _driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    match = re.search(r"\d+\.\d+(\.\d+)?", version.read_text(encoding="utf-8")) if version.is_file() else None
    return match[0] if match else "unknown"


if __name__ == "__main__":
    main()
