"""The benchmarks' results as Markdown: `python -m benchmarks.tables` writes them into the pages that show them."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PASSES = ("train", "eval", "backward")
SHARED = {"calls": "datapath", "together": "groups", "kept": "durability", "spread": "servers"}
"""Tables of a report that has another name."""
SUMMARY = "summary"
NAMES = {"train": "train forward", "eval": "eval forward", "backward": "backward"}


def load(name: str) -> dict[str, Any]:
    """Return a report: of "gpu-kernels" and "gpu-calls" the last one of any GPU, of others the one of that name."""
    path = RESULTS / f"{name}.json"
    if name.startswith("gpu-"):
        path = max(RESULTS.glob(f"{name}-*.json"), key=lambda each: (each.stem[-len("2026-01-01") :], each.stem))
    report: dict[str, Any] = json.loads(path.read_text())
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


def datapath_table(report: dict[str, Any]) -> str:
    """Return one line a comparison: its ratio, and the one that it was meant to be."""
    lines = ["| measure | ratio | meant to be |", "|---|---:|---:|"]
    for each in report["goals"]:
        mark = "" if each["met"] else ", not met"
        lines.append(_line([each["what"], f"{each['ratio']:.2f}", f"{each['goal']}{mark}"]))
    return "\n".join(lines)


def calls_table(report: dict[str, Any]) -> str:
    """Return one line a way: medians in ms of a training forward of 25.7 MB and of a tiny one, and of the peers."""
    single = report["single"]
    lines = ["| ms | 25.7 MB, TCP | unix socket | 8 KB, TCP | unix socket |", "|---|---:|---:|---:|---:|"]
    names = {
        "direct": "remote train forward, direct",
        "grpc": "remote train forward, gRPC",
        "echo, overlapped": "bare echo by grpcio, chunks sent back as they come",
        "echo, once received": "bare echo by grpcio, sent back when all is there",
        "unary echo": "bare echo by grpcio, one message",
        "echo, open stream": "bare echo by grpcio, one message on an open stream",
        "socket echo": "bare echo on a socket, sent back when all is there",
        "Flight echo": "Arrow Flight echo",
    }
    for name, label in names.items():
        groups = ("TCP", "unix socket", "tiny, TCP", "tiny, unix socket")
        cells = [_ms(single[group][name]["p50"]) if name in single[group] else "" for group in groups]
        lines.append(_line([label, *cells]))
    host = single["one host"]
    for name, label in (
        ("shared memory", "remote train forward, shared memory"),
        ("shared memory, hub.empty", "the same, arrays from `hub.empty`"),
        ("compute=client", 'remote train forward, `compute="client"`'),
        ("local layer", "local layer of ours"),
        ("torch train", "local torch BatchNorm2d"),
    ):
        lines.append(_line([label, "", _ms(host[name]["p50"]), "", ""]))
    return "\n".join(lines)


def together_table(report: dict[str, Any]) -> str:
    """Return one line a thing that processes do together: medians in ms, of a group and of gloo's ranks."""
    found = report["together"]
    steps = found["steps, 2"]
    lines = ["| ms | group | by hand over gloo | the same, fewest passes |", "|---|---:|---:|---:|"]
    for name in ("forward", "forward and backward"):
        sides = ("group", "gloo", "gloo, fewest passes")
        lines.append(_line([f"step of 2 members, {name}", *(_ms(steps[f"{each}, {name}"]["p50"]) for each in sides)]))
    for key, label in (
        ("network, 2", "20 meetings in a row, 2 members"),
        ("network, 4", "20 meetings in a row, 4 members"),
        ("barrier, 8", "one meeting, 8 members"),
    ):
        lines.append(_line([label, *(_ms(found[key][side]["p50"]) for side in ("group", "gloo")), ""]))
    return "\n".join(lines)


