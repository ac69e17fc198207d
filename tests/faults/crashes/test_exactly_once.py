"""Every change is made once, whatever the network does: through a proxy that cuts, half-closes and stalls.

`SHAREDNORM_SEEDS` is how many schedules are tried for each way that calls go.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.core.state import LayerState
from sharednorm.errors import DeadlineExceeded, ServerUnavailable, SharedNormError
from tests.support.inside import connection_of
from tests.support.oracle import random_tensor
from tests.support.processes.proxy import Faults, network
from tests.support.processes.server import ServerProcess, server_process

SEEDS = int(os.environ.get("SHAREDNORM_SEEDS", "4"))
# Whoever waits for a network that breaks waits long on a busy machine.
pytestmark = pytest.mark.timeout(400 + 10 * SEEDS)
SHAPE = (4, 5, 6, 3)
CALLS = 25

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpc": ("grpc", {}),
    "direct": ("direct", {}),
    "client, grpc": ("grpc", {"compute": "client"}),
    "client, direct": ("direct", {"compute": "client"}),
    "ahead, grpc": ("grpc", {"compute": "client", "push": "async"}),
    "ahead, direct": ("direct", {"compute": "client", "push": "async"}),
}


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    state = f"sqlite://{tmp_path_factory.mktemp('state')}"
    if request.param == "redis":
        state = request.getfixturevalue("redis_process").url()
    with server_process("--state", state, "--log-level", "warning") as process:
        yield process


@pytest.fixture(scope="module")
def direct_port(server: ServerProcess) -> int:
    with sharednorm.connect(server.address) as hub:
        endpoint = connection_of(hub).direct
        assert endpoint is not None
        return endpoint.port


def change(layer: sharednorm.Layer, rng: random.Random, number: int) -> None:
    """Make one of the changes that a training loop makes; the same to a handle and to its twin."""
    what = rng.choice(("step", "step", "step", "backward", "update", "zero", "momentum"))
    x = random_tensor(number, SHAPE)
    if what == "step" or layer.inData is None:
        layer(x)
    elif what in {"backward", "momentum"}:
        layer.backward(x, momentum=0.5 if what == "momentum" else 1.0)
    elif what == "update":
        layer.updateParams(-0.125)
    else:
        layer.zeroGradParams()


def same_state(layer: sharednorm.Layer, twin: sharednorm.Layer) -> None:
    state, mine = layer.snapshot(), twin.snapshot()
    assert state.version == mine.version
    for name in ("scale", "bias", "mean", "var", "scale_grad", "bias_grad", "num_of_props"):
        np.testing.assert_array_equal(getattr(state, name), getattr(mine, name), err_msg=name)


@pytest.mark.parametrize("way", WAYS)
def test_training_over_a_network_that_breaks_is_training_over_one_that_does_not(
    server: ServerProcess, direct_port: int, way: str
) -> None:
    transport, options = WAYS[way]
    happened: dict[str, int] = {}
    for seed in range(SEEDS):
        faults = Faults(random.Random(f"{way} {seed}"), happened=happened)
        with network(server.address, direct_port, faults) as (address, cut):
            trained_alike(address, cut, faults, f"{way}/{seed}", transport, options)
    assert sum(happened.values()) >= 2 * SEEDS


def trained_alike(
    address: str, cut: Callable[[], None], faults: Faults, name: str, transport: str, options: dict[str, Any]
) -> None:
    np.random.seed(1)  # noqa: NPY002 - both scales are drawn from there
    twin = sharednorm.BatchNorm2D(5)
    np.random.seed(1)  # noqa: NPY002
    rng, mine = random.Random(name), random.Random(name)
    with sharednorm.connect(address, transport=transport, timeout=60) as hub:
        layer = hub.BatchNorm2D(5, name=name, **options)
        layer.trainMode()
        faults.left = 10
        for number in range(CALLS):
            if number % 5 == 0:
                cut()  # so that also what was made before the faults began is broken
            change(layer, rng, number)
            change(twin, mine, number)
        layer.flush()
        faults.left = 0
        same_state(layer, twin)


def test_many_clients_of_one_layer_over_a_network_that_breaks(server: ServerProcess, direct_port: int) -> None:
    """No step is lost or counted twice: versions are those of the steps, and the state that of their order."""
    faults = Faults(random.Random(1))
    x = [random_tensor(number, SHAPE) for number in range(8 * 12)]
    with sharednorm.connect(server.address) as plain, network(server.address, direct_port, faults) as (address, cut):
        plain.BatchNorm2D(5, name="many", sscale=0.0)
        order: dict[int, int] = {}
        errors: list[BaseException] = []
        connected = threading.Barrier(9)

        def train(worker: int) -> None:
            transport, options = WAYS[["grpc", "direct", "client, grpc", "client, direct"][worker % 4]]
            try:
                with sharednorm.connect(address, transport=transport, timeout=60) as hub:
                    layer = hub.layer("many", **options)
                    layer.trainMode()
                    connected.wait(30)
                    for number in range(worker * 12, worker * 12 + 12):
                        layer(x[number])
                        saved = layer._pass.saved
                        assert saved is not None
                        order[saved.version] = number
            except BaseException as error:  # noqa: BLE001 - told below
                errors.append(error)

        threads = [threading.Thread(target=train, args=(worker,), daemon=True) for worker in range(8)]
        for thread in threads:
            thread.start()
        connected.wait(30)
        faults.left = 60
        cut()
        for thread in threads:
            thread.join(100)
        assert errors == []
        assert sorted(order) == list(range(1, 8 * 12 + 1))
        twin = sharednorm.BatchNorm2D(5, sscale=0.0)
        for version in sorted(order):
            twin(x[order[version]])
        same_state(plain.layer("many"), twin)
    assert sum(faults.happened.values()) >= 10


ASKED_AGAIN: dict[str, Callable[[sharednorm.Layer], object]] = {
    "step": lambda layer: layer(random_tensor(2, SHAPE)),
    "backward": lambda layer: layer.backward(random_tensor(3, SHAPE)),
    "update": lambda layer: layer.updateParams(-0.5),
    "zero": lambda layer: layer.zeroGradParams(),
}


@pytest.mark.parametrize("what", ASKED_AGAIN)
@pytest.mark.parametrize("way", ["grpc", "direct", "client, grpc", "client, direct"])
def test_a_call_that_came_to_no_answer_in_time_may_be_made_again(
    server: ServerProcess, direct_port: int, way: str, what: str
) -> None:
    """By hand, once the network is back: it is made once, also if it had been made before."""
    transport, options = WAYS[way]
    unanswered = 0
    # What goes to the server passes; of what it answers so many bytes: none, part of a greeting, an answer or a part.
    for behind in (0, 80, 200):
        faults = Silent(random.Random(), seconds=0.6)
        name = f"again/{way}/{what}/{behind}"
        with network(server.address, direct_port, faults) as (address, cut):
            unanswered += asked_again(address, cut, faults, behind, name, transport, options, ASKED_AGAIN[what])
    assert unanswered


def asked_again(
    address: str,
    cut: Callable[[], None],
    faults: Silent,
    behind: int,
    name: str,
    transport: str,
    options: dict[str, Any],
    call: Callable[[sharednorm.Layer], object],
) -> bool:
    """Make a call that gets no answer, and then once more; return whether the first one got none."""
    twin, failed = sharednorm.BatchNorm2D(5, sscale=0.0), False
    with sharednorm.connect(address, transport=transport, timeout=0.4) as hub:
        layer = hub.BatchNorm2D(5, name=name, sscale=0.0, **options)

        def both(call: Callable[[sharednorm.Layer], object]) -> None:
            # A machine with much to do may be late for whatever call.
            again(lambda: call(layer))
            call(twin)

        both(lambda each: each.trainMode())
        both(lambda each: each(random_tensor(1, SHAPE)))
        both(lambda each: each.backward(random_tensor(5, SHAPE)))
        faults.behind, faults.left = behind, 1000
        cut()
        try:
            call(layer)
        except (DeadlineExceeded, ServerUnavailable):
            failed = True
        faults.left = 0
        if failed:
            again(lambda: call(layer))
        call(twin)
        # Another batch is another step, whatever has become of the one before.
        both(lambda each: each(random_tensor(9, SHAPE)))
        again(lambda: same_state(layer, twin))
    return failed


@pytest.mark.parametrize("first", ASKED_AGAIN)
@pytest.mark.parametrize("way", ["grpc", "direct", "client, grpc", "client, direct"])
def test_after_a_call_without_an_answer_another_one_is_another_change(
    server: ServerProcess, direct_port: int, way: str, first: str
) -> None:
    """Whether the first was made, nobody knows; but what follows is made, once, behind it or instead of it."""
    transport, options = WAYS[way]
    faults = Silent(random.Random(), seconds=0.6)
    with_it, without = (sharednorm.BatchNorm2D(5, sscale=0.0) for _ in range(2))
    with (
        network(server.address, direct_port, faults) as (address, cut),
        sharednorm.connect(address, transport=transport, timeout=0.4) as hub,
    ):
        layer = hub.BatchNorm2D(5, name=f"another/{way}/{first}", sscale=0.0, **options)

        def all_of(call: Callable[[sharednorm.Layer], object]) -> None:
            again(lambda: call(layer))
            for twin in (with_it, without):
                call(twin)

        all_of(lambda each: each.trainMode())
        all_of(lambda each: each(random_tensor(1, SHAPE)))
        all_of(lambda each: each.backward(random_tensor(5, SHAPE)))
        faults.behind, faults.left = 42, 1000  # a direct connection is welcomed with 28 bytes, a reply has 16
        cut()
        with pytest.raises((DeadlineExceeded, ServerUnavailable)):
            ASKED_AGAIN[first](layer)
        faults.left = 0
        ASKED_AGAIN[first](with_it)
        all_of(lambda each: each(random_tensor(8, SHAPE)))
        all_of(lambda each: each(random_tensor(9, SHAPE)))
        found: list[LayerState] = []
        again(lambda: found.append(layer.snapshot()))
        made, not_made = (difference(each.snapshot(), found[0]) for each in (with_it, without))
        assert transport == "grpc" or made < not_made
        again(lambda: same_state(layer, with_it if made < not_made else without))


def difference(one: LayerState, other: LayerState) -> float:
    names = ("scale", "bias", "mean", "var", "scale_grad", "bias_grad")
    return sum(float(np.abs(getattr(one, name) - getattr(other, name)).max()) for name in names)


class Silent(Faults):
    """Answers do not come: each connection stalls on the way to the client, at once or a little later."""

    behind = 0

    def next(self) -> tuple[str, bool, int]:
        """Return what befalls the next connection."""
        if self.left <= 0:
            return "", False, 0
        return "stall", False, self.behind


def again(call: Callable[[], object]) -> None:
    """Make a call until it has an answer: connections that stall are found out one after the other."""
    for _ in range(50):
        try:
            call()
        except (DeadlineExceeded, ServerUnavailable):
            continue
        except SharedNormError as error:
            raise AssertionError("a call that is made again") from error
        return
    raise AssertionError("no answer any more")
