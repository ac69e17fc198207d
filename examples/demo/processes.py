"""The processes of the demo: the server, the workers that train, and the evaluator that only reads.

Workers and the evaluator are spawned and talk to the demo through a pipe each. No wait is without a bound.
"""

from __future__ import annotations

import multiprocessing
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

import sharednorm
from examples.demo.shards import CHANNELS, Images

T = TypeVar("T")

NAMESPACE = "demo"
PATIENCE = 60.0
"""Seconds that any process of the demo waits for any other."""

PAUSE = 0.12
"""Seconds between two steps of a worker. They stand for the rest of its network."""


@dataclass(frozen=True)
class Step:
    """A worker has trained a layer, whose statistics had then taken in that many steps, other workers' included."""

    layer: str
    number: int


@dataclass(frozen=True)
class Reading:
    """What the evaluator found.

    Attributes:
        layer: The layer.
        number: Steps that its statistics had taken in.
        mean: Its running mean, float32 (C,).
        out_mean: Mean of its held-out batch, normalized by the layer: near 0 if the statistics fit it.
    """

    layer: str
    number: int
    mean: npt.NDArray[np.float32]
    out_mean: float


Report: TypeAlias = "Step | Reading | None"
"""None: the process has done its work."""


@dataclass(frozen=True)
class Child:
    """A spawned process and the demo's end of its pipe."""

    name: str
    process: BaseProcess
    connection: Connection


@contextmanager
def server() -> Iterator[tuple[str, str]]:
    """Run a server on a free port of the loopback; give its address, and its process id and start-up line in words."""
    command = [
        str(Path(sys.executable).with_name("sharednorm")),
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--state",
        "memory:",
    ]
    command += ["--log-level", "warning"]
    # A session of its own: Ctrl-C reaches the demo alone, which then stops the others in their order.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        line = _first_line(process.stdout)
        if "listening on " not in line:
            raise RuntimeError(f"the server did not start: {line.strip() or 'it said nothing'}")
        address = line.partition("listening on ")[2].partition(",")[0]
        yield address, f"a server (pid {process.pid}): {line.strip()}"
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=15)


def spawn_worker(name: str, address: str, schedule: list[tuple[str, Images]]) -> Child:
    """Start a process that trains on some batches, one step for each time that it is told to go on."""
    return _spawn(name, _work, address, schedule)


def spawn_evaluator(name: str, address: str, held_out: dict[str, Images]) -> Child:
    """Start a process that reads the layers, for each time that it is asked to."""
    return _spawn(name, _evaluate, address, held_out)


def _spawn(name: str, target: Callable[[str, T, Connection], None], address: str, data: T) -> Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(address, data, theirs), name=name, daemon=True)
    process.start()
    # With its own end closed here, the death of the child is the end of the pipe.
    theirs.close()
    return Child(name, process, ours)


def _work(address: str, schedule: list[tuple[str, Images]], demo: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with sharednorm.connect(address, namespace=NAMESPACE, timeout=PATIENCE) as hub:
        # Whoever comes first creates the layers, the others attach to them. 1 / n as the factor of the n-th step,
        # without a lower bound, makes the running statistics the plain average over all steps.
        layers = {
            name: hub.BatchNorm2D(len(channels), name=name, initFactor=1.0, minFactor=0.0)
            for name, channels in CHANNELS.items()
        }
        for name, batch in schedule:
            bn = layers[name]
            bn(batch)
            demo.send(Step(name, bn.numOfProps))
            _await_word(demo)
            time.sleep(PAUSE)
    demo.send(None)


def _evaluate(address: str, held_out: dict[str, Images], demo: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with sharednorm.connect(address, namespace=NAMESPACE, timeout=PATIENCE) as hub:
        layers = {name: hub.layer(name) for name in held_out}
        for bn in layers.values():
            bn.evalMode()  # of these handles alone: the workers go on training
        while _await_word(demo):
            for name, bn in layers.items():
                state, out = bn.snapshot(), bn(held_out[name])
                demo.send(Reading(name, state.num_of_props, state.mean, float(out.mean())))
    demo.send(None)


def _await_word(demo: Connection) -> bool:
    if not demo.poll(PATIENCE):
        raise TimeoutError(f"the demo said nothing for {PATIENCE:.0f} seconds")
    return bool(demo.recv())


def _first_line(stream: IO[str]) -> str:
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return stream.readline() if selector.select(PATIENCE) else ""
