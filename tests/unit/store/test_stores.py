"""Every store keeps what it is given, in the order of names."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import initial_state
from sharednorm.core.types import LayerKind
from sharednorm_server.store.base import ExclusiveStore, LayerKey, LayerRecord, Store
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.records import LastChange, Note, Remembered
from sharednorm_server.store.redis.store import RedisStore
from sharednorm_server.store.sqlite.store import SqliteStore

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 2)


def record(name: str, namespace: str = "default") -> LayerRecord:
    state = initial_state(CONFIG, 0.0, np.random.default_rng(0))
    return LayerRecord(LayerKey(namespace, name), CONFIG, state)


def note(session: str, seq: int, forgotten: tuple[str, ...] = (), floor: int = 0) -> Note:
    names = tuple(name.ljust(16).encode() for name in forgotten)
    return Note(session.ljust(16).encode(), LastChange(seq, b"content", 7, 6), names, floor)


def same(found: LayerRecord | None, expected: LayerRecord) -> bool:
    """Return whether a store has given a record back: itself, or one of the same values."""
    if found is None or found is expected:
        return found is expected
    assert (found.key, found.key.uid, found.config, found.train) == (
        expected.key, expected.key.uid, expected.config, expected.train,
    )  # fmt: skip
    for each in fields(expected.state):
        np.testing.assert_array_equal(getattr(found.state, each.name), getattr(expected.state, each.name))
    return found.mark == expected.mark


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made: Store
    if request.param == "redis":
        made = RedisStore(request.getfixturevalue("redis_process").url("a state:{b}"))
    else:
        made = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "a state")
    yield made
    if isinstance(made, RedisStore):
        request.getfixturevalue("redis_process").ask("FLUSHDB")
    made.close()


@pytest.fixture(params=["memory", "sqlite"])
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ExclusiveStore]:
    made: ExclusiveStore = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "a state")
    yield made
    made.close()


def test_it_says_what_it_is(own: ExclusiveStore, tmp_path: Path) -> None:
    directory = f"sqlite://{tmp_path}/a%20state?durability=os"
    assert own.description == ("memory:" if isinstance(own, MemoryStore) else directory)


def test_a_record_that_was_created_is_found(store: Store) -> None:
    first = record("a")
    assert store.create(first)
    assert same(store.get(first.key), first)


def test_creating_twice_changes_nothing(store: Store) -> None:
    first = record("a")
    store.create(first)
    assert not store.create(replace(first, train=False))
    assert same(store.get(first.key), first)


def test_put_replaces(own: ExclusiveStore) -> None:
    first = record("a")
    own.create(first)
    second = replace(first, train=False)
    kept = own.put(second)
    assert kept is not None
    kept.wait()
    assert own.get(first.key) is second


def test_put_makes_no_new_record(own: ExclusiveStore) -> None:
    assert own.put(record("a")) is None
    assert own.get(LayerKey("default", "a")) is None
    assert own.page("default", "", 10) == []


def test_what_is_known_of_sessions_is_kept_with_the_records(own: ExclusiveStore) -> None:
    key = LayerKey("default", "a")
    own.create(record("a"))
    own.create(record("b"))
    assert own.remembered(key) == Remembered({}, 0)
    assert own.remembered(LayerKey("default", "c")) == Remembered({}, 0)
    for seq, session in enumerate(("one", "two", "three", "one")):
        assert own.put(record("a"), note(session, seq)) is not None
    found = own.remembered(key)
    assert [session.rstrip() for session in found.changes] == [b"two", b"three", b"one"]  # the most recent last
    assert [change.seq for change in found.changes.values()] == [1, 2, 3]
    assert own.put(record("a"), note("four", 4, forgotten=("two", "three"), floor=9)) is not None
    found = own.remembered(key)
    assert ([session.rstrip() for session in found.changes], found.floor) == ([b"one", b"four"], 9)
    assert own.remembered(LayerKey("default", "b")) == Remembered({}, 0)
    assert own.put(record("c"), note("one", 1)) is None
    own.delete(key)
    own.create(record("a"))
    assert own.remembered(key) == Remembered({}, 0)


def test_the_numbers_of_sessions_grow(store: Store) -> None:
    numbers = [store.open_session() for _ in range(3)]
    assert numbers == sorted(set(numbers))
    assert all(store.session_opened(number) for number in numbers)
    assert not store.session_opened(numbers[-1] + 1)


def test_delete_forgets_and_says_whether_there_was_anything(store: Store) -> None:
    store.create(record("a"))
    assert store.delete(LayerKey("default", "a"))
    assert not store.delete(LayerKey("default", "a"))
    assert store.get(LayerKey("default", "a")) is None
    assert store.page("default", "", 10) == []


def test_a_name_may_be_used_again_after_delete(store: Store) -> None:
    store.create(record("a"))
    store.delete(LayerKey("default", "a"))
    assert store.create(record("a"))
    assert [found.key.name for found in store.page("default", "", 10)] == ["a"]


def test_pages_follow_the_code_points_of_the_names(store: Store) -> None:
    names = ["b", "a/b", "a", "Z", "é", "e\u0301", "中", "a b", "😀", "\uffff"]
    for name in random.Random(1).sample(names, len(names)):
        store.create(record(name))
    expected = sorted(names, key=lambda name: [ord(character) for character in name])
    collected: list[str] = []
    while page := store.page("default", collected[-1] if collected else "", 3):
        assert len(page) <= 3
        collected += [found.key.name for found in page]
    assert collected == expected


def test_a_page_may_begin_behind_a_name_that_is_gone(store: Store) -> None:
    for name in "abc":
        store.create(record(name))
    store.delete(LayerKey("default", "b"))
    assert [found.key.name for found in store.page("default", "b", 10)] == ["c"]


def test_namespaces_never_see_each_other(store: Store) -> None:
    store.create(record("a", "one"))
    store.create(record("a", "two"))
    store.delete(LayerKey("one", "a"))
    assert store.page("one", "", 10) == []
    assert [found.key for found in store.page("two", "", 10)] == [LayerKey("two", "a")]


def test_racing_creators_make_one_record(store: Store) -> None:
    barrier = threading.Barrier(8)
    created: list[bool] = []

    def create() -> None:
        barrier.wait(10)
        created.append(store.create(record("a")))

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(created) == [False] * 7 + [True]
    assert len(store.page("default", "", 10)) == 1
