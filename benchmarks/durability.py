"""What it costs that a step is kept before it is answered, against a server's memory and the disk's own fsync.

`python -m benchmarks.durability` measures everything, prints the figures beside their goals, and writes
benchmarks/results/durability.json. Three servers, of which one computes at a time: with `--state memory:`, and with a
file under `--durability os` and `fsync`; and two more with `fsync`, on disks that are made slow: `slow_disk.c` adds to
each fsync 16 ms, as a disk that turns needs, or 40 ms, as one that others use as well, since it is there that a shared
commit counts. Clients are processes on this machine; each has layers of its own, and takes steps whose tensors stay
with it (`compute="client"`), so that what is measured is the state and not the tensors. On the slow disk eight clients
also share one layer, with both kinds of `compute`, and create layers.

`python -m benchmarks.durability client SECONDS THREADS ADDRESS...` is one client, of which each thread is one trainer:
it reads the number of an address, trains there for so long, prints what each step took, and reads the next. `python -m
benchmarks.durability disk DIRECTORY` tells what an fsync takes there, and a commit of a step by one thread alone.
`python -m benchmarks.durability sharer SECONDS ADDRESS` is a client that reads "client", "server" or "create".
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

import sharednorm
from benchmarks.goals import Goal
from benchmarks.remote import machine, server, summary
from benchmarks.trainers import answer_of, obey, started, steps_at, train
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments, initial_state
from sharednorm.core.types import LayerKind
from sharednorm_server.layers.idempotency import step_change
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import CallKey, Note
from sharednorm_server.store.sqlite.store import SqliteStore

MAPS = 64
SECONDS, ROUNDS, PROBES = 4.0, 3, 25
RESULTS = Path(__file__).parent / "results" / "durability.json"
SLOW_MS = {"slow": 16.0, "slower": 40.0}
DISKS = ("fsync", *SLOW_MS)
STORES = ("memory", "os", *DISKS)
_CONFIG = LayerConfig(LayerKind.BATCH_NORM, MAPS)
BATCH = Moments(8, np.zeros(MAPS), np.ones(MAPS))
RECORD = LayerRecord(LayerKey("default", "one", "one"), _CONFIG, initial_state(_CONFIG, 0.1, np.random.default_rng(0)))

GOALS = {
    "os": Goal("train steps a second of 8 clients, durability os / memory", least=0.7),
    "fsync, 8": Goal("train steps a second of 8 clients, durability fsync / memory"),
    "fsync, 32": Goal("train steps a second of 32 clients, durability fsync / fsyncs a second of the disk", least=20.0),
    "alone": Goal("what durability fsync adds to the step of one client alone / one commit", most=1.1),
    "alone, fsync": Goal("the same / one fsync of the disk"),
    **{
        f"{name}, 32": Goal(
            f"the same of 32 clients, each fsync {ms:g} ms longer / fsyncs a second of that disk", least=20.0
        )
        for name, ms in SLOW_MS.items()
    },
    **{
        f"{name}, shared": Goal(f"steps of 32 clients in one commit, each fsync {ms:g} ms longer")
        for name, ms in SLOW_MS.items()
    },
    **{
        f"{name}, alone": Goal(
            f"what it adds to the step of one client alone, each fsync {ms:g} ms longer / one commit", most=1.1
        )
        for name, ms in SLOW_MS.items()
    },
    "one layer": Goal(
        "train steps a second of 8 clients of one layer, compute='client' / 'server', each fsync 16 ms longer",
        least=0.95,
    ),
    "create": Goal("layers a second that 8 clients create / one client creates, each fsync 16 ms longer", least=5.0),
}


def rates() -> dict[str, Any]:
    """Measure steps a second and latencies of one, 8 and 32 clients with each store, and fsyncs of the same disk."""
    found: dict[str, Any] = {}
    alone: dict[str, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        # Beside the results: a temporary directory may well be in memory.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=RESULTS.parent)))
        pages = {name: f"127.0.0.1:{_free_port()}" for name in SLOW_MS}
        options = {
            "memory": (),
            "os": ("--state", f"sqlite://{directory}/os", "--durability", "os"),
            "fsync": ("--state", f"sqlite://{directory}/fsync", "--durability", "fsync"),
            **{
                name: ("--state", f"sqlite://{directory}/{name}", "--durability", "fsync", "--http-listen", page)
                for name, page in pages.items()
            },
        }
        servers, probes = {}, {}
        for store in STORES:
            with _slow(directory, SLOW_MS[store]) if store in SLOW_MS else contextlib.nullcontext():
                servers[store] = stack.enter_context(server("127.0.0.1:0", *options[store]))
                if store in DISKS:
                    words = ["benchmarks.durability", "disk", f"{directory}/probe-{store}"]
                    (probes[store],) = stack.enter_context(started([words]))
        for clients, threads in ((1, 1), (8, 1), (8, 4)):
            name = f"{clients * threads} clients" if clients > 1 else "1 client"
            rounds: dict[str, list[dict[str, Any]]] = {store: [] for store in STORES}
            addresses = [servers[store].address for store in STORES]
            words = ["benchmarks.durability", "client", str(SECONDS), str(threads), *addresses]
            with started([words] * clients) as trainers:
                before = {store: _kept(page) for store, page in pages.items()}
                for _ in range(ROUNDS):
                    for index, store in enumerate(STORES):
                        rounds[store].append(_round(trainers, index))
                    for store, probe in probes.items():
                        for what, taken in answer_of(probe, "measure").items():
                            alone.setdefault(what, {}).setdefault(store, []).extend(taken)
                together = {store: _kept(page) - before[store] for store, page in pages.items()}
            found[name] = {
                store: {
                    "steps a second": median(each["steps a second"] for each in rounds[store]),
                    "ms": summary([ms for each in rounds[store] for ms in each["ms"]]),
                    **({"changes a commit": together[store].share} if store in together else {}),
                }
                for store in STORES
            }
    for what, disks in alone.items():
        found[what] = {store: {"ms": summary(taken)} for store, taken in disks.items()}
    return found


def sharing() -> dict[str, Any]:
    """Measure steps a second of 8 clients of one layer, and layers a second that clients create, on the slow disk."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=RESULTS.parent)))
        with _slow(directory, SLOW_MS["slow"]):
            state = f"sqlite://{directory}/shared"
            kept = stack.enter_context(server("127.0.0.1:0", "--state", state, "--durability", "fsync"))
        words = ["benchmarks.durability", "sharer", str(SECONDS), kept.address]
        sharers = stack.enter_context(started([words] * 8))
        cases = {
            "one layer, client": sharers,
            "one layer, server": sharers,
            "1 creator": sharers[:1],
            "8 creators": sharers,
        }
        taken: dict[str, list[list[float]]] = {name: [] for name in cases}
        for _ in range(ROUNDS):
            for name, clients in cases.items():
                taken[name].append(steps_at(clients, "create" if "creator" in name else name.split()[-1]))
    for name, rounds in taken.items():
        rate = median(len(each) / SECONDS for each in rounds)
        found[name] = {"slow": {"steps a second": rate, "ms": summary([ms for each in rounds for ms in each])}}
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    """Return the figures."""

    def rate(what: str) -> float:
        return float(found[what]["slow"]["steps a second"])

    eight, many = found["8 clients"], found["32 clients"]

    def of(what: str, store: str) -> float:
        return float(found[what][store]["ms"]["p50"])

    added = {store: of("1 client", store) - of("1 client", "memory") for store in DISKS}
    return {
        "os": eight["os"]["steps a second"] / eight["memory"]["steps a second"],
        "fsync, 8": eight["fsync"]["steps a second"] / eight["memory"]["steps a second"],
        **{f"{store}, 32": many[store]["steps a second"] * of("one fsync", store) / 1e3 for store in DISKS},
        "alone": added["fsync"] / of("one commit", "fsync"),
        "alone, fsync": added["fsync"] / of("one fsync", "fsync"),
        **{f"{name}, shared": many[name]["changes a commit"] for name in SLOW_MS},
        **{f"{name}, alone": added[name] / of("one commit", name) for name in SLOW_MS},
        "one layer": rate("one layer, client") / rate("one layer, server"),
        "create": rate("8 creators") / rate("1 creator"),
    }


