"""A change that comes twice under one key is made once, and answered alike both times."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharednorm.core.state import Moments, StateUpdate
from sharednorm.errors import (
    CallCancelled,
    KeyReused,
    LayerNotFound,
    NonFiniteInput,
    SessionExpired,
    StepOutOfOrder,
)
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import BackwardCall, CallKey, ForwardAnswer, ForwardCall, LayerRecord
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.base import CommitHandle, Store
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.records import Note
from sharednorm_server.store.redis.store import RedisStore
from sharednorm_server.store.sqlite.store import SqliteStore
from tests.support.oracle import random_tensor
from tests.support.service import KEY, SHAPE, InterruptedDevice, create, new_service

X, GRAD = random_tensor(3, SHAPE), random_tensor(4, SHAPE)
ARRAYS = ("scale", "bias", "mean", "var", "scale_grad", "bias_grad")


@pytest.fixture(params=["memory", "sqlite", "redis"])
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LayerService]:
    store: Store
    if request.param == "redis":
        store = RedisStore(request.getfixturevalue("redis_process").url())
    else:
        store = MemoryStore() if request.param == "memory" else SqliteStore(tmp_path)
    made = new_service(store=store)
    create(made)
    yield made
    made.close()


class Client:
    """Gives the keys of one session, one after the other."""

    def __init__(self, service: LayerService) -> None:
        self.session = service.open_session() + b"lane 001"
        self.seq = 0

    def next(self) -> CallKey:
        self.seq += 1
        return CallKey(self.session, self.seq)


def moments(seed: int) -> Moments:
    x = random_tensor(seed, SHAPE).astype(np.float64)
    mean = x.mean((0, 2, 3))
    return Moments(40, mean, ((x - mean.reshape(1, -1, 1, 1)) ** 2).sum((0, 2, 3)))


def output_of(answer: ForwardAnswer) -> np.ndarray[Any, Any]:
    return answer.output.array()


def state_of(service: LayerService) -> dict[str, object]:
    state = service.get_layer(KEY).state
    return {name: getattr(state, name).tobytes() for name in ARRAYS} | {
        "version": state.version, "num_of_props": state.num_of_props,
    }  # fmt: skip


def test_a_forward_that_comes_again_gives_the_bits_of_the_first_time(service: LayerService) -> None:
    client, other, x = Client(service), Client(service), random_tensor(0, SHAPE)
    call = ForwardCall(KEY, train=True, keep_input=True, call=client.next())
    first = service.forward(call, x)
    expected = output_of(first).copy()
    # Whatever comes in between changes what a new step would give.
    service.forward(ForwardCall(KEY, train=True, call=other.next()), random_tensor(1, SHAPE))
    service.set_state(KEY, StateUpdate(scale=[5, 6, 7], bias=[1, 1, 1]))
    before = state_of(service)
    again = service.forward(call, x)
    assert (first.replayed, again.replayed) == (False, True)
    np.testing.assert_array_equal(output_of(again), expected)
    assert (again.version, again.num_of_props, again.train) == (first.version, first.num_of_props, True)
    assert first.scale is not None
    assert again.scale is not None
    np.testing.assert_array_equal(again.scale, first.scale)
    assert state_of(service) == before
    # A backward of the answer that came is the one that the first would have had.
    gradients = [
        service.backward(BackwardCall(KEY, answer.saved_input, param_grads=False), random_tensor(2, SHAPE))
        for answer in (first, again)
    ]
    for name in ("scale_grad", "bias_grad"):
        np.testing.assert_array_equal(getattr(gradients[0], name), getattr(gradients[1], name))


def test_moments_that_come_again_are_taken_once(service: LayerService) -> None:
    client = Client(service)
    key = client.next()
    first = service.push_moments(KEY, None, moments(0), call=key)
    service.push_moments(KEY, True, moments(1))
    service.set_state(KEY, StateUpdate(scale=[5, 6, 7]))
    before = state_of(service)
    again = service.push_moments(KEY, None, moments(0), call=key)
    assert (first.replayed, again.replayed) == (False, True)
    assert (again.train, again.version, again.num_of_props) == (True, 1, 1)
    np.testing.assert_array_equal(again.scale, first.scale)
    np.testing.assert_array_equal(again.bias, first.bias)
    assert state_of(service) == before


CHANGES: dict[str, Callable[[LayerService, CallKey | None], bool]] = {
    "backward": lambda service, key: (
        service.backward(
            BackwardCall(KEY, service.forward(ForwardCall(KEY, True, keep_input=True), X).saved_input, call=key), GRAD
        ).replayed
    ),
    "push_gradients": lambda service, key: service.push_gradients(
        BackwardCall(KEY, scale=0.5, momentum=0.25, call=key), np.ones(3, np.float32), np.full(3, 2, np.float32)
    ),
    "update_params": lambda service, key: service.update_params(KEY, 0.5, key)[1],
    "set_state": lambda service, key: service.set_state(KEY, StateUpdate(mean=[1, 2, 3], num_of_props=7), key)[1],
    "set_train": lambda service, key: service.set_train(KEY, False, key)[1],
}


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "backward"])
def test_a_change_that_comes_again_is_made_once(service: LayerService, name: str) -> None:
    service.set_state(KEY, StateUpdate(scale_grad=[1, 2, 3], bias_grad=[1, 1, 1]))
    key = Client(service).next()
    assert not CHANGES[name](service, key)
    after, train = state_of(service), service.get_layer(KEY).train
    assert CHANGES[name](service, key)
    assert state_of(service) == after
    # Somebody else's change in between stays.
    service.set_state(KEY, StateUpdate(mean=[9, 9, 9], scale=[4, 4, 4]))
    service.set_train(KEY, True)
    after = state_of(service)
    assert CHANGES[name](service, key)
    assert state_of(service) == after
    assert service.get_layer(KEY).train
    assert train == (name != "set_train")


def test_a_backward_that_comes_again_adds_its_gradients_once(service: LayerService) -> None:
    token = service.forward(ForwardCall(KEY, True, keep_input=True), X).saved_input
    call = BackwardCall(KEY, token, momentum=1.0, call=Client(service).next())
    first = service.backward(call, GRAD)
    after = state_of(service)
    again = service.backward(call, GRAD)
    assert (first.replayed, again.replayed) == (False, True)
    assert state_of(service) == after
    assert first.grad is not None
    assert again.grad is not None
    np.testing.assert_array_equal(again.grad.array(), first.grad.array())
    with pytest.raises(KeyReused):
        service.backward(call, GRAD * 2)
    with pytest.raises(KeyReused):
        service.backward(replace(call, scale=2.0), GRAD)
    assert state_of(service) == after


OTHERS: dict[str, Callable[[LayerService, CallKey | None], object]] = {
    "another batch": lambda service, key: service.forward(ForwardCall(KEY, True, call=key), random_tensor(9, SHAPE)),
    "other moments": lambda service, key: service.push_moments(KEY, True, moments(9), call=key),
    "another domain": lambda service, key: service.forward(ForwardCall(replace(KEY, domain="d"), True, call=key), X),
    "gradients": CHANGES["push_gradients"],
    "an update": CHANGES["update_params"],
    "a state": CHANGES["set_state"],
    "a mode": CHANGES["set_train"],
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_key_that_was_used_for_something_else(service: LayerService, other: str) -> None:
    service.create_domain(replace(KEY, domain="d"), StateUpdate())
    client = Client(service)
    key = client.next()
    service.forward(ForwardCall(KEY, True, call=key), X)
    before = state_of(service)
    with pytest.raises(KeyReused):
        OTHERS[other](service, key)
    assert state_of(service) == before
    OTHERS[other](service, client.next())


def test_numbers_that_are_out_of_order(service: LayerService) -> None:
    client = Client(service)
    service.push_moments(KEY, True, moments(0), call=client.next())
    service.push_moments(KEY, True, moments(1), call=client.next())
    before = state_of(service)
    for seq in (1, 4):
        with pytest.raises(StepOutOfOrder):
            service.push_moments(KEY, True, moments(0), call=CallKey(client.session, seq))
        with pytest.raises(StepOutOfOrder):
            service.forward(ForwardCall(KEY, True, call=CallKey(client.session, seq)), X)
    assert state_of(service) == before


def test_what_is_refused_or_changes_nothing_uses_up_no_number(service: LayerService) -> None:
    client = Client(service)
    key = client.next()
    bad = X.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteInput):
        service.forward(ForwardCall(KEY, True, call=key), bad)
    with pytest.raises(CallCancelled):
        service.forward(ForwardCall(KEY, True, call=key), X, wanted=lambda: False)
    service.set_train(KEY, False)
    assert not service.forward(ForwardCall(KEY, call=key), X).train
    assert not service.push_moments(KEY, None, moments(0), call=key).train
    service.set_train(KEY, True)
    assert service.forward(ForwardCall(KEY, call=key), X).version == 1
    assert service.push_moments(KEY, True, moments(0), call=client.next()).version == 2


def test_a_step_that_comes_again_when_the_default_mode_has_become_eval(service: LayerService) -> None:
    client = Client(service)
    call = ForwardCall(KEY, call=client.next())
    first = service.forward(call, X)
    pushed_key = client.next()
    pushed = service.push_moments(KEY, None, moments(1), call=pushed_key)
    service.set_train(KEY, False)
    again = service.push_moments(KEY, None, moments(1), call=pushed_key)
    assert (again.train, again.replayed, again.version) == (True, True, pushed.version)
    other = Client(service)
    call = replace(call, call=other.next(), train=True)
    first = service.forward(call, X)
    again_forward = service.forward(replace(call, train=None), X)
    assert (again_forward.train, again_forward.replayed) == (True, True)
    np.testing.assert_array_equal(output_of(again_forward), output_of(first))


def test_sessions_beyond_the_limit_are_forgotten_and_told_so(tmp_path: Path) -> None:
    placement = Placement(CpuDevice())
    service = LayerService(SqliteStore(tmp_path), placement, 0, max_sessions=2)
    create(service)
    clients = [Client(service) for _ in range(3)]
    for seed, client in enumerate(clients):
        service.push_moments(KEY, True, moments(seed), call=client.next())
    for run in range(2):
        with pytest.raises(SessionExpired):
            service.push_moments(KEY, True, moments(0), call=CallKey(clients[0].session, 1))
        for seed in (1, 2):
            key = CallKey(clients[seed].session, 1)
            assert service.push_moments(KEY, True, moments(seed), call=key).replayed
        assert service.get_layer(KEY).state.version == 3
        service.close()
        if not run:
            service = LayerService(SqliteStore(tmp_path), placement, 0, max_sessions=2)


def test_a_layer_that_is_made_anew_has_no_sessions(service: LayerService) -> None:
    client = Client(service)
    service.push_moments(KEY, True, moments(0), call=client.next())
    service.delete_layer(KEY)
    with pytest.raises(LayerNotFound):
        service.push_moments(KEY, True, moments(0), call=CallKey(client.session, 1))
    create(service)
    assert not service.push_moments(KEY, True, moments(0), call=CallKey(client.session, 1)).replayed


def test_the_next_server_knows_what_the_one_before_has_done(tmp_path: Path) -> None:
    service = new_service(store=SqliteStore(tmp_path))
    create(service)
    clients = [Client(service) for _ in range(4)]
    calls = [ForwardCall(KEY, True, call=client.next()) for client in clients]
    outputs = [output_of(service.forward(call, random_tensor(seed, SHAPE))) for seed, call in enumerate(calls)]
    key = clients[0].next()
    service.update_params(KEY, 0.5, key)
    before = state_of(service)
    service.close()
    service = new_service(store=SqliteStore(tmp_path))
    assert service.update_params(KEY, 0.5, key)[1]
    for seed in (1, 2, 3):
        answer = service.forward(calls[seed], random_tensor(seed, SHAPE))
        assert (answer.replayed, answer.version) == (True, seed + 1)
        np.testing.assert_array_equal(output_of(answer), outputs[seed])
    with pytest.raises(StepOutOfOrder):
        service.forward(calls[0], random_tensor(0, SHAPE))
    with pytest.raises(KeyReused):
        service.forward(calls[1], random_tensor(0, SHAPE))
    assert state_of(service) == before
    assert int.from_bytes(service.open_session(), "big") > int.from_bytes(clients[-1].session[:8], "big")
    service.close()


@pytest.mark.parametrize("store", ["memory", "sqlite"])
def test_one_key_in_many_threads_is_one_change(store: str, tmp_path: Path) -> None:
    service = new_service(store=MemoryStore() if store == "memory" else SqliteStore(tmp_path))
    create(service)
    client = Client(service)
    for round_number in range(8):
        key, x = client.next(), random_tensor(round_number, SHAPE)
        barrier = threading.Barrier(6)
        answers: list[ForwardAnswer] = []

        def send(key: CallKey = key, x: Any = x, barrier: threading.Barrier = barrier, answers: Any = answers) -> None:
            barrier.wait(10)
            answers.append(service.forward(ForwardCall(KEY, True, call=key), x))

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(answer.replayed for answer in answers) == [False] + [True] * 5
        assert {output_of(answer).tobytes() for answer in answers} == {output_of(answers[0]).tobytes()}
        assert service.get_layer(KEY).state.version == round_number + 1
    service.close()


class LateStore(MemoryStore):
    """A store whose changes are kept only when they are let."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.go_on.set()

    def put(self, record: LayerRecord, note: Note | None = None) -> CommitHandle | None:
        """Take a change, which is kept later."""
        kept = super().put(record, note)
        return None if kept is None else self

    def wait(self) -> None:
        """Wait until changes are kept."""
        assert self.go_on.wait(20)


