"""The commands that show a server's layers: `ls`, `stats` and `snapshots`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sharednorm_server.cli.output import (
    FAILED,
    Commands,
    add_json,
    add_server,
    connect,
    drawing,
    layer_to_json,
    mode_of,
    print_table,
    say,
    shown,
    table_of,
    telling_of_files,
)

if TYPE_CHECKING:
    from sharednorm import Hub, Layer
    from sharednorm.core.state import LayerState

_VECTORS = ("scale", "bias", "mean", "var")


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


def _ls(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        layers = hub.layers()
    if arguments.json:
        say(arguments, "", [layer_to_json(layer) for layer in layers])
    else:
        print_table(table_of(layers))
    return 0


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


def _facts(layer: Layer, hub: Hub, state: LayerState) -> Iterable[tuple[str, str]]:
    names = ", ".join(map(shown, layer.domains)) or "none"
    return (
        ("layer", f"{shown(str(layer.name))} of namespace {shown(hub.namespace)} on {hub.address}"),
        ("domain", f"{shown(layer.domain) or 'none: its own statistics'} (it has: {names})"),
        ("maps", str(layer.maps)),
        ("mode", mode_of(layer.train, state.stats_frozen) if state.initialized else "empty: waits for its state"),
        ("steps", f"{state.version}, {state.num_of_props} of them in the running statistics (numOfProps)"),
        ("epsilon", f"{layer.epsilon:g}"),
        ("averaging", f"{layer.averaging}, f = max({layer.initFactor:g} / n, {layer.minFactor:g})"),
        ("affine", "yes" if layer.affine else "no: scale 1 and bias 0, fixed"),
        ("NaN, infinity", {"refuse": "refused", "allow": "allowed"}[layer.nonfinite]),
    )
