"""How often a forward, or a backward, asks a store that other servers use: once, also with strong consistency."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.layers.registry import LayerRegistry
from sharednorm_server.store.redis.store import RedisStore
from tests.support.oracle import random_tensor
from tests.support.processes.redis import RedisProcess
from tests.support.processes.server import in_process

SMALL, LARGE = (4, 3, 5, 2), (16, 3, 256, 128)  # at once; in parts


@pytest.fixture(scope="module")
def address(redis_process: RedisProcess) -> Iterator[str]:
    with in_process(ServerConfig(state=redis_process.url(), max_staleness=60.0)) as server:
        yield server.address


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often a layer is looked up, and how often the store is asked for it."""
    counts = {"find": 0, "look": 0}
    find, look = LayerRegistry.find, RedisStore.look

    def counted_find(self: LayerRegistry, *arguments: Any) -> Any:
        counts["find"] += 1
        return find(self, *arguments)

    def counted_look(self: RedisStore, *arguments: Any) -> Any:
        counts["look"] += 1
        return look(self, *arguments)

    monkeypatch.setattr(LayerRegistry, "find", counted_find)
    monkeypatch.setattr(RedisStore, "look", counted_look)
    return counts


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("transport", ["grpc", "direct"])
@pytest.mark.parametrize("train", [True, False])
def test_a_forward_asks_once(address: str, asked: dict[str, int], transport: str, train: bool, shape: Any) -> None:
    name = f"{transport}/{train}/{len(shape)}/{shape[0]}"
    with sharednorm.connect(address, transport=transport, consistency="strong") as hub:
        layer = hub.BatchNorm2D(3, name=name)
        layer.train = train
        x = random_tensor(1, shape)
        layer(x)  # the first step of a session asks for what that has done before
        before = dict(asked)
        layer(x)
        assert asked["look"] - before["look"] == 1
        # An evaluation whose tensor came in parts finds the layer again in memory.
        assert asked["find"] - before["find"] == (2 if shape is LARGE and not train else 1)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_a_backward_asks_once(address: str, asked: dict[str, int], transport: str, shape: Any) -> None:
    with sharednorm.connect(address, transport=transport, consistency="strong") as hub:
        layer = hub.BatchNorm2D(3, name=f"backward/{transport}/{shape[0]}")
        layer.trainMode()
        x = random_tensor(1, shape)
        layer(x)
        before = dict(asked)
        layer.backward(x)
        assert {name: asked[name] - before[name] for name in asked} == {"find": 1, "look": 1}


def test_an_evaluation_in_parts_sees_what_was_changed_before_it(address: str) -> None:
    with sharednorm.connect(address, transport="grpc", consistency="strong") as hub:
        layer = hub.BatchNorm2D(3, name="seen", sscale=0.0)
        other = hub.BatchNorm2D(3, name="seen", sscale=0.0)
        layer.evalMode()
        x = np.ones(LARGE, np.float32)
        assert not np.allclose(layer(x), 5)
        other.bias = np.full(3, 5)
        other.mean = np.ones(3)
        assert np.allclose(layer(x), 5)
