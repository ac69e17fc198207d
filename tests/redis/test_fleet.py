"""A hub of several servers: who serves what, and what happens when one is away."""

from __future__ import annotations

import gc
import pickle
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import IncompatibleServer, InvalidConfiguration, ServerUnavailable
from sharednorm.transport.cluster import Cluster, ClusterTransport
from sharednorm_server.auth import certificates
from sharednorm_server.config.options import ServerConfig
from tests.support.oracle import random_tensor
from tests.support.processes.proxy import HOST, Faults, Proxy
from tests.support.processes.redis import RedisProcess
from tests.support.processes.server import ServerProcess, in_process, server_process, stopped

SHAPE = (4, 3, 5, 2)
X = random_tensor(1, SHAPE)
WAYS: list[dict[str, Any]] = [{}, {"compute": "client"}, {"compute": "client", "push": "async"}]


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def fleet_of(hub: sharednorm.Hub) -> Cluster:
    assert isinstance(hub._exchange, ClusterTransport)
    return hub._exchange._fleet


def home_of(hub: sharednorm.Hub, name: str) -> str:
    """Return the address of the server that a layer's calls go to now."""
    assert isinstance(hub._exchange, ClusterTransport)
    return hub._exchange.of("layer", name).connection.member().address.text


@pytest.fixture(scope="module")
def url(redis_process: RedisProcess) -> str:
    return redis_process.url()


@pytest.fixture(scope="module")
def addresses(url: str) -> Iterator[list[str]]:
    """Give the addresses of three servers in this process."""
    with ExitStack() as stack:
        config = ServerConfig(state=url)
        yield [stack.enter_context(in_process(config)).address for _ in range(3)]


@pytest.fixture
def processes(url: str) -> Iterator[list[ServerProcess]]:
    """Give two servers that may be killed."""
    with server_process("--state", url) as one, server_process("--state", url) as two:
        yield [one, two]


def named(hub: sharednorm.Hub, address: str, stem: str = "layer") -> str:
    """Return the name of a layer that a server is the first for."""
    return next(name for name in (f"{stem}{number}" for number in range(1000)) if home_of(hub, name) == address)


@pytest.mark.parametrize("way", WAYS)
def test_a_hub_of_several_servers_is_a_hub(addresses: list[str], way: dict[str, Any]) -> None:
    with sharednorm.connect(",".join(addresses), namespace=str(way)) as hub:
        local, remote = sharednorm.BatchNorm2D(3), hub.BatchNorm2D(3, name="bn", **way)
        local.scale = remote.scale
        for seed in range(5):
            x = random_tensor(seed, SHAPE)
            np.testing.assert_array_equal(remote(x), local(x))
            remote.backward(x)
            local.backward(x)
            np.testing.assert_array_equal(remote.grad, local.grad)
        remote.updateParams(0.1)
        local.updateParams(0.1)
        remote.flush()
        for name in ("mean", "var", "scale", "bias", "numOfProps"):
            np.testing.assert_array_equal(getattr(remote, name), getattr(local, name))
        assert [layer.name for layer in hub.layers()] == ["bn"]
        assert hub.layer("bn").numOfProps == 5
        assert hub.info.store.startswith("redis://")
        assert hub.address in repr(hub)
        hub.set_train("bn", False)
        copy = pickle.loads(pickle.dumps(remote))
        assert copy.numOfProps == 5
        assert hub.snapshots("bn")
        hub.delete("bn")
        assert hub.layers() == []


def test_layers_are_spread_and_all_clients_agree(addresses: list[str]) -> None:
    names = [f"stage{number}/bn" for number in range(300)]
    with sharednorm.connect(",".join(addresses)) as hub, sharednorm.connect(", ".join(reversed(addresses))) as other:
        homes = [home_of(hub, name) for name in names]
        assert homes == [home_of(other, name) for name in names]
        assert min(homes.count(address) for address in addresses) > 60
    with sharednorm.connect(",".join(addresses[:2])) as hub:  # without one server only its layers are elsewhere
        moved = [(home_of(hub, name), home) for name, home in zip(names, homes, strict=True)]
        assert all(now == before for now, before in moved if before != addresses[2])


def test_many_layers_in_one_call_are_divided(addresses: list[str]) -> None:
    with sharednorm.connect(",".join(addresses), namespace="many") as hub:
        layers = [
            hub.BatchNorm2D(3, name=f"bn{number}", compute="client", push="async", max_staleness=60.0)
            for number in range(12)
        ]
        for turn in range(5):
            for layer in layers:
                layer(random_tensor(turn, SHAPE))
        hub.flush()
        hub.refresh(*layers)
        for layer in layers:
            layer.evalMode()
            layer(X)
            assert layer.numOfProps == 5
        homes = {home_of(hub, layer.name) for layer in layers if layer.name is not None}
        assert len(homes) > 1


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_is_killed_is_replaced_by_the_next(processes: list[ServerProcess], way: dict[str, Any]) -> None:
    with sharednorm.connect(",".join(each.address for each in processes), namespace=f"kill {way}") as hub:
        name = named(hub, processes[0].address)
        layer, twin = hub.BatchNorm2D(3, name=name, **way), sharednorm.BatchNorm2D(3)
        twin.scale = layer.scale
        for seed in range(30):
            x = random_tensor(seed, SHAPE)
            np.testing.assert_array_equal(layer(x), twin(x))
            if seed == 10:
                processes[0].process.kill()
        layer.flush()
        assert layer.numOfProps == 30
        np.testing.assert_array_equal(layer.mean, twin.mean)
        assert home_of(hub, name) == processes[1].address


