"""Clients that go away, wait too briefly, or meet a defect: nothing is applied for nobody, and others are served."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sharednorm.config import Array, LayerConfig
from sharednorm.normalization import arithmetic
from sharednorm.state import LayerState
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.config import ServerConfig
from sharednorm_server.device import DeviceTensor, TrainedBatch
from sharednorm_server.device.cpu import CpuDevice
from tests.support import oracle, server
from tests.support.service import KEY, InterruptedDevice, new_service
from tests.support.stock import MAPS, SECONDS, SlowForward, StockClient, channel_to, code_of, detail_of, ref, spec

SHAPE = (4, MAPS, 5, 2)
NAME = "bn"


@pytest.fixture
def client() -> Iterator[StockClient]:
    """Give a client of a server that runs one call at a time."""
    with server.in_process(ServerConfig(workers=1)) as running, channel_to(running.address) as channel:
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
