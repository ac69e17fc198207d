"""The command that shows a server's layers again and again: `watch`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.cli.output import FAILED, Commands, add_server, connect, layer_to_json, print_table, table_of

if TYPE_CHECKING:
    from sharednorm import LayerInfo

# Home, and clear what is below: nothing flickers.
_CLEAR = "\x1b[H\x1b[J"


def add_watch(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm watch`."""
    parser = commands.add_parser(
        "watch",
        help="watch the layers of a server",
        description="Show the layers of a namespace again and again, with the steps that each takes in a second, those "
        "that take most first, until it is interrupted.",
        epilog="example: sharednorm watch --interval 5 --server gpu-box:50051",
    )
    parser.set_defaults(run=_watch, failure=FAILED)
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="SECONDS", help="time between two looks; default %(default)s"
    )
    parser.add_argument("--count", type=int, metavar="N", help="how many times; default: until interrupted")
    parser.add_argument("--rows", type=int, default=40, metavar="N", help="most layers; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one line of JSON each time, for programs")
    add_server(parser)


def _watch(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.interval <= 3600:
        raise InvalidConfiguration(f"--interval is {arguments.interval:g} (expected: 0.1 to 3600 seconds)")
    before: dict[str, int] = {}
    looked, shown_times = 0.0, 0
    clear = _CLEAR if sys.stdout.isatty() else ""
    with connect(arguments) as hub:
        while True:
            layers, now = hub.layers(), time.monotonic()
            rates = {layer.name: _rate(layer, before, now - looked) for layer in layers}
            if arguments.json:
                rows = [{**layer_to_json(layer), "steps_per_second": rates[layer.name]} for layer in layers]
                print(json.dumps(rows), flush=True)
            else:
                print(clear, end="")
                _show(layers, rates, arguments.rows)
            before, looked = {layer.name: layer.version for layer in layers}, now
            shown_times += 1
            if arguments.count is not None and shown_times >= arguments.count:
                return 0
            time.sleep(arguments.interval)


def _rate(layer: LayerInfo, before: dict[str, int], seconds: float) -> float | None:
    if layer.name not in before:
        return None
    return max(0, layer.version - before[layer.name]) / seconds


def _show(layers: Sequence[LayerInfo], rates: dict[str, float | None], most: int) -> None:
    busiest = sorted(layers, key=lambda layer: (-(rates[layer.name] or 0.0), layer.name))[:most]
    head, *rows = table_of(busiest)
    told = ["-" if (rate := rates[layer.name]) is None else f"{rate:.1f}" for layer in busiest]
    print_table([(*head, "STEPS/S"), *((*row, rate) for row, rate in zip(rows, told, strict=True))])
    left = len(layers) - len(busiest)
    together = sum(rate or 0.0 for rate in rates.values())
    print(f"{len(layers)} layers, {together:.1f} steps a second" + (f" ({left} not shown)" if left else ""), flush=True)
