"""What was answered is kept: servers that are killed, or whose disk refuses something, in the middle of training."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.core.types import Array
from sharednorm.errors import DataLoss
from tests.support.oracle import random_tensor
from tests.support.processes.server import ServerProcess, run, server_process

SHAPE = (4, 5, 6, 3)
KILLS = int(os.environ.get("SHAREDNORM_KILLS", "6"))
# So many servers are started, each of which takes its time on a busy machine.
pytestmark = pytest.mark.timeout(400 + 20 * KILLS)
WAYS: list[dict[str, Any]] = [
    {"transport": "shm"},
    {"transport": "direct"},
    {"transport": "grpc"},
    {"transport": "direct", "compute": "client"},
    {"transport": "grpc", "compute": "client"},
    {"transport": "auto", "compute": "client", "push": "async"},
]


class Trainer(threading.Thread):
    """A client with a layer of its own, which it trains as if nothing ever happened to its server.

    Args:
        number: Which.
        address: Where the server is, whenever there is one.
    """

    def __init__(self, number: int, address: str) -> None:
        super().__init__(daemon=True)
        self.name = f"layer/{number}"
        self._address, self._options = address, dict(WAYS[number % len(WAYS)])
        self._transport = str(self._options.pop("transport"))
        self.steps = 0  # that were answered
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self._twin = sharednorm.BatchNorm2D(5, sscale=0.0)

    def run(self) -> None:
        """Train until it is told to stop, and see that the layer is what a local one is."""
        try:
            with sharednorm.connect(self._address, timeout=120, transport=self._transport) as hub:
                layer = hub.BatchNorm2D(5, name=self.name, sscale=0.0, **self._options)
                layer.trainMode()
                while not self.stopping.is_set():
                    self._train(layer)
                layer.flush()
                same(layer, self._twin)
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error

    def _train(self, layer: sharednorm.Layer) -> None:
        x = random_tensor(self.steps, SHAPE)
        for each in (layer, self._twin):
            each(x)
            if self.steps % 3 == 1:
                each.backward(x, momentum=1.0)
                each.updateParams(-0.125)
        self.steps += 1


def same(layer: sharednorm.Layer, twin: sharednorm.Layer) -> None:
    state, mine = layer.snapshot(), twin.snapshot()
    assert state.version == mine.version
    for name in ("scale", "bias", "mean", "var", "scale_grad", "bias_grad", "num_of_props"):
        np.testing.assert_array_equal(getattr(state, name), getattr(mine, name), err_msg=name)


@contextmanager
def running(directory: Path, *options: str, listen: str = "127.0.0.1:0") -> Iterator[ServerProcess]:
    state = ("--state", f"sqlite://{directory}", "--log-level", "warning")
    with server_process(*state, *options, listen=listen) as server:
        yield server


@contextmanager
def training(address: str) -> Iterator[list[Trainer]]:
    """Have one client of each way train; in the end all have to be fine."""
    trainers = [Trainer(number, address) for number in range(len(WAYS))]
    for trainer in trainers:
        trainer.start()
    try:
        yield trainers
    finally:
        for trainer in trainers:
            trainer.stopping.set()
        for trainer in trainers:
            trainer.join(60)
    assert [trainer.error for trainer in trainers] == [None] * len(trainers)
    assert not any(trainer.is_alive() for trainer in trainers)


def all_have_trained(trainers: list[Trainer]) -> None:
    """Wait until each has been answered some more steps."""
    before, end = [trainer.steps for trainer in trainers], time.monotonic() + 60
    while any(trainer.steps < was + 3 for trainer, was in zip(trainers, before, strict=True)):
        assert time.monotonic() < end, [trainer.error for trainer in trainers]
        assert all(trainer.is_alive() for trainer in trainers), [trainer.error for trainer in trainers]
        time.sleep(0.02)


@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_training_goes_on_when_the_server_is_killed_and_started_anew(tmp_path: Path, durability: str) -> None:
    listen, rng = f"unix:{tmp_path}/socket", random.Random(durability)
    options = ("--durability", durability)
    with ExitStack() as stack:
        server = stack.enter_context(running(tmp_path / "state", *options, listen=listen))
        with training(listen) as trainers:
            for _ in range(KILLS):
                all_have_trained(trainers)
                time.sleep(rng.uniform(0.0, 0.3))
                server.stop(signal.SIGKILL)
                server = stack.enter_context(running(tmp_path / "state", *options, listen=listen))
            all_have_trained(trainers)


def test_training_goes_on_when_the_server_is_replaced_in_order(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/socket"
    with ExitStack() as stack:
        server = stack.enter_context(running(tmp_path / "state", listen=listen))
        with training(listen) as trainers:
            for _ in range(2):
                all_have_trained(trainers)
                assert server.stop() == 0
                server = stack.enter_context(running(tmp_path / "state", listen=listen))
            all_have_trained(trainers)


def test_a_disk_that_refuses_more_ends_the_server_and_loses_nothing(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/socket"
    with ExitStack() as stack:
        server = stack.enter_context(running(tmp_path / "state", listen=listen))
        with training(listen) as trainers:
            all_have_trained(trainers)
            log = tmp_path / "state" / "sharednorm.sqlite3-wal"
            room = log.stat().st_size + (1 << 17)
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (room, room))
            assert server.wait(60) == 4
            assert "cannot be kept any more" in server.log()
            stack.enter_context(running(tmp_path / "state", listen=listen))
            all_have_trained(trainers)


def test_a_second_server_of_a_state(tmp_path: Path) -> None:
    with running(tmp_path / "state") as server:
        done = run(["serve", "--listen", "127.0.0.1:0", "--state", f"sqlite://{tmp_path}/state"])
        assert (done.returncode, done.stdout) == (2, "")
        assert f"is used by process {server.pid} on " in done.stderr
        assert done.stderr.endswith("stop that server, or pass another --state\n")


@pytest.mark.parametrize(
    ("transport", "options"),
    [("grpc", {}), ("direct", {"compute": "client"}), ("shm", {})],
    ids=["grpc", "client", "shm"],
)
def test_a_handle_goes_on_with_the_next_server(tmp_path: Path, transport: str, options: dict[str, Any]) -> None:
    """It is of the same layer: nobody has to make it again."""
    listen = f"unix:{tmp_path}/socket"
    x, twin = random_tensor(1, SHAPE), sharednorm.BatchNorm2D(5, sscale=0.0)
    with ExitStack() as stack:
        first = stack.enter_context(running(tmp_path / "state", listen=listen))
        hub = stack.enter_context(sharednorm.connect(listen, transport=transport, timeout=20))
        layer = hub.BatchNorm2D(5, name="bn", sscale=0.0, domain="site-a", **options)
        twin(x)
        np.testing.assert_array_equal(layer(x), twin.data)
        first.stop(signal.SIGKILL)
        stack.enter_context(running(tmp_path / "state", listen=listen))
        for _ in range(3):
            twin(x)
            np.testing.assert_array_equal(layer(x), twin.data)
        assert layer.numOfProps == 4
        np.testing.assert_array_equal(layer.mean, twin.mean)
        layer.backward(x)
        twin.backward(x)
        np.testing.assert_array_equal(layer.grad, twin.grad)


CALLS: list[Callable[[sharednorm.Layer, Array], object]] = [
    lambda layer, x: layer(x),
    lambda layer, x: layer.backward(x),
    lambda layer, _: layer.mean,
    lambda layer, _: layer.updateParams(0.1),
    lambda layer, _: layer.resetStats(),
]


def made(call: Callable[[sharednorm.Layer, Array], object], layer: sharednorm.Layer, x: Array) -> None:
    """Make a call, and wait until the server has answered it."""
    call(layer, x)
    layer.flush()


def test_an_old_state_that_is_put_in_place_is_noticed(tmp_path: Path) -> None:
    listen, x = f"unix:{tmp_path}/socket", random_tensor(1, SHAPE)
    for number in range(2):  # the state with one step is kept aside
        with running(tmp_path / "state", listen=listen) as server, sharednorm.connect(listen) as hub:
            hub.BatchNorm2D(5, name="bn")(x)
            server.stop()
        if not number:
            shutil.copytree(tmp_path / "state", tmp_path / "old")
    with ExitStack() as stack:
        first = stack.enter_context(running(tmp_path / "state", listen=listen))
        hub = stack.enter_context(sharednorm.connect(listen, timeout=20))
        layers = [
            hub.layer("bn"), hub.layer("bn", compute="client"), hub.layer("bn", compute="client", push="async"),
        ]  # fmt: skip
        for layer in layers:
            layer.trainMode()
            layer(x)
            layer.flush()
            assert layer.version >= 3
        first.stop()
        shutil.rmtree(tmp_path / "state")
        shutil.copytree(tmp_path / "old", tmp_path / "state")
        stack.enter_context(running(tmp_path / "state", listen=listen))
        for layer in layers:
            for call in CALLS:
                with pytest.raises(DataLoss, match=r"is at version 1, and this handle was told of version [3-6]:"):
                    made(call, layer, x)
        again = hub.layer("bn")
        again(x)
        assert again.version == 2


class Member(threading.Thread):
    """One of three members of a group, whose batches are normalized as one."""

    def __init__(self, rank: int, address: str, steps: int, adds: bool) -> None:
        super().__init__(daemon=True)
        self._rank, self._address, self._steps = rank, address, steps
        self._options = {"momentum": 1.0} if adds else {"updParamGrads": False}
        self.done = 0
        self.outputs: list[bytes] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train for so many steps."""
        try:
            with sharednorm.connect(self._address, timeout=60) as hub:
                group = sharednorm.Group("run", size=3, rank=self._rank, timeout=60)
                layers = [hub.BatchNorm2D(5, name=name, sscale=0.0, compute="client", group=group) for name in "ab"]
                while self.done < self._steps:
                    x = random_tensor(3 * self.done + self._rank, SHAPE)
                    for layer in layers:
                        x = layer(x)
                    for layer in reversed(layers):
                        layer.backward(random_tensor(self.done + self._rank, SHAPE), **self._options)
                        x = x + layer.grad
                    self.outputs.append(x.tobytes())
                    self.done += 1
                self.participants = group.participants
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