class Kept(NamedTuple):
    """What a store has done: its transactions, and the changes in them."""

    commits: float
    changes: float

    def __sub__(self, before: Kept) -> Kept:
        """Return what it has done since."""
        return Kept(self.commits - before.commits, self.changes - before.changes)

    @property
    def share(self) -> float:
        """How many changes share a transaction."""
        return self.changes / self.commits


def _kept(page: str) -> Kept:
    with urllib.request.urlopen(f"http://{page}/metrics", timeout=10) as answer:
        lines = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
    return Kept(float(lines["sharednorm_store_commits_total"]), float(lines["sharednorm_store_changes_total"]))


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@contextlib.contextmanager
def _slow(directory: Path, ms: float) -> Iterator[None]:
    """Have what is started meanwhile find the disk slow."""
    library = directory / "slow_disk.so"
    source = Path(__file__).with_name("slow_disk.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    os.environ |= {"LD_PRELOAD": str(library), "SLOW_DISK_MS": str(ms)}
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"], os.environ["SLOW_DISK_MS"]


def _round(clients: Sequence[subprocess.Popen[str]], index: int) -> dict[str, Any]:
    taken = steps_at(clients, index)
    return {"steps a second": len(taken) / SECONDS, "ms": taken}


def disk(directory: Path) -> None:
    """Tell, whenever that is asked for, what some fsyncs and some commits took, in ms."""
    directory.mkdir()
    with contextlib.closing(SqliteStore(directory, "fsync")) as store:
        store.create(RECORD)
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps({"one fsync": _fsyncs(directory), "one commit": _commits(store)}), flush=True)


