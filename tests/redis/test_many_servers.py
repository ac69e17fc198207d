"""Many clients, several servers that are killed, and a Redis that freezes: no step is lost, and none is taken twice.

`SHAREDNORM_STEPS` is how many steps are taken in all, at least; something happens for each 150 of them.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import StoreUnavailable
from sharednorm_server.config.options import ServerConfig
from tests.support.oracle import random_tensor
from tests.support.processes.programs import program
from tests.support.processes.redis import redis_server
from tests.support.processes.server import ServerProcess, in_process, server_process
from tests.support.web import get

STEPS = int(os.environ.get("SHAREDNORM_STEPS", "800"))
pytestmark = pytest.mark.timeout(400 + STEPS // 4)
SHAPE = (4, 5, 6, 3)
CLIENTS, LAYERS, SERVERS = 12, 4, 3


@dataclass(frozen=True)
class Step:
    """A step that was answered: which batch it was, what it made, and when it was asked for and answered."""

    version: int
    seed: int
    began: float
    ended: float


class Client(threading.Thread):
    """Trains layers that all clients share, as if nothing ever happened to any server.

    Args:
        number: Which.
        address: Of all servers.
        left: How many steps are still to be taken, by all.
        over: That nothing happens any more.
    """

    def __init__(self, number: int, address: str, left: list[int], over: threading.Event) -> None:
        super().__init__(daemon=True)
        self._number, self._address, self._left, self._over = number, address, left, over
        self.steps: dict[str, list[Step]] = {f"layer{layer}": [] for layer in range(LAYERS)}
        self.error: BaseException | None = None

    def run(self) -> None:
        """Take steps until enough are taken."""
        rng = random.Random(self._number)
        compute = "client" if self._number % 2 else "server"
        try:
            with sharednorm.connect(self._address, timeout=120.0) as hub:
                handles = {name: hub.BatchNorm2D(5, name=name, sscale=0.0, compute=compute) for name in self.steps}
                while self._left[0] > 0 or not self._over.is_set():
                    self._left[0] -= 1
                    time.sleep(rng.uniform(0.0, 0.05))
                    name = rng.choice(list(handles))
                    seed = self._number * 1_000_000 + len(self.steps[name]) * 10 + int(name[-1])
                    x, began = random_tensor(seed, SHAPE), time.monotonic()
                    handles[name](x)
                    saved = handles[name]._pass.saved
                    assert saved is not None
                    self.steps[name].append(Step(saved.version, seed, began, time.monotonic()))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def in_real_time(steps: list[Step]) -> bool:
    """Return whether no step has a later version than one that was asked for after its answer."""
    latest = 0.0  # start of any step so far
    for step in steps:
        if latest > step.ended:
            return False
        latest = max(latest, step.began)
    return True


def test_a_history_that_is_not_in_real_time() -> None:
    assert in_real_time([Step(1, 0, 0.0, 1.0), Step(2, 0, 0.5, 2.0), Step(3, 0, 0.2, 3.0)])
    assert not in_real_time([Step(1, 0, 2.0, 3.0), Step(2, 0, 0.0, 1.0)])


def test_servers_are_killed_and_redis_freezes(tmp_path: Path) -> None:
    rng, left, over = random.Random(7), [STEPS], threading.Event()
    with ExitStack() as stack:
        redis = stack.enter_context(
            redis_server(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "everysec")
        )
        state = ("--state", redis.url("many", timeout=1), "--log-level", "warning")
        listen = [f"127.0.0.1:{port}" for port in free_ports(SERVERS)]
        servers: list[ServerProcess] = [
            stack.enter_context(server_process(*state, listen=address)) for address in listen
        ]
        clients = [Client(number, ",".join(listen), left, over) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            for _ in range(max(4, STEPS // 150)):
                time.sleep(rng.uniform(0.2, 1.0))
                if rng.random() < 0.4:
                    with redis.frozen():
                        time.sleep(rng.choice((0.1, 0.5, 1.5, 2.5)))
                else:
                    victim = rng.randrange(SERVERS)
                    servers[victim].stop(signal.SIGKILL)
                    servers[victim] = stack.enter_context(server_process(*state, listen=listen[victim]))
        finally:
            over.set()
        for client in clients:
            client.join(120)
        assert [client.error for client in clients] == [None] * CLIENTS
        assert not any(client.is_alive() for client in clients)
        with sharednorm.connect(",".join(listen), consistency="strong") as hub:
            for name in clients[0].steps:
                steps = [step for client in clients for step in client.steps[name]]
                steps.sort(key=lambda step: step.version)
                assert [step.version for step in steps] == list(range(1, len(steps) + 1))
                assert in_real_time(steps)
                layer, twin = hub.layer(name), sharednorm.BatchNorm2D(5, sscale=0.0)
                for step in steps:
                    twin(random_tensor(step.seed, SHAPE))
                assert layer.numOfProps == len(steps)
                np.testing.assert_array_equal(layer.mean, twin.mean)
                np.testing.assert_array_equal(layer.var, twin.var)


# --- A network that is pulled in the middle ---------------------------------------------------------------


class Cable:
    """A network of its own for a Redis, and the cable to it, which can be pulled.

    Args:
        name: Of the network; at most 8 characters.
        number: Of its addresses.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.here, self.there = f"10.213.{number}.1", f"10.213.{number}.2"

    def lay(self) -> None:
        """Make both."""
        self._ip("netns", "add", self.name)
        self._ip("link", "add", f"{self.name}h", "type", "veth", "peer", "name", f"{self.name}n", "netns", self.name)
        self._ip("addr", "add", f"{self.here}/24", "dev", f"{self.name}h")
        self._ip("link", "set", f"{self.name}h", "up")
        self._ip("-n", self.name, "addr", "add", f"{self.there}/24", "dev", f"{self.name}n")
        self._ip("-n", self.name, "link", "set", f"{self.name}n", "up")
        self._ip("-n", self.name, "link", "set", "lo", "up")

    def pull(self) -> None:
        """Pull it on the other side: nothing is said to anybody here."""
        self._ip("-n", self.name, "link", "set", f"{self.name}n", "down")

    def plug(self) -> None:
        """Put it in again."""
        self._ip("-n", self.name, "link", "set", f"{self.name}n", "up")

    def take_away(self) -> None:
        """Forget both."""
        self._ip("netns", "del", self.name)

    def _ip(self, *words: str) -> None:
        subprocess.run([program("ip"), *words], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def far_redis(directory: Path) -> Iterator[tuple[Cable, str]]:
    """Run a Redis at the other end of a cable; gives its URL."""
    if os.geteuid() != 0:
        pytest.skip("lays a cable, which only root may do")
    number = os.getpid() % 200 + 1
    cable = Cable(f"norm{number}", number)
    cable.lay()
    directory.mkdir()
    try:
        words = [
            program("ip"), "netns", "exec", cable.name, program("redis-server"), "--port", "6379",
            "--bind", cable.there, "--protected-mode", "no", "--save", "", "--dir", str(directory),
        ]  # fmt: skip
        with (directory / "log").open("w") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 20
            while True:
                with socket.socket() as probe:
                    probe.settimeout(1)
                    if probe.connect_ex((cable.there, 6379)) == 0:
                        break
                assert time.monotonic() < end, (directory / "log").read_text()
                time.sleep(0.05)
            yield cable, f"redis://{cable.there}:6379?timeout=1"
        finally:
            process.terminate()
            process.wait(20)
    finally:
        cable.take_away()


def test_the_cable_to_redis_is_pulled_in_the_middle(tmp_path: Path) -> None:
    with far_redis(tmp_path / "redis") as (cable, url), server_process("--state", url) as server:  # noqa: SIM117
        with sharednorm.connect(server.address, timeout=3.0) as hub:
            layer, twin = hub.BatchNorm2D(5, name="bn", sscale=0.0), sharednorm.BatchNorm2D(5, sscale=0.0)
            for seed in range(3):
                layer(random_tensor(seed, SHAPE))
                twin(random_tensor(seed, SHAPE))
            cable.pull()
            began = time.monotonic()
            with pytest.raises(StoreUnavailable, match="cannot be used now"):
                layer(random_tensor(3, SHAPE))
            assert time.monotonic() < began + 8
            cable.plug()
            patient = sharednorm.connect(server.address, timeout=60.0)
            with patient:
                other = patient.layer("bn")
                assert other.numOfProps in {3, 4}  # nobody can say; the same step again settles it
                layer(random_tensor(3, SHAPE))
                twin(random_tensor(3, SHAPE))
                assert other.numOfProps == 4
            np.testing.assert_array_equal(layer.mean, twin.mean)


def test_a_call_that_waits_for_a_frozen_redis_goes_on(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as redis, server_process("--state", redis.url("p", timeout=1)) as server:  # noqa: SIM117
        with sharednorm.connect(server.address, timeout=60.0) as hub:
            layer = hub.BatchNorm2D(5, name="bn")
            layer(random_tensor(1, SHAPE))
            thawing = threading.Timer(4.0, os.kill, (redis.pid, signal.SIGCONT))
            os.kill(redis.pid, signal.SIGSTOP)
            thawing.start()
            layer(random_tensor(2, SHAPE))
            thawing.join()
            assert layer.numOfProps == 2


def test_health_says_why(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as redis:  # noqa: SIM117 - its address is needed
        with in_process(ServerConfig(state=redis.url("p", timeout=0.5), http_listen="127.0.0.1:0")) as server:
            assert get(server, "/readyz").status == 200
            redis.stop()
            end = time.monotonic() + 20
            while get(server, "/readyz").status == 200:
                assert time.monotonic() < end
                time.sleep(0.05)
            assert "the store cannot be used" in get(server, "/readyz").text
            assert get(server, "/healthz").status == 200  # a new process would not be any better
            redis.start()
            while get(server, "/readyz").status != 200:
                assert time.monotonic() < end
                time.sleep(0.05)
