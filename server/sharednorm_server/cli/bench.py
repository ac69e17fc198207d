"""`sharednorm bench`: what calls to a running server take, by the size of their tensors."""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import sharednorm
from sharednorm_server.cli.output import FAILED, Commands, add_server, drawing, print_table, telling_of_files
from sharednorm_server.config.options import parse_size

if TYPE_CHECKING:
    from sharednorm import Hub, Layer, Progress
    from sharednorm.core.types import Array

MAPS = 64
_SPACES = ((4, 4), (28, 28), (56, 56))
_WARM, _LEAST = 2, 5
_SOON_SECONDS = 0.2


def add_bench(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure calls to a running server",
        description="Measure training and eval forwards and backwards of a layer that is made for it and deleted "
        "afterwards: median and 90th percentile, and the bytes of tensors that travel in a second, there and back.",
        epilog="example: sharednorm bench --server gpu-box:50051 --sizes 16KiB,1MiB,25MiB --seconds 5",
    )
    parser.set_defaults(run=_bench, failure=FAILED)
    parser.add_argument("--sizes", default="8KiB,1MiB,24MiB", metavar="SIZE,...",
        help="about how large the tensors are; default %(default)s")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S",
        help="how long each kind of call is repeated; default %(default)s")  # fmt: skip
    parser.add_argument("--transport", default="auto", metavar="WAY",
        help="shm, direct, grpc, or auto for the best there is; default %(default)s")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it, to a .png, .svg or .pdf")
    add_server(parser)


def _bench(arguments: argparse.Namespace) -> int:
    shapes = [_shape(parse_size(size)) for size in arguments.sizes.split(",")]
    bar = _Bar()
    with sharednorm.connect(
        arguments.server,
        namespace=arguments.namespace,
        timeout=arguments.timeout,
        transport=arguments.transport,
        progress=bar.tell,
        tls=arguments.tls_ca,
    ) as hub:
        info, transport = hub.info, hub.transport
        rows = [row for shape in shapes for row in _measure(hub, shape, arguments.seconds, bar)]
    bar.close()
    if arguments.plot is not None:
        charts = drawing()
        with telling_of_files():
            charts.save_bench(arguments.plot, rows, f"{arguments.server}, device {info.device}, tensors by {transport}")
    if arguments.json:
        found = {"server": arguments.server, "device": info.device, "transport": transport, "calls": rows}
        print(json.dumps(found, indent=1))
        return 0
    print(f"{arguments.server}, device {info.device}, tensors by {transport}\n")
    head = ("TENSOR", "MB", "CALL", "P50 MS", "P90 MS", "MB/S")
    print_table([head, *(
        (
            "x".join(map(str, row["shape"])), f"{row['bytes'] / 1e6:.3g}", row["call"],
            f"{row['p50_ms']:.3g}", f"{row['p90_ms']:.3g}", f"{row['mb_per_s']:.0f}",
        )
        for row in rows
    )])  # fmt: skip
    return 0


def _measure(hub: Hub, shape: tuple[int, ...], seconds: float, bar: _Bar) -> Iterator[dict[str, Any]]:
    x = hub.empty(shape)
    x[...] = np.random.default_rng(0).normal(size=shape)
    with _layer(hub, shape[1]) as layer:
        calls: tuple[tuple[str, Callable[[], object]], ...] = (
            ("train", lambda: layer(x)),
            ("backward", lambda: layer.backward(x)),
            ("eval", lambda: layer(x)),
        )
        for name, call in calls:
            if name == "eval":
                layer.evalMode()
            bar.begin(f"{name} {'x'.join(map(str, shape))}")
            times = _times(call, seconds)
            p50, p90 = (float(value) for value in np.percentile(times, (50, 90)))
            yield {
                "shape": shape,
                "bytes": x.nbytes,
                "call": name,
                "repeats": len(times),
                "p50_ms": round(1e3 * p50, 4),
                "p90_ms": round(1e3 * p90, 4),
                "mb_per_s": round(2 * x.nbytes / 1e6 / p50, 2),
            }


@contextmanager
def _layer(hub: Hub, maps: int) -> Iterator[Layer]:
    name = f"sharednorm-bench/{secrets.token_hex(4)}"
    layer = hub.BatchNorm2D(maps, name=name)
    try:
        layer.trainMode()
        yield layer
    finally:
        hub.delete(name)


def _times(call: Callable[[], object], seconds: float) -> Array:
    for _ in range(_WARM):
        call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _LEAST or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return np.array(times)


def _shape(nbytes: int) -> tuple[int, ...]:
    """Return a tensor of 64 maps of about so many bytes, at least two of its values a map."""
    fits = (space for space in reversed(_SPACES) if nbytes >= 8 * 4 * MAPS * space[0] * space[1])
    height, width = next(fits, _SPACES[0])
    return max(1, round(nbytes / (4 * MAPS * height * width))), MAPS, height, width


class _Bar:
    """A bar on stderr, if that is a terminal: the bytes of the call that runs, when it is a long one."""

    def __init__(self) -> None:
        from tqdm import tqdm  # noqa: PLC0415 - for this command alone

        self._bar = tqdm(disable=None, leave=False, unit="B", unit_scale=True, unit_divisor=1024, miniters=1)
        self._began = self._done = 0.0

    def begin(self, what: str) -> None:
        """Say what comes now."""
        self._bar.set_description(what)

    def tell(self, progress: Progress) -> None:
        """Show how far a call has come, once it has taken a while."""
        total, done = progress.to_send + progress.to_receive, progress.sent + progress.received
        if done < self._done or not self._began:
            self._began = time.monotonic()
            self._bar.reset(total)
        self._done = done
        if time.monotonic() >= self._began + _SOON_SECONDS:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()
