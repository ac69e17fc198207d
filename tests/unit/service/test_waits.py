"""What waits for the store, and what does not: a slow disk delays the answers that depend on it, and no others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments, StateUpdate, initial_state
from sharednorm.core.types import LayerKind
from sharednorm.errors import LayerNotFound, LimitExceeded, SnapshotNotFound, StoreFailed
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.layers.registry import LayerRegistry
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.sqlite.store import SqliteStore
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process
from tests.support.service import KEY, MAPS, create, new_service

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 2)
SECONDS = 10
NAMES = ("a", "b", "c", "d")


def key(name: str) -> LayerKey:
    return LayerKey("default", name)


def make(name: str) -> Callable[[], LayerRecord]:
    return lambda: LayerRecord(key(name), CONFIG, initial_state(CONFIG, 0.0, np.random.default_rng(0)))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class HeldStore(MemoryStore):
    """A store whose creations and deletions take until a test lets them end.

    Attributes:
        begun: Names whose creation, or "-" and the name whose deletion, has begun.
        fails: Whether a creation fails in the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[str] = []
        self.fails = False
        self._free = threading.Event()
        self._free.set()

    def create(self, record: LayerRecord) -> bool:
        """Keep a new layer's record."""
        self.begun.append(record.key.name)
        assert self._free.wait(SECONDS)
        if self.fails:
            raise StoreFailed("the disk is gone")
        return super().create(record)

    def delete(self, key: LayerKey) -> bool:
        """Forget a layer."""
        self.begun.append(f"-{key.name}")
        assert self._free.wait(SECONDS)
        return super().delete(key)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold creations and deletions meanwhile."""
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()


@pytest.fixture
def store() -> HeldStore:
    return HeldStore()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_layers_are_created_at_the_same_time(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry = LayerRegistry(store)
    with store.held():
        futures = [threads.submit(registry.create, key(name), make(name)) for name in NAMES]
        until(lambda: sorted(store.begun) == sorted(NAMES))
    assert [future.result(SECONDS)[1] for future in futures] == [True] * len(NAMES)


def test_a_layer_in_memory_is_found_while_others_are_created(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry = LayerRegistry(store)
    registry.create(key("a"), make("a"))
    with store.held():
        creation = threads.submit(registry.create, key("b"), make("b"))
        until(lambda: "b" in store.begun)
        assert threads.submit(registry.find, key("a")).result(SECONDS).key == key("a")
        assert threads.submit(registry.create, key("a"), make("a")).result(SECONDS)[1] is False
        with pytest.raises(LayerNotFound):
            threads.submit(registry.find, key("c")).result(SECONDS)
        assert len(registry.alive()) == 1
    assert creation.result(SECONDS)[1]


def test_another_creation_of_the_same_layer_waits_for_its_commit(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry = LayerRegistry(store)
    with store.held():
        futures = [threads.submit(registry.create, key("a"), make("a")) for _ in range(4)]
        lookup = threads.submit(registry.find, key("a"))
        until(lambda: store.begun == ["a"])
        assert not any(future.done() for future in futures)
    results = [future.result(SECONDS) for future in futures]
    assert sorted(created for _, created in results) == [False, False, False, True]
    assert len({id(record) for record, _ in results}) == 1
    assert store.begun == ["a"]
    assert lookup.exception(SECONDS) is None or isinstance(lookup.exception(), LayerNotFound)  # it came first, perhaps


def test_a_creation_that_fails_frees_the_name(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry, store.fails = LayerRegistry(store), True
    with store.held():
        first = threads.submit(registry.create, key("a"), make("a"))
        until(lambda: store.begun == ["a"])
    with pytest.raises(StoreFailed):
        first.result(SECONDS)
    assert registry.alive() == []
    store.fails = False
    assert registry.create(key("a"), make("a"))[1]


def test_a_name_whose_layer_is_being_deleted_is_created_anew(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry = LayerRegistry(store)
    old, _ = registry.create(key("a"), make("a"))
    with store.held():
        deletion = threads.submit(registry.delete, key("a"))
        until(lambda: "-a" in store.begun)
        creation = threads.submit(registry.create, key("b"), make("b"))
        until(lambda: "b" in store.begun)  # another name does not wait
    assert deletion.result(SECONDS).key == key("a")
    assert creation.result(SECONDS)[1]
    record, created = registry.create(key("a"), make("a"))
    assert created
    assert record is not old


def test_the_last_place_of_a_namespace_is_given_once(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry = LayerRegistry(store, max_layers=2)
    with store.held():
        futures = [threads.submit(registry.create, key(name), make(name)) for name in NAMES]
        until(lambda: bool(store.begun))
    outcomes = [future.exception(SECONDS) for future in futures]
    assert sum(outcome is None for outcome in outcomes) == 2
    assert all(outcome is None or isinstance(outcome, LimitExceeded) for outcome in outcomes)
    assert store.count("default") == 2


def test_the_last_place_goes_to_another_if_a_creation_fails(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry, store.fails = LayerRegistry(store, max_layers=1), True
    with store.held():
        first = threads.submit(registry.create, key("a"), make("a"))
        until(lambda: store.begun == ["a"])
        second = threads.submit(registry.create, key("b"), make("b"))
        time.sleep(0.05)  # it waits, and is not refused
        assert not second.done()
    with pytest.raises(StoreFailed):
        first.result(SECONDS)
    store.fails = False
    assert isinstance(second.exception(SECONDS), (StoreFailed, type(None)))


class HeldCommits:
    """Holds the commits of a SQLite store, and counts what is put meanwhile."""

    def __init__(self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.puts = self.commits = 0
        self.free = threading.Event()
        self.free.set()
        put, transact = store.put, store._transact

        def counted(*arguments: Any) -> Any:
            self.puts += 1
            return put(*arguments)

        def held(works: Any) -> None:
            self.commits += 1
            assert self.free.wait(SECONDS)
            transact(works)

        monkeypatch.setattr(store, "put", counted)
        monkeypatch.setattr(store, "_transact", held)


@pytest.mark.parametrize("compute", ["client", "server"])
def test_steps_of_one_layer_share_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor, compute: str
) -> None:
    # A step that needs the layer's configuration alone does not wait until the step before is on the disk.
    with in_process(ServerConfig(state=f"sqlite://{tmp_path}")) as server:
        hubs = [sharednorm.connect(server.address) for _ in range(4)]
        layers = [hub.BatchNorm2D(3, name="bn", compute=compute) for hub in hubs]
        for layer in layers:
            layer(random_tensor(0, (4, 3, 5, 5)))
        store = server._service._store
        assert isinstance(store, SqliteStore)
        commits = HeldCommits(store, monkeypatch)
        commits.free.clear()
        steps = [threads.submit(layer, random_tensor(i, (4, 3, 5, 5))) for i, layer in enumerate(layers)]
        try:
            until(lambda: commits.puts == len(layers))
            assert commits.commits == 1
        finally:
            commits.free.set()
        for step in steps:
            step.result(SECONDS)
        assert commits.commits <= 3
        for hub in hubs:
            hub.close()


def test_steps_do_not_wait_while_a_snapshot_is_read(threads: ThreadPoolExecutor) -> None:
    class Reading(MemoryStore):
        begun, go_on = threading.Event(), threading.Event()

        def snapshot(self, key: LayerKey, version: int) -> LayerRecord | None:
            self.begun.set()
            assert self.go_on.wait(SECONDS)
            return super().snapshot(key, version)

    service = new_service(store=Reading())
    create(service)
    rollback = threads.submit(service.roll_back, KEY, 0)
    assert Reading.begun.wait(SECONDS)
    try:
        assert threads.submit(service.set_train, KEY, False).result(SECONDS)[0].train is False
    finally:
        Reading.go_on.set()
    assert isinstance(rollback.exception(SECONDS), (SnapshotNotFound, type(None)))


def test_a_layer_that_is_there_is_found_where_there_is_room_for_none(store: HeldStore) -> None:
    LayerRegistry(store).create(key("a"), make("a"))
    restarted = LayerRegistry(store, max_layers=1)
    assert restarted.create(key("a"), make("a"))[1] is False
    with pytest.raises(LimitExceeded):
        restarted.create(key("b"), make("b"))


def test_a_layer_that_is_being_deleted_is_not_attached_to(store: HeldStore, threads: ThreadPoolExecutor) -> None:
    registry = LayerRegistry(store)
    old, _ = registry.create(key("a"), make("a"))
    with store.held():
        deletion = threads.submit(registry.delete, key("a"))
        until(lambda: "-a" in store.begun)
        creation = threads.submit(registry.create, key("a"), make("a"))
    deletion.result(SECONDS)
    record, created = creation.result(SECONDS)
    assert (record is old) != created  # it came before the deletion, or after it


def test_nothing_is_left_of_names_and_namespaces(store: HeldStore) -> None:
    registry = LayerRegistry(store)
    for number in range(10):
        one = LayerKey(f"namespace {number}", "a")
        registry.create(one, lambda one=one: LayerRecord(one, CONFIG, make("a")().state))  # type: ignore[misc]
        registry.delete(one)
    assert (len(registry._creating), len(registry._openings), registry.alive()) == (0, 0, [])


@pytest.mark.parametrize("what", ["merge", "domain"])
def test_a_repeated_change_is_answered_when_the_first_one_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor, what: str
) -> None:
    with in_process(ServerConfig(state=f"sqlite://{tmp_path}")) as server:
        service = server._service
        create(service)
        layer_store = service._store
        assert isinstance(layer_store, SqliteStore)

        def change() -> object:
            if what == "merge":
                return service.merge_statistics(KEY, b"delta", Moments(8, np.zeros(MAPS), np.ones(MAPS)))
            return service.create_domain(replace(KEY, domain="site"), StateUpdate())

        commits = HeldCommits(layer_store, monkeypatch)
        commits.free.clear()
        try:
            first = threads.submit(change)
            until(lambda: commits.commits == 1)
            again = threads.submit(change)
            time.sleep(0.05)
            assert not again.done()
        finally:
            commits.free.set()
        assert first.result(SECONDS)[1] is True  # type: ignore[index]
        assert again.result(SECONDS)[1] is False  # type: ignore[index]
