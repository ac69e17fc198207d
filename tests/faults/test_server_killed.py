"""What was answered is kept: servers that are killed, or whose disk refuses something, in the middle of training."""

from __future__ import annotations

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
from sharednorm.config import Array
from sharednorm.errors import DataLoss, ServerUnavailable, StoreFailed
from tests.support.oracle import random_tensor
from tests.support.server import ServerProcess, run, server_process

SHAPE = (4, 5, 6, 3)
WORKERS = 4
KILLS = 6


class Trainer:
    """One client with a layer of its own, of which it knows what the server has answered, and what that must be.

    Args:
        number: Which.
    """

    def __init__(self, number: int) -> None:
        self.name = f"layer/{number}"
        self.options: dict[str, Any] = {"compute": "client"} if number % 2 else {}
        self.answered = 0
        np.random.seed(number)  # noqa: NPY002 - both scales are drawn from there
        self.twin = sharednorm.BatchNorm2D(5)
        self.steps = 0  # that the twin has taken
        self.error: BaseException | None = None

    def train(self, address: str) -> None:
        """Train until the server is gone."""
        try:
            with sharednorm.connect(address, timeout=20) as hub:
                layer = hub.layer(self.name, **self.options)
                while True:
                    layer(random_tensor(self.answered, SHAPE))
                    self.answered += 1
        except ServerUnavailable as error:
            self.error = error

    def check(self, hub: sharednorm.Hub) -> None:
        """See that the layer has all steps that were answered, and at most the one more that was under way."""
        state = hub.layer(self.name).snapshot()
        assert state.version in {self.answered, self.answered + 1}
        while self.steps < state.version:
            self.twin(random_tensor(self.steps, SHAPE))
            self.steps += 1
        mine = self.twin.snapshot()
        for name in ("scale", "bias", "mean", "var", "num_of_props"):
            np.testing.assert_array_equal(getattr(state, name), getattr(mine, name))
        self.answered = state.version


@contextmanager
def running(directory: Path, *options: str, listen: str = "127.0.0.1:0") -> Iterator[ServerProcess]:
    state = ("--state", f"sqlite://{directory}", "--log-level", "warning")
    with server_process(*state, *options, listen=listen) as server:
        yield server


def create(hub: sharednorm.Hub, trainers: list[Trainer]) -> None:
    for number, trainer in enumerate(trainers):
        np.random.seed(number)  # noqa: NPY002 - both scales are drawn from there
        hub.BatchNorm2D(5, name=trainer.name)


def train_until(trainers: list[Trainer], server: ServerProcess, end: float) -> None:
    """Have all of them train, and after a while something happen to the server."""
    threads = [threading.Thread(target=trainer.train, args=(server.address,), daemon=True) for trainer in trainers]
    for thread in threads:
        thread.start()
    time.sleep(end)
    server.process.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    server.wait()


@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_steps_that_were_answered_survive_that_the_server_is_killed(tmp_path: Path, durability: str) -> None:
    trainers, rng = [Trainer(number) for number in range(WORKERS)], random.Random(1)
    for number in range(KILLS + 1):
        with running(tmp_path / "state", "--durability", durability) as server:
            with sharednorm.connect(server.address) as hub:
                if not number:
                    create(hub, trainers)
                for trainer in trainers:
                    trainer.check(hub)
                if number == KILLS:
                    break
            train_until(trainers, server, rng.uniform(0.1, 0.6))
    assert min(trainer.answered for trainer in trainers) > KILLS


def test_a_disk_that_refuses_more_ends_the_server_and_loses_nothing(tmp_path: Path) -> None:
    trainers = [Trainer(number) for number in range(WORKERS)]
    with running(tmp_path / "state") as server:
        with sharednorm.connect(server.address) as hub:
            create(hub, trainers)
        log = tmp_path / "state" / "sharednorm.sqlite3-wal"
        room = log.stat().st_size + (1 << 17)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (room, room))
        threads = [threading.Thread(target=trainer.train, args=(server.address,), daemon=True) for trainer in trainers]
        for thread in threads:
            thread.start()
        assert server.wait(60) == 4
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert any(isinstance(trainer.error, StoreFailed) for trainer in trainers)
        assert "cannot be kept any more" in server.log()
    with running(tmp_path / "state") as server, sharednorm.connect(server.address) as hub:
        for trainer in trainers:
            assert trainer.answered > 0
            trainer.check(hub)


def test_a_second_server_of_a_state(tmp_path: Path) -> None:
    with running(tmp_path / "state") as server:
        done = run(["serve", "--listen", "127.0.0.1:0", "--state", f"sqlite://{tmp_path}/state"])
        assert (done.returncode, done.stdout) == (2, "")
        assert f"is used by process {server.pid} on " in done.stderr
        assert done.stderr.endswith("stop that server, or pass another --state\n")


def eventually_there(hub: sharednorm.Hub) -> None:
    """Wait until gRPC looks for the server again, which it does after a pause."""
    end = time.monotonic() + 20.0
    while True:
        try:
            hub.info  # noqa: B018 - it asks
            break
        except ServerUnavailable:
            assert time.monotonic() < end, "the server is not found again"
        time.sleep(0.1)


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
        with pytest.raises(ServerUnavailable):
            layer(x)
        stack.enter_context(running(tmp_path / "state", listen=listen))
        eventually_there(hub)
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
        eventually_there(hub)
        for layer in layers:
            for call in CALLS:
                with pytest.raises(DataLoss, match=r"is at version 1, and this handle was told of version [3-6]:"):
                    made(call, layer, x)
        again = hub.layer("bn")
        again(x)
        assert again.version == 2
