"""Processes and hubs: spawned children connect, forked ones are told that they cannot."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import LayerNotFound, ServerUnavailable
from sharednorm.remote.handle import backend_of
from tests.support.processes.server import server_process

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


@pytest.mark.parametrize("socket", [False, True], ids=["tcp", "unix"])
def test_a_forked_child_cannot_use_its_parents_hub_and_the_parent_goes_on(socket: bool, tmp_path: Path) -> None:
    with server_process(listen=f"unix:{tmp_path}/s.sock" if socket else "127.0.0.1:0") as server:
        said = run(
            """
            import numpy as np
            hub = sharednorm.connect(address)
            layer = hub.BatchNorm(2, name="x")
            x = hub.empty((10_000, 2))
            x[...] = np.random.default_rng(0).normal(size=x.shape)
            y, lanes = layer(x), list(hub._exchange._ways._way.link._lanes)
            assert in_child(hub.layers) == 7
            assert in_child(lambda: layer.mean) == 7
            assert in_child(lambda: layer(x)) == 7
            assert in_child(hub.close) == 0
            assert [info.name for info in hub.layers()] == ["x"]
            assert np.array_equal(layer(x), y)
            assert list(hub._exchange._ways._way.link._lanes) == lanes  # not even the connection is another one
            """,
            server.address,
        )
    assert said.count('use the start method "spawn"') == 3


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


def test_a_hub_does_not_travel_and_says_what_does() -> None:
    said = "pass the address and the layer's name, and connect in the other process"
    with server_process() as server, sharednorm.connect(server.address) as hub, pytest.raises(TypeError, match=said):
        pickle.dumps(hub)


CHILD_OF_A_HANDLE = """
import pickle, sys
import numpy as np
layer = pickle.loads(bytes.fromhex(sys.argv[1]))
layer(np.arange(8, dtype=np.float32).reshape(4, 2))
print(layer.numOfProps, layer.train, layer.calctype, pickle.loads(bytes.fromhex(sys.argv[1])) is not layer)
"""


@pytest.mark.parametrize("compute", ["server", "client"])
def test_a_handle_travels_and_connects_by_itself(compute: str) -> None:
    with server_process() as server, sharednorm.connect(server.address, namespace="ours", timeout=20.0) as hub:
        layer = hub.BatchNorm(2, name="x", compute=compute)
        layer.trainMode()
        layer.calcMode("float32")
        layer(np.arange(8, dtype=np.float32).reshape(4, 2))
        sent = pickle.dumps(layer).hex()
        done = subprocess.run(
            [sys.executable, "-c", CHILD_OF_A_HANDLE, sent], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == "2 True float32 True\n", done.stderr
        here = pickle.loads(bytes.fromhex(sent))  # by the hub that is open here
        assert backend_of(here).connection is backend_of(layer).connection  # type: ignore[union-attr]
        assert here.numOfProps == 2
        assert here.inData is None
        for copied in (copy.copy(layer), copy.deepcopy(layer)):
            copied.evalMode()
            assert layer.train
            assert copied.calctype == layer.calctype
            assert copied.numOfProps == 2
        hub.delete("x")
        hub.BatchNorm(2, name="x")
        with pytest.raises(LayerNotFound):  # another layer of that name
            pickle.loads(bytes.fromhex(sent)).snapshot()
    with pytest.raises(ServerUnavailable):
        pickle.loads(bytes.fromhex(sent))
