"""How many functions of this project one call runs, in how many files: `python -m benchmarks.call_path`.

A server and a client run in this process, so that the profile sees all threads of both. What is counted are calls of
functions of sharednorm and sharednorm_server, distinct functions, and files; generated code is left out. The least of
several calls is told: it has no work of other threads in it. `--list CASE` prints the functions of a case, most calls
first.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import numpy as np

import sharednorm
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.server import start

CALLS = 30
CASES = {
    "8 KB, direct": ("direct", "server", (8, 64, 2, 2)),
    "6.4 MB, direct": ("direct", "server", (8, 64, 56, 56)),
    "8 KB, gRPC": ("grpc", "server", (8, 64, 2, 2)),
    "moments": ("direct", "client", (8, 64, 2, 2)),
}


class Profile:
    """Counts calls of this project's functions, on all threads that start after it, while it is on."""

    def __init__(self) -> None:
        self.counts: Counter[CodeType] = Counter()
        self.on = False
        self._ours: dict[str, bool] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a call."""
        del argument
        if self.on and event == "call" and self._is_ours(frame.f_code.co_filename):
            self.counts[frame.f_code] += 1

    def of(self, call: Callable[[], object]) -> Counter[CodeType]:
        """Return what a call runs."""
        self.counts = Counter()
        self.on = True
        call()
        self.on = False
        return self.counts

    def _is_ours(self, path: str) -> bool:
        known = self._ours.get(path)
        if known is None:
            ours = "/sharednorm/" in path or "/sharednorm_server/" in path
            known = self._ours[path] = ours and "/v1/" not in path
        return known


def measure(profile: Profile, address: str, case: str) -> Counter[CodeType]:
    """Return what the shortest of several training forwards runs."""
    transport, compute, shape = CASES[case]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with sharednorm.connect(address, transport=transport) as hub:
        bn = hub.BatchNorm2D(shape[1], name=case, compute=compute)
        bn(x)
        return min((profile.of(lambda: bn(x)) for _ in range(CALLS)), key=lambda counts: counts.total())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Count the functions that a call runs.")
    parser.add_argument("--list", choices=CASES, help="print the functions of one case")
    arguments = parser.parse_args()
    profile = Profile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    server = start(ServerConfig(listen="127.0.0.1:0", state="memory:"))
    try:
        for case in (arguments.list,) if arguments.list else CASES:
            counts = measure(profile, server.address, case)
            files = {code.co_filename for code in counts}
            print(f"{case:16} {counts.total():5} calls, {len(counts):4} functions, {len(files):3} files")
            if arguments.list:
                for code, number in counts.most_common():
                    path = code.co_filename.rsplit("/", 3)
                    print(f"{number:5}  {'/'.join(path[-2:])}:{code.co_firstlineno} {code.co_name}")
    finally:
        sys.setprofile(None)
        server.stop(5.0)


if __name__ == "__main__":
    main()
