"""How fast tensors travel, against peers that move the same bytes in the same run.

`python -m benchmarks.datapath` measures everything, prints the ratios beside their goals, and writes
benchmarks/results/datapath.json. What is compared takes turns within the same minute; absolute times differ from
machine to machine, so quote the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import sharednorm
from benchmarks.goals import Goal
from benchmarks.one_call import forget_peak, peak_bytes
from benchmarks.peers.echo import EchoClient, cut
from benchmarks.peers.flight_echo import FlightClient, check
from benchmarks.peers.remote_module import SHAPE, alone, remote_module
from benchmarks.peers.socket_echo import SocketClient
from benchmarks.remote import Calls, Server, machine, measure, process, server, torch_calls
from sharednorm.core.types import Array

TINY = (8, 16, 4, 4)
CLIENTS = 8
LOAD_SECONDS = 6.0
SIZE_ROUNDS = 5
GB = 1_000_000_000
RESULTS = Path(__file__).parent / "results" / "datapath.json"


GOALS = {
    "flight": Goal("train forward, 25.7 MB, TCP / Arrow Flight echo, TCP", most=1.0),
    "flight unix": Goal("train forward, 25.7 MB, unix socket / Arrow Flight echo, unix socket", most=1.0),
    "remote module": Goal("train forward, 25.7 MB, TCP / torch RemoteModule, TCP", most=0.6),
    "remote module, default": Goal("the same / RemoteModule as by default (shared memory, polling)", most=0.6),
    "shared": Goal("train forward, 25.7 MB, shared memory / local torch BatchNorm2d", most=1.0),
    "empty": Goal("the same, arrays from hub.empty / our local layer", most=1.5),
    "client": Goal("train forward, 25.7 MB, compute=client over TCP / local torch BatchNorm2d", most=0.6),
    "tiny": Goal("tiny train forward, p50, TCP / raw unary echo, p50", most=1.15),
    "client memory": Goal("client's peak extra memory, 1 GB over TCP / payload", most=2.2),
    "server memory": Goal("server's peak extra memory, 1 GB over TCP / payload", most=2.2),
    "backward memory": Goal("the same of a forward whose input is kept, and its backward / payload", most=2.2),
    "clients": Goal("bytes through 8 clients at once / raw echo with 8 clients", least=0.9),
    "per byte": Goal("time per byte at 2 GB / at 25.7 MB", most=1.1),
    "calls": Goal("tiny train calls a second, 8 client processes / raw unary echo", least=0.7),
    "eval calls": Goal("tiny eval calls a second, 8 client processes / raw unary echo", least=0.7),
}


def single(directory: str) -> dict[str, Any]:
    """Measure one client at a time: calls of 25.7 MB and tiny ones, each group of peers by itself and in turns."""
    x = np.random.default_rng(0).normal(1, 2, SHAPE).astype(np.float32)
    tiny = np.ascontiguousarray(x[:8, :16, :4, :4])
    assert tiny.shape == TINY
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        layers = {
            transport: stack.enter_context(server(listen)).address
            for transport, listen in (("TCP", "127.0.0.1:0"), ("unix socket", f"unix:{directory}/s.sock"))
        }
        local = sharednorm.BatchNorm2D(SHAPE[1])
        shared = stack.enter_context(sharednorm.connect(layers["unix socket"], transport="shm"))
        tcp = stack.enter_context(sharednorm.connect(layers["TCP"]))
        here = tcp.BatchNorm2D(SHAPE[1], name="large/client", compute="client")
        there = shared.empty(SHAPE)
        there[...] = x
        bn, of_empty = (shared.BatchNorm2D(SHAPE[1], name=f"large/{name}") for name in ("shm", "empty"))
        found["one host"] = measure(
            {
                "shared memory": lambda: bn(x),
                "shared memory, hub.empty": lambda: of_empty(there),
                "compute=client": call_of(here, x),
                "local layer": lambda: local(x),
                **torch_calls(x),
            }
        )
        for transport, address in layers.items():
            calls, small = ways(stack, address, x, tiny)
            where = "127.0.0.1:0" if transport == "TCP" else f"unix:{directory}/echo"
            large_echo, small_echo = echoes(stack.enter_context(process("benchmarks.peers.echo", where)).line, x, tiny)
            where = "127.0.0.1:0" if transport == "TCP" else f"unix:{directory}/socket"
            bare = stack.enter_context(process("benchmarks.peers.socket_echo", where)).line
            location = "grpc://127.0.0.1:0" if transport == "TCP" else f"grpc+unix://{directory}/flight"
            flight = flight_echo(stack.enter_context(process("benchmarks.peers.flight_echo", location)).line, x)
            found[transport] = measure(calls | large_echo | flight | socket_echo(bare, x))
            found[f"tiny, {transport}"] = measure(small | small_echo | socket_echo(bare, tiny))
        calls, _ = ways(stack, layers["TCP"], x, tiny)
        with remote_module(x, tcp=True) as call:
            found["torch RemoteModule"] = measure({"direct": calls["direct"], "RemoteModule, TCP": call})
    found["torch RemoteModule"]["RemoteModule, as by default, alone"] = alone()
    return found


def ways(stack: contextlib.ExitStack, address: str, x: Array, tiny: Array) -> tuple[Calls, Calls]:
    """Return training forwards of a large and of a small tensor, by a direct connection and by gRPC."""
    large, small = {}, {}
    for way in ("direct", "grpc"):
        hub = stack.enter_context(sharednorm.connect(address, transport=way))
        large[way] = call_of(hub.BatchNorm2D(SHAPE[1], name=f"large/{way}"), x)
        small[way] = call_of(hub.BatchNorm2D(TINY[1], name=f"tiny/{way}"), tiny)
    return large, small


def call_of(layer: sharednorm.Layer, x: Array) -> Callable[[], object]:
    """Return a forward."""
    layer.trainMode()
    return lambda: layer(x)


def echoes(address: str, x: Array, tiny: Array) -> tuple[Calls, Calls]:
    """Return echoes of both tensors over grpcio: in chunks, and in one message, by a call or on an open stream."""
    client, chunks, data = EchoClient(address), cut(x.tobytes()), tiny.tobytes()
    large: Calls = {
        "echo, overlapped": lambda: client.overlapped(chunks),
        "echo, once received": lambda: client.received(chunks),
    }
    kept_open = client.kept_open()
    return large, {"unary echo": lambda: client.whole(data), "echo, open stream": lambda: kept_open(data)}


def socket_echo(address: str, x: Array) -> Calls:
    """Return an echo over a bare socket."""
    client, data = SocketClient(address, x.nbytes), x.tobytes()
    return {"socket echo": lambda: client.whole(data)}


def flight_echo(location: str, x: Array) -> Calls:
    """Return an echo over Arrow Flight."""
    client = FlightClient(location)
    check(client)
    return {"Flight echo": lambda: client.echo(x)}


def one_call(nbytes: int, *passes: str) -> dict[str, float]:
    """Measure one call of so many bytes over TCP, in a client and a server of its own."""
    with server("127.0.0.1:0", "--activation-cache-bytes", str(4 * nbytes) if passes else "0") as running:
        command = [sys.executable, "-m", "benchmarks.one_call", running.address, "auto"]
        subprocess.run([*command, "1000000"], check=True, capture_output=True, timeout=120)
        forget_peak(running.pid)
        before = peak_bytes(running.pid)
        found = subprocess.run(
            [*command, str(nbytes), *passes], check=True, capture_output=True, text=True, timeout=600
        )
        result: dict[str, float] = json.loads(found.stdout)
        return {**result, "server extra": peak_bytes(running.pid) - before}


def sizes() -> dict[str, dict[str, float]]:
    """Measure calls of several sizes, each several times and in turns: medians of the times, and the highest peaks."""
    calls: dict[str, tuple[int, tuple[str, ...]]] = {
        "25.7 MB": (4 * int(np.prod(SHAPE)), ()),
        "1 GB": (GB, ()),
        "2 GB": (2 * GB, ()),
        "1 GB, and backward": (GB, ("backward",)),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    for _ in range(SIZE_ROUNDS):
        for name, (nbytes, passes) in calls.items():
            found[name].append(one_call(nbytes, *passes))
    return {
        name: {
            key: (median if key == "seconds" else max)([each[key] for each in taken])  # the payload is always the same
            for key in taken[0]
        }
        for name, taken in found.items()
    }


def many(shape: tuple[int, ...]) -> dict[str, float]:
    """Return the calls a second that 8 client processes make of a layer each, and of a bare echo.

    With them come, for training, the time of the server's processors that a call takes, in ms, and how often its
    threads wait: with all clients, and with one.
    """
    found: dict[str, float] = {}
    with server("127.0.0.1:0") as ours, process("benchmarks.peers.echo", "127.0.0.1:0") as echo:
        servers = {"echo": Server(echo.line, echo.pid), "train": ours, "eval": ours}
        for kind, running in (*servers.items(),) * 2:  # in turns; the better one counts
            rate, work = _load(kind, running, shape, CLIENTS)
            if rate > found.get(kind, 0.0):
                found[kind] = rate
                if kind == "train":
                    found |= {f"{name} a call, {CLIENTS} clients": value for name, value in work.items()}
        _, work = _load("train", ours, shape, 1)
        return found | {f"{name} a call, 1 client": value for name, value in work.items()}


def _load(kind: str, running: Server, shape: tuple[int, ...], clients: int) -> tuple[float, dict[str, float]]:
    """Return the calls a second of so many processes, and what a call takes of the server."""
    sizes = ",".join(map(str, shape))
    command = [sys.executable, "-m", "benchmarks.load", kind, running.address, str(LOAD_SECONDS), sizes]
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(clients)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        before = work_of(running.pid)
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        counts = [int(child.stdout.readline()) for child in children if child.stdout is not None]
        after = work_of(running.pid)
    return sum(counts) / LOAD_SECONDS, {name: (after[name] - before[name]) / sum(counts) for name in after}


def work_of(pid: int) -> dict[str, float]:
    """Return the processor time in ms that a process has had, and how often its threads have waited for something."""
    directory = Path(f"/proc/{pid}")
    # Behind the name, which may hold anything in parentheses, fields 12 and 13 are user's and system's ticks.
    fields = (directory / "stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    waits = 0
    for status in (directory / "task").glob("*/status"):
        waits += int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return {"server ms": 1000 * ticks / os.sysconf("SC_CLK_TCK"), "server waits": float(waits)}


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Return the figure of each goal that was measured."""
    found: dict[str, float] = {}
    if "single" in report:
        found |= {
            "flight": _ratio(report, "TCP", "direct", "Flight echo"),
            "flight unix": _ratio(report, "unix socket", "direct", "Flight echo"),
            "remote module": _ratio(report, "torch RemoteModule", "direct", "RemoteModule, TCP"),
            "remote module, default": _ratio(
                report, "torch RemoteModule", "direct", "RemoteModule, as by default, alone"
            ),
            "shared": _ratio(report, "one host", "shared memory", "torch train"),
            "empty": _ratio(report, "one host", "shared memory, hub.empty", "local layer"),
            "client": _ratio(report, "one host", "compute=client", "torch train"),
            "tiny": _ratio(report, "tiny, TCP", "direct", "unary echo"),
        }
    if "sizes" in report:
        sizes = report["sizes"]
        payload = sizes["1 GB"]["payload"]
        per_byte = {name: each["seconds"] / each["payload"] for name, each in sizes.items()}
        found |= {
            "client memory": sizes["1 GB"]["client extra"] / payload,
            "server memory": sizes["1 GB"]["server extra"] / payload,
            "backward memory": sizes["1 GB, and backward"]["server extra"] / payload,
            "per byte": per_byte["2 GB"] / per_byte["25.7 MB"],
        }
    if "many" in report:
        found |= {
            "clients": report["many"]["25.7 MB"]["train"] / report["many"]["25.7 MB"]["echo"],
            "calls": report["many"]["tiny"]["train"] / report["many"]["tiny"]["echo"],
            "eval calls": report["many"]["tiny"]["eval"] / report["many"]["tiny"]["echo"],
        }
    return {name: round(value, 3) for name, value in found.items()}


