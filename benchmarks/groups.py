"""What it costs to be normalized together: a group of processes, against torch's gloo ranks in the same processes.

`python -m benchmarks.groups` measures everything, prints the figures beside their goals, and writes
benchmarks/results/groups.json. Members, ranks and the server are processes on this machine that talk over TCP on the
loopback. What is compared takes turns within the same minute; absolute times differ from machine to machine, so quote
the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import sharednorm
from benchmarks.goals import Goal
from benchmarks.peers.counting_proxy import HERE, THERE, CountingProxy, counting
from benchmarks.remote import machine, measure, server, summary, torch_calls

ALONE_SHAPE = (32, 64, 56, 56)
MAPS = 64
WIRE_STEPS = 50
LAYERS, REFRESHES = 50, 200
RANK_SECONDS, CALL_SECONDS = 300.0, 60.0
RESULTS = Path(__file__).parent / "results" / "groups.json"

STEP = "step of 2 members x (16, 64, 56, 56), 1 thread each"
GOALS = {
    "forward": Goal(f"{STEP}, forward / sync batch norm by hand over gloo", most=0.35),
    "forward, fewest passes": Goal("the same / with the fewest passes that torch's functions allow", most=0.35),
    "both": Goal(f"{STEP}, forward and backward / by hand over gloo"),
    "both, fewest passes": Goal("the same / with the fewest passes that torch's functions allow"),
    "alone": Goal("train forward (32, 64, 56, 56), compute=client, no group / local torch BatchNorm2d", most=0.6),
    "wire, forward": Goal("bytes of a forward, direct connection, the larger way / (32 C + 512)", most=1.0),
    "wire, backward": Goal("bytes of a backward, direct connection, the larger way / (32 C + 512)", most=1.0),
    "wire, gRPC": Goal("bytes of a forward or a backward, gRPC, the largest / (32 C + 512)", most=1.0),
    "barrier, 8": Goal("meeting of 8 members, C = 64, p50 / gloo all-reduce of as many values, 8 ranks", most=2.0),
    "network, 2": Goal("20 meetings in a row, 2 members / 20 gloo all-reduces", most=1.5),
    "network, 4": Goal("20 meetings in a row, 4 members / 20 gloo all-reduces", most=1.5),
    "refresh, changed": Goal("refresh of 50 layers of 64 maps that have changed / of one", most=3.0),
    "refresh, same": Goal("refresh of 50 layers of 64 maps that have not changed / of one", most=3.0),
}


def ranks(plan: str, count: int) -> dict[str, dict[str, float]]:
    """Have so many processes be members of a group and ranks of gloo; return percentiles of their calls in ms.

    They are of the calls of all processes together: who comes first waits for the others, on either side.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        running = stack.enter_context(server(f"{THERE}:0"))
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.group_rank", plan]
        arguments = [str(count), running.address, f"{directory}/gloo"]
        children = []
        for rank in range(count):
            child = subprocess.Popen(
                [*command, str(rank), *arguments],
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            )
            stack.callback(child.wait)
            stack.callback(child.kill)
            children.append(child)
        # At the same time, since none ends its program before all have.
        readers = stack.enter_context(ThreadPoolExecutor(count))
        outputs = list(readers.map(lambda child: child.communicate(timeout=RANK_SECONDS)[0], children))
        if any(child.returncode for child in children):
            raise RuntimeError(f"a process of the plan {plan!r} has failed; its message is above")
    found: list[dict[str, list[float]]] = [json.loads(output) for output in outputs]
    return {name: summary([time for each in found for time in each[name]]) for name in found[0]}


def together() -> dict[str, Any]:
    """Measure what processes do together."""
    return {
        "steps, 2": ranks("steps", 2),
        "barrier, 8": ranks("barrier", 8),
        "network, 2": ranks("network", 2),
        "network, 4": ranks("network", 4),
    }


def alone() -> dict[str, Any]:
    """Measure a process that sends its moments and waits for nobody, with two threads, as torch has."""
    x = np.random.default_rng(0).normal(1, 2, ALONE_SHAPE).astype(np.float32)
    with server(f"{THERE}:0") as running, sharednorm.connect(running.address) as hub:
        bn = hub.BatchNorm2D(ALONE_SHAPE[1], name="alone", compute="client")
        bn.trainMode()
        return measure({"compute=client": lambda: bn(x), **torch_calls(x)})


def wire() -> dict[str, Any]:
    """Count the bytes that one of two members sends and receives for a forward, and for a backward."""
    ports = _free_ports(2)
    found: dict[str, Any] = {"maps": MAPS, "goal": 32 * MAPS + 512}
    with server(f"{THERE}:{ports[0]}", "--direct-port", str(ports[1])), counting(*ports) as proxy:
        for transport in ("direct", "grpc"):
            for name, counted in _traffic(proxy, ports[0], transport).items():
                found[f"{name}, {transport}"] = counted
    return found


