"""Training that runs ahead of the server: no step is lost without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import (
    HubClosed,
    InvalidConfiguration,
    LayerEmpty,
    LayerNotFound,
    NonFiniteInput,
)
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.rpc.servicer import Servicer
from sharednorm_server.server import RunningServer
from tests.support.ahead import LONG, At, Gate, ahead, eventually, gated
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process

SHAPE = (8, 5, 7, 3)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with in_process() as running:
        yield running


@pytest.fixture(params=["direct", "grpc"])
def hub(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[sharednorm.Hub]:
    space = request.node.name[:128]
    with sharednorm.connect(server.address, namespace=space, transport=request.param) as opened:
        yield opened


@pytest.fixture
def other(server: RunningServer, hub: sharednorm.Hub) -> Iterator[sharednorm.Hub]:
    """Somebody else's hub of the same layers."""
    with sharednorm.connect(server.address, namespace=hub.namespace) as opened:
        yield opened


@pytest.fixture
def gate(hub: sharednorm.Hub) -> Iterator[Gate]:
    with gated() as made:
        yield made


# --- Errors -----------------------------------------------------------------------------------------------


def test_a_batch_that_is_not_finite_is_refused_at_once(hub: sharednorm.Hub, gate: Gate) -> None:
    bn, waits, x = ahead(hub), hub.BatchNorm2D(5, name="sync", compute="client"), random_tensor(1, SHAPE)
    poisoned = x.copy()
    poisoned[0, 2, 0, 0] = np.inf
    messages = []
    for layer in (bn, waits):
        with pytest.raises(NonFiniteInput, match=r"in 1 of 5 maps \(2\)") as caught:
            layer(poisoned)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    bn.flush()
    assert gate.calls == []
    allowing = ahead(hub, "allowing", nonfinite="allow")
    allowing(poisoned)
    assert np.isnan(allowing.var).any()


def test_an_empty_layer_is_refused_at_once(hub: sharednorm.Hub) -> None:
    bn = ahead(hub, empty=True)
    with pytest.raises(LayerEmpty):
        bn(random_tensor(1, SHAPE))


NEXT_CALLS = [
    pytest.param(lambda at: at.bn(at.x), id="forward"),
    pytest.param(lambda at: at.bn.backward(at.x), id="backward"),
    pytest.param(lambda at: at.bn.backward(at.x, updParamGrads=False), id="local backward"),
    pytest.param(lambda at: at.bn.mean, id="read"),
    pytest.param(lambda at: at.bn.updateParams(0.1), id="updateParams"),
    pytest.param(lambda at: at.bn.flush(), id="flush"),
    pytest.param(lambda at: at.hub.flush(), id="hub.flush"),
    pytest.param(lambda at: at.hub.refresh(at.bn), id="hub.refresh"),
    pytest.param(lambda at: (at.bn.evalMode(), at.bn(at.x)), id="eval"),
]


@pytest.mark.parametrize("call", NEXT_CALLS)
@pytest.mark.parametrize("together", [False, True], ids=["sent one by one", "sent together"])
def test_a_step_that_failed_is_told_once_by_the_next_call(
    hub: sharednorm.Hub,
    other: sharednorm.Hub,
    gate: Gate,
    together: bool,
    call: Callable[[At], object],
) -> None:
    bn, fine, x = ahead(hub, max_staleness=LONG), ahead(hub, "fine"), random_tensor(1, SHAPE)
    for layer in (bn, fine):
        layer(x)
    hub.flush()
    gate.calls.clear()
    gate.shut()
    (fine if together else bn)(x)  # is on its way, and the others wait
    eventually(lambda: len(gate.calls) == 1)
    for _ in range(2):
        bn(x)
    if together:
        bn(x)
    fine(x)
    other.delete("bn")
    gate.open()
    fine.flush()
    words = r"layer 'bn' was not taken, nor were 2 behind it: .*somebody deleted"
    with pytest.raises(LayerNotFound, match=words) as caught:
        call(At(bn, hub, x))
    assert caught.value.metadata["steps_lost"] == "3"
    assert caught.value.metadata["steps_unknown"] == "0"
    bn.flush()  # not again
    assert fine.numOfProps == (3 if together else 2)
    assert gate.calls == ([["fine"], ["bn", "bn", "bn", "fine"]] if together else [["bn"], ["fine"]])


def test_a_handle_goes_on_after_what_it_was_told(hub: sharednorm.Hub, other: sharednorm.Hub, gate: Gate) -> None:
    bn, x = ahead(hub), random_tensor(1, SHAPE)
    bn(x)
    bn.flush()
    other.delete("bn")
    ahead(other)  # of the same name, and another one
    for _ in range(3):
        bn(x)
        with pytest.raises(LayerNotFound, match="another one has its name now"):
            bn.flush()
    assert other.layer("bn").numOfProps == 0


def test_each_handle_of_a_layer_is_told_of_its_own(hub: sharednorm.Hub, other: sharednorm.Hub, gate: Gate) -> None:
    one, two, x = ahead(hub), ahead(hub), random_tensor(1, SHAPE)
    one(x)
    two(x)
    hub.flush()
    gate.shut()
    one(x)
    eventually(lambda: gate.calls[-1] == ["bn"] and len(gate.calls) >= 2)
    for _ in range(2):
        two(x)
    other.delete("bn")
    gate.open()
    for bn, count in ((one, 1), (two, 2)):
        with pytest.raises(LayerNotFound) as caught:
            bn.flush()
        assert caught.value.metadata["steps_lost"] == f"{count}"
    hub.flush()