def _ratio(report: dict[str, Any], group: str, ours: str, theirs: str) -> float:
    row = report["single"][group]
    return float(row[ours]["p50"] / row[theirs]["p50"])


def main() -> None:
    """Measure, print and write."""
    parts = ("single", "sizes", "many")
    parser = argparse.ArgumentParser(description="Measure how fast tensors travel, against peers.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    parser.add_argument("--only", choices=parts, help="measure a part, and keep the rest of what was written before")
    arguments = parser.parse_args()
    output: Path = arguments.output
    report: dict[str, Any] = json.loads(output.read_text()) if arguments.only and output.exists() else {}
    report["machine"] = machine()
    with tempfile.TemporaryDirectory() as directory:
        for part in (arguments.only,) if arguments.only else parts:
            if part == "single":
                report[part] = single(directory)
                for group, row in report[part].items():
                    print(f"\n{group}; ms, p50 (p10 to p90)")
                    for name, taken in row.items():
                        print(f"  {name:28} {taken['p50']:8.3f}  ({taken['p10']:.3f} to {taken['p90']:.3f})")
            elif part == "sizes":
                report[part] = sizes()
                print("\n" + "\n".join(f"{name}: {found}" for name, found in report[part].items()))
            else:
                report[part] = {"tiny": many(TINY), "25.7 MB": many(SHAPE)}
                print("\ncalls a second of 8 clients: " + json.dumps(report[part]))
    report["goals"] = [
        {"what": GOALS[name].what, "ratio": ratio, "goal": GOALS[name].words(), "met": GOALS[name].met(ratio)}
        for name, ratio in ratios(report).items()
    ]
    print()
    for line in report["goals"]:
        print(f"{line['what']:78} {line['ratio']:7.3f}  (goal {line['goal']}{'' if line['met'] else ': not met'})")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
