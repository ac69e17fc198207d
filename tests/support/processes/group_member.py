"""A member of a group as a process of its own, which does what it is told on its standard input.

python -m tests.support.processes.group_member ADDRESS GROUP SETTINGS; SETTINGS are the arguments of `Group` as JSON.
Each line that it reads is a wish as JSON, each that it writes the outcome.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import sharednorm
from tests.support import oracle

MAPS = 3


class Member:
    """The process, seen from the test."""

    def __init__(self, address: str, group: str, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes.group_member", address, group, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.hear() == {"ready": True}

    def say(self, what: str, **wish: Any) -> None:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **wish}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Wait for the outcome."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the member is gone"
        outcome: dict[str, Any] = json.loads(line)
        return outcome

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def finish(self) -> None:
        """Let its program come to its end, which closes its hub in order."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(30) == 0

    def end(self) -> None:
        """Kill it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def members(address: str, group: str, settings: Sequence[dict[str, Any]]) -> Iterator[list[Member]]:
    """Start members, and kill those that are left at the end."""
    started: list[Member] = []
    try:
        for each in settings:
            started.append(Member(address, group, each))  # noqa: PERF401 - those before one that fails have to be ended
        yield started
    finally:
        for member in started:
            member.end()


def part(seed: int, rows: int) -> oracle.Array:
    """Return a member's batch, or its gradient."""
    return oracle.random_tensor(seed, (rows, MAPS))


def _serve(address: str, name: str, settings: dict[str, Any]) -> None:
    with sharednorm.connect(address, timeout=10) as hub:
        group = sharednorm.Group(name, **settings)
        layer = hub.BatchNorm(MAPS, name="bn", sscale=0.0, compute="client", group=group)
        _tell({"ready": True})
        for line in sys.stdin:
            wish = json.loads(line)
            try:
                outcome = _do(layer, group, wish)
            except sharednorm.SharedNormError as error:
                outcome = {"error": type(error).__name__, "message": error.message}
            _tell({**outcome, "generation": group.generation, "rank": group.rank, "participants": group.participants})


def _tell(outcome: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(outcome) + "\n")
    sys.stdout.flush()


def _do(layer: sharednorm.Layer, group: sharednorm.Group, wish: dict[str, Any]) -> dict[str, Any]:
    if wish["do"] == "forward":
        result = layer(part(wish["seed"], wish["rows"]))
        return {"result": result.tolist(), "count": layer.numOfProps}
    if wish["do"] == "backward":
        layer.backward(part(wish["seed"], wish["rows"]))
        assert layer.grad is not None
        return {"result": layer.grad.tolist()}
    if wish["do"] == "leave":
        group.leave()
        return {}
    if wish["do"] == "join":
        group.join()
        return {}
    raise ValueError(wish["do"])


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
