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


def draw(local: dict[str, Any], remote: dict[str, Any], path: Path) -> None:
    """Write the picture: local layers against torch, and remote layers against the bare transport."""
    figure = Figure(figsize=(12, 9), layout="constrained", dpi=110)
    above, below = figure.subplots(2, 1)
    _draw_local(above, local)
    _draw_remote(below, remote)
    figure.text(
        0.005, 0.003, f"above: {machine(local)}\nbelow: {machine(remote)}", fontsize=7, color="gray", va="bottom"
    )
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))  # type: ignore[union-attr, call-arg]
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


def _draw_remote(axes: Axes, report: dict[str, Any]) -> None:
    rows = report["rows"]
    places = np.arange(len(rows))
    columns = ("unix train", "unix echo", "torch train")
    labels = ("remote train forward, unix socket", "bare echo of the tensor, unix socket", "local torch")
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
    """Draw what `benchmarks.local` and `benchmarks.remote` have written."""
    parser = argparse.ArgumentParser(description="Draw the results of the benchmarks.")
    parser.add_argument("--output", type=Path, default=RESULTS / "benchmarks.png", help="default %(default)s")
    arguments = parser.parse_args()
    draw(load("local"), load("remote"), arguments.output)
    print(f"picture: {arguments.output.resolve()}")


if __name__ == "__main__":
    main()
