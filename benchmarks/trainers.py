"""Processes that measure when they are told to: those of `durability` and `servers`.

A client reads the number of a place, trains there for so long, prints what each step took, and reads the next.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sharednorm
from sharednorm.core.types import Array


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Run modules of Python, each with its arguments, and wait until all are ready.

    Raises:
        RuntimeError: One has not started.
    """
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for words in commands
        ]
        try:
            for each in clients:
                if _line_of(each) != "ready\n":
                    raise RuntimeError("a process did not start")
            yield clients
        finally:
            for each in clients:
                each.kill()


def steps_at(clients: Sequence[subprocess.Popen[str]], place: int | str) -> list[float]:
    """Have all clients train at a place at once; return what each step took, in ms."""
    for each in clients:
        _tell(each, str(place))
    return [ms for each in clients for ms in json.loads(_line_of(each))]


def answer_of(process: subprocess.Popen[str], line: str) -> Any:
    """Send a process a line, and return what it answers."""
    _tell(process, line)
    return json.loads(_line_of(process))


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _line_of(client: subprocess.Popen[str]) -> str:
    assert client.stdout is not None
    return client.stdout.readline()


def obey(places: Sequence[Sequence[sharednorm.Layer]], x: Array, seconds: float) -> None:
    """Be a client: train the layers of a place, each in a thread, for so long, whenever the place's number is read."""
    for layer in (layer for layers in places for layer in layers):
        layer.trainMode()
        layer(x)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(train(places[int(line)], x, seconds)), flush=True)


def train(layers: Sequence[sharednorm.Layer], x: Array, seconds: float) -> list[float]:
    """Train layers, each in a thread, for so long; return what each step took, in ms."""
    taken: list[float] = []

    def work(layer: sharednorm.Layer) -> None:
        mine: list[float] = []
        begin = time.perf_counter()
        end = begin + seconds
        while begin < end:
            layer(x)
            now = time.perf_counter()
            mine.append(round(1e3 * (now - begin), 4))
            begin = now
        taken.extend(mine)

    trainers = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for trainer in trainers:
        trainer.start()
    for trainer in trainers:
        trainer.join()
    return taken
