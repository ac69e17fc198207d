"""Running make from a test, which may itself have been started by make."""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.support.processes.distributions import ROOT


def make(*arguments: str, path: str | None = None, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run make in the checkout for a bounded time, without the flags of a make that runs this.

    Args:
        arguments: Its arguments.
        path: The PATH of its recipes; None for this process's.
        seconds: How long.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    program = shutil.which("make") or "make"
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        [program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
