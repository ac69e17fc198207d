"""A line to Redis that looks for it again: callers are refused meanwhile, and never wait for that."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sharednorm.errors import StoreUnavailable
from sharednorm_server.store.redis.connection import Command, RedisConnection

SECONDS = 10


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Host:
    """A machine that answers every command with "OK", and connections only while it is there.

    Attributes:
        there: Whether it is; else a connection that looks after the line waits.
        waiting: Connections that wait.
        open: Connections that are there.
    """

    def __init__(self) -> None:
        self.there = threading.Event()
        self.there.set()
        self.waiting = self.open = 0


class Wire:
    """A connection to such a machine; those of the thread that listens hear nothing."""

    def __init__(self, host: Host) -> None:
        self._host, self._open, self._sent = host, False, 0

    def connect(self) -> None:
        if threading.current_thread().name == "redis-line" and not self._host.there.is_set():
            self._host.waiting += 1
            assert self._host.there.wait(SECONDS)
        self._open = True
        self._host.open += 1

    def disconnect(self) -> None:
        self._host.open -= self._open
        self._open = False

    def pack_commands(self, commands: Sequence[Command]) -> Sequence[bytes]:
        return [b"" for _ in commands]

    def send_packed_command(self, command: Sequence[bytes]) -> None:
        self._sent += len(command)

    def send_command(self, *_: bytes | str | float) -> None:
        self._sent += 1

    def read_response(self) -> Any:
        self._sent -= 1
        return [b"master"]

    def can_read(self, timeout: float) -> bool:
        time.sleep(timeout / 50)
        return False


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def line(host: Host) -> Iterator[RedisConnection]:
    made = RedisConnection(
        lambda: Wire(host),
        "redis://host",
        "probe",
        lambda _: None,
        (),
        lambda *_: None,
        lambda _: None,
    )
    yield made
    host.there.set()
    made.close()
    assert host.open == 0


def test_no_caller_waits_while_the_line_is_connected_anew(host: Host, line: RedisConnection) -> None:
    assert line.ask("PING") == [b"master"]
    host.there.clear()
    line.give_up("it was moved")
    until(lambda: host.waiting == 1)
    with ThreadPoolExecutor(2) as threads:
        try:
            error = threads.submit(line.give_up, "it was moved").result(SECONDS / 2)
            assert isinstance(error, StoreUnavailable)
            with pytest.raises(StoreUnavailable, match="it was moved"):
                threads.submit(line.ask, "PING").result(SECONDS / 2)
        finally:
            host.there.set()
    until(lambda: not line.trouble)
    assert line.ask("PING") == [b"master"]