def test_a_backward_whose_forward_was_with_a_server_that_is_gone(processes: list[ServerProcess]) -> None:
    with sharednorm.connect(",".join(each.address for each in processes), namespace="backward") as hub:
        name = named(hub, processes[0].address)
        layer, twin = hub.BatchNorm2D(3, name=name), sharednorm.BatchNorm2D(3)
        twin.scale = layer.scale
        np.testing.assert_array_equal(layer(X), twin(X))
        processes[0].process.kill()
        layer.backward(X)
        twin.backward(X)
        np.testing.assert_array_equal(layer.grad, twin.grad)
        np.testing.assert_array_equal(layer.vars["scale"].grad, twin.vars["scale"].grad)


def test_a_server_that_hangs_is_given_up_in_the_middle_of_a_call(processes: list[ServerProcess]) -> None:
    with sharednorm.connect(",".join(each.address for each in processes), namespace="hang", timeout=60.0) as hub:
        name = named(hub, processes[0].address)
        layer = hub.BatchNorm2D(3, name=name)
        layer(X)
        with stopped(processes[0].pid):
            began = time.monotonic()
            layer(X)
            assert time.monotonic() < began + 20
            assert layer.numOfProps == 2
            assert home_of(hub, name) == processes[1].address
        until(lambda: home_of(hub, name) == processes[0].address)  # it is there again
        layer(X)
        assert layer.numOfProps == 3


def test_a_server_that_stops_in_order_and_comes_back(url: str, processes: list[ServerProcess]) -> None:
    one, two = processes
    with sharednorm.connect(f"{one.address},{two.address}", namespace="stop") as hub:
        name = named(hub, one.address)
        layer = hub.BatchNorm2D(3, name=name)
        ended = threading.Event()
        failures: list[BaseException] = []

        def train() -> None:
            try:
                while not ended.is_set():
                    layer(X)
            except BaseException as error:  # noqa: BLE001 - shown below
                failures.append(error)

        thread = threading.Thread(target=train)
        thread.start()
        assert one.stop(signal.SIGTERM) == 0
        until(lambda: home_of(hub, name) == two.address)
        with server_process("--state", url, listen=one.address):
            until(lambda: home_of(hub, name) == one.address)
            time.sleep(0.2)
            ended.set()
            thread.join(30)
            assert failures == []
            assert layer.numOfProps == hub.layer(name).numOfProps > 0


def test_no_server_is_there(processes: list[ServerProcess]) -> None:
    text = ",".join(each.address for each in processes)
    with sharednorm.connect(text, namespace="none", timeout=3.0) as hub:
        layer = hub.BatchNorm2D(3, name="bn")
        for process in processes:
            process.process.kill()
            process.wait()
        with pytest.raises(ServerUnavailable):
            layer(X)
    with pytest.raises(ServerUnavailable):
        sharednorm.connect(text, timeout=2.0)


def test_one_of_them_is_not_there_at_the_start(processes: list[ServerProcess]) -> None:
    processes[0].process.kill()
    processes[0].wait()
    with sharednorm.connect(",".join(each.address for each in processes), namespace="half") as hub:
        for number in range(10):
            hub.BatchNorm2D(3, name=f"{number}")(X)


def test_one_of_them_is_there_and_says_nothing(addresses: list[str]) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        began = time.monotonic()
        with sharednorm.connect(f"127.0.0.1:{mute.getsockname()[1]},{addresses[0]}", namespace="mute") as hub:
            for number in range(10):
                hub.BatchNorm2D(3, name=f"{number}")(X)
        assert time.monotonic() < began + 10


def test_servers_that_share_nothing_are_refused(addresses: list[str]) -> None:
    with in_process() as apart, pytest.raises(IncompatibleServer, match="does not share the layers of the others"):
        sharednorm.connect(f"{addresses[0]},{apart.address}")