def test_a_step_that_failed_in_a_call_of_its_own_mode(hub: sharednorm.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    bn, x = ahead(hub), random_tensor(1, SHAPE)

    def push_many(request: service_pb2.BatchPushMomentsRequest, push: Any) -> service_pb2.BatchPushMomentsResponse:
        answers = [service_pb2.PushMomentsResponse(mode=layer_pb2.MODE_TRAIN) for _ in request.pushes]
        return service_pb2.BatchPushMomentsResponse(
            results=[service_pb2.BatchPushMomentsResult(moments=each) for each in answers]
        )

    monkeypatch.setattr("sharednorm_server.rpc.servicer.push_many", push_many)
    bn(x)
    with pytest.raises(sharednorm.MalformedMessage, match=r"1 may or may not have been taken, and 0 .* has 0 values"):
        bn.flush()
    monkeypatch.setattr("sharednorm_server.rpc.servicer.push_many", lambda *_: service_pb2.BatchPushMomentsResponse())
    bn(x)
    with pytest.raises(sharednorm.MalformedMessage, match=r"BatchPushMoments has 0 results \(expected: 1\)"):
        bn.flush()


def test_a_defect_of_the_server_is_told(
    hub: sharednorm.Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bn, x = ahead(hub), random_tensor(1, SHAPE)

    def push_moments(*_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Servicer, "push_moments", push_moments)
        bn(x)
        with pytest.raises(sharednorm.InternalError, match="its log has the details"):
            bn.flush()
    assert "ZeroDivisionError" in caplog.text
    bn(x)
    assert bn.numOfProps == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"push": "async"}, "push='async' is given with compute='server'"),
        ({"push": "later", "compute": "client"}, "push is 'later'"),
        ({"push": None, "compute": "client"}, "push is None"),
        ({"push": ["async"], "compute": "client"}, "push is \\['async'\\]"),
        ({"max_pending": 4}, "max_pending is given, and with push='sync'"),
        ({"max_pending": 4, "compute": "client"}, "max_pending is given, and with push='sync'"),
        ({"max_pending": 0, "compute": "client", "push": "async"}, "max_pending is 0"),
        ({"max_pending": 1025, "compute": "client", "push": "async"}, "max_pending is 1025"),
        ({"max_pending": 2.0, "compute": "client", "push": "async"}, "max_pending is 2.0"),
        ({"max_pending": True, "compute": "client", "push": "async"}, "max_pending is True"),
        ({"group": sharednorm.Group("g", 2), "compute": "client", "push": "async"}, "given with a group"),
    ],
)
def test_options_that_contradict(hub: sharednorm.Hub, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfiguration, match=words):
        hub.BatchNorm2D(5, name="bn", **options)
    assert hub.layers() == []
    with pytest.raises(InvalidConfiguration, match=words):
        hub.layer("bn", **options)


# --- The end of a hub -------------------------------------------------------------------------------------


def test_a_hub_that_is_closed_has_sent_everything(hub: sharednorm.Hub, other: sharednorm.Hub, gate: Gate) -> None:
    bn = ahead(hub)
    gate.shut()
    for seed in range(5):
        bn(random_tensor(seed, SHAPE))
    threading.Timer(0.1, gate.open).start()
    hub.close()
    assert other.layer("bn").numOfProps == 5
    for call in (lambda: bn(random_tensor(1, SHAPE)), bn.flush, hub.flush, lambda: bn.mean):
        with pytest.raises(HubClosed):
            call()
    hub.close()


def test_closing_tells_what_nobody_was_told(server: RunningServer, hub: sharednorm.Hub, gate: Gate) -> None:
    mine = sharednorm.connect(server.address, namespace=hub.namespace)
    layers, x = [ahead(mine, name) for name in "abc"], random_tensor(1, SHAPE)
    for bn in layers:
        bn(x)
    mine.flush()
    for name in "ab":
        hub.delete(name)
    for bn in layers:
        bn(x)
    del layers, bn  # nobody can ask the handles any more
    with pytest.raises(LayerNotFound, match=r"layer 'a' was not taken.*\(and so for handles of 'b'\)"):
        mine.close()
    assert mine.closed
    assert hub.layer("c").numOfProps == 2


def test_an_error_is_not_hidden_by_what_closing_has_to_say(server: RunningServer, hub: sharednorm.Hub) -> None:
    mine = sharednorm.connect(server.address, namespace=hub.namespace)

    def train() -> None:
        with mine:
            bn, x = ahead(mine), random_tensor(1, SHAPE)
            bn(x)
            bn.flush()
            hub.delete("bn")
            bn(x)
            raise ZeroDivisionError

    def caught() -> None:
        with pytest.raises(ZeroDivisionError):
            train()

    with pytest.warns(RuntimeWarning, match="layer 'bn' was not taken"):
        caught()
    assert mine.closed


def test_a_forward_that_waits_ends_with_its_hub(server: RunningServer, hub: sharednorm.Hub, gate: Gate) -> None:
    mine = sharednorm.connect(server.address, namespace=hub.namespace, timeout=0.3)
    bn, x = ahead(mine, max_pending=1), random_tensor(1, SHAPE)
    bn(x)
    bn.flush()
    gate.shut()
    bn(x)
    said = []
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(bn, x)
        time.sleep(0.02)
        began = time.monotonic()
        try:
            mine.close()
        except sharednorm.SharedNormError as error:
            said.append(str(error))
        assert time.monotonic() < began + 5
        raised = future.exception(LONG)
    assert isinstance(raised, sharednorm.SharedNormError)
    # At least one of the two is told of the first step.
    assert any("1 may or may not have been taken" in words for words in (*said, str(raised)))
