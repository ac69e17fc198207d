"""Processes of their own for what could crash, hang or leave something behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

_KILLED_SECONDS = 2.0
_LONGEST = 300


@dataclass(frozen=True)
class Outcome:
    """What became of a process.

    Attributes:
        facts: What it had said when it ended, in order.
        failure: Why it did not end well, in one line; "" if it did.
    """

    facts: tuple[dict[str, Any], ...]
    failure: str

    def fact(self, name: str) -> Any:
        """Return what it said under a name, or None."""
        return next((facts[name] for facts in self.facts if name in facts), None)


class Child:
    """A process that runs one function of `sharednorm_server.doctor.probe`. It imports what this process would.

    Args:
        call: The call, for example "package('numpy', 'numpy')".
    """

    def __init__(self, call: str) -> None:
        # The path is given as it is: through PYTHONPATH, the working directory would come first.
        code = f"import sys; sys.path[:] = {sys.path!a}\nfrom sharednorm_server.doctor import probe; probe.{call}"
        # Files, not pipes: who reads a file waits for nobody.
        self._output, self._errors = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 - outcome() closes
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and the code above
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=self._output, stderr=self._errors
        )

    def outcome(self, end: float) -> Outcome:
        """Wait until it has ended, or until a moment of `time.monotonic`, and return what became of it."""
        failure = ""
        try:
            code = self._process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            failure = "it took too long, and was ended"
            self._kill()
        else:
            if code:
                failure = _signal(-code) if code < 0 else self._last_words() or f"it ended with status {code}"
        facts = tuple(self._facts())
        for file in (self._output, self._errors):
            file.close()
        return Outcome(facts, failure)

    def _kill(self) -> None:
        self._process.kill()
        try:
            self._process.wait(_KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            # It hangs inside the kernel, in a driver perhaps, where no signal reaches it. It ends when that does.
            self._process.returncode = -signal.SIGKILL

    def _facts(self) -> list[dict[str, Any]]:
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", "replace").splitlines(keepends=True)
        # Others may print, too, as a package does when it is imported; a line without its end is not finished.
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:_LONGEST] if lines else ""


def _signal(number: int) -> str:
    try:
        return f"it crashed ({signal.Signals(number).name})"
    except ValueError:
        return f"it crashed (signal {number})"
