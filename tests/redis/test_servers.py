"""Several servers over one Redis: any of them serves any layer, and none is wrong about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.state import LayerState, Moments, StateUpdate, step
from sharednorm.errors import (
    GENERATION_GONE,
    ConfigurationMismatch,
    DataLoss,
    KeyReused,
    LayerEmpty,
    LayerNotFound,
    SessionExpired,
    StaleGeneration,
    StoreUnavailable,
)
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.groups.coordinator import GroupKey, Synchronizer
from sharednorm_server.groups.state_machine import GroupSettings
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import BackwardCall, CallKey, ForwardCall
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.redis.store import RedisStore
from sharednorm_server.store.snapshots import SnapshotPolicy
from tests.support.oracle import random_tensor
from tests.support.processes.redis import RedisProcess, redis_server
from tests.support.service import CONFIG, KEY, SHAPE, create

X = random_tensor(3, SHAPE)
MAX_STALENESS = 0.2

MakeService = Callable[..., LayerService]


def moments(seed: int) -> Moments:
    return arithmetic("numpy").moments(random_tensor(seed, SHAPE))


@pytest.fixture
def server(redis_process: RedisProcess) -> Iterator[MakeService]:
    """Make services that share their layers."""
    url, made = redis_process.url(), list[LayerService]()

    def make(
        policy: SnapshotPolicy | None = None, max_sessions: int = 8, max_staleness: float = MAX_STALENESS
    ) -> LayerService:
        store, device = RedisStore(url, max_sessions=max_sessions), CpuDevice(arithmetic("numpy"))
        made.append(
            LayerService(
                store, Placement(device), 1 << 20, max_sessions=max_sessions, policy=policy, max_staleness=max_staleness
            )
        )
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture
def two(server: MakeService) -> tuple[LayerService, LayerService]:
    one, other = server(), server()
    create(one)
    return one, other


def replayed(batches: list[Moments], state: LayerState) -> LayerState:
    for batch in batches:
        state = step(state, CONFIG, batch)
    return state


def same(found: LayerState, expected: LayerState) -> None:
    assert found.version == expected.version
    for name in ("mean", "var", "scale", "bias", "num_of_props"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_steps_through_two_servers_are_steps_through_one(two: tuple[LayerService, LayerService]) -> None:
    first = two[0].get_layer(KEY).state
    batches = [moments(seed) for seed in range(20)]
    for turn, batch in enumerate(batches):
        answer = two[turn % 2].push_moments(KEY, True, batch)
        assert answer.version == turn + 1
    expected = replayed(batches, first)
    for service in two:
        same(service.get_layer(replace(KEY, strong=True)).state, expected)


def test_tensors_through_two_servers(two: tuple[LayerService, LayerService]) -> None:
    for turn in range(6):
        answer = two[turn % 2].forward(ForwardCall(KEY, train=True), random_tensor(turn, SHAPE))
        assert (answer.train, answer.version) == (True, turn + 1)


def test_racing_servers_take_every_step_once(server: MakeService) -> None:
    services = [server() for _ in range(3)]
    create(services[0])
    versions: list[int] = []

    def train(number: int) -> None:
        batches = [moments(100 * number + turn) for turn in range(40)]
        versions.extend(services[number % 3].push_moments(KEY, True, batch).version for batch in batches)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(train, range(6)))
    assert sorted(versions) == list(range(1, 241))
    assert {service.get_layer(replace(KEY, strong=True)).state.version for service in services} == {240}
    assert sum(service.figures.steps for service in services) == 240


def test_a_step_that_comes_again_through_another_server(two: tuple[LayerService, LayerService]) -> None:
    session = two[1].open_session() + b"lane 001"
    first = two[0].push_moments(KEY, True, moments(1), call=CallKey(session, 1))
    again = two[1].push_moments(KEY, True, moments(1), call=CallKey(session, 1))
    assert (first.replayed, again.replayed, first.version, again.version) == (False, True, 1, 1)
    two[1].push_moments(KEY, True, moments(2), call=CallKey(session, 2))
    with pytest.raises(KeyReused):
        two[0].push_moments(KEY, True, moments(3), call=CallKey(session, 2))
    assert two[0].push_moments(KEY, True, moments(2), call=CallKey(session, 2)).replayed
    assert two[0].push_moments(KEY, True, moments(3), call=CallKey(session, 3)).version == 3
    tensor = two[1].forward(ForwardCall(KEY, train=True, call=CallKey(session, 4)), X)
    other = two[0].forward(ForwardCall(KEY, train=True, call=CallKey(session, 4)), X)
    assert (other.replayed, other.version) == (True, tensor.version)
    np.testing.assert_array_equal(other.output.array(), tensor.output.array())


def test_a_session_that_another_server_has_forgotten_is_no_new_one(server: MakeService) -> None:
    one, other = server(max_sessions=2), server(max_sessions=2)
    create(one)
    sessions = [other.open_session() + b"lane 001" for _ in range(4)]
    for turn, session in enumerate(sessions):
        (one, other)[turn % 2].push_moments(KEY, True, moments(turn), call=CallKey(session, 1))
    for service in (one, other):
        for session in sessions[:2]:
            with pytest.raises(SessionExpired):
                service.push_moments(KEY, True, moments(1), call=CallKey(session, 1))
    assert one.push_moments(KEY, True, moments(3), call=CallKey(sessions[3], 1)).replayed


def test_a_number_that_no_server_has_given(two: tuple[LayerService, LayerService]) -> None:
    number = int.from_bytes(two[0].open_session(), "big") + 1
    with pytest.raises(SessionExpired):
        two[1].push_moments(KEY, True, moments(1), call=CallKey(number.to_bytes(8, "big") + b"lane 001", 1))


def test_what_was_changed_elsewhere_is_seen_in_evaluation(two: tuple[LayerService, LayerService]) -> None:
    assert two[1].forward(ForwardCall(KEY, train=False), X).version == 0
    two[0].push_moments(KEY, True, moments(1))
    assert two[1].forward(ForwardCall(replace(KEY, strong=True), train=False), X).version == 1
    two[0].push_moments(KEY, True, moments(2))
    until(lambda: two[1].forward(ForwardCall(KEY, train=False), X).version == 2, 5.0)


def deafen(service: LayerService) -> None:
    """Have a server hear of no change that others make."""
    assert isinstance(service._store, RedisStore)
    service._store.on_changed(lambda *_: None)


def test_a_change_that_another_server_has_made_is_heard(server: MakeService) -> None:
    one, other = server(max_staleness=60.0), server(max_staleness=60.0)
    create(one)
    assert other.forward(ForwardCall(KEY, train=False), X).version == 0
    one.push_moments(KEY, True, moments(1))
    until(lambda: other.forward(ForwardCall(KEY, train=False), X).version == 1, 5.0)


def test_a_server_that_has_not_heard_takes_what_comes_next(server: MakeService) -> None:
    deaf, other = server(max_staleness=60.0), server()
    create(deaf)
    deafen(deaf)
    session = deaf.open_session() + b"lane 001"
    deaf.push_moments(KEY, True, moments(1), call=CallKey(session, 1))
    for seq in (2, 3):
        other.push_moments(KEY, True, moments(seq), call=CallKey(session, seq))
    assert deaf.push_moments(KEY, True, moments(3), call=CallKey(session, 3)).replayed
    assert deaf.push_moments(KEY, True, moments(4), call=CallKey(session, 4)).version == 4
    other.push_moments(KEY, True, moments(5), call=CallKey(session, 5))
    assert deaf.push_moments(KEY, True, moments(6), call=CallKey(session, 6)).version == 6


def test_a_copy_is_never_older_than_its_age(two: tuple[LayerService, LayerService]) -> None:
    deaf = two[1]
    deafen(deaf)
    assert deaf.forward(ForwardCall(KEY, train=False), X).version == 0
    two[0].push_moments(KEY, True, moments(1))
    changed = time.monotonic()
    seen = 0
    while seen == 0:
        asked = time.monotonic()
        seen = deaf.forward(ForwardCall(KEY, train=False), X).version
        assert seen or asked < changed + MAX_STALENESS
    # Whoever has been told of a step never sees the layer without it.
    two[0].push_moments(KEY, True, moments(2))
    assert deaf.forward(ForwardCall(replace(KEY, seen=2), train=False), X).version == 2


def test_a_copy_that_nobody_has_changed_is_not_asked_for(server: MakeService) -> None:
    one = server(max_staleness=60.0)
    create(one)
    for _ in range(3):
        one.push_moments(KEY, True, moments(1))
    store = one._store
    assert isinstance(store, RedisStore)
    time.sleep(0.2)  # it has heard that it listens
    one.forward(ForwardCall(KEY, train=False), X)
    looks = list[object]()
    look = store.look
    store.look = lambda *arguments: looks.append(arguments) or look(*arguments)  # type: ignore[method-assign, func-returns-value]
    for _ in range(10):
        one.forward(ForwardCall(KEY, train=False), X)
        one.push_moments(KEY, True, moments(1))
    assert looks == []


def test_modes_parameters_and_domains_through_two_servers(two: tuple[LayerService, LayerService]) -> None:
    strong = replace(KEY, strong=True)
    two[0].set_train(KEY, False)
    assert not two[1].forward(ForwardCall(strong), X).train
    two[1].set_state(KEY, StateUpdate(scale=np.full(3, 2.0), bias=np.full(3, 1.0)))
    np.testing.assert_array_equal(two[0].get_layer(strong).state.scale, np.full(3, 2.0, np.float32))
    two[0].create_domain(replace(KEY, domain="d"), StateUpdate())
    assert two[1].push_moments(replace(KEY, domain="d", strong=True), True, moments(1)).version == 1
    assert [name for name, _ in two[0].list_domains(strong)] == ["d"]
    two[1].delete_domain(replace(KEY, domain="d"))
    with pytest.raises(LayerNotFound):
        two[0].push_moments(replace(KEY, domain="d", strong=True), True, moments(1))


def test_a_layer_that_another_server_has_filled(server: MakeService) -> None:
    one, other = server(), server()
    one.create_layer(KEY, CONFIG, StateUpdate(), sscale=0.0, empty=True)
    with pytest.raises(LayerEmpty):
        other.push_moments(KEY, True, moments(1))
    one.set_state(KEY, StateUpdate(scale=np.ones(3), bias=np.ones(3), mean=np.ones(3), var=np.ones(3)))
    assert other.push_moments(replace(KEY, strong=True), True, moments(1)).version == 1


def test_racing_creators_make_one_layer(server: MakeService) -> None:
    services = [server() for _ in range(4)]
    barrier = threading.Barrier(4)

    def make(service: LayerService) -> tuple[str, bool]:
        barrier.wait(10)
        record, created = service.create_layer(KEY, CONFIG, StateUpdate(), sscale=1.0, empty=False)
        return record.key.uid, created

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(make, services))
    assert sum(created for _, created in made) == 1
    assert len({uid for uid, _ in made}) == 1
    with pytest.raises(ConfigurationMismatch):
        services[0].create_layer(KEY, replace(CONFIG, maps=4), StateUpdate(), sscale=1.0, empty=False)


def test_a_layer_that_was_deleted_elsewhere_and_made_again(two: tuple[LayerService, LayerService]) -> None:
    uid = two[1].get_layer(KEY).key.uid
    two[1].push_moments(KEY, True, moments(1))
    two[0].delete_layer(KEY)
    with pytest.raises(LayerNotFound, match="was deleted"):
        two[1].push_moments(replace(KEY, uid=uid, seen=1), True, moments(2))
    create(two[0])
    with pytest.raises(LayerNotFound, match="another one has its name now"):
        two[1].push_moments(replace(KEY, uid=uid), True, moments(2))
    assert two[1].push_moments(KEY, True, moments(2)).version == 1
    until(lambda: len(two[1].alive()) == 1)


def test_snapshots_are_taken_by_one_and_gone_back_to_by_another(server: MakeService) -> None:
    now = [1000.0]
    policy = SnapshotPolicy(every=10.0, most=3, age=1e9, clock=lambda: now[0])
    one, other = server(policy), server(policy)
    create(one)
    for turn in range(12):
        (one, other)[turn % 2].push_moments(KEY, True, moments(turn))
        now[0] += 5.0
    versions = [info.version for info in other.list_snapshots(KEY)]
    assert len(versions) == 3
    assert versions == [info.version for info in one.list_snapshots(KEY)]
    before = one.get_layer(replace(KEY, strong=True)).state
    record, _ = other.roll_back(KEY, versions[0])
    assert (record.state.version, record.state.num_of_props) == (before.version, versions[0])
    same(one.get_layer(replace(KEY, strong=True)).state, record.state)
    assert one.list_snapshots(KEY)[-1].version == before.version  # what there was is kept


# --- Groups -----------------------------------------------------------------------------------------------


def joined(groups: Synchronizer) -> list[bytes]:
    """Return the tickets of two members of a group."""
    settings = GroupSettings(2, 2, 30.0)
    joining = [groups.join(GroupKey("default", "group"), f"{rank}", rank, settings) for rank in range(2)]
    return [each.result(10).ticket for each in joining]


def test_a_step_of_a_group_whose_server_is_gone(two: tuple[LayerService, LayerService]) -> None:
    first, second = (Synchronizer(service) for service in two)
    tickets = joined(first)
    asked = [first.moments(KEY, ticket, 1, moments(rank)) for rank, ticket in enumerate(tickets)]
    assert {each.result(10).result.version for each in asked} == {1}
    again = second.moments(KEY, tickets[0], 1, moments(0)).result(10)  # whoever has lost the answer
    assert (again.replayed, again.result.version, again.ranks) == (True, 1, (0, 1))
    with pytest.raises(StaleGeneration, match="this step was not taken") as caught:
        second.moments(KEY, tickets[1], 2, moments(1))  # whoever has not, and is at the next one
    assert GENERATION_GONE in caught.value.metadata
    assert second.moments(KEY, tickets[0], 1, moments(0)).result(10).replayed  # that is still known
    for each in (first, second):
        each.close()


@pytest.mark.parametrize("backward", [False, True])
def test_a_server_that_is_only_slow_takes_no_step_of_a_group_that_has_left_it(
    two: tuple[LayerService, LayerService], monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    slow, second = (Synchronizer(service) for service in two)
    held, going_on = threading.Event(), threading.Event()
    name = "backward_together" if backward else "step_together"
    take = getattr(two[0], name)

    def later(*arguments: Any) -> Any:
        held.set()
        assert going_on.wait(20)
        return take(*arguments)

    monkeypatch.setattr(two[0], name, later)
    tickets = joined(slow)

    def bring(groups: Synchronizer, rank: int, ticket: bytes, number: int) -> Future[Any]:
        if backward:
            return groups.gradients(BackwardCall(KEY), ticket, number, np.full((2, 3), rank + 1.0), moments(7))
        return groups.moments(KEY, ticket, number, moments(rank))

    first = bring(slow, 0, tickets[0], 1)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(lambda: bring(slow, 1, tickets[1], 1).result(20))
        assert held.wait(10)  # all parts are there, and nothing is committed
        for rank, ticket in enumerate(tickets):
            with pytest.raises(StaleGeneration, match="this step was not taken"):
                bring(second, rank, ticket, 1)
        again = joined(second)
        taken = [bring(second, rank, ticket, 1) for rank, ticket in enumerate(again)]
        for each in taken:
            each.result(10)
        after = two[1].get_layer(replace(KEY, strong=True)).state
        going_on.set()
        with pytest.raises(StaleGeneration, match="have gone on with another server"):
            last.result(20)
        with pytest.raises(StaleGeneration):
            first.result(20)
    state = two[0].get_layer(replace(KEY, strong=True)).state
    assert state.version == after.version == (0 if backward else 1)
    np.testing.assert_array_equal(state.mean, after.mean)
    np.testing.assert_array_equal(state.bias_grad, after.bias_grad)
    for groups in (slow, second):
        groups.close()


# --- A Redis that loses things ----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisProcess]:
    """Give a Redis to this test alone."""
    with redis_server(tmp_path / "redis") as process:
        yield process


def service_of(process: RedisProcess) -> LayerService:
    store, device = RedisStore(process.url("p", timeout=0.5)), CpuDevice(arithmetic("numpy"))
    return LayerService(store, Placement(device), 1 << 20, max_staleness=60.0)


def patiently(call: Callable[[], object], seconds: float = 10.0) -> object:
    """Make a call until the store is there, as a client does."""
    end = time.monotonic() + seconds
    while True:
        try:
            return call()
        except StoreUnavailable:  # noqa: PERF203 - that is what is waited for
            assert time.monotonic() < end
            time.sleep(0.05)


def test_one_that_starts_empty(own: RedisProcess) -> None:
    service = service_of(own)
    create(service)
    service.push_moments(KEY, True, moments(1))
    key = replace(KEY, uid=service.get_layer(KEY).key.uid, seen=1)
    own.stop()
    own.start()
    with pytest.raises(DataLoss, match="is gone, and nobody has deleted it"):
        patiently(lambda: service.push_moments(key, True, moments(2)))
    with pytest.raises(DataLoss, match="is gone"):
        patiently(lambda: service.forward(ForwardCall(key, train=False), X))
    with pytest.raises(LayerNotFound):  # whoever has heard of no layer of that name
        service.push_moments(KEY, True, moments(2))
    create(service)  # goes on, without a restart
    assert service.push_moments(KEY, True, moments(2)).version == 1
    service.close()


def test_one_that_is_emptied_while_nobody_looks(own: RedisProcess) -> None:
    service = service_of(own)
    create(service)
    service.push_moments(KEY, True, moments(1))
    key = replace(KEY, uid=service.get_layer(KEY).key.uid)
    own.ask("FLUSHALL")
    with pytest.raises(DataLoss, match="is gone"):
        service.push_moments(key, True, moments(2))
    service.close()


def test_one_that_fails_over_to_an_older_replica(own: RedisProcess, tmp_path: Path) -> None:
    """The replica is cut off, and later has the address of the primary, as behind a name or a proxy."""
    service, lazy = service_of(own), service_of(own)
    create(service)
    session = service.open_session() + b"lane 001"
    uid = lazy.get_layer(KEY).key.uid
    with redis_server(tmp_path / "replica", "--replicaof", f"127.0.0.1 {own.port}") as replica:
        until(lambda: replica.ask("INFO", "replication")["master_link_status"] == "up")
        for turn in range(8):
            service.push_moments(KEY, True, moments(turn), call=CallKey(session, turn + 1))
            if turn == 4:
                with redis.Redis(port=own.port) as client:
                    client.set("behind", "all of that")  # what is waited for are a connection's own changes
                    assert client.wait(1, 5000) == 1
                replica.ask("REPLICAOF", "NO", "ONE")  # from here on it gets nothing
        replica.ask("SAVE")
        own.stop()
        own.directory = replica.directory
    own.start()
    told = replace(KEY, uid=uid, seen=8)
    with pytest.raises(DataLoss, match=r"version (8 to )?5"):
        patiently(lambda: service.push_moments(told, True, moments(9), call=CallKey(session, 9)))
    with pytest.raises(DataLoss, match="is at version 5, and this handle was told of version 8"):
        patiently(lambda: lazy.push_moments(told, True, moments(9), call=CallKey(session, 9)))
    # Who was told of nothing that is lost goes on.
    fresh = service.open_session() + b"lane 002"
    assert service.push_moments(replace(KEY, seen=5), True, moments(9), call=CallKey(fresh, 1)).version == 6
    assert lazy.push_moments(replace(KEY, seen=6), True, moments(10)).version == 7
    for each in (service, lazy):
        each.close()


def test_a_session_that_was_never_given_makes_no_other_look_forgotten(redis_process: RedisProcess) -> None:
    store = RedisStore(redis_process.url("invented"), max_sessions=2)
    service = LayerService(store, Placement(CpuDevice(arithmetic("numpy"))), 1 << 20, max_sessions=2)
    create(service)
    for number in range(5):
        assert service.end_together(KEY, ((1 << 52) + number).to_bytes(8, "big") + bytes(8)) is None
    session = service.open_session() + bytes(8)
    record, replayed = service.set_train(KEY, False, CallKey(session, 1))
    assert (record.train, replayed) == (False, False)
    service.close()
