"""Run Python in a process of its own, with the runtime of a sanitizer where one is asked for.

On the command line: `python -m tests.emulation.process address|thread ARGUMENTS...` runs `python ARGUMENTS...`; what it
builds with `build(sources, active())` is instrumented, and the process ends with another status than 0 if the sanitizer
reported something.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.emulation.build import SANITIZERS, Sanitizer, runtimes

ROOT = Path(__file__).parents[2]
ACTIVE = "SHAREDNORM_EMULATED_SANITIZER"


def active() -> Sanitizer | None:
    """Return the sanitizer whose runtime this process was started with."""
    name = os.environ.get(ACTIVE, "")
    return _sanitizer(name) if name else None


def _sanitizer(name: str) -> Sanitizer:
    for sanitizer in SANITIZERS:
        if sanitizer == name:
            return sanitizer
    raise ValueError(f"{name!r} is no sanitizer (expected: {', '.join(SANITIZERS)})")


def environment(sanitizer: Sanitizer | None, images: Path) -> dict[str, str]:
    """Return what a process needs besides this one's environment; images is a directory for its images."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    needed = {"PYTHONPATH": path, "SHAREDNORM_EMULATED_IMAGES": str(images)}
    if sanitizer is not None:
        needed |= {
            ACTIVE: sanitizer,
            "LD_PRELOAD": runtimes(sanitizer),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter itself leaves memory behind
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "TSAN_OPTIONS": "exitcode=66",
        }
    return needed


def run(
    arguments: Sequence[str],
    sanitizer: Sanitizer | None = None,
    settings: Mapping[str, str] | None = None,
    timeout: float = 100.0,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with arguments to its end, and return its status and what it wrote.

    Raises:
        subprocess.TimeoutExpired: It took longer than timeout seconds, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="sharednorm-") as images:
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, **environment(sanitizer, Path(images)), **(settings or {})},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )


def main() -> int:
    """Run the command line, its output passed through, and return its status."""
    if len(sys.argv) < 3 or sys.argv[1] not in SANITIZERS:
        sys.stderr.write(f"usage: python -m tests.emulation.process {'|'.join(SANITIZERS)} ARGUMENTS...\n")
        return 2
    sanitizer = _sanitizer(sys.argv[1])
    with tempfile.TemporaryDirectory(prefix="sharednorm-") as images:
        needed = {**os.environ, **environment(sanitizer, Path(images))}
        return subprocess.run([sys.executable, *sys.argv[2:]], env=needed, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
