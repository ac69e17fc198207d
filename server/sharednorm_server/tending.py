"""The commands of whoever tends layers: `sharednorm watch`, `sharednorm delete` and `sharednorm completion`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sharednorm.errors import InvalidConfiguration, LayerNotFound
from sharednorm_server.commands import (
    FAILED,
    Commands,
    add_json,
    add_server,
    connect,
    layer_to_json,
    print_table,
    say,
    shown,
    table_of,
)

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
        epilog="example: sharednorm watch --every 5 --server gpu-box:50051",
    )
    parser.set_defaults(run=_watch, failure=FAILED)
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="how often; default %(default)s")
    parser.add_argument("--count", type=int, metavar="N", help="how many times; default: until interrupted")
    parser.add_argument("--rows", type=int, default=40, metavar="N", help="most layers; default %(default)s")
    parser.add_argument("--json", action="store_true", help="print one line of JSON each time, for programs")
    add_server(parser)


def add_delete(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm delete`."""
    parser = commands.add_parser(
        "delete",
        help="forget layers",
        description="Forget layers and all that they have learned, snapshots included, for everybody. It asks first.",
        epilog="example: sharednorm delete old/bn1 old/bn2 --yes",
    )
    parser.set_defaults(run=_delete, failure=FAILED)
    parser.add_argument("names", nargs="+", metavar="NAME", help="which")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_json(parser)
    add_server(parser)


def add_completion(commands: Commands[argparse.ArgumentParser], whole: Callable[[], argparse.ArgumentParser]) -> None:
    """Add `sharednorm completion`.

    Args:
        commands: Where.
        whole: Returns the parser of all commands.
    """
    parser = commands.add_parser(
        "completion",
        help="print what completes commands in a shell",
        description="Print a script that completes commands and options in a shell.",
        epilog="example: sharednorm completion bash > ~/.local/share/bash-completion/completions/sharednorm",
    )
    parser.set_defaults(run=lambda arguments: _completion(arguments.shell, whole()), failure=FAILED)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def _watch(arguments: argparse.Namespace) -> int:
    if not 0.1 <= arguments.every <= 3600:
        raise InvalidConfiguration(f"--every is {arguments.every:g} (expected: 0.1 to 3600 seconds)")
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
            time.sleep(arguments.every)


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


def _delete(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        known = {layer.name: layer.version for layer in hub.layers()}
        missing = [name for name in arguments.names if name not in known]
        if missing:
            raise LayerNotFound(f"there is no layer {missing[0]!r} in {hub.namespace!r}; nothing has been deleted")
        if not arguments.yes and not _sure(arguments.names, known):
            print("nothing has been deleted", file=sys.stderr)
            return FAILED
        for name in arguments.names:
            hub.delete(name)
    say(arguments, f"deleted: {', '.join(map(shown, arguments.names))}", {"deleted": arguments.names})
    return 0


def _sure(names: Sequence[str], known: dict[str, int]) -> bool:
    if not sys.stdin.isatty():
        raise InvalidConfiguration("nobody can be asked here whether to delete (expected: --yes)")
    listed = ", ".join(f"{shown(name)} ({known[name]} steps)" for name in names)
    print(f"Delete {listed}, for everybody? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def _completion(shell: str, parser: argparse.ArgumentParser) -> int:
    try:
        import shtab  # noqa: PLC0415 - needed here alone
    except ModuleNotFoundError as error:
        raise InvalidConfiguration("completion needs shtab: pip install 'sharednorm[server]'") from error
    print(shtab.complete(parser, shell=shell))
    return 0
