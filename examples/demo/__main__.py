"""Four workers that see different data share two normalization layers on one server.

Each worker is a process with its own shard: some of the handwritten digits, and a part of a photograph. It
normalizes its batches through the layers "digits/bn" and "photos/bn", which stand on the server. One worker is
killed on the way, and a new one takes its place. An evaluator reads meanwhile. At the end the statistics on the
server must be those of all data together, which no process has ever seen in one place.

    make demo        or        python -m examples.demo

With `--server ADDRESS` it uses a server that runs, in the namespace "demo", and leaves both layers there for you to
look at.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import sharednorm
from examples.demo.processes import NAMESPACE, PATIENCE, server
from examples.demo.report import Outcome, draw, table
from examples.demo.shards import CHANNELS, DIGITS, PHOTOS, Shard, Statistics, load
from examples.demo.training import Training

PICTURE = Path("demo-output") / "shared_statistics.png"
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the value: the server rounds to float32 at each of about 100 steps."""


def main() -> int:
    """Run the demo; return 0 if the shared statistics are those of all data, else 1."""
    parser = argparse.ArgumentParser(description="Several processes share layers on one server, on real data.")
    parser.add_argument("--server", metavar="ADDRESS", help="one that runs; default: one of its own, which it stops")
    running: str | None = parser.parse_args().server
    # A polite kill ends like Ctrl-C: the processes are stopped first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    print("loading scikit-learn's handwritten digits and sample photographs", flush=True)
    shards, held_out = load()
    for shard in shards:
        counts = f"{len(shard.batches[DIGITS])} batches of the digits {shard.digits}"
        print(f"  {shard.name}: {counts:35} {len(shard.batches[PHOTOS])} batches of the {shard.photo}")
    with server() if running is None else contextlib.nullcontext(_prepared(running)) as (address, line):
        print(line, flush=True)
        total = sum(len(shard.schedule()) for shard in shards)
        with tqdm(total=total, unit=" steps", desc="4 workers", disable=None) as progress:
            training = Training(address, shards, held_out, progress)
            training.run()
        outcomes = _outcomes(address, shards)
    print("the server has stopped\n" if running is None else f"the layers are on {running}, namespace {NAMESPACE}\n")
    print("Averages over the batches; the variance is that within a batch, as batch normalization keeps it.\n")
    for outcome in outcomes:
        print(table(outcome) + "\n")
    draw(outcomes, shards, training.readings, training.killed_at, PICTURE)
    verdicts = [_verdict(outcome) for outcome in outcomes]
    print(f"picture: {PICTURE.resolve()}\n{time.monotonic() - begin:.1f} seconds")
    return 0 if all(verdicts) else 1


def _prepared(address: str) -> tuple[str, str]:
    """Remove what an earlier demo has left on a server."""
    with sharednorm.connect(address, namespace=NAMESPACE, timeout=PATIENCE) as hub:
        for layer in hub.layers():
            if layer.name in CHANNELS:
                hub.delete(layer.name)
    return address, f"the server on {address}"


def _outcomes(address: str, shards: list[Shard]) -> list[Outcome]:
    found = []
    with sharednorm.connect(address, namespace=NAMESPACE, timeout=PATIENCE) as hub:
        for layer in CHANNELS:
            state = hub.layer(layer).snapshot()
            own = [shard.batches[layer] for shard in shards]
            found.append(
                Outcome(
                    layer,
                    [Statistics.of(batches) for batches in own],
                    Statistics.of([batch for batches in own for batch in batches]),
                    Statistics(state.mean.astype(np.float64), state.var.astype(np.float64)),
                    state.num_of_props,
                    [len(batches) for batches in own],
                )
            )
    return found


def _verdict(outcome: Outcome) -> bool:
    complete = outcome.steps == sum(outcome.batches)
    matched = complete and outcome.difference <= TOLERANCE
    print(
        f"{outcome.layer}: {'MATCHES' if matched else 'DOES NOT MATCH'}. The server and all data together differ by "
        f"{outcome.difference:.1e} at most (allowed {TOLERANCE:.0e});\n"
        f"    a shard alone is off by up to {outcome.spread:.0%}; "
        f"{outcome.steps} steps counted, {sum(outcome.batches)} made"
    )
    return matched


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the processes of the demo have ended", file=sys.stderr)
        sys.exit(130)
