"""The commands that ask a server: they are clients like any other, and print plain tables."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import sharednorm
from sharednorm.errors import InvalidConfiguration, InvalidFile, SharedNormError
from sharednorm_server.config import DEFAULT_LISTEN

if TYPE_CHECKING:
    from sharednorm import Hub, Layer, LayerInfo
    from sharednorm.core.state import LayerState

FAILED = 1

_VECTORS = ("scale", "bias", "mean", "var")

Commands = argparse._SubParsersAction  # the type that argparse gives to what add_subparsers returns


def add_ls(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm ls`."""
    parser = commands.add_parser(
        "ls",
        help="list the layers of a server",
        description="List the layers of a namespace: kind, maps, mode, steps, steps in the statistics, domains.",
        epilog="example: sharednorm ls --server gpu-box:50051 --namespace experiment-7",
    )
    parser.set_defaults(run=_ls, failure=FAILED)
    add_json(parser)
    add_server(parser)


def add_stats(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm stats`."""
    parser = commands.add_parser(
        "stats",
        help="show what a layer has learned",
        description="Show a layer's configuration and counters, a summary of its vectors, and its first maps.",
        epilog="example: sharednorm stats stem/bn --maps 64",
    )
    parser.set_defaults(run=_stats, failure=FAILED)
    parser.add_argument("name", metavar="NAME", help="the layer's name")
    parser.add_argument(
        "--domain", default="", help="whose running statistics; default: the layer's own, which are of no domain"
    )
    parser.add_argument("--maps", type=int, default=8, metavar="N", help="maps to show one by one; default %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them, to a .png, .svg or .pdf")
    add_json(parser)
    add_server(parser)


def add_snapshots(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm snapshots`."""
    parser = commands.add_parser(
        "snapshots",
        help="list the earlier states of a layer",
        description="List the states of a layer that the server has kept, to which `rollback` brings it back.",
        epilog="example: sharednorm snapshots stem/bn",
    )
    parser.set_defaults(run=_snapshots, failure=FAILED)
    parser.add_argument("name", metavar="NAME", help="the layer's name")
    add_json(parser)
    add_server(parser)


def add_rollback(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm rollback`."""
    parser = commands.add_parser(
        "rollback",
        help="bring a layer back to an earlier state",
        description="Bring a layer back to a snapshot, for everybody: scale, bias, and the statistics of all domains. "
        "What it has now becomes a snapshot first. Its count of steps goes on.",
        epilog="example: sharednorm rollback stem/bn --to-version 12000",
    )
    parser.set_defaults(run=_rollback, failure=FAILED)
    parser.add_argument("name", metavar="NAME", help="the layer's name")
    parser.add_argument("--to-version", type=int, required=True, metavar="V", help="version of the snapshot")
    add_json(parser)
    add_server(parser)


def add_backup(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm backup`."""
    parser = commands.add_parser(
        "backup",
        help="copy a server's state to a file, while it works",
        description="Have a server copy all that it keeps to a file on its machine, and print the file's path. To use "
        "it, put it into an empty directory as sharednorm.sqlite3, and start a server with that as its --state.",
        epilog="example: sharednorm backup --server unix:/run/sharednorm.sock",
    )
    parser.set_defaults(run=_backup, failure=FAILED)
    add_json(parser)
    add_server(parser)


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server, whose layers, and how long to wait."""
    parser.add_argument(
        "--server",
        metavar="ADDRESS",
        default=DEFAULT_LISTEN,
        help="HOST:PORT or unix:PATH of the server; default %(default)s",
    )
    parser.add_argument(
        "--tls-ca",
        metavar="FILE",
        help="authority of the server's certificate, PEM; default: the file that $SHAREDNORM_TLS_CA names, or no "
        "encryption. A token is taken from $SHAREDNORM_TOKEN",
    )
    parser.add_argument("--namespace", default="default", help="whose layers; default %(default)s")
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="longest wait for the server; default %(default)s",
    )


def connect(arguments: argparse.Namespace) -> Hub:
    """Return the hub that a command line asks for."""
    return sharednorm.connect(
        arguments.server, namespace=arguments.namespace, timeout=arguments.timeout, tls=arguments.tls_ca
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how to print."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


@contextmanager
def telling_of_files() -> Iterator[None]:
    """Have files that cannot be read or written told in one line, like everything else.

    Raises:
        InvalidFile: One cannot be.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, SharedNormError):  # some of ours are such, too
            raise
        raise InvalidFile(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def say(arguments: argparse.Namespace, text: str, found: object) -> None:
    """Print what has been done: a line for people, or JSON."""
    print(json.dumps(found, indent=1) if arguments.json else text)


def _ls(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        layers = hub.layers()
    if arguments.json:
        say(arguments, "", [layer_to_json(layer) for layer in layers])
    else:
        print_table(table_of(layers))
    return 0


def layer_to_json(layer: LayerInfo) -> dict[str, object]:
    """Return what is known of a layer, as JSON has it."""
    return {
        "name": layer.name, "kind": layer.config.kind.label, "maps": layer.config.maps, "train": layer.train,
        "initialized": layer.initialized, "frozen": layer.stats_frozen, "version": layer.version,
        "numOfProps": layer.num_of_props, "domains": layer.domains,
    }  # fmt: skip


def table_of(layers: Sequence[LayerInfo]) -> list[tuple[str, ...]]:
    """Return layers as a table, its head first."""
    head = ("NAME", "KIND", "MAPS", "MODE", "STEPS", "NUMOFPROPS", "DOMAINS")
    rows = [
        (
            shown(layer.name),
            layer.config.kind.label,
            str(layer.config.maps),
            _mode(layer.train, layer.stats_frozen) if layer.initialized else "empty",
            str(layer.version),
            str(layer.num_of_props),
            str(layer.domains),
        )
        for layer in layers
    ]
    return [head, *rows]


def _stats(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        layer = hub.layer(arguments.name, domain=arguments.domain)
        state = layer.snapshot()
        if arguments.plot is not None:
            _plot(arguments.plot, layer, state)
        if arguments.json:
            say(arguments, "", _stats_to_json(layer, state))
            return 0
        print_table(_facts(layer, hub, state))
    vectors = [getattr(state, name) for name in _VECTORS]
    print()
    summary = [
        (name, *(f"{value:.6g}" for value in (vector.min(), vector.mean(dtype=float), vector.max())))
        for name, vector in zip(_VECTORS, vectors, strict=True)
    ]
    print_table([("", "MIN", "MEAN", "MAX"), *summary])
    shown = max(0, min(arguments.maps, layer.maps))
    if shown:
        print()
        rows = [(str(index), *(f"{vector[index]:.6g}" for vector in vectors)) for index in range(shown)]
        print_table([("MAP", *(name.upper() for name in _VECTORS)), *rows])
    if shown < layer.maps:
        print(f"({layer.maps - shown} more; --maps {layer.maps} shows all)")
    return 0


def _stats_to_json(layer: Layer, state: LayerState) -> dict[str, object]:
    return {
        "name": layer.name, "domain": layer.domain, "domains": list(layer.domains), "maps": layer.maps,
        "epsilon": layer.epsilon, "affine": layer.affine, "averaging": layer.averaging, "nonfinite": layer.nonfinite,
        "initFactor": layer.initFactor, "minFactor": layer.minFactor, "train": layer.train,
        "initialized": state.initialized, "frozen": state.stats_frozen, "version": state.version,
        "numOfProps": state.num_of_props,
        **{name: [_json_number(value) for value in getattr(state, name).tolist()] for name in _VECTORS},
    }  # fmt: skip


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no such number


def _plot(path: Path, layer: Layer, state: LayerState) -> None:
    charts = drawing()
    with telling_of_files():
        charts.save_plot(
            path, {name: getattr(state, name) for name in _VECTORS}, f"{layer.name}, version {state.version}"
        )


def drawing() -> ModuleType:
    """Return what draws pictures.

    Raises:
        InvalidConfiguration: It is not installed.
    """
    try:
        from sharednorm_server.page import charts  # noqa: PLC0415 - needs the extra, and takes a moment
    except ModuleNotFoundError as error:
        raise InvalidConfiguration(f"--plot needs {error.name}: pip install 'sharednorm[server]'") from error
    return charts


def _snapshots(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        found = hub.snapshots(arguments.name)
    if arguments.json:
        every = [
            {"version": each.version, "numOfProps": each.num_of_props, "taken": each.taken.isoformat()}
            for each in found
        ]
        say(arguments, "", every)
        return 0
    rows = [(str(each.version), str(each.num_of_props), f"{each.taken:%Y-%m-%d %H:%M:%S} UTC") for each in found]
    print_table([("VERSION", "NUMOFPROPS", "TAKEN"), *rows])
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        before = hub.layer(arguments.name).version
        hub.rollback(arguments.name, arguments.to_version)
    text = f"{shown(arguments.name)} is as it was at version {arguments.to_version}; what it was is version {before}"
    say(arguments, text, {"name": arguments.name, "version": arguments.to_version, "before": before})
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        path = hub.backup()
    say(arguments, path, {"path": path})
    return 0


def _facts(layer: Layer, hub: Hub, state: LayerState) -> Iterable[tuple[str, str]]:
    names = ", ".join(map(shown, layer.domains)) or "none"
    return (
        ("layer", f"{shown(str(layer.name))} of namespace {shown(hub.namespace)} on {hub.address}"),
        ("domain", f"{shown(layer.domain) or 'none: its own statistics'} (it has: {names})"),
        ("maps", str(layer.maps)),
        ("mode", _mode(layer.train, state.stats_frozen) if state.initialized else "empty: waits for its state"),
        ("steps", f"{state.version}, {state.num_of_props} of them in the running statistics (numOfProps)"),
        ("epsilon", f"{layer.epsilon:g}"),
        ("averaging", f"{layer.averaging}, f = max({layer.initFactor:g} / n, {layer.minFactor:g})"),
        ("affine", "yes" if layer.affine else "no: scale 1 and bias 0, fixed"),
        ("NaN, infinity", {"refuse": "refused", "allow": "allowed"}[layer.nonfinite]),
    )


def _mode(train: bool, frozen: bool) -> str:
    return ("train" if train else "eval") + (", frozen" if frozen else "")


def shown(text: str) -> str:
    """Return a name or a path as it may be printed: on one line, in the characters that stdout has.

    Those that turn a terminal's line around, and all others that are not printable, are escaped.
    """
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # stdout is None in a process started without one
    return printable.encode(encoding, "backslashreplace").decode(encoding)


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells, each column as wide as its widest cell."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
