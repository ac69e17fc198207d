"""The benchmarks' results as Markdown: `python -m benchmarks.tables` writes them into the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PASSES = ("train", "eval", "backward")
NAMES = {"train": "train forward", "eval": "eval forward", "backward": "backward"}


def load(name: str) -> dict[str, Any]:
    """Return a report, "local" or "remote"."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return report


def local_table(report: dict[str, Any]) -> str:
    """Return one line a shape: medians in ms, of the layer and of torch, and how many times faster the layer is."""
    head = "".join(f" {NAMES[each]} | torch | |" for each in PASSES)
    lines = [f"| shape |{head}", "|---|" + "---:|---:|---:|" * len(PASSES)]
    for row in report["rows"]:
        cells = [f"({', '.join(map(str, row['shape']))})"]
        for each in PASSES:
            ours, theirs = (row["ms"][f"{each}, {side}"]["p50"] for side in ("layer", "torch"))
            cells += [_ms(ours), _ms(theirs), f"{row['ratios'][f'{each}, torch / layer']:.1f}x"]
        lines.append(_line(cells))
    means = [f"**{report['geometric means'][f'{each}, torch / layer']:.1f}x**" for each in PASSES]
    lines.append(_line(["geometric mean", *(cell for mean in means for cell in ("", "", mean))]))
    return "\n".join(lines)


def remote_table(report: dict[str, Any]) -> str:
    """Return one line a shape: medians in ms of a remote layer, of the bare transport, and of a local torch layer."""
    lines = [
        "| shape | MB | remote train, TCP | unix socket | bare echo, TCP | unix socket | local torch |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    columns = ("tcp train", "unix train", "tcp echo", "unix echo", "torch train")
    for row in report["rows"]:
        cells = [f"({', '.join(map(str, row['shape']))})", f"{row['bytes'] / 1e6:.3g}"]
        lines.append(_line([*cells, *(_ms(row["ms"][name]["p50"]) for name in columns)]))
    return "\n".join(lines)


def machine(report: dict[str, Any]) -> str:
    """Return what a report was measured on, as one sentence."""
    found = report["machine"]
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("numpy", "numba", "grpcio", "torch"))
    return f"{found['date']}, {found['cpu']}, {found['cpus']} CPUs, Python {found['python']}, {versions}."


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def updated(readme: str) -> str:
    """Return a README whose parts between `<!-- benchmarks: NAME -->` and `<!-- end -->` are those of the results."""
    for name, table in (("local", local_table), ("remote", remote_table)):
        report = load(name)
        head, mark, rest = readme.partition(f"<!-- benchmarks: {name} -->\n")
        _, end, tail = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"the README has no place for the table {name!r}")
        readme = f"{head}{mark}{table(report)}\n\nMeasured {machine(report)}\n{end}{tail}"
    return readme


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"tables: {README}")