def kept_table(report: dict[str, Any]) -> str:
    """Return one line a number of clients: steps a second, and medians in ms, with each store."""
    rates = report["rates"]
    lines = [
        "| | memory, a second | ms | os, a second | ms | fsync, a second | ms | disk, ms |",
        "|---|" + "---:|" * 7,
    ]
    for clients in ("1 client", "8 clients", "32 clients"):
        cells = [clients]
        for store in ("memory", "os", "fsync"):
            found = rates[clients][store]
            cells += [f"{found['steps a second']:.0f}", _ms(found["ms"]["p50"])]
        lines.append(_line([*cells, _ms(rates["one fsync"]["fsync"]["ms"]["p50"])]))
    return "\n".join(lines)


def spread_table(report: dict[str, Any]) -> str:
    """Return one line a place: steps a second of eight clients, and median and 99th percentile in ms of one alone."""
    rates = report["rates"]
    lines = ["| | 64 layers, a second | one layer, a second | one client alone, ms | p99 |", "|---|" + "---:|" * 4]
    names = {
        "memory": "one server, memory",
        "SQLite": "one server, SQLite, durability os",
        "1 server": "one server, Redis",
        "2 servers": "two servers, Redis",
        "3 servers": "three servers, Redis",
        "2 servers, each for itself": "two servers, Redis, each client with one of them",
    }
    for place, label in names.items():
        cells = [f"{rates[what][place]['steps a second']:.0f}" for what in ("64 layers", "1 layer")]
        alone = rates["1 client"][place]["ms"]
        lines.append(_line([label, *cells, _ms(alone["p50"]), _ms(alone["p99"])]))
    return "\n".join(lines)


def kernels_table(report: dict[str, Any]) -> str:
    """Return one line a shape: medians in microseconds of our kernels and the faster torch, and the ratio, float32.

    Then the ratios' geometric means over all shapes, for each element type.
    """
    head = "".join(f" {NAMES[each]} | torch | |" for each in PASSES)
    lines = [f"| float32, microseconds |{head}", "|---|" + "---:|---:|---:|" * len(PASSES)]
    for row in report["rows"]:
        cells = [f"({', '.join(map(str, row['shape']))})"]
        for each in PASSES:
            ours, theirs = _medians(row, each)
            cells += [_ms(ours), _ms(theirs), f"{theirs / ours:.1f}x"]
        if row["dtype"] == "float32":
            lines.append(_line(cells))
    for dtype in ("float32", "float16", "bfloat16"):
        means = [_times(_kernels_mean(report, each, dtype)) for each in PASSES]
        lines.append(_line([f"geometric mean, {dtype}", *(cell for mean in means for cell in ("", "", mean))]))
    return "\n".join(lines)


def gpu_calls_table(report: dict[str, Any]) -> str:
    """Return one line a way: medians in ms of a call to a server's GPU, and of torch in the program itself."""
    rows = report["rows"]
    sizes = " | ".join(f"{row['bytes'] / 1e6:.3g} MB" for row in rows)
    lines = [f"| ms | {sizes} |", "|---|" + "---:|" * len(rows)]
    for name, label in (
        ("shm train", "remote train forward, shared memory"),
        ("shm train, hub.empty", "the same, arrays from `hub.empty`"),
        ("shm train and backward", "remote train forward and backward, shared memory"),
        ("direct train", "remote train forward, TCP"),
        ("torch on the GPU", "torch in the program, GPU, with the copies there and back"),
        ("torch on the GPU, pinned", "the same, from and to pinned memory"),
        ("torch train", "torch in the program, CPU"),
    ):
        lines.append(_line([label, *(_ms(row["ms"][name]["p50"]) for row in rows)]))
    return "\n".join(lines)


def machine(report: dict[str, Any]) -> str:
    """Return what a report was measured on, as one sentence."""
    found = report["machine"]
    gpu = f"{found['GPU']}, driver {found['driver']}, cuDNN {found['cuDNN']}, " if "GPU" in found else ""
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("numpy", "numba", "grpcio", "torch"))
    return f"{found['date']}, {gpu}{found['cpu']}, {found['cpus']} CPUs, Python {found['python']}, {versions}."


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(value: float) -> str:
    return f"{value:#.3g}" if value < 100 else f"{value:.0f}"


