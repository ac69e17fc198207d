"""Earlier states of layers: when one is taken, how long it stays, and what it is to go back to one."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from sharednorm.core.state import LayerState, Moments, StateUpdate
from sharednorm.errors import BackupFailed, LayerNotFound, SnapshotNotFound
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import CallKey
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.base import AnyStore, LayerKey
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.snapshots import SnapshotInfo, SnapshotPolicy
from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore
from tests.support.service import KEY, create, new_service


def moments(seed: int) -> Moments:
    rng = np.random.default_rng(seed)
    return Moments(10 + seed, rng.normal(size=3), rng.uniform(1, 9, 3))


DOMAIN, LATER = replace(KEY, domain="site-a"), replace(KEY, domain="site-b")


@dataclass
class Clock:
    """A clock that stands still until it is set."""

    now: float = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyStore]:
    made: AnyStore = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path / "state")
    yield made
    made.close()


def service_of(store: AnyStore, clock: Clock, every: float = 10.0, most: int = 3, age: float = 1e6) -> LayerService:
    return LayerService(store, Placement(CpuDevice()), 0, policy=SnapshotPolicy(every, most, age, clock))


def train(service: LayerService, seed: int, key: LayerKey = KEY) -> LayerState:
    return service.push_moments(key, True, moments(seed)).record.state


def versions(service: LayerService) -> list[int]:
    return [info.version for info in service.list_snapshots(KEY)]


def test_one_is_taken_at_most_every_so_many_seconds(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock)
    create(service)
    assert versions(service) == []
    for seed, now in enumerate((1000.0, 1001.0, 1009.9, 1010.0, 1011.0, 1030.0)):
        clock.now = now
        train(service, seed)
    assert service.list_snapshots(KEY) == [
        SnapshotInfo(1, 1000.0, 1), SnapshotInfo(4, 1010.0, 4), SnapshotInfo(6, 1030.0, 6),
    ]  # fmt: skip


def test_the_newest_are_kept_and_none_that_is_too_old_but_the_last(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock, most=3, age=100.0)
    create(service)
    for seed in range(6):
        clock.now += 10
        train(service, seed)
    assert versions(service) == [4, 5, 6]
    clock.now += 95
    train(service, 7)
    assert versions(service) == [6, 7]
    clock.now += 1000
    assert versions(service) == [6, 7]  # nothing has changed
    train(service, 8)
    assert versions(service) == [8]


def test_without_a_time_between_them_none_are_taken(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock, every=0)
    create(service)
    train(service, 1)
    assert versions(service) == []


def test_to_go_back_is_to_have_parameters_and_statistics_of_then(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock)
    create(service, scale=[1, 2, 3], bias=[4, 5, 6], scale_grad=[7, 8, 9])
    service.create_domain(DOMAIN, StateUpdate())
    for seed in range(3):
        train(service, seed, DOMAIN)
    clock.now += 10
    then = train(service, 3)
    then_there = service.get_layer(DOMAIN).state
    service.create_domain(LATER, StateUpdate())
    train(service, 4, LATER)
    train(service, 5)
    service.set_state(KEY, StateUpdate(scale=[np.nan] * 3, mean=[9, 9, 9]))
    later = service.get_layer(LATER).state
    record, replayed = service.roll_back(KEY, then.version)
    assert not replayed
    assert record is service.get_layer(KEY)
    state, there = record.state, service.get_layer(DOMAIN).state
    for name in ("scale", "bias", "mean", "var"):
        np.testing.assert_array_equal(getattr(state, name), getattr(then, name))
        np.testing.assert_array_equal(getattr(there, name), getattr(then_there, name))
    assert (state.num_of_props, there.num_of_props) == (then.num_of_props, then_there.num_of_props) == (1, 3)
    assert state.version == then.version + 2  # it counts steps, and those were taken
    assert not state.scale_grad.any()
    # A domain that came later is as it was.
    np.testing.assert_array_equal(service.get_layer(LATER).state.mean, later.mean)
    # What was there before is there to go back to.
    assert versions(service) == [0, then.version, state.version]
    service.roll_back(KEY, state.version)
    np.testing.assert_array_equal(service.get_layer(KEY).state.mean, [9, 9, 9])


def test_to_go_back_twice_under_one_key_is_to_go_back_once(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock)
    create(service)
    then = train(service, 1)
    key = CallKey(service.open_session() + b"lane 001", 1)
    train(service, 2)
    assert not service.roll_back(KEY, 1, key)[1]
    state = train(service, 3)
    record, replayed = service.roll_back(KEY, 1, key)
    assert replayed
    np.testing.assert_array_equal(record.state.mean, state.mean)
    assert not np.array_equal(state.mean, then.mean)


def test_a_version_without_a_snapshot(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock)
    create(service)
    train(service, 1)
    before = service.get_layer(KEY)
    with pytest.raises(SnapshotNotFound, match=r"no snapshot of version 7 \(expected: one of 1\)"):
        service.roll_back(KEY, 7)
    assert service.get_layer(KEY) is before
    for use in (service.list_snapshots, lambda key: service.roll_back(key, 1)):
        with pytest.raises(LayerNotFound):
            use(replace(KEY, name="other"))


def test_a_layer_that_is_made_anew_has_none(store: AnyStore, clock: Clock) -> None:
    service = service_of(store, clock)
    create(service)
    train(service, 1)
    service.delete_layer(KEY)
    create(service)
    assert versions(service) == []


def test_they_outlive_the_server_and_are_not_taken_at_each_start(tmp_path: Path, clock: Clock) -> None:
    service = service_of(SqliteStore(tmp_path), clock)
    create(service, bias=[1, 2, 3])
    service.create_domain(DOMAIN, StateUpdate(mean=[5, 6, 7], num_of_props=3))
    then = service.get_layer(KEY).state
    train(service, 1)
    for seed in (2, 3, 4):  # a server that is restarted again and again pushes none out
        service.close()
        clock.now += 1
        service = service_of(SqliteStore(tmp_path), clock)
        train(service, seed)
    assert versions(service) == [0]
    clock.now += 10
    train(service, 5)
    assert versions(service) == [0, 5]
    service.close()
    service = service_of(SqliteStore(tmp_path), clock)
    state = service.roll_back(KEY, 0)[0].state
    for name in ("scale", "bias", "mean", "var"):
        assert getattr(state, name).tobytes() == getattr(then, name).tobytes()
    np.testing.assert_array_equal(service.get_layer(DOMAIN).state.mean, [5, 6, 7])
    service.close()


# --- Backups ----------------------------------------------------------------------------------------


def test_a_backup_is_a_state_that_a_server_takes(tmp_path: Path, clock: Clock) -> None:
    service = service_of(SqliteStore(tmp_path / "state"), clock)
    create(service)
    key = CallKey(service.open_session() + b"lane 001", 1)
    service.push_moments(KEY, True, moments(1), call=key)
    text, size = service.back_up()
    path = Path(text)
    assert (path.parent, path.stat().st_size) == (tmp_path / "state" / "backups", size)
    assert path.parent.stat().st_mode & 0o077 == 0
    then = service.get_layer(KEY).state
    train(service, 2)  # the server goes on, and the copy stays as it is
    assert service.back_up()[0] != text
    service.close()
    (tmp_path / "other").mkdir()
    shutil.copy(path, tmp_path / "other" / FILE_NAME)
    service = service_of(SqliteStore(tmp_path / "other"), clock)
    state = service.get_layer(KEY).state
    assert (state.version, state.mean.tobytes()) == (1, then.mean.tobytes())
    assert service.push_moments(KEY, True, moments(1), call=key).replayed
    assert versions(service) == [1]
    service.close()


def test_a_backup_that_fails_leaves_the_state_and_no_file(tmp_path: Path, clock: Clock) -> None:
    service = service_of(SqliteStore(tmp_path / "state"), clock)
    create(service)
    (tmp_path / "state" / "backups").write_text("no directory")
    with pytest.raises(BackupFailed, match="cannot be copied to"):
        service.back_up()
    train(service, 1)
    (tmp_path / "state" / "backups").unlink()
    assert Path(service.back_up()[0]).exists()
    service.close()
    with closing(sqlite3.connect(tmp_path / "state" / FILE_NAME)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_of_memory_there_is_no_backup() -> None:
    with pytest.raises(BackupFailed, match="the state is memory:"):
        new_service().back_up()