@pytest.mark.parametrize("name", ["forward", "push", "update_params"])
def test_a_repeat_is_answered_no_sooner_than_the_change_is_kept(name: str) -> None:
    store = LateStore()
    service = new_service(store=store)
    create(service)
    key, x = Client(service).next(), random_tensor(0, SHAPE)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: service.forward(ForwardCall(KEY, True, call=key), x),
        "push": lambda: service.push_moments(KEY, True, moments(0), call=key),
        "update_params": lambda: service.update_params(KEY, 0.5, key),
    }
    store.go_on.clear()
    threads = [threading.Thread(target=calls[name], daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join(0.3)
    assert all(thread.is_alive() for thread in threads)  # the second one, too
    store.go_on.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)


def test_a_repeat_that_comes_while_the_first_computes(tmp_path: Path) -> None:
    device = InterruptedDevice()
    service = new_service(device, store=SqliteStore(tmp_path))
    create(service)
    call, x = ForwardCall(KEY, True, call=Client(service).next()), random_tensor(0, SHAPE)
    inner: list[ForwardAnswer] = []

    def interrupt(outputs: int) -> None:
        if outputs == 1:
            inner.append(service.forward(call, x))

    device.interrupt = interrupt
    outer = service.forward(call, x)
    assert (inner[0].replayed, outer.replayed) == (False, True)
    np.testing.assert_array_equal(output_of(outer), output_of(inner[0]))
    assert service.get_layer(KEY).state.version == 1
    service.close()


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_with_repeats_and_restarts_is_the_sequence_without_them(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    service, plain = new_service(store=SqliteStore(tmp_path)), new_service()
    for each in (service, plain):
        create(each, scale_grad=[1, 2, 3], bias_grad=[1, 1, 1])
    clients = [Client(service) for _ in range(3)]
    last: dict[int, tuple[Callable[[LayerService, CallKey | None], object], CallKey]] = {}
    for number in range(120):
        which = rng.randrange(3)
        if which in last and rng.random() < 0.4:
            change, key = last[which]
            change(service, key)
        else:
            change, key = some_change(rng, number), clients[which].next()
            change(service, key)
            change(plain, None)
            last[which] = change, key
        if rng.random() < 0.05:
            service.close()
            service = new_service(store=SqliteStore(tmp_path))
        assert state_of(service) == state_of(plain)
    service.close()


def some_change(rng: random.Random, number: int) -> Callable[[LayerService, CallKey | None], object]:
    x = random_tensor(number, SHAPE)
    choices: list[Callable[[LayerService, CallKey | None], object]] = [
        lambda service, key: service.forward(ForwardCall(KEY, True, call=key), x),
        lambda service, key: service.push_moments(KEY, True, moments(number), call=key),
        lambda service, key: service.set_state(KEY, StateUpdate(bias_grad=x[0, :, 0, 0]), key),
        *(CHANGES[name] for name in ("push_gradients", "update_params", "set_train")),
    ]
    return rng.choice(choices)
