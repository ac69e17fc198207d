"""Clients that go away, wait too briefly, or meet a defect: nothing is applied for nobody, and others are served."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState
from sharednorm.core.types import Array
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.device.base import DeviceTensor, TrainedBatch
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.server import RunningServer
from tests.support import oracle
from tests.support.processes import server
from tests.support.service import KEY, InterruptedDevice, new_service
from tests.support.stock import MAPS, SECONDS, SlowForward, StockClient, channel_to, code_of, detail_of, ref, spec

SHAPE = (4, MAPS, 5, 2)
NAME = "bn"


@pytest.fixture
def running() -> Iterator[RunningServer]:
    """Give a server that runs one call at a time."""
    with server.in_process(ServerConfig(workers=1)) as started:
        yield started


@pytest.fixture
def client(running: RunningServer) -> Iterator[StockClient]:
    """Give a client of that server."""
    with channel_to(running.address) as channel:
        made = StockClient.on(channel)
        made.create(NAME)
        yield made


def version(client: StockClient) -> int:
    return client.stats(NAME).layer.version


def test_a_stream_that_is_given_up_is_not_applied(client: StockClient) -> None:
    slow = SlowForward(client, NAME)
    slow.cancel()
    assert version(client) == 0  # and the only worker is free again
    assert client.forward(NAME, oracle.random_tensor(1, SHAPE)).version == 1


def test_a_stream_whose_deadline_passes_is_not_applied(client: StockClient) -> None:
    slow = SlowForward(client, NAME, seconds=1.0)
    with pytest.raises(grpc.RpcError) as caught:
        next(slow.call)
    assert code_of(caught.value) is grpc.StatusCode.DEADLINE_EXCEEDED
    slow.cancel()
    assert version(client) == 0


def test_a_client_that_vanishes_frees_its_worker() -> None:
    with server.in_process(ServerConfig(workers=1)) as running, channel_to(running.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        with channel_to(running.address) as other:
            slow = SlowForward(StockClient.on(other), NAME)
        slow.go_on()
        assert version(client) == 0


def test_a_call_that_waited_longer_than_its_client_is_not_applied(client: StockClient) -> None:
    slow = SlowForward(client, NAME)
    request = service_pb2.ForwardRequest(
        ref=ref(NAME),
        mode=layer_pb2.MODE_TRAIN,
        input=spec(SHAPE),
        data=oracle.random_tensor(1, SHAPE).tobytes(),
    )
    updates = service_pb2.SetTrainRequest(ref=ref(NAME), train=False)
    for call in (
        lambda: client.stub.Forward(request, timeout=0.3),
        lambda: client.stub.SetTrain(updates, timeout=0.3),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert code_of(caught.value) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert slow.answer()[0].version == 1
    stats = client.stats(NAME)
    assert (stats.layer.version, stats.layer.default_mode) == (1, layer_pb2.MODE_TRAIN)


def test_a_step_given_up_during_its_computation_is_not_applied() -> None:
    device = InterruptedDevice()
    service = new_service(device)
    inside, go_on = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        inside.set()
        assert go_on.wait(SECONDS)

    device.interrupt = hold
    with (
        server.in_process(ServerConfig(workers=2), service) as running,
        channel_to(running.address) as channel,
    ):
        client = StockClient.on(channel)
        client.create(NAME)
        request = service_pb2.ForwardRequest(
            ref=ref(NAME), input=spec(SHAPE), data=oracle.random_tensor(1, SHAPE).tobytes()
        )
        call = client.stub.Forward.future(request, timeout=SECONDS)
        assert inside.wait(SECONDS)
        call.cancel()
        time.sleep(0.3)  # until the server has heard of it
        go_on.set()
        assert running.stop(SECONDS)
    # The computation ended after the server had stopped waiting for its client, or before.
    assert device.forwards == 1
    assert service.get_layer(KEY).state.version == 0


def test_an_answer_that_nobody_reads_frees_its_worker(client: StockClient) -> None:
    slow = SlowForward(client, NAME)
    slow.go_on()
    assert next(slow.call).header.version == 1
    slow.cancel()
    assert version(client) == 1  # it had been applied, and stays so
    assert client.forward(NAME, oracle.random_tensor(1, SHAPE)).version == 2


def test_health_answers_while_every_worker_is_busy(client: StockClient) -> None:
    slow = SlowForward(client, NAME)
    with pytest.raises(grpc.RpcError):
        client.stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=0.3)
    slow.answer()


def test_health_has_threads_of_its_own() -> None:
    with server.in_process(ServerConfig(workers=1)) as running, channel_to(running.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        slow = SlowForward(client, NAME)
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        slow.answer()


class DefectiveDevice(CpuDevice):
    """A device that fails in a way that nobody has foreseen."""

    def __init__(self, error: Exception) -> None:
        super().__init__(arithmetic("numpy"))
        self._error = error

    def forward(
        self,
        x: DeviceTensor,  # noqa: ARG002
        state: LayerState,  # noqa: ARG002
        config: LayerConfig,  # noqa: ARG002
        out: Array | None = None,  # noqa: ARG002
    ) -> TrainedBatch:
        """Fail."""
        raise self._error


def stream(client: StockClient) -> object:
    return client.forward_stream(NAME, oracle.random_tensor(1, SHAPE), 64)


def unary(client: StockClient) -> object:
    return client.forward(NAME, oracle.random_tensor(1, SHAPE))


@pytest.mark.parametrize("attempt", [unary, stream])
def test_a_defect_is_explained_in_the_log_and_nowhere_else(
    attempt: Callable[[StockClient], object], caplog: pytest.LogCaptureFixture
) -> None:
    service = new_service(DefectiveDevice(RuntimeError("the secret of the house")))
    with server.in_process(service=service) as running, channel_to(running.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError) as caught:
            attempt(client)
        detail = detail_of(caught.value)
        assert (code_of(caught.value), detail.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "secret" not in detail.message + str(caught.value)
        identity = detail.metadata["id"]
        assert identity in detail.message
        records = [record for record in caplog.records if identity in record.getMessage()]
        assert len(records) == 1
        assert records[0].exc_info is not None
        assert "the secret of the house" in str(records[0].exc_info[1])
        assert client.stats(NAME).layer.version == 0


def test_too_little_memory_is_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    service = new_service(DefectiveDevice(MemoryError()))
    with server.in_process(service=service) as running, channel_to(running.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        with caplog.at_level(logging.ERROR), pytest.raises(grpc.RpcError) as caught:
            unary(client)
        assert code_of(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert detail_of(caught.value).reason == "LIMIT_EXCEEDED"


# --- HTTP/2 beneath gRPC ----------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, PING, GOAWAY = 4, 6, 7


def frame(kind: int, payload: bytes = b"") -> bytes:
    """Return a frame of HTTP/2, of no stream: RFC 9113, section 4.1."""
    return len(payload).to_bytes(3, "big") + bytes([kind, 0, 0, 0, 0, 0]) + payload


def frames_of(sock: socket.socket) -> list[tuple[int, bytes]]:
    """Return the frames that come until the other side closes."""
    found = bytearray()
    with suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            found += part
    frames = []
    while len(found) >= 9:
        size = int.from_bytes(found[:3], "big")
        frames.append((found[3], bytes(found[9 : 9 + size])))
        del found[: 9 + size]
    return frames


def flood(sock: socket.socket, part: bytes) -> None:
    """Send the same again and again, until the other side takes no more of it."""
    with suppress(ConnectionError):
        for _ in range(10_000):
            sock.sendall(part)


def to(running: RunningServer) -> socket.socket:
    host, _, port = running.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def test_a_flood_of_pings_ends_its_connection_and_no_other(running: RunningServer, client: StockClient) -> None:
    with to(running) as sock:
        sock.sendall(PREFACE + frame(SETTINGS))
        flood(sock, frame(PING, bytes(8)) * 10)
        ends = [payload for kind, payload in frames_of(sock) if kind == GOAWAY]
    # ENHANCE_YOUR_CALM, RFC 9113, section 7; the answer may be lost with a connection that is reset.
    assert all(int.from_bytes(payload[4:8], "big") == 11 and b"too_many_pings" in payload for payload in ends)
    assert client.forward(NAME, oracle.random_tensor(1, SHAPE)).version == 1


def test_a_connection_that_never_says_what_it_is_ends() -> None:
    with server.in_process(ServerConfig(handshake_timeout=0.5)) as running, channel_to(running.address) as channel:
        began = time.monotonic()
        with to(running) as sock:
            sock.sendall(PREFACE[:10])
            frames_of(sock)
        assert 0.4 < time.monotonic() - began < 10
        StockClient.on(channel).create(NAME)


def test_bytes_that_trickle_in_keep_nobody_waiting(running: RunningServer, client: StockClient) -> None:
    """Twenty connections that say a byte now and then, as a slow attack does; others are served meanwhile."""
    socks = [to(running) for _ in range(20)]
    try:
        for at in range(len(PREFACE)):
            for sock in socks:
                sock.sendall(PREFACE[at : at + 1])
            if at % 6 == 0:
                client.forward(NAME, oracle.random_tensor(at, SHAPE))
        assert version(client) == 4
    finally:
        for sock in socks:
            sock.close()


def test_a_client_that_reads_nothing_of_its_answers_harms_nobody() -> None:
    """Its answers fill its window, and its worker waits until its deadline; the others are answered by the rest."""
    with server.in_process(ServerConfig(workers=2)) as running, channel_to(running.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        slow = SlowForward(client, NAME, seconds=2.0)
        slow.go_on()  # the answer is larger than a window, and nobody takes it
        for step in range(20):
            assert client.forward(NAME, oracle.random_tensor(step, SHAPE)).version
        end = time.monotonic() + 20
        while running._pools[0].calls:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert version(client) == 21
