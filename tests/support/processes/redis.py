"""A real redis-server, which tests start, stop, freeze and lose things with."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import redis

from tests.support.processes.programs import program
from tests.support.processes.server import stopped

_SECONDS = 20.0
_prefixes = itertools.count()


class RedisProcess:
    """A redis-server on a port of its own, on loopback.

    Args:
        directory: Where its files are.
        arguments: More of its options.
    """

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.directory, self._arguments = directory, arguments
        self.port = 65535
        while self.port > 55535:  # that of a cluster's own talk is 10,000 above
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None
        return self._process.pid

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def url(self, prefix: str = "", **query: object) -> str:
        """Return a --state that nobody else has, unless it is told of a prefix."""
        more = "".join(f"&{name}={value}" for name, value in query.items())
        return f"redis://{self.address}/0?prefix={prefix or f'test{next(_prefixes)}-{os.getpid()}'}{more}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        assert self._process is None
        self.directory.mkdir(exist_ok=True)
        words = [
            program("redis-server"),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory)),
            *("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0", *self._arguments),
        ]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        end = time.monotonic() + _SECONDS
        while True:
            try:
                if self.ask("PING"):
                    return
            except redis.RedisError:  # noqa: PERF203 - it needs a moment
                assert self._process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.01)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it, by default at once and without a word."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(_SECONDS)

    def ask(self, *command: Any) -> Any:
        """Run a command."""
        with redis.Redis(port=self.port, protocol=2, socket_timeout=10) as client:
            return cast("Any", client.execute_command(*command))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep it from running."""
        with stopped(self.pid):
            yield


@contextmanager
def redis_server(directory: Path, *arguments: str) -> Iterator[RedisProcess]:
    """Run a redis-server that keeps nothing, unless its options say otherwise."""
    process = RedisProcess(directory, *arguments)
    process.start()
    try:
        yield process
    finally:
        process.stop()
