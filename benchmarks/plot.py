"""A picture of the benchmarks' results: `python -m benchmarks.plot` writes benchmarks/results/benchmarks.png."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import NAMES, PASSES, RESULTS, load, machine

COLORS = ("#0072B2", "#E69F00", "#009E73")
WANTED = {"train": 2.5, "eval": 1.0, "backward": 1.5}
"""How many times faster than torch a local layer is meant to be, on the geometric mean."""


def draw(local: dict[str, Any], datapath: dict[str, Any], remote: dict[str, Any], path: Path) -> None:
    """Write the picture: local layers against torch, the data path against its peers, and remote layers by shape."""
    figure = Figure(figsize=(12, 13), layout="constrained", dpi=110)
    above, middle, below = figure.subplots(3, 1)
    _draw_local(above, local)
    _draw_datapath(middle, datapath)
    _draw_remote(below, remote)
    runs = f"above: {machine(local)}\nmiddle: {machine(datapath)}\nbelow: {machine(remote)}"
    figure.text(0.005, 0.003, runs, fontsize=7, color="gray", va="bottom")
    figure.get_layout_engine().set(rect=(0, 0.045, 1, 0.955))  # type: ignore[union-attr, call-arg]  # it is there, and takes that
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_local(axes: Axes, report: dict[str, Any]) -> None:
    rows = report["rows"]
    places = np.arange(len(rows) + 1)
    for index, (each, color) in enumerate(zip(PASSES, COLORS, strict=True)):
        name = f"{each}, torch / layer"
        values = [row["ratios"][name] for row in rows] + [report["geometric means"][name]]
        label = f"{NAMES[each]} (meant: {WANTED[each]:g})"
        bars = axes.bar(places + (index - 1) * 0.27, values, width=0.26, color=color, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
        axes.axhline(WANTED[each], color=color, lw=0.8, ls=":")
    axes.axvline(len(rows) - 0.5, color="gray", lw=0.8)
    axes.set_xticks(places, [*_labels(rows), "geometric\nmean"], fontsize=8)
    axes.set_ylabel("times faster than torch")
    axes.set_title("A local layer and torch.nn.BatchNorm2d on the CPU, float32")
    _finish(axes)


def _draw_datapath(axes: Axes, report: dict[str, Any]) -> None:
    tcp, host = report["single"]["TCP"], report["single"]["one host"]
    bars = (
        ("gRPC's Python echo, overlapped", tcp["echo, overlapped"], COLORS[1]),
        ("Arrow Flight echo (C++)", tcp["Flight echo"], COLORS[1]),
        ("remote layer, gRPC", tcp["grpc"], COLORS[0]),
        ("remote layer, direct", tcp["direct"], COLORS[0]),
        ("remote layer, shared memory", host["shared memory"], COLORS[0]),
        ("remote layer, hub.empty", host["shared memory, hub.empty"], COLORS[0]),
        ("local torch BatchNorm2d", host["torch train"], COLORS[1]),
        ("local layer", host["local layer"], COLORS[2]),
    )
    places = np.arange(len(bars))[::-1]
    drawn = axes.barh(places, [taken["p50"] for _, taken, _ in bars], color=[color for *_, color in bars], height=0.7)
    axes.bar_label(drawn, fmt="%.1f", fontsize=8, padding=2)
    axes.set_yticks(places, [name for name, *_ in bars], fontsize=8)
    axes.set_xlabel("ms, median; TCP on the loopback, shared memory over a unix socket")
    axes.set_title("A training forward of 25.7 MB, there and back, and who moves the same bytes")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_remote(axes: Axes, report: dict[str, Any]) -> None:
    rows = report["rows"]
    places = np.arange(len(rows))
    columns = ("unix train", "unix echo", "torch train")
    labels = (
        "remote train forward, unix socket (shared memory)",
        "bare echo, unix socket",
        "local torch",
    )
    for index, (name, label, color) in enumerate(zip(columns, labels, COLORS, strict=True)):
        values = [row["ms"][name]["p50"] for row in rows]
        bars = axes.bar(places + (index - 1) * 0.27, values, width=0.26, color=color, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(places, _labels(rows), fontsize=8)
    axes.set_ylabel("ms, median")
    axes.set_title("A remote layer, client and server on one machine")
    _finish(axes)


def _labels(rows: list[dict[str, Any]]) -> list[str]:
    return [f"({', '.join(map(str, row['shape']))})\n{row['bytes'] / 1e6:.3g} MB" for row in rows]


def _finish(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw what `benchmarks.local`, `benchmarks.datapath` and `benchmarks.remote` have written."""
    parser = argparse.ArgumentParser(description="Draw the results of the benchmarks.")
    parser.add_argument("--output", type=Path, default=RESULTS / "benchmarks.png", help="default %(default)s")
    arguments = parser.parse_args()
    draw(load("local"), load("datapath"), load("remote"), arguments.output)
    print(f"picture: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()
