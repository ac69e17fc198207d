"""Servers for tests: in this process, and as the real process that a user starts."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from sharednorm_server.config.options import ServerConfig
from sharednorm_server.layers.service import LayerService
from sharednorm_server.server import RunningServer, serve, start
from tests.support import lock_audit

START_SECONDS = 60.0
STOP_SECONDS = 30.0

_BANNER = re.compile(
    r"sharednorm (?P<version>\S+) listening on (?P<address>\S.*), device (?P<device>.+), state (?P<state>[^\s,]+)"
    r"(, http (?P<http>\S+))?"
)


@contextmanager
def in_process(config: ServerConfig | None = None, service: LayerService | None = None) -> Iterator[RunningServer]:
    """Run a server in this process; it listens on a free port unless the configuration says another place."""
    config = config or ServerConfig()
    if config.listen == ServerConfig().listen:
        config = replace(config, listen="127.0.0.1:0")
    server = start(config) if service is None else serve(config, service)
    try:
        yield server
    finally:
        server.stop(5.0)


@dataclass
class ServerProcess:
    """A `sharednorm serve` that runs. Everything that waits gives up after a while.

    Attributes:
        process: The process.
        banner: Its start-up line.
        address: Where it listens, from that line.
        seconds: From the start of the process to its line.
    """

    process: subprocess.Popen[str]
    banner: str
    address: str
    seconds: float
    _log: IO[str]

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.process.pid

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)

    def log(self) -> str:
        """Return what it has written to stderr."""
        self._log.seek(0)
        return self._log.read()

    def resident_bytes(self, what: str = "VmRSS") -> int:
        """Return the memory that it occupies now, or with VmHWM the most that it has occupied."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields[what].split()[0]) << 10


@contextmanager
def server_process(
    *arguments: str, listen: str = "127.0.0.1:0", env: dict[str, str] | None = None
) -> Iterator[ServerProcess]:
    """Start a server process and wait until it listens; kill it at the end if it still runs."""
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        state = () if "--state" in arguments else ("--state", "memory:")
        process = spawn("serve", "--listen", listen, *state, *arguments, stderr=log, env=env)
        try:
            banner = _first_line(process, log)
            match = _BANNER.fullmatch(banner)
            assert match is not None, f"not a start-up line: {banner!r}"
            yield ServerProcess(process, banner, match["address"], time.monotonic() - began, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(STOP_SECONDS)
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process from running, as a machine that swaps or a debugger would."""
    os.kill(pid, signal.SIGSTOP)
    try:
        end = time.monotonic() + 5
        while any(status != "T" for status in _thread_states(pid)):
            assert time.monotonic() < end
            time.sleep(0.001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _thread_states(pid: int) -> list[str]:
    """What each thread of a process does: "T" if it is stopped, which SIGSTOP brings about only after a moment."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def spawn(*arguments: str, stderr: IO[str] | int, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, *lock_audit.arguments("sharednorm_server"), *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, **(env or {})},
    )


def run(arguments: Sequence[str], env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, for at most a minute."""
    return subprocess.run(
        [sys.executable, *lock_audit.arguments("sharednorm_server"), *arguments],
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        env={**os.environ, **(env or {})},
        check=False,
    )


def _first_line(process: subprocess.Popen[str], log: IO[str]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ready = selector.select(START_SECONDS)
    line = process.stdout.readline() if ready else ""
    if not line:
        log.seek(0)
        raise AssertionError(f"the server did not start:\n{log.read()}")
    return line.rstrip("\n")