@pytest.mark.parametrize("text", ["a:1,a:1", "a:1,,b:2", "a:1,b", ","])
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidConfiguration):
        sharednorm.connect(text)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the addresses of the name "boxes.test", which a test may change. Loopback has many."""
    hosts, real = ["127.0.0.2", "127.0.0.3"], socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "boxes.test":
            return real(host, *arguments, **options)
        return [found for each in hosts for found in real(each, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("sharednorm.transport.cluster._NAME_SECONDS", 0.2)
    return hosts


def test_a_name_with_several_addresses_has_one_certificate(url: str, hosts: list[str], tmp_path: Path) -> None:
    certificates.create(tmp_path, ["boxes.test"], 1)
    config = ServerConfig(state=url, tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key")
    with ExitStack() as stack:
        first = stack.enter_context(in_process(replace(config, listen=f"{hosts[0]}:0")))
        port = first.address.rpartition(":")[2]
        stack.enter_context(in_process(replace(config, listen=f"{hosts[1]}:{port}")))
        hub = sharednorm.connect(f"boxes.test:{port}", namespace="tls", tls=tmp_path / "ca.pem")
        stack.enter_context(hub)
        for number in range(8):
            hub.BatchNorm2D(3, name=f"{number}")(X)
        assert {home_of(hub, f"{number}") for number in range(100)} == {f"{host}:{port}" for host in hosts}
        assert all(member.known is not None for member in fleet_of(hub).members)


def test_a_name_with_several_addresses(url: str, hosts: list[str]) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(in_process(ServerConfig(listen="127.0.0.2:0", state=url)))
        port = first.address.rpartition(":")[2]
        for host in ("127.0.0.3", "127.0.0.4"):
            stack.enter_context(in_process(ServerConfig(listen=f"{host}:{port}", state=url)))
        with sharednorm.connect(f"boxes.test:{port}", namespace="names") as hub:
            assert {home_of(hub, f"{number}") for number in range(100)} == {f"{host}:{port}" for host in hosts}
            layer = hub.BatchNorm2D(3, name="bn")
            layer(X)
            hosts[:] = ["127.0.0.3", "127.0.0.4"]
            until(lambda: {member.address.host for member in fleet_of(hub).members} == {"boxes.test"})
            until(lambda: {home_of(hub, f"{number}") for number in range(100)} == {f"{host}:{port}" for host in hosts})
            layer(X)
            assert layer.numOfProps == 2


def test_a_balancer_in_front_of_them(processes: list[ServerProcess]) -> None:
    ports = [int(each.address.rpartition(":")[2]) for each in processes]
    balancer = Proxy(ports[0], Faults(random.Random(0)), others=ports[1:])
    try:
        with ExitStack() as stack:
            hubs = [
                stack.enter_context(sharednorm.connect(f"{HOST}:{balancer.port}", namespace="balancer", timeout=60.0))
                for _ in range(4)
            ]
            layers, twin = (
                [hub.BatchNorm2D(3, name="bn", sscale=0.0) for hub in hubs],
                sharednorm.BatchNorm2D(3, sscale=0.0),
            )
            for seed in range(24):
                x = random_tensor(seed, SHAPE)
                layers[seed % 4](x)
                twin(x)
                if seed == 12:
                    processes[0].process.kill()
            layers[3].backward(X)
            assert layers[0].numOfProps == 24
            np.testing.assert_array_equal(layers[0].mean, twin.mean)
    finally:
        balancer.close()


def test_a_hub_that_is_closed_or_dropped_leaves_no_thread(addresses: list[str]) -> None:
    def looking() -> int:
        return sum(thread.name == "sharednorm-fleet" for thread in threading.enumerate())

    before = looking()
    hub = sharednorm.connect(",".join(addresses))
    assert looking() > before
    hub.close()
    with pytest.raises(sharednorm.HubClosed):
        hub.layers()
    until(lambda: looking() <= before)
    hub = sharednorm.connect(",".join(addresses))
    assert looking() > before
    del hub
    gc.collect()
    until(lambda: looking() <= before)


def test_members_of_a_group_meet_at_one_server(processes: list[ServerProcess]) -> None:
    text = ",".join(each.address for each in processes)
    outputs: dict[int, list[np.ndarray]] = {0: [], 1: []}
    failures: list[BaseException] = []
    killed = threading.Event()

    def member(rank: int) -> None:
        try:
            with sharednorm.connect(text, namespace="group") as hub:
                group = sharednorm.Group("run", 2, rank=rank, timeout=20.0)
                layer = hub.BatchNorm2D(3, name="bn", compute="client", group=group)
                for turn in range(20):
                    outputs[rank].append(layer(random_tensor(10 * turn + rank, SHAPE)))
                    if turn == 9 and rank == 0:
                        exchange = hub._exchange
                        assert isinstance(exchange, ClusterTransport)
                        home = exchange.of("group", "group\0run").connection.member().address.text
                        next(each for each in processes if each.address == home).process.kill()
                        killed.set()
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert killed.is_set()
    twin = sharednorm.BatchNorm2D(3)
    with sharednorm.connect(text, namespace="group") as hub:
        assert hub.layer("bn").numOfProps == 20
        twin.scale = hub.layer("bn").scale
    for turn in range(20):
        both = np.concatenate([random_tensor(10 * turn + rank, SHAPE) for rank in range(2)])
        expected = twin(both)
        for rank in range(2):
            np.testing.assert_allclose(outputs[rank][turn], expected[4 * rank : 4 * rank + 4], rtol=2e-6, atol=2e-6)