def _fsyncs(directory: Path) -> list[float]:
    """Return what it takes until 4 KiB more of a file are on the disk."""
    taken = []
    with (directory / "probe").open("wb", buffering=0) as file:
        for _ in range(PROBES):
            file.write(bytes(4096))
            begin = time.perf_counter()
            os.fsync(file.fileno())
            taken.append(1e3 * (time.perf_counter() - begin))
    return taken


def _commits(store: SqliteStore) -> list[float]:
    """Return what it takes until a step of a state as large as the clients' is kept, by nobody but this thread."""
    taken = []
    for number in range(1, PROBES + 1):
        record = RECORD.with_state(replace(RECORD.state, num_of_props=number, version=number))
        note = Note(bytes(16), step_change(CallKey(bytes(16), number), "", BATCH, record.state))
        begin = time.perf_counter()
        kept = store.put(record, note)
        assert kept is not None
        kept.wait()
        taken.append(1e3 * (time.perf_counter() - begin))
    return taken


def client(addresses: list[str], seconds: float, threads: int) -> None:
    """Take steps with one of the servers for so long, whenever its number is read; print what each took, in ms."""
    x = np.random.default_rng(0).normal(size=(8, MAPS)).astype(np.float32)
    with contextlib.ExitStack() as stack:
        name = f"load/{os.getpid()}"
        places: list[list[sharednorm.Layer]] = []
        for address in addresses:
            hub = stack.enter_context(sharednorm.connect(address))
            places.append([hub.BatchNorm(MAPS, name=f"{name}/{i}", compute="client") for i in range(threads)])
        obey(places, x, seconds)


def sharer(address: str, seconds: float) -> None:
    """Train one layer, which others train as well, or create layers, for so long, whenever that is read."""
    x = np.random.default_rng(0).normal(size=(8, MAPS)).astype(np.float32)
    with sharednorm.connect(address) as hub:
        layers = {compute: hub.BatchNorm(MAPS, name="one layer", compute=compute) for compute in ("client", "server")}
        for layer in layers.values():
            layer.trainMode()
            layer(x)
        numbers = itertools.count()
        print("ready", flush=True)
        for line in sys.stdin:
            what = line.strip()
            taken = _create(hub, numbers, seconds) if what == "create" else train([layers[what]], x, seconds)
            print(json.dumps(taken), flush=True)


def _create(hub: sharednorm.Hub, numbers: Iterator[int], seconds: float) -> list[float]:
    taken: list[float] = []
    begin = time.perf_counter()
    end = begin + seconds
    while begin < end:
        hub.BatchNorm(MAPS, name=f"created/{os.getpid()}/{next(numbers)}")
        now = time.perf_counter()
        taken.append(1e3 * (now - begin))
        begin = now
    return taken


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure what it costs that a step is kept before it is answered.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("client")
    one.add_argument("seconds", type=float)
    one.add_argument("threads", type=int)
    one.add_argument("addresses", nargs="+")
    other = commands.add_parser("sharer")
    other.add_argument("seconds", type=float)
    other.add_argument("address")
    probe = commands.add_parser("disk")
    probe.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "disk":
        disk(arguments.directory)
        return
    if arguments.command == "sharer":
        sharer(arguments.address, arguments.seconds)
        return
    if arguments.command == "client":
        client(arguments.addresses, arguments.seconds, arguments.threads)
        return
    report: dict[str, Any] = {"machine": machine(), "rates": {**rates(), **sharing()}}
    figures = ratios(report["rates"])
    report["goals"] = [
        {"what": goal.what, "ratio": round(figures[name], 3), "goal": goal.words(), "met": goal.met(figures[name])}
        for name, goal in GOALS.items()
    ]
    for name, row in report["rates"].items():
        for store, found in row.items():
            rate = f"{found['steps a second']:8.0f} a second, " if "steps a second" in found else ""
            print(f"{name:12} {store:8} {rate}p50 {found['ms']['p50']:.3f} ms")
    print()
    for line in report["goals"]:
        goal = f"  (goal {line['goal']}{'' if line['met'] else ': not met'})" if line["goal"] else ""
        print(f"{line['what']:98} {line['ratio']:7.3f}{goal}")
    output: Path = arguments.output
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
