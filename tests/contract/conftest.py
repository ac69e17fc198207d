"""The four backends that one suite runs over, unchanged: `make_layer` makes a layer on each."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

import sharednorm
from sharednorm_server.config import ServerConfig
from sharednorm_server.server import start

BACKENDS = ("local-numpy", "local-numba", "remote-in-process", "remote-process")
START_SECONDS = 60


class MakeLayer(Protocol):
    """Makes a layer."""

    def __call__(self, kind: str, maps: int, **options: Any) -> sharednorm.Layer:
        """Return a layer of a kind, "BatchNorm" to "BatchNorm3D", by the constructor of that name."""
        ...


@contextmanager
def server_process(folder: Path) -> Iterator[str]:
    """Run `sharednorm serve` on a unix socket in a folder; give its address."""
    address = f"unix:{folder / 'socket'}"
    command = [sys.executable, "-c", "from sharednorm_server.cli import main; raise SystemExit(main())"]
    with (folder / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [*command, "serve", "--listen", address], stdout=subprocess.PIPE, stderr=errors, env=dict(os.environ)
        )
        assert process.stdout is not None
        watchdog = threading.Timer(START_SECONDS, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline().decode()
            assert address in line, (line, (folder / "stderr").read_text())
            yield address
        finally:
            watchdog.cancel()
            process.terminate()
            try:
                process.wait(timeout=30)
            finally:
                process.kill()
                process.stdout.close()
                process.wait()


@pytest.fixture(scope="session")
def in_process_hub() -> Iterator[sharednorm.Hub]:
    """Give a connection over TCP to a server in this process."""
    server = start(ServerConfig(listen="127.0.0.1:0"))
    try:
        with sharednorm.connect(server.address) as hub:
            yield hub
    finally:
        server.stop(grace=5)


@pytest.fixture(scope="session")
def process_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sharednorm.Hub]:
    """Give a connection over a unix socket to a server in a process of its own."""
    with server_process(tmp_path_factory.mktemp("server")) as address, sharednorm.connect(address) as hub:
        yield hub


names = itertools.count()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Name the backend that a test runs over."""
    name: str = request.param
    return name


@pytest.fixture
def make_layer(backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeLayer:
    """Make layers on the test's backend, each with a name of its own unless one is given."""
    if backend.startswith("local-"):
        place: Any = sharednorm
        monkeypatch.setenv("SHAREDNORM_ARITHMETIC", backend.removeprefix("local-"))
    else:
        place = request.getfixturevalue("in_process_hub" if backend == "remote-in-process" else "process_hub")

    def make(kind: str, maps: int, **options: Any) -> sharednorm.Layer:
        layer: sharednorm.Layer = getattr(place, kind)(maps, **{"name": f"contract/{next(names)}", **options})
        return layer

    return make
