"""What a server gets done when more is asked of it than it may hold: bytes a second of 64 clients against those of few.

`python -m benchmarks.overload` measures it, prints the figure beside its goal, and writes
benchmarks/results/overload.json. Clients are threads of this process, each with a hub of its own, that send one
training forward of 64 MiB after the other; the server may have 1 GiB on its way, and tells the others to come again.

Machines change their speed while they are measured, so numbers of clients are compared within a round, which goes from
few to many and back: a ratio is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import sharednorm
from benchmarks.goals import Goal
from benchmarks.remote import machine, server
from sharednorm.core.types import Array

SHAPE = (64, 16, 128, 128)
NBYTES = 64 << 20
CLIENTS = (1, 2, 4, 16, 64)
WARM_UP, SECONDS, ROUNDS = 3.0, 5.0, 4
RESULTS = Path(__file__).parent / "results" / "overload.json"

GOAL = Goal("bytes a second of 64 clients / the most of any number of clients, budget 1 GiB", least=0.8)


def rate(address: str, transport: str, clients: int, x: Array) -> float:
    """Return how many bytes of tensors a second so many clients get normalized."""
    done, begun = [0] * clients, threading.Barrier(clients + 1)
    stopping = threading.Event()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with sharednorm.connect(address, transport=transport, timeout=300) as hub:
                layer, out = hub.BatchNorm2D(16, name=f"bn/{number}"), x.copy()
                layer.trainMode()
                begun.wait()
                while not stopping.is_set():
                    layer(x, out=out)
                    done[number] += 1
        except BaseException as error:
            errors.append(error)
            begun.abort()
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begun.wait()
    time.sleep(WARM_UP)
    before, begin = sum(done), time.perf_counter()
    time.sleep(SECONDS)
    after, end = sum(done), time.perf_counter()
    stopping.set()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return (after - before) * NBYTES / (end - begin)


def rates() -> dict[str, list[dict[int, float]]]:
    """Measure each way with each number of clients, in rounds."""
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    found: dict[str, list[dict[int, float]]] = {}
    arguments = ("--max-inflight-bytes", "1GiB", "--activation-cache-bytes", "256MiB")
    for transport in ("direct", "grpc"):
        with server("127.0.0.1:0", *arguments) as running:
            found[transport] = [
                {n: rate(running.address, transport, n, x) for n in (CLIENTS, CLIENTS[::-1])[number % 2]}
                for number in range(ROUNDS)
            ]
    return found


def overloaded(rounds: list[dict[int, float]]) -> float:
    """Return what the most clients get done, against the number of clients that gets most done."""
    return min(median(each[CLIENTS[-1]] / each[few] for each in rounds) for few in CLIENTS)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure what an overloaded server gets done.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    output: Path = parser.parse_args().output
    report: dict[str, Any] = {"machine": machine(), "bytes a second": rates(), "goals": []}
    for transport, rounds in report["bytes a second"].items():
        row = {n: median(each[n] for each in rounds) for n in CLIENTS}
        print(f"{transport:8}" + "".join(f"  {n} clients: {each / 1e9:.2f} GB/s" for n, each in row.items()))
        ratio = overloaded(rounds)
        goal = {
            "what": f"{GOAL.what}, {transport}",
            "ratio": round(ratio, 3),
            "goal": GOAL.words(),
            "met": GOAL.met(ratio),
        }
        report["goals"].append(goal)
        print(f"{goal['what']:98} {ratio:7.3f}  (goal {goal['goal']}{'' if goal['met'] else ': not met'})")
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
