"""Processes and hubs: spawned children connect, forked ones are told that they cannot."""

from __future__ import annotations

import pickle
import subprocess
import sys
from textwrap import dedent

import pytest

import sharednorm
from tests.support.server import server_process

# Forks need a process of their own: one without the threads of the tests, and of which nothing else depends.
PREAMBLE = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's on forking with threads, which is the point
import sharednorm
address = sys.argv[1]

def in_child(call):
    child = os.fork()
    if child == 0:
        try:
            call()
        except sharednorm.HubClosed as error:
            print(error, flush=True)
            os._exit(7)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
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
    assert "fork" not in done.stderr, "gRPC's fork handlers complain"
    return done.stdout


def test_a_forked_child_cannot_use_its_parents_hub_and_the_parent_goes_on() -> None:
    with server_process() as server:
        said = run(
            """
            hub = sharednorm.connect(address)
            layer = hub.BatchNorm(2, name="x")
            assert in_child(hub.layers) == 7
            assert in_child(lambda: layer.mean) == 7
            assert in_child(hub.close) == 0
            assert [info.name for info in hub.layers()] == ["x"]
            """,
            server.address,
        )
    assert said.count('use the start method "spawn"') == 2


def test_a_child_of_a_connected_process_is_refused_and_does_not_hang() -> None:
    with server_process() as server:
        said = run(
            """
            hub = sharednorm.connect(address)
            assert in_child(lambda: sharednorm.connect(address)) == 7
            hub.close()
            assert in_child(lambda: sharednorm.connect(address)) == 7
            """,
            server.address,
        )
    assert said.count('use the start method "spawn", or fork before the first connect()') == 2


def test_a_child_that_was_forked_before_the_first_connect_connects() -> None:
    with server_process() as server:
        run(
            """
            assert in_child(lambda: sharednorm.connect(address).BatchNorm(2, name="x")) == 0
            assert [info.name for info in sharednorm.connect(address).layers()] == ["x"]
            """,
            server.address,
        )


def test_a_hub_and_its_handles_do_not_travel_and_say_what_does() -> None:
    with server_process() as server, sharednorm.connect(server.address) as hub:
        for thing in (hub, hub.BatchNorm(2, name="x")):
            with pytest.raises(
                TypeError, match="pass the address and the layer's name, and connect in the other process"
            ):
                pickle.dumps(thing)