def summary_table() -> str:
    """Return one line for each of the figures that say most, each with what it was measured on."""
    lines = ["| ours | against | times as fast | on |", "|---|---|---:|---|"]
    kernels, local, datapath, groups = (load(name) for name in ("gpu-kernels", "local", "datapath", "groups"))
    for each in PASSES:
        mean = _kernels_mean(kernels, each, "float32")
        lines.append(_line([f"CUDA {NAMES[each]}, float32", "torch with cuDNN or without, the faster", _times(mean),
                            kernels["machine"]["GPU"]]))  # fmt: skip
    for each in PASSES:
        mean = local["geometric means"][f"{each}, torch / layer"]
        lines.append(_line([f"local {NAMES[each]}", "`torch.nn.BatchNorm2d`", _times(mean), _processors(local)]))
    for report, named in ((datapath, _TRAVELS), (groups, _MEETINGS)):
        ratios = {each["what"]: each["ratio"] for each in report["goals"]}
        for what, (ours, peer) in named.items():
            lines.append(_line([ours, peer, _times(1 / ratios[what]), _processors(report)]))
    return "\n".join(lines)


_TRAVELS = {
    "train forward, 25.7 MB, TCP / Arrow Flight echo, TCP":
        ("remote train forward of 25.7 MB, TCP", "an echo of the bytes by Arrow Flight"),
    "train forward, 25.7 MB, shared memory / local torch BatchNorm2d":
        ("remote train forward of 25.7 MB, shared memory", "`torch.nn.BatchNorm2d` in the program"),
    "train forward, 25.7 MB, compute=client over TCP / local torch BatchNorm2d":
        ('train forward of 25.7 MB, `compute="client"`', "`torch.nn.BatchNorm2d` in the program"),
}  # fmt: skip
_MEETINGS = {
    "step of 2 members x (16, 64, 56, 56), 1 thread each, forward and backward / by hand over gloo":
        ("step of a group of two, forward and backward", "the same by hand over gloo"),
    "meeting of 8 members, C = 64, p50 / gloo all-reduce of as many values, 8 ranks":
        ("meeting of a group of eight", "an all-reduce of gloo"),
}  # fmt: skip


def _medians(row: dict[str, Any], each: str) -> tuple[float, float]:
    # Of a pass in microseconds: ours, and that of the faster torch.
    found = row["passes"][each]["us"]
    return found["ours"]["p50"], min(taken["p50"] for side, taken in found.items() if side != "ours")


def _kernels_mean(report: dict[str, Any], each: str, dtype: str) -> float:
    medians = [_medians(row, each) for row in report["rows"] if row["dtype"] == dtype]
    return geometric_mean(theirs / ours for ours, theirs in medians)


def _times(ratio: float) -> str:
    return f"**{ratio:.1f}x**"


def _processors(report: dict[str, Any]) -> str:
    found = report["machine"]
    return f"{found['cpus']} CPUs, {found['cpu']}"


def updated(page: str) -> str:
    """Return a page whose parts between `<!-- benchmarks: NAME -->` and `<!-- end -->` are those of the results."""
    if f"<!-- benchmarks: {SUMMARY} -->" in page:
        return _replaced(page, SUMMARY, summary_table())
    tables = {
        "gpu-kernels": kernels_table, "gpu-calls": gpu_calls_table,
        "local": local_table, "datapath": datapath_table, "calls": calls_table, "remote": remote_table,
        "groups": datapath_table, "together": together_table,
        "durability": datapath_table, "kept": kept_table, "overload": datapath_table,
        "servers": datapath_table, "spread": spread_table,
    }  # fmt: skip
    for name, table in tables.items():
        report = load(SHARED.get(name, name))
        page = _replaced(page, name, f"{table(report)}\n\nMeasured {machine(report)}")
    return page


def _replaced(page: str, name: str, text: str) -> str:
    head, mark, rest = page.partition(f"<!-- benchmarks: {name} -->\n")
    _, end, tail = rest.partition("<!-- end -->")
    if not (mark and end):
        raise ValueError(f"the page has no place for the table {name!r}")
    return f"{head}{mark}{text}\n{end}{tail}"


if __name__ == "__main__":
    for path in (README, PAGE):
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"tables: {path}")
