"""One client among many: `python -m benchmarks.load KIND ADDRESS SECONDS N,C,H,W`.

It prints "ready", waits for a line, makes calls for so many seconds, prints how many, and stays until its input ends.
KIND is "train" or "eval" (forwards of a remote layer), or "echo" (the same bytes back from `benchmarks.peers.echo`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import sharednorm
from benchmarks.peers.echo import EchoClient, cut
from sharednorm.codec import wire


def _call(kind: str, address: str, shape: tuple[int, ...]) -> Callable[[], Any]:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if kind != "echo":
        bn = sharednorm.connect(address).BatchNorm2D(shape[1], name=f"load/{time.time_ns()}")
        bn.train = kind == "train"
        return lambda: bn(x)
    client, data = EchoClient(address), x.tobytes()
    if len(data) <= wire.MAX_UNARY_BYTES:
        return lambda: client.whole(data)
    chunks = cut(data)
    return lambda: client.overlapped(chunks)


def main() -> None:
    """Run."""
    kind, address, seconds, sizes = sys.argv[1:]
    call = _call(kind, address, tuple(map(int, sizes.split(","))))
    for _ in range(3):
        call()
    print("ready", flush=True)
    sys.stdin.readline()
    end, count = time.perf_counter() + float(seconds), 0
    while time.perf_counter() < end:
        call()
        count += 1
    print(count, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