def refresh() -> dict[str, Any]:
    """Measure how a process reads its layers for evaluation: one, and the 50 of a network, in one call each."""
    x = np.random.default_rng(0).normal(size=(8, MAPS)).astype(np.float32)
    with (
        server(f"{THERE}:0") as running,
        sharednorm.connect(running.address) as hub,
        sharednorm.connect(running.address) as other,
    ):
        names = [f"encoder/block{number}/bn" for number in range(LAYERS)]
        readers = [hub.BatchNorm(MAPS, name=name, compute="client", max_staleness=1e6) for name in names]
        writers = [other.BatchNorm(MAPS, name=name, compute="client") for name in names]
        for layer in writers:
            layer.trainMode()

        def changed(count: int) -> float:
            for layer in writers[:count]:
                layer(x)
            begin = time.perf_counter()
            hub.refresh(*readers[:count])
            return time.perf_counter() - begin

        found: dict[str, Any] = {}
        for name, count in (("1 layer", 1), (f"{LAYERS} layers", LAYERS)):
            taken = [changed(count) for _ in range(REFRESHES)]
            found[f"{name}, changed"] = summary([1e3 * seconds for seconds in taken[REFRESHES // 10 :]])
        same: dict[str, Callable[[], object]] = {
            "1 layer, not changed": lambda: hub.refresh(readers[0]),
            f"{LAYERS} layers, not changed": lambda: hub.refresh(*readers),
        }
        return found | measure(same)


def refresh_ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures of reading many layers."""
    return {
        "refresh, changed": _ratio(found, f"{LAYERS} layers, changed", "1 layer, changed"),
        "refresh, same": _ratio(found, f"{LAYERS} layers, not changed", "1 layer, not changed"),
    }


def _traffic(proxy: CountingProxy, port: int, transport: str) -> dict[str, dict[str, float]]:
    x = np.random.default_rng(0).normal(size=(8, MAPS)).astype(np.float32)
    found = {}
    with contextlib.ExitStack() as stack:
        layers = [
            stack.enter_context(sharednorm.connect(f"{host}:{port}", transport=transport)).BatchNorm(
                MAPS,
                name="encoder/block3/bn2",
                compute="client",
                group=sharednorm.Group(f"run-{transport}", size=2, rank=rank),
            )
            for rank, host in enumerate((HERE, THERE))  # the second member goes past the proxy
        ]
        threads = stack.enter_context(ThreadPoolExecutor(len(layers)))
        passes: dict[str, Callable[[sharednorm.Layer], object]] = {
            "forward": lambda layer: layer(x),
            "backward": lambda layer: layer.backward(x),
        }
        for call in passes.values():  # the first calls join, and open connections
            list(threads.map(call, layers, timeout=CALL_SECONDS))
        for name, call in passes.items():
            before = proxy.traffic()
            for _ in range(WIRE_STEPS):
                list(threads.map(call, layers, timeout=CALL_SECONDS))
            after = proxy.traffic()
            found[name] = {
                "sent": (after.sent - before.sent) / WIRE_STEPS,
                "received": (after.received - before.received) / WIRE_STEPS,
            }
    return found


def _free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server((THERE, 0))) for _ in range(count)]
        return tuple(probe.getsockname()[1] for probe in probes)


def together_ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures of what processes do together."""
    ratios = {}
    for name, passes in (("forward", "forward"), ("both", "forward and backward")):
        for of, form in (("", ""), (", fewest passes", "fewest passes, ")):
            ratios[f"{name}{of}"] = _ratio(found["steps, 2"], f"group, {passes}", f"gloo, {form}{passes}")
    return ratios | {name: _ratio(row, "group", "gloo") for name, row in found.items() if name != "steps, 2"}


def alone_ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return the figure of a process that waits for nobody."""
    return {"alone": _ratio(found, "compute=client", "torch train")}


def wire_ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return the bytes in relation to the goal."""
    most = {name: max(each.values()) / found["goal"] for name, each in found.items() if isinstance(each, dict)}
    return {
        "wire, forward": most["forward, direct"],
        "wire, backward": most["backward, direct"],
        "wire, gRPC": max(most["forward, grpc"], most["backward, grpc"]),
    }


def _ratio(row: dict[str, Any], ours: str, theirs: str) -> float:
    return float(row[ours]["p50"] / row[theirs]["p50"])


PARTS: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], dict[str, float]]]] = {
    "together": (together, together_ratios),
    "alone": (alone, alone_ratios),
    "wire": (wire, wire_ratios),
    "refresh": (refresh, refresh_ratios),
}
"""What is measured, and the figures that come of it."""


def show(part: str, found: dict[str, Any]) -> None:
    """Print what was measured."""
    rows = found if part == "together" else {part: found}
    for name, row in rows.items():
        print(f"\n{name}")
        for what, taken in row.items():
            if isinstance(taken, dict) and "p50" in taken:
                print(f"  {what:44} {taken['p50']:8.3f} ms  ({taken['p10']:.3f} to {taken['p90']:.3f})")
            else:
                print(f"  {what:44} {json.dumps(taken)}")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure what it costs to be normalized together, against gloo.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    parser.add_argument("--only", choices=PARTS, help="measure a part, and keep the rest of what was written before")
    arguments = parser.parse_args()
    output: Path = arguments.output
    report: dict[str, Any] = json.loads(output.read_text()) if arguments.only and output.exists() else {}
    report["machine"] = machine()
    for part in (arguments.only,) if arguments.only else PARTS:
        report[part] = PARTS[part][0]()
        show(part, report[part])
    figures: dict[str, float] = {}
    for part, (_, figures_of) in PARTS.items():
        if part in report:
            figures |= figures_of(report[part])
    report["goals"] = [
        {"what": goal.what, "ratio": round(figures[name], 3), "goal": goal.words(), "met": goal.met(figures[name])}
        for name, goal in GOALS.items()
        if name in figures
    ]
    print()
    for line in report["goals"]:
        goal = f"  (goal {line['goal']}{'' if line['met'] else ': not met'})" if line["goal"] else ""
        print(f"{line['what']:98} {line['ratio']:7.3f}{goal}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
