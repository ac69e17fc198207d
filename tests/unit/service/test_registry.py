"""The registry finds one live layer a name, and a live layer changes one step after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import initial_state
from sharednorm.core.types import LayerKind
from sharednorm.errors import DataLoss, LayerNotFound
from sharednorm_server.layers.layer import Layer
from sharednorm_server.layers.registry import LayerRegistry
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.memory import MemoryStore
from tests.support.service import SlowStore

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 2)
KEY = LayerKey("default", "a")


def make(key: LayerKey = KEY) -> LayerRecord:
    return LayerRecord(key, CONFIG, initial_state(CONFIG, 0.0, np.random.default_rng(0)))


def counted(record: LayerRecord) -> LayerRecord:
    return replace(record, state=replace(record.state, version=record.state.version + 1))


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def registry(store: MemoryStore) -> LayerRegistry:
    return LayerRegistry(store)


def test_an_unknown_layer_is_named(registry: LayerRegistry) -> None:
    with pytest.raises(LayerNotFound, match="'a' of namespace 'default'") as caught:
        registry.find(KEY)
    assert caught.value.metadata == {"namespace": "default", "name": "a"}


def test_create_makes_a_layer_once(registry: LayerRegistry) -> None:
    first, created = registry.create(KEY, make)
    second, again = registry.create(KEY, make)
    assert (created, again) == (True, False)
    assert first is second


def test_a_layer_that_the_store_remembers_is_found(store: MemoryStore, registry: LayerRegistry) -> None:
    store.create(make())
    assert registry.find(KEY).committed() == store.get(KEY)
    assert registry.create(KEY, make)[1] is False


def test_one_name_is_one_object(store: MemoryStore, registry: LayerRegistry) -> None:
    store.create(make())
    found: list[Layer] = []
    barrier = threading.Barrier(8)

    def find() -> None:
        barrier.wait(10)
        found.append(registry.find(KEY))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: find(), range(8)))
    assert len({id(layer) for layer in found}) == 1


def test_racing_creators_make_one_layer(registry: LayerRegistry) -> None:
    barrier = threading.Barrier(8)

    def create(_: int) -> tuple[LayerRecord, bool]:
        barrier.wait(10)
        return registry.create(KEY, make)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(create, range(8)))
    assert sum(created for _, created in answers) == 1
    assert len({id(record) for record, _ in answers}) == 1


def test_a_change_is_kept_by_the_store(store: MemoryStore, registry: LayerRegistry) -> None:
    registry.create(KEY, make)
    changed = registry.find(KEY).change(counted)
    assert changed.state.version == 1
    assert store.get(KEY) is changed
    assert registry.find(KEY).committed() is changed


def test_a_change_that_fails_changes_nothing(store: MemoryStore, registry: LayerRegistry) -> None:
    before, _ = registry.create(KEY, make)

    def fail(_: LayerRecord) -> LayerRecord:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        registry.find(KEY).change(fail)
    assert registry.find(KEY).committed() is before
    assert store.get(KEY) is before
    assert registry.find(KEY).change(counted).state.version == 1  # the lock is free again


def test_no_change_is_lost() -> None:
    registry = LayerRegistry(SlowStore())
    registry.create(KEY, make)
    layer = registry.find(KEY)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [layer.change(counted) for _ in range(50)], range(8)))
    assert layer.committed().state.version == 400


def test_layers_change_at_the_same_time(registry: LayerRegistry) -> None:
    other = LayerKey("default", "b")
    registry.create(KEY, make)
    registry.create(other, lambda: make(other))
    with registry.find(KEY).exclusive(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(registry.find(other).change, counted).result(10).state.version == 1


def test_a_deleted_layer_is_gone_for_those_who_hold_it(store: MemoryStore, registry: LayerRegistry) -> None:
    registry.create(KEY, make)
    layer = registry.find(KEY)
    assert registry.delete(KEY) is layer
    for use in (layer.committed, lambda: layer.change(counted), lambda: registry.find(KEY)):
        with pytest.raises(LayerNotFound):
            use()
    assert store.get(KEY) is None


def test_delete_of_an_unknown_layer(registry: LayerRegistry) -> None:
    with pytest.raises(LayerNotFound):
        registry.delete(KEY)


def test_a_layer_made_again_is_another_one(registry: LayerRegistry) -> None:
    registry.create(KEY, make)
    old = registry.find(KEY)
    old.change(counted)
    registry.delete(KEY)
    _, created = registry.create(KEY, make)
    assert created
    assert registry.find(KEY).committed().state.version == 0
    with pytest.raises(LayerNotFound):
        old.change(counted)
    assert registry.find(KEY).committed().state.version == 0


def test_a_layer_that_another_server_deleted_from_the_store_is_gone(
    store: MemoryStore, registry: LayerRegistry
) -> None:
    registry.create(KEY, make)
    store.delete(KEY)
    with pytest.raises(LayerNotFound):
        registry.find(KEY).change(counted)


def test_delete_waits_for_a_change_that_has_begun(registry: LayerRegistry) -> None:
    registry.create(KEY, make)
    with ThreadPoolExecutor(1) as pool:
        with registry.find(KEY).exclusive() as record:
            deleting = pool.submit(registry.delete, KEY)
            assert not deleting.done()
            registry.find(KEY).commit(counted(record))
        deleting.result(10)
    with pytest.raises(LayerNotFound):
        registry.find(KEY)


def test_a_layer_that_is_older_than_what_was_told(registry: LayerRegistry) -> None:
    registry.create(KEY, make)
    layer = registry.find(KEY)
    for _ in range(3):
        layer.change(counted)
    assert registry.find(replace(KEY, seen=3)) is layer
    with pytest.raises(DataLoss, match="is at version 3, and this handle was told of version 4") as caught:
        registry.find(replace(KEY, seen=4))
    assert caught.value.metadata == {"version": "3", "seen": "4"}
