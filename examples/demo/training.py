"""What the demo does between the first step and the last: it keeps the processes going, and replaces one."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.connection import Connection, wait

from tqdm import tqdm

from examples.demo.processes import PATIENCE, Child, Reading, Step, spawn_evaluator, spawn_worker
from examples.demo.shards import CHANNELS, Images, Shard

VICTIM, LAST_STEP = 2, 20
"""The worker that is killed, counted from 0, and after how many of its steps."""

READING_INTERVAL = 0.2
"""Seconds between two looks of the evaluator."""


class Training:
    """Four workers and an evaluator, from their start to their end.

    Args:
        address: The server's.
        shards: One a worker.
        held_out: The evaluator's batch for each layer.
        progress: Shows the steps.

    Attributes:
        readings: What the evaluator has found, in order.
        killed_at: For each layer, the steps that all workers had made when one was killed.
    """

    def __init__(self, address: str, shards: list[Shard], held_out: dict[str, Images], progress: tqdm[None]) -> None:
        self.readings: list[Reading] = []
        self.killed_at: dict[str, int] = {}
        self._address = address
        self._schedules = [shard.schedule() for shard in shards]
        self._held_out = held_out
        self._progress = progress
        self._begin = time.monotonic()
        self._taken = [0] * len(shards)
        self._steps = dict.fromkeys(CHANNELS, 0)
        self._workers: dict[Connection, tuple[int, Child]] = {}
        self._evaluator: Child | None = None
        self._next_reading = 0.0

    def run(self) -> None:
        """Train until every batch of every shard has been a step.

        Raises:
            RuntimeError: A process ended that should not have.
            TimeoutError: Nothing happened for too long.
        """
        try:
            for index in range(len(self._schedules)):
                self._start(index)
            while self._workers:
                self._hear_everybody()
            self._last_reading()
        finally:
            for child in self._children():
                child.process.kill()
                child.process.join(PATIENCE)

    def _start(self, index: int) -> None:
        rest = self._schedules[index][self._taken[index] :]
        child = spawn_worker(f"worker {index + 1}", self._address, rest)
        self._workers[child.connection] = (index, child)

    def _hear_everybody(self) -> None:
        ready = wait([child.connection for child in self._children()], PATIENCE)
        if not ready:
            raise TimeoutError(f"no process of the demo said anything for {PATIENCE:.0f} seconds")
        for connection in ready:
            assert isinstance(connection, Connection)
            if self._evaluator and connection is self._evaluator.connection:
                self._hear_evaluator(self._evaluator)
            else:
                self._hear_worker(*self._workers[connection])
        self._ask_evaluator()

    def _hear_worker(self, index: int, child: Child) -> None:
        message = _receive(child)
        if message is None:
            child.process.join(PATIENCE)
            del self._workers[child.connection]
            self._say(f"{child.name} has seen all of its shard and leaves")
        elif isinstance(message, Step):
            self._taken[index] += 1
            self._steps[message.layer] += 1
            self._progress.update()
            if index == VICTIM and self._taken[index] == LAST_STEP and not self.killed_at:
                self._replace(index, child)
            else:
                child.connection.send(True)

    def _replace(self, index: int, child: Child) -> None:
        # It has its answer and waits for our word, so its last step counts once, and no other is under way.
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.join(PATIENCE)
        self.killed_at = dict(self._steps)
        del self._workers[child.connection]
        self._say(f"{child.name} (pid {child.process.pid}) is killed (SIGKILL) between two steps, after "
                  f"{self._taken[index]} of its {len(self._schedules[index])}")  # fmt: skip
        self._start(index)
        self._say(f"{child.name} starts again as a new process, attaches to the layers by their names, goes on")

    def _ask_evaluator(self) -> None:
        if self._evaluator is None:
            if not all(self._steps.values()):
                return
            self._evaluator = spawn_evaluator("evaluator", self._address, self._held_out)
            self._say("an evaluator joins: it reads in eval mode, and no worker notices")
        if time.monotonic() >= self._next_reading:
            self._next_reading = time.monotonic() + READING_INTERVAL
            self._evaluator.connection.send(True)

    def _hear_evaluator(self, child: Child) -> None:
        message = _receive(child)
        if not isinstance(message, Reading):
            raise RuntimeError(f"the evaluator said {message} while the workers were still training")  # noqa: TRY004 - not of a type, but of a moment
        self.readings.append(message)
        if len(self.readings) % 20 in {1, 2}:
            self._say(f"evaluator: {message.layer} after {message.number:3} steps; its held-out batch, normalized, "
                      f"has mean {message.out_mean:+.3f}")  # fmt: skip

    def _last_reading(self) -> None:
        assert self._evaluator is not None
        for word in (True, False):
            self._evaluator.connection.send(word)
        while (message := _receive(self._evaluator)) is not None:
            assert isinstance(message, Reading)
            self.readings.append(message)

    def _children(self) -> list[Child]:
        workers = [child for _, child in self._workers.values()]
        return [*workers, self._evaluator] if self._evaluator else workers

    def _say(self, text: str) -> None:
        self._progress.write(f"{time.monotonic() - self._begin:5.1f} s  {text}")


def _receive(child: Child) -> Step | Reading | None:
    if not child.connection.poll(PATIENCE):
        raise TimeoutError(f"{child.name} said nothing for {PATIENCE:.0f} seconds")
    try:
        message: Step | Reading | None = child.connection.recv()
    except EOFError:
        child.process.join(PATIENCE)
        raise RuntimeError(f"{child.name} ended with exit code {child.process.exitcode}") from None
    return message
