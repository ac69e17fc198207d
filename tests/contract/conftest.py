"""The backends that one suite runs over, unchanged: `make_layer` makes a layer on each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

import sharednorm
from sharednorm_server.config.options import ServerConfig
from tests.support.inside import exchange_of
from tests.support.kernels import cuda
from tests.support.making import MakeLayer
from tests.support.processes.redis import RedisProcess
from tests.support.processes.server import in_process, server_process

BACKENDS = (
    *("local-numpy", "local-numba", "remote-grpc", "remote-direct", "remote-shm"),
    *("remote-client", "remote-async", "remote-cuda", "remote-redis"),
)
HANDLINGS: dict[str, dict[str, Any]] = {
    "remote-client": {"compute": "client"},
    "remote-async": {"compute": "client", "push": "async"},
}

names = itertools.count()


@pytest.fixture(scope="session")
def grpc_hub() -> Iterator[sharednorm.Hub]:
    """Give a connection over TCP, by gRPC alone, to a server in this process."""
    with in_process() as server, sharednorm.connect(server.address, transport="grpc") as hub:
        yield hub


@pytest.fixture(scope="session")
def direct_hub() -> Iterator[sharednorm.Hub]:
    """Give a connection over TCP to a server in this process; tensors travel on connections of their own."""
    with in_process() as server, sharednorm.connect(server.address, transport="direct") as hub:
        yield hub


@pytest.fixture(scope="session")
def shm_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sharednorm.Hub]:
    """Give a connection to a server process that shares memory with this one, where all tensors are, and has a file."""
    socket = tmp_path_factory.mktemp("server") / "socket"
    with (
        server_process("--state", f"sqlite://{socket.with_name('state')}", listen=f"unix:{socket}") as server,
        sharednorm.connect(server.address, transport="shm") as hub,
    ):
        exchange_of(hub)._share_bytes = 0
        yield hub


@pytest.fixture(scope="session")
def cuda_hub() -> Iterator[sharednorm.Hub]:
    """Give a connection over TCP to a server process that computes with CUDA, on the emulated driver or a real GPU."""
    if not cuda.available():
        pytest.skip(cuda.NEEDS_PYCUDA)
    with server_process("--device", "cuda", env=cuda.environment()) as server:
        with sharednorm.connect(server.address) as hub:
            yield hub
        # Also what the driver finds at exit, such as memory that nobody gave back, fails the run.
        assert server.stop() == 0, server.log()


@pytest.fixture(scope="session")
def redis_hub(redis_process: RedisProcess) -> Iterator[sharednorm.Hub]:
    """Give a connection over TCP to a server in this process that keeps its layers in Redis."""
    with in_process(ServerConfig(state=redis_process.url())) as server, sharednorm.connect(server.address) as hub:
        yield hub


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
        way = "direct" if backend in HANDLINGS else backend.removeprefix("remote-")
        place = request.getfixturevalue(f"{way}_hub")
    usual = HANDLINGS.get(backend, {})

    def make(kind: str, maps: int, **options: Any) -> sharednorm.Layer:
        layer: sharednorm.Layer = getattr(place, kind)(maps, **{"name": f"contract/{next(names)}", **usual, **options})
        return layer

    return make
