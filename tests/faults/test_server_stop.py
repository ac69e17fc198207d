"""How a server ends: nothing new begins, nothing that runs is cut, and it is over soon."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sharednorm.codec import wire
from sharednorm.v1 import service_pb2
from sharednorm_server.config.options import ServerConfig
from tests.support import oracle
from tests.support.processes import server
from tests.support.service import KEY, create, new_service
from tests.support.stock import MAPS, SECONDS, SlowForward, StockClient, channel_to, code_of, detail_of, floats

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVING = health_pb2.HealthCheckResponse.SERVING


def info(client: StockClient) -> service_pb2.GetServerInfoResponse:
    return client.stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=SECONDS)


def refusal(client: StockClient) -> grpc.StatusCode | None:
    """Return the code of a call that is refused, None if it is answered."""
    try:
        info(client)
    except grpc.RpcError as error:
        return code_of(error)
    return None


def eventually(reached: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def expected(x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    count, mean, m2 = oracle.batch_moments(x)
    return oracle.normalized(x, mean, m2 / count, np.ones(MAPS), np.zeros(MAPS), 1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(number: signal.Signals) -> None:
    with server.server_process() as process:
        began = time.monotonic()
        assert process.stop(number) == 0
        assert time.monotonic() - began < 5
        assert "Traceback" not in process.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_in_flight_ends_and_new_ones_are_refused(number: signal.Signals) -> None:
    with server.server_process() as process, channel_to(process.address) as channel:
        client = StockClient.on(channel)
        client.create("bn")
        slow = SlowForward(client, "bn")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watch).status == SERVING
        process.process.send_signal(number)
        assert next(watch).status == NOT_SERVING
        eventually(lambda: refusal(client) is grpc.StatusCode.UNAVAILABLE)
        with channel_to(process.address) as other:
            assert refusal(StockClient.on(other)) is grpc.StatusCode.UNAVAILABLE
        assert process.process.poll() is None
        header, data = slow.answer()
        assert header.version == 1
        np.testing.assert_allclose(floats(data, slow.x.shape), expected(slow.x), rtol=2e-6, atol=4e-6)
        assert process.wait() == 0
        assert "Traceback" not in process.log()


def test_a_call_that_waits_for_a_worker_is_in_flight_too() -> None:
    with server.server_process("--workers", "1") as process, channel_to(process.address) as channel:
        client = StockClient.on(channel)
        client.create("bn")
        slow = SlowForward(client, "bn")
        waiting = [
            client.stub.GetServerInfo.future(service_pb2.GetServerInfoRequest(), timeout=SECONDS) for _ in range(9)
        ]
        time.sleep(0.5)  # until they have arrived, of which nobody outside can tell
        process.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in process.log())
        slow.answer()
        assert {call.result(SECONDS).protocol for call in waiting} == {wire.PROTOCOL}
        assert process.wait() == 0


def test_a_signal_right_behind_its_start_up_line_is_heard() -> None:
    # It may come between the last instruction of the main thread and the wait that follows.
    for _ in range(6):
        with server.server_process() as process:
            assert process.stop() == 0


def test_watchers_of_its_health_do_not_hold_it_up() -> None:
    with server.server_process() as process, channel_to(process.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert next(watch).status == SERVING
        began = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began < 5
        assert next(watch).status == NOT_SERVING


def test_a_second_signal_ends_it_at_once() -> None:
    with server.server_process() as process, channel_to(process.address) as channel:
        client = StockClient.on(channel)
        client.create("bn")
        slow = SlowForward(client, "bn")
        process.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in process.log())
        began = time.monotonic()
        assert process.stop() == -signal.SIGTERM
        assert time.monotonic() - began < 5
        with pytest.raises(grpc.RpcError) as caught:
            slow.answer()
        assert code_of(caught.value) is grpc.StatusCode.UNAVAILABLE


def test_what_does_not_end_in_time_is_cut_off_and_said() -> None:
    with server.server_process("--shutdown-grace", "0.5") as process, channel_to(process.address) as channel:
        client = StockClient.on(channel)
        client.create("bn")
        slow = SlowForward(client, "bn")
        began = time.monotonic()
        assert process.stop() == 1
        assert time.monotonic() - began < 10
        assert "cut off" in process.log()
        with pytest.raises(grpc.RpcError):
            slow.answer()


def test_clients_that_train_until_the_end_get_every_answer_or_a_typed_refusal() -> None:
    service = new_service()
    refusals: list[str] = []
    answered: list[int] = []

    def train(address: str, begun: threading.Event) -> None:
        with channel_to(address) as channel:
            client = StockClient.on(channel)
            while True:
                try:
                    answered.append(client.forward("bn", oracle.random_tensor(1, (4, MAPS, 5, 2))).version)
                except grpc.RpcError as error:
                    refusals.append(detail_of(error).reason)
                    return
                begun.set()

    with server.in_process(ServerConfig(workers=2), service) as running:
        create(service, KEY)
        begun = [threading.Event() for _ in range(6)]
        threads = [threading.Thread(target=train, args=(running.address, each)) for each in begun]
        for thread in threads:
            thread.start()
        for each in begun:
            assert each.wait(SECONDS)
        assert running.stop(SECONDS)
        for thread in threads:
            thread.join(SECONDS)
    assert refusals == ["UNAVAILABLE"] * 6
    assert sorted(answered) == list(range(1, service.get_layer(KEY).state.version + 1))


def test_stopping_again_changes_nothing() -> None:
    with server.in_process() as running:
        assert running.stop(5.0)
        assert running.stop(5.0)
        assert running.wait(5.0)


def test_waiting_for_a_server_that_runs() -> None:
    with server.in_process() as running:
        assert not running.wait(0.05)


def test_a_socket_is_gone_when_its_server_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with server.server_process(listen=f"unix:{path}") as process:
        assert path.is_socket()
        assert process.stop() == 0
    assert not path.exists()


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with server.server_process(listen=f"unix:{path}") as process:
        assert process.stop(signal.SIGKILL) == -signal.SIGKILL
    assert path.is_socket()
    with server.in_process(ServerConfig(listen=f"unix:{path}")), channel_to(f"unix:{path}") as channel:
        assert info(StockClient.on(channel)).protocol == wire.PROTOCOL
        second = server.run(["serve", "--listen", f"unix:{path}"])
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr == f"sharednorm: cannot listen on unix:{path}: another server does already\n"
        assert info(StockClient.on(channel)).protocol == wire.PROTOCOL


def test_a_port_can_be_used_again_at_once() -> None:
    with server.server_process() as process:
        assert process.stop() == 0
    with server.server_process(listen=process.address) as again:
        assert again.address == process.address


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        second = server.run(["serve", "--listen", address])
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr.startswith(f"sharednorm: cannot listen on {address}: another program does already")
    assert second.stderr.count("\n") == 1


def test_two_servers_never_share_a_port() -> None:
    with server.in_process() as running:
        second = server.run(["serve", "--listen", running.address])
    assert second.returncode == 2
    assert "another program does already" in second.stderr
