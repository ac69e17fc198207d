"""Running make from a test, which may itself have been started by make."""

from __future__ import annotations

import os
import subprocess

from tests.support.distributions import ROOT


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the checkout for at most a minute, without the flags of a make that runs this."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
