"""Changes that share a commit of the SQLite store: who waits for which one, on a disk that takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharednorm.core.state import initial_state
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.sqlite.store import SqliteStore
from tests.support.service import CONFIG

STATE = initial_state(CONFIG, 0.3, np.random.default_rng(1))


def record(name: str) -> LayerRecord:
    return LayerRecord(LayerKey("default", name, f"uid of {name}"), CONFIG, STATE)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path)) as opened:
        for name in "abcd":
            opened.create(record(name))
        yield opened


def slowly(store: SqliteStore, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> None:
    """Have something done before the end of each commit, whose number it gets."""
    real, commits = store._transact, iter(range(1_000_000))

    def transact(works: Any) -> None:
        real(works)
        before(next(commits))

    monkeypatch.setattr(store, "_transact", transact)


def keep(store: SqliteStore, name: str) -> threading.Thread:
    def work() -> None:
        kept = store.put(record(name).with_state(replace(STATE, num_of_props=1)))
        assert kept is not None
        kept.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def ended(*threads: threading.Thread) -> None:
    """Wait for threads, none of which hangs."""
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_nobody_whose_change_is_kept_waits_for_another_commit(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates, reached = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]

    def hold(commit: int) -> None:
        reached[commit].set()
        assert gates[commit].wait(10)

    slowly(store, monkeypatch, hold)
    first = keep(store, "a")
    assert reached[0].wait(10)
    together = [keep(store, "b"), keep(store, "c")]
    until(lambda: len(store._waiting) == 2)
    gates[0].set()
    ended(first)
    assert reached[1].wait(10)  # both are in it
    last = keep(store, "d")
    until(lambda: len(store._waiting) == 1)
    gates[1].set()
    assert reached[2].wait(10)
    ended(*together)
    assert last.is_alive()
    gates[2].set()
    ended(last)


def test_on_a_slow_disk_those_who_come_back_share_each_commit(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(store, monkeypatch, lambda _: time.sleep(0.03))
    before, rounds = store.counts, 20

    def train(name: str) -> None:
        for _ in range(rounds):
            ended(keep(store, name))

    threads = [threading.Thread(target=train, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    ended(*threads)
    commits, changes = store.counts.commits - before.commits, store.counts.changes - before.changes
    assert changes == 4 * rounds
    assert commits < 1.6 * rounds  # two cohorts would need twice as many as there are rounds


def test_one_that_comes_alone_waits_for_nobody(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(store._gathered, "wait", waits.append)
    slowly(store, monkeypatch, lambda _: time.sleep(0.01))
    for _ in range(5):
        ended(keep(store, "a"))
    assert waits == []


@pytest.fixture
def waited(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each wait for others was ended by their coming."""
    found: list[bool] = []
    real = store._gathered.wait

    def wait(seconds: float | None = None) -> bool:
        found.append(real(seconds))
        return found[-1]

    monkeypatch.setattr(store._gathered, "wait", wait)
    return found


def test_those_who_do_not_come_are_waited_for_seldom(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, waited: list[bool]
) -> None:
    slowly(store, monkeypatch, lambda _: time.sleep(0.01))
    for _ in range(9):
        store._siblings, store._until = 4, time.perf_counter() + 0.01  # as after a commit of four
        ended(keep(store, "a"))
    assert waited == [False]


def test_those_of_whom_most_come_are_waited_for_each_time(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, waited: list[bool]
) -> None:
    slowly(store, monkeypatch, lambda _: time.sleep(0.01))
    for _ in range(5):
        store._siblings, store._until = 4, time.perf_counter() + 0.05
        ended(*[keep(store, name) for name in "ab"])
    assert waited == 5 * [False]


def test_many_that_come_at_once_are_waited_for_whatever_was_before(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, waited: list[bool]
) -> None:
    store._without, store._siblings = 8, 1  # as after a commit of one that was waited for in vain
    threads: list[threading.Thread] = []

    def others(commit: int) -> None:
        time.sleep(0.01)
        if not commit:
            threads.extend(keep(store, name) for name in "bcd")
            until(lambda: len(store._waiting) == 3)

    slowly(store, monkeypatch, others)
    ended(keep(store, "a"))
    assert store._siblings == 4
    ended(*threads)
    assert waited == [False]  # three of the four came