def trained_together(directory: Path, kills: int, steps: int, adds: bool) -> tuple[list[list[bytes]], list[bytes]]:
    """Train a group while its server is killed; return the outputs of each member, and what the layers are then."""
    listen, rng = f"unix:{directory}/socket", random.Random(7)
    with ExitStack() as stack:
        server = stack.enter_context(running(directory / "state", listen=listen))
        members = [Member(rank, listen, steps, adds) for rank in range(3)]
        for member in members:
            member.start()
        for number in range(kills):
            end = time.monotonic() + 60
            while min(member.done for member in members) < (number + 1) * steps // (kills + 1):
                assert time.monotonic() < end, [member.error for member in members]
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
            server.stop(signal.SIGKILL)
            server = stack.enter_context(running(directory / "state", listen=listen))
        for member in members:
            member.join(60)
        assert [(member.error, member.done) for member in members] == [(None, steps)] * 3
        assert {member.participants for member in members} == {(0, 1, 2)}
        with sharednorm.connect(listen) as hub:
            found = []
            for name in "ab":
                state = hub.layer(name).snapshot()
                assert state.version == state.num_of_props == steps
                arrays = (state.mean, state.var, state.scale_grad, state.bias_grad)
                found.append(b"".join(array.tobytes() for array in arrays))
        return [member.outputs for member in members], found


@pytest.mark.parametrize("adds", [True, False], ids=["gradients are added", "nothing is added"])
def test_a_group_goes_on_when_its_server_is_killed(tmp_path: Path, adds: bool) -> None:
    """Each step is taken for all or for none, and once: the bits are those of a group whose server lives on.

    Args:
        tmp_path: A directory.
        adds: Whether a backward adds to the gradients of scale and bias, or is made for the sake of its sums alone.
    """
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    steps = max(60, 2 * KILLS)  # a server that is killed before anything is answered stops everybody
    expected = trained_together(tmp_path / "calm", 0, steps, adds)
    assert trained_together(tmp_path / "killed", KILLS, steps, adds) == expected
