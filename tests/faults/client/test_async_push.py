"""Training that runs ahead of a server that stops, is killed, or is not waited for."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import sharednorm
from sharednorm.errors import DeadlineExceeded, ServerUnavailable
from sharednorm.remote.handle import RemoteBatchNorm
from tests.support.oracle import random_tensor
from tests.support.processes.server import ServerProcess, server_process

SHAPE = (8, 5, 7, 3)
LONG = 30.0

TRANSPORTS = pytest.mark.parametrize("transport", ["direct", "grpc"])


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    with server_process() as running:
        yield running


def ahead(hub: sharednorm.Hub, name: str = "bn", **options: Any) -> RemoteBatchNorm:
    """A handle that has heard of its layer's parameters, and has one step behind it."""
    bn = hub.BatchNorm2D(5, name=name, sscale=0.0, compute="client", push="async", **options)
    bn(random_tensor(0, SHAPE))
    bn.flush()
    return bn


def stop(server: ServerProcess) -> None:
    """Stop a server, and wait until each of its threads stands still."""
    server.process.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{server.pid}/task")
    eventually(lambda: all(_state(task) == "T" for task in tasks.iterdir()))


def _state(task: Path) -> str:
    return (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@TRANSPORTS
def test_training_is_so_far_ahead_of_a_stopped_server_and_no_further(server: ServerProcess, transport: str) -> None:
    with sharednorm.connect(server.address, transport=transport) as hub:
        bn, done = ahead(hub, max_pending=4), []

        def train() -> None:
            for seed in range(10):
                bn(random_tensor(seed, SHAPE))
                done.append(seed)

        thread = threading.Thread(target=train)
        stop(server)
        thread.start()
        eventually(lambda: len(done) == 4)
        time.sleep(0.3)
        assert len(done) == 4
        server.process.send_signal(signal.SIGCONT)
        thread.join(LONG)
        assert bn.numOfProps == 11


@TRANSPORTS
def test_steps_that_a_server_does_not_answer_in_time(server: ServerProcess, transport: str) -> None:
    hub = sharednorm.connect(server.address, transport=transport, timeout=0.7)
    bn, x = ahead(hub, max_pending=3), random_tensor(1, SHAPE)
    stop(server)
    for _ in range(3):
        bn(x)
    with pytest.raises(DeadlineExceeded, match=r"may or may not have been taken.* did not answer within") as caught:
        bn(x)
    told = caught.value.metadata
    assert int(told["steps_unknown"]) + int(told["steps_lost"]) == 3
    assert int(told["steps_unknown"]) >= 1
    server.process.send_signal(signal.SIGCONT)
    with sharednorm.connect(server.address) as other:
        theirs = other.layer("bn")
        assert theirs.numOfProps == 1  # nobody waited for them any more
        bn(x)
        bn.flush()
        assert theirs.numOfProps == 2
    hub.close()


@TRANSPORTS
def test_a_server_that_is_killed_with_steps_pending(server: ServerProcess, transport: str) -> None:
    hub = sharednorm.connect(server.address, transport=transport, timeout=5.0)
    layers, x = [ahead(hub, name) for name in "ab"], random_tensor(1, SHAPE)
    stop(server)
    for _ in range(3):
        for bn in layers:
            bn(x)
    server.stop(signal.SIGKILL)
    for bn in layers:
        with pytest.raises(ServerUnavailable, match="may or may not have been taken") as caught:
            bn.flush()
        told = caught.value.metadata
        assert int(told["steps_unknown"]) + int(told["steps_lost"]) == 3
    hub.close()  # nothing is left to say


def test_closing_while_a_server_does_not_answer_takes_as_long_as_the_timeout(server: ServerProcess) -> None:
    hub = sharednorm.connect(server.address, timeout=0.5)
    bn = ahead(hub)
    stop(server)
    for seed in range(5):
        bn(random_tensor(seed, SHAPE))
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="may or may not have been taken") as caught:
        hub.close()
    assert 0.3 < time.monotonic() - began < 5
    assert hub.closed
    assert sum(int(caught.value.metadata[name]) for name in ("steps_unknown", "steps_lost")) == 5
    server.process.send_signal(signal.SIGCONT)


# --- Processes of their own -------------------------------------------------------------------------------

PREAMBLE = """
import os, signal, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's on forking with threads, which is the point
import numpy as np
import sharednorm
hub = sharednorm.connect(sys.argv[1])
bn = hub.BatchNorm2D(5, name="bn", compute="client", push="async")
x = np.random.default_rng(0).normal(size=(8, 5, 7, 3)).astype(np.float32)
bn(x)
"""


def run(script: str, address: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + dedent(script), address],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("end", ["", "hub.close()", "del bn, hub", "raise SystemExit(0)"])
def test_nothing_is_lost_when_a_process_ends(server: ServerProcess, end: str) -> None:
    run(
        f"""
        for _ in range(6):
            bn(x)
        {end}
        """,
        server.address,
    )
    with sharednorm.connect(server.address) as hub:
        assert hub.layer("bn").numOfProps == 7


def test_a_forked_child_is_told_and_the_parent_goes_on(server: ServerProcess) -> None:
    said = run(
        """
        bn.flush()
        os.kill(SERVER, signal.SIGSTOP)
        bn(x)  # is on its way while the process forks
        child = os.fork()
        if child == 0:
            for call in (lambda: bn(x), bn.flush, hub.flush, lambda: bn.mean):
                try:
                    call()
                except sharednorm.HubClosed as error:
                    print("told", flush=True)
            hub.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.kill(SERVER, signal.SIGCONT)
        print(bn.numOfProps)
        hub.close()
        """.replace("SERVER", str(server.pid)),
        server.address,
    )
    assert said == "told\n" * 4 + "2\n"
