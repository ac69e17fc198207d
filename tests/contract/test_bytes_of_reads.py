"""How many bytes travel for what is read of a large layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import sharednorm
from tests.support.processes.proxy import HOST, Faults, Proxy
from tests.support.processes.server import in_process

MAPS = 1 << 17
KB = 1024
SMALL: dict[str, Callable[[sharednorm.Layer], Any]] = {
    "version": lambda layer: layer.version,
    "numOfProps": lambda layer: layer.numOfProps,
    "statsFrozen": lambda layer: layer.statsFrozen,
    "train": lambda layer: layer.train,
    "domains": lambda layer: layer.domains,
}
# With the bytes of a value on the wire.
VECTORS: dict[str, tuple[Callable[[sharednorm.Layer], Any], int]] = {
    "mean": (lambda layer: layer.mean, 8),
    "var": (lambda layer: layer.var, 8),
    "attrs": (lambda layer: layer.attrs, 16),
    "scale": (lambda layer: layer.scale, 4),
    "bias": (lambda layer: layer.bias, 4),
    "data": (lambda layer: layer.vars["scale"].data, 4),
    "grad": (lambda layer: layer.vars["bias"].grad, 4),
    "snapshot": (lambda layer: layer.snapshot(), 32),
}
HANDLES: dict[str, dict[str, Any]] = {
    "server": {},
    "client": {"compute": "client"},
    "async": {"compute": "client", "push": "async"},
    "group": {"compute": "client", "group": sharednorm.Group("alone", size=1)},
}


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with in_process() as server:
        made = Proxy(int(server.address.rpartition(":")[2]), Faults(random.Random(0)))
        yield made
        made.close()


@pytest.fixture(scope="module")
def hub(proxy: Proxy) -> Iterator[sharednorm.Hub]:
    with sharednorm.connect(f"{HOST}:{proxy.port}", transport="grpc") as opened:
        yield opened


@pytest.fixture(params=HANDLES)
def layer(hub: sharednorm.Hub, request: pytest.FixtureRequest) -> sharednorm.Layer:
    return hub.BatchNorm(MAPS, name="wide", **HANDLES[request.param])


@pytest.mark.parametrize("name", SMALL)
def test_a_number_travels_in_less_than_1_kb(proxy: Proxy, layer: sharednorm.Layer, name: str) -> None:
    SMALL[name](layer)
    before = proxy.carried
    SMALL[name](layer)
    assert proxy.carried - before < KB


@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_travels_alone(proxy: Proxy, layer: sharednorm.Layer, name: str) -> None:
    read, bytes_of_a_value = VECTORS[name]
    before = proxy.carried
    read(layer)
    nbytes = MAPS * bytes_of_a_value
    assert nbytes < proxy.carried - before < nbytes * 1.02 + 4 * KB
