"""Layers that are taken from one state into another go on there, sessions and all."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.state import Moments, StateUpdate
from sharednorm.errors import KeyReused, SessionExpired
from sharednorm_server.cli.migrate import migrate
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import CallKey, LayerKey, Together
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.base import AnyStore
from sharednorm_server.store.redis.store import RedisStore
from sharednorm_server.store.snapshots import SnapshotPolicy
from sharednorm_server.store.sqlite.store import SqliteStore
from tests.support.oracle import random_tensor
from tests.support.processes.redis import RedisProcess
from tests.support.processes.server import run, server_process
from tests.support.service import KEY, SHAPE, create


def moments(seed: int) -> Moments:
    return arithmetic("numpy").moments(random_tensor(seed, SHAPE))


def service_of(store: AnyStore) -> LayerService:
    policy = SnapshotPolicy(every=1e-9)  # one at each change
    return LayerService(store, Placement(CpuDevice(arithmetic("numpy"))), 1 << 20, policy=policy, max_sessions=3)


def opened(where: str, directory: Path, redis: RedisProcess, prefix: str) -> SqliteStore | RedisStore:
    if where == "sqlite":
        return SqliteStore(directory / "state")
    return RedisStore(redis.url(prefix), max_sessions=3)


@pytest.mark.parametrize(("one", "two"), [("sqlite", "redis"), ("redis", "sqlite")])
def test_all_of_a_layer_goes_along(tmp_path: Path, redis_process: RedisProcess, one: str, two: str) -> None:
    prefix = f"migration-{one}"
    service = service_of(opened(one, tmp_path, redis_process, prefix))
    create(service)
    create(service, LayerKey("é", "another: {one}"))
    service.create_domain(replace(KEY, domain="d"), StateUpdate())
    sessions = [service.open_session() + b"lane 001" for _ in range(4)]
    for seed, session in enumerate(sessions):
        service.push_moments(KEY, True, moments(seed), call=CallKey(session, 1))
    service.push_moments(replace(KEY, domain="d"), True, moments(9), call=CallKey(sessions[3], 2))
    service.set_train(KEY, False)
    service.push_moments(KEY, True, moments(10), call=CallKey(sessions[2], 2))
    record, snapshots = service.get_layer(KEY), service.list_snapshots(KEY)
    service.close()

    source, target = opened(one, tmp_path, redis_process, prefix), opened(two, tmp_path, redis_process, prefix)
    assert migrate(source, target) == (2, 0)
    assert migrate(source, target) == (0, 2)
    source.close()
    service = service_of(target)
    found = service.get_layer(KEY)
    assert (found.key, found.key.uid, found.train, found.config) == (KEY, record.key.uid, False, record.config)
    for name in ("scale", "bias", "mean", "var", "version", "num_of_props", "initialized"):
        np.testing.assert_array_equal(getattr(found.state, name), getattr(record.state, name))
        np.testing.assert_array_equal(getattr(found.within("d").state, name), getattr(record.within("d").state, name))
    assert service.list_snapshots(KEY) == snapshots
    assert service.list_namespaces() == [("default", 1), ("é", 1)]
    # What comes again is known; what was forgotten is no new session; what goes on goes on.
    again = service.push_moments(KEY, True, moments(10), call=CallKey(sessions[2], 2))
    assert (again.replayed, again.version) == (True, record.state.version)
    with pytest.raises(KeyReused):
        service.push_moments(KEY, True, moments(11), call=CallKey(sessions[2], 2))
    with pytest.raises(SessionExpired):
        service.push_moments(KEY, True, moments(0), call=CallKey(sessions[0], 1))
    assert (
        service.push_moments(KEY, True, moments(11), call=CallKey(sessions[3], 3)).version == record.state.version + 1
    )
    fresh = service.open_session()
    assert fresh > max(session[:8] for session in sessions)
    assert service.push_moments(KEY, True, moments(12), call=CallKey(fresh + b"lane 001", 1)).version > 0
    service.roll_back(KEY, snapshots[1].version)
    service.close()


def test_the_sums_of_a_group_go_along(tmp_path: Path, redis_process: RedisProcess) -> None:
    service = service_of(SqliteStore(tmp_path / "state"))
    create(service)
    session = service.open_session() + b"lane 001"
    stepped = service.step_together(KEY, moments(1), Together(CallKey(session, 1), b"content"))
    service.close()
    source, target = SqliteStore(tmp_path / "state"), RedisStore(redis_process.url())
    migrate(source, target)
    source.close()
    service = service_of(target)
    change = service.end_together(KEY, session)
    assert change is not None
    assert change.step is not None
    assert (change.content, change.version) == (b"content", stepped.state.version)
    np.testing.assert_array_equal(change.step.moments.mean, moments(1).mean)
    service.close()


@pytest.mark.parametrize("way", [{}, {"compute": "client"}, {"compute": "client", "push": "async"}])
def test_training_goes_on_in_redis(tmp_path: Path, redis_process: RedisProcess, way: dict[str, Any]) -> None:
    state, url, listen = f"sqlite://{tmp_path}/state", redis_process.url(), f"unix:{tmp_path}/socket"
    moved, steps, failures = threading.Event(), [0], list[BaseException]()

    def train() -> None:
        try:
            with sharednorm.connect(listen, timeout=120.0) as hub:
                layer, twin = hub.BatchNorm2D(3, name="bn", sscale=0.0, **way), sharednorm.BatchNorm2D(3, sscale=0.0)
                layer.trainMode()
                while not moved.is_set() or steps[0] < 60:
                    x = random_tensor(steps[0], SHAPE)
                    np.testing.assert_array_equal(layer(x), twin(x))
                    steps[0] += 1
                layer.flush()
                assert layer.numOfProps == steps[0]
                np.testing.assert_array_equal(layer.mean, twin.mean)
                np.testing.assert_array_equal(layer.var, twin.var)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            failures.append(error)

    with server_process("--state", state, listen=listen) as server:
        trainer = threading.Thread(target=train)
        trainer.start()
        while steps[0] < 20 and trainer.is_alive():
            moved.wait(0.01)
        busy = run(["migrate", state, url])
        assert busy.returncode != 0
        assert "is used by process" in busy.stderr
        assert server.stop() == 0
    done = run(["migrate", state, url])
    assert (done.returncode, done.stdout) == (0, "copied 1 layer\n")
    with server_process("--state", url, listen=listen):
        moved.set()
        trainer.join(120)
    assert failures == []


def test_memory_has_nothing_to_copy(tmp_path: Path) -> None:
    done = run(["migrate", "memory:", f"sqlite://{tmp_path}/state"])
    assert done.returncode != 0
    assert done.stderr == "sharednorm: memory: keeps nothing that could be copied\n"
