"""Training that runs ahead of the server: the same numbers, in the same order, in few calls."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.remote.backends.async_push import AsyncComputeBackend
from sharednorm_server.server import RunningServer
from tests.support import oracle
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


# --- Numbers and order ------------------------------------------------------------------------------------


def test_outputs_and_statistics_are_those_of_the_model(hub: sharednorm.Hub) -> None:
    bn, model = ahead(hub), oracle.Model(5)
    for seed in range(12):
        x = random_tensor(seed, SHAPE) + seed
        np.testing.assert_allclose(bn(x), model.train(x), rtol=1e-5, atol=4e-6)
    assert (bn.numOfProps, bn.version) == (12, 12)
    np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bn.var.ravel(), model.var, rtol=1e-5)
    bn.evalMode()
    np.testing.assert_allclose(bn(x), model.evaluate(x), rtol=1e-5, atol=4e-6)


def test_the_bits_are_those_of_a_handle_that_waits(hub: sharednorm.Hub) -> None:
    pair = ahead(hub, "async"), hub.BatchNorm2D(5, name="sync", sscale=0.0, compute="client")
    for seed in range(6):
        x, grad = random_tensor(seed, SHAPE), random_tensor(100 + seed, SHAPE)
        seen = []
        for bn in pair:
            y = bn(x).tobytes()
            bn.backward(grad, scale=0.5, momentum=0.9)
            assert bn.grad is not None
            seen.append((y, bn.grad.tobytes()))
            if seed % 2:
                bn.updateParams(-0.1)
                bn.zeroGradParams()
            if seed == 4:
                bn.bias = np.linspace(-1, 1, 5)
        assert seen[0] == seen[1]
    states = [bn.snapshot() for bn in pair]
    for name in ("scale", "bias", "mean", "var", "scale_grad", "bias_grad"):
        assert getattr(states[0], name).tobytes() == getattr(states[1], name).tobytes(), name
    assert states[0].version == states[1].version == 6


def test_steps_that_wait_together_travel_together_and_in_order(hub: sharednorm.Hub, gate: Gate) -> None:
    layers = [ahead(hub, f"{number}") for number in range(20)]
    models = [oracle.Model(5) for _ in layers]
    gate.shut()
    for seed in range(5):
        for number, (bn, model) in enumerate(zip(layers, models, strict=True)):
            x = random_tensor(seed, SHAPE) * (seed + 1) + number
            np.testing.assert_allclose(bn(x), model.train(x), rtol=1e-5, atol=1e-5)
    gate.open()
    hub.flush()
    assert len(gate.calls) <= 2  # what was pushed before the first call left, and all the others
    assert [name for call in gate.calls for name in call] == [f"{number}" for _ in range(5) for number in range(20)]
    for bn, model in zip(layers, models, strict=True):
        assert bn.numOfProps == 5
        np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(bn.var.ravel(), model.var, rtol=1e-5)


def test_more_steps_than_a_call_takes(hub: sharednorm.Hub, gate: Gate) -> None:
    first = ahead(hub)
    wide = [
        hub.BatchNorm(50_000, name=f"wide {k}", sscale=0.0, compute="client", push="async", max_pending=9)
        for k in range(3)
    ]
    x = random_tensor(1, (2, 50_000))
    for bn in wide:
        bn(x)
    hub.flush()
    gate.calls.clear()
    gate.shut()
    first(random_tensor(1, SHAPE))
    eventually(lambda: len(gate.calls) == 1)
    for bn in wide:
        bn(x)
    gate.open()
    hub.flush()
    assert gate.calls == [["bn"], ["wide 0", "wide 1"], ["wide 2"]]
    assert [bn.numOfProps for bn in wide] == [2, 2, 2]


def test_a_forward_that_would_be_too_far_ahead_waits(hub: sharednorm.Hub, gate: Gate) -> None:
    bn, done = ahead(hub, max_pending=3), []
    gate.shut()

    def train() -> None:
        for seed in range(7):
            bn(random_tensor(seed, SHAPE))
            done.append(seed)

    thread = threading.Thread(target=train)
    thread.start()
    eventually(lambda: len(done) == 3)
    time.sleep(0.1)
    assert done == [0, 1, 2]
    gate.open()
    thread.join(LONG)
    assert bn.numOfProps == len(done) == 7


@pytest.mark.parametrize(
    "reading",
    [
        pytest.param(lambda at: at.bn.mean, id="mean"),
        pytest.param(lambda at: at.bn.numOfProps, id="numOfProps"),
        pytest.param(lambda at: at.bn.snapshot(), id="snapshot"),
        pytest.param(lambda at: at.bn.save(Path(at.hub.namespace + ".npz")), id="save"),
        pytest.param(lambda at: (at.bn.evalMode(), at.bn(at.x)), id="eval"),
        pytest.param(lambda at: at.bn.backward(at.x), id="backward"),
        pytest.param(lambda at: at.bn.updateParams(0.1), id="updateParams"),
        pytest.param(lambda at: at.bn.zeroGradParams(), id="zeroGradParams"),
        pytest.param(lambda at: setattr(at.bn, "bias", np.ones(5)), id="assignment"),
        pytest.param(lambda at: at.bn.flush(), id="flush"),
        pytest.param(lambda at: at.hub.flush(), id="hub.flush"),
        pytest.param(lambda at: at.hub.refresh(at.bn), id="hub.refresh"),
    ],
)
def test_whatever_looks_at_the_layer_sees_the_handles_own_steps(
    hub: sharednorm.Hub,
    other: sharednorm.Hub,
    gate: Gate,
    reading: Callable[[At], object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    bn, theirs, x = ahead(hub, max_staleness=LONG), other.layer("bn"), random_tensor(1, SHAPE)
    gate.shut()
    for _ in range(2):
        bn(x)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(reading, At(bn, hub, x))
        time.sleep(0.05)
        assert not future.done()
        assert theirs.numOfProps == 0
        gate.open()
        future.result(LONG)
    assert theirs.numOfProps == 2


def test_what_was_read_before_a_step_is_read_again_after_it(hub: sharednorm.Hub) -> None:
    bn, model, x = ahead(hub, max_staleness=LONG), oracle.Model(5), random_tensor(1, SHAPE)
    for seed in range(3):
        bn.trainMode()
        bn(random_tensor(seed, SHAPE) + seed)
        model.train(random_tensor(seed, SHAPE) + seed)
        bn.evalMode()
        for _ in range(2):
            np.testing.assert_allclose(bn(x), model.evaluate(x), rtol=1e-5, atol=4e-6)


def test_a_backward_that_tells_the_layer_nothing_waits_for_nothing(hub: sharednorm.Hub, gate: Gate) -> None:
    bn, x = ahead(hub), random_tensor(1, SHAPE)
    fixed = hub.BatchNorm2D(5, name="fixed", affine=False, compute="client", push="async")
    gate.shut()
    bn(x)
    bn.backward(x, updParamGrads=False)
    fixed(x)
    fixed.backward(x)
    assert bn.grad is not None
    assert fixed.grad is not None


def test_parameters_that_somebody_else_changes_are_heard_of_with_the_next_answer(
    hub: sharednorm.Hub, other: sharednorm.Hub
) -> None:
    bn, x = ahead(hub), random_tensor(1, SHAPE)
    bn(x)
    bn.flush()
    theirs = other.layer("bn")
    theirs.bias = np.full(5, 7.0)
    assert abs(bn(x).mean()) < 0.01
    bn.flush()
    assert abs(bn(x).mean() - 7.0) < 0.01
    bn.bias = np.full(5, 3.0)  # its own change, at once
    assert abs(bn(x).mean() - 3.0) < 0.01


def test_a_forward_that_is_begun_and_waited_for_later(hub: sharednorm.Hub) -> None:
    bn, model = ahead(hub, max_pending=2), oracle.Model(5)
    batches = [random_tensor(seed, SHAPE) for seed in range(6)]
    futures = [bn.forward_async(x) for x in batches]
    bn.flush()
    assert bn.numOfProps == 6
    for future, x in zip(futures, batches, strict=True):
        np.testing.assert_allclose(future.result(0), model.train(x), rtol=1e-5, atol=4e-6)


def test_such_a_handle_begins_in_train_mode(hub: sharednorm.Hub, gate: Gate) -> None:
    hub.BatchNorm2D(5, name="bn")
    hub.set_train("bn", False)
    bn = hub.layer("bn", compute="client", push="async", max_pending=2)
    assert bn.train
    assert "computed here, at most 2 steps ahead" in repr(bn)
    bn(random_tensor(1, SHAPE))
    assert bn.numOfProps == 1
    assert gate.calls == [["bn"]]


def test_a_handle_that_is_copied_or_pickled_runs_ahead_too(hub: sharednorm.Hub, gate: Gate) -> None:
    bn, x = ahead(hub, max_pending=2), random_tensor(1, SHAPE)
    for again in (copy.copy(bn), pickle.loads(pickle.dumps(bn))):
        assert "at most 2 steps ahead" in repr(again)
        again(x)
        again.flush()
    assert gate.calls == [["bn"], ["bn"]]
    assert bn.numOfProps == 2


def test_an_adapter_has_its_own_parameters(hub: sharednorm.Hub, gate: Gate) -> None:
    bn, model, x = ahead(hub), oracle.Model(5), random_tensor(1, SHAPE)
    backend, own = bn._backend, (np.full(5, 3, np.float32), np.full(5, -1, np.float32))
    assert isinstance(backend, AsyncComputeBackend)
    gate.shut()
    result = backend.forward(x, train=True, release="", out=None, parameters=own)
    np.testing.assert_allclose(result.data, 3 * model.train(x) - 1, rtol=1e-5, atol=1e-5)
    assert result.saved is not None
    assert (result.saved.version, result.saved.scale.tobytes()) == (0, own[0].tobytes())
    assert backend.gradients(result.saved, x, input_grad=False)[0] is None  # waits for nothing
    gate.open()
    np.testing.assert_allclose(backend.statistics().mean, model.mean, rtol=1e-6, atol=1e-6)
    result = backend.forward(x, train=False, release="", out=None, parameters=own)
    np.testing.assert_allclose(result.data, 3 * model.evaluate(x) - 1, rtol=1e-5, atol=1e-5)
