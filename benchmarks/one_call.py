"""What one large call costs: `python -m benchmarks.one_call ADDRESS TRANSPORT PAYLOAD_BYTES` prints it as JSON.

With a fourth argument, "backward", each forward is followed by a backward, whose gradient is the forward's input.

A process of its own, because the most memory that a process has had is never less than before.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

import sharednorm

MAPS, HEIGHT, WIDTH = 64, 56, 56


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most memory that a process has occupied since it began, or since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError


def forget_peak(pid: int | str = "self") -> None:
    """Begin to look for the most memory anew: what a process occupies now is the most."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def main() -> None:
    """Make the call."""
    address, transport, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    backward = sys.argv[4:] == ["backward"]
    samples = max(1, round(nbytes / (4 * MAPS * HEIGHT * WIDTH)))
    x = np.empty((samples, MAPS, HEIGHT, WIDTH), np.float32)
    x[...] = np.random.default_rng(0).normal(size=(1, MAPS, HEIGHT, WIDTH))
    x[0] += 1
    with sharednorm.connect(address, transport=transport, timeout=300.0) as hub:
        bn = hub.BatchNorm2D(MAPS, name="large")
        bn(x[:2])
        out = None
        forget_peak()
        before = peak_bytes()
        times = []
        for _ in range(3):
            began = time.perf_counter()
            out = bn(x)
            if backward:
                bn.backward(x)
            times.append(time.perf_counter() - began)
            del out
        extra = peak_bytes() - before
    print(json.dumps({"payload": x.nbytes, "seconds": min(times), "client extra": extra}))


if __name__ == "__main__":
    main()
