"""Everything that a GPU is needed for, in one command: `python -m benchmarks.gpu.check`, which `make gpu-check` runs.

Compiles the kernels; runs their tests, those of the CUDA device, and the contract suite on the real GPU; then
the benchmarks. A step that fails does not keep the next from being run, but for the kernels, without which there is
nothing to run; the exit code is that of the first that failed. Takes less than eight minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
NO_GPU = 2
TIMED_OUT = 124
STEP_SECONDS = 420.0

Step = tuple[str, Sequence[str]]


def gpus() -> int:
    """Return how many GPUs NVIDIA's driver shows to this process."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def steps(output: Path | None, quick: bool) -> list[Step]:
    """Return what is to be run, as arguments of the Python interpreter."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    where = ["--output", str(output)] if output is not None else []
    fewer = ["--shapes", "7", "--repeats", "10"] if quick else []
    return [
        ("compile the kernels", ["-m", "sharednorm_kernels.build", "--verbose"]),
        ("the kernels' tests", [*tests, "tests/kernels", "--ignore", "tests/kernels/test_build.py"]),
        ("the CUDA device's tests", [*tests, "tests/cuda"]),
        ("the contract suite on the GPU", [*tests, "tests/contract", "-k", "remote-cuda"]),
        ("the kernels against torch's", ["-m", "benchmarks.gpu.kernels", *where, *fewer]),
        ("calls to a server's GPU", ["-m", "benchmarks.gpu.calls", *where, *fewer[:2]]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, and return 0, the exit code of the one that failed, or 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description="Check everything that is built on a real GPU.")
    parser.add_argument("--output", type=Path, help="where the benchmark writes; default benchmarks/results")
    parser.add_argument("--quick", action="store_true", help="the shapes of 32 images only, in fewer rounds")
    options = parser.parse_args(argv)
    if not gpus():
        print(
            "there is no GPU on this machine, or no driver for it: not run (see `sharednorm doctor`)", file=sys.stderr
        )
        return NO_GPU
    paths = [str(ROOT / folder) for folder in (".", "client", "server", "kernels")]
    beside = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    env = {**os.environ, "SHAREDNORM_TEST_GPU": "1", "PYTHONPATH": os.pathsep.join([*paths, *beside])}
    began = time.monotonic()
    failed: dict[str, int] = {}
    for number, (name, arguments) in enumerate(steps(options.output, options.quick)):
        print(f"\n=== {name} ({time.monotonic() - began:.0f} s)", flush=True)
        try:
            command = [sys.executable, *arguments]
            code = subprocess.run(command, cwd=ROOT, env=env, timeout=STEP_SECONDS, check=False).returncode
        except subprocess.TimeoutExpired as error:
            print(error, file=sys.stderr)
            code = TIMED_OUT
        if code:
            failed[name] = code
            print(f"=== {name}: failed", file=sys.stderr, flush=True)
            if number == 0:
                break
    print(f"\n=== {'failed: ' + ', '.join(failed) if failed else 'passed'} ({time.monotonic() - began:.0f} s)")
    return next(iter(failed.values()), 0)


if __name__ == "__main__":
    sys.exit(main())
