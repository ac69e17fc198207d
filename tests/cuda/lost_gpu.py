"""What a lost GPU is to those who use it. `test_failures.py` runs this in a process of its own, which it spoils."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import sharednorm
from sharednorm.errors import DeviceLost
from sharednorm_server.device.base import Device
from sharednorm_server.layers.requests import ForwardCall
from tests.cuda.test_failures import KEY, SHAPE, service_on
from tests.emulation.load import fail
from tests.support import oracle
from tests.support.kernels import cuda
from tests.support.processes.server import in_process


@pytest.fixture
def doomed() -> Iterator[Device]:
    """A GPU that a test may lose: its thread stays behind."""
    cuda.prepare()
    from sharednorm_server.device.cuda.device import CudaDevice

    device = CudaDevice()
    yield device
    device.close()
    fail()


@pytest.mark.parametrize("rule", ["fault:1", "lost:1", "lost:4"])
def test_a_lost_gpu_commits_nothing_and_says_so(doomed: Device, rule: str) -> None:
    service, x = service_on(doomed), oracle.random_tensor(1, SHAPE)
    reasons: list[str] = []
    service.on_device_lost(reasons.append)
    service.forward(ForwardCall(KEY), x)
    before = service.get_layer(KEY)
    fail(rule)
    for _ in range(2):
        with pytest.raises(DeviceLost, match=r"cuda:0 \(Emulated H200\) has failed: .*nothing was changed"):
            service.forward(ForwardCall(KEY), x)
    assert service.get_layer(KEY) is before
    assert len(reasons) == 1
    late: list[str] = []
    service.on_device_lost(late.append)
    assert late == reasons


def test_somebody_who_fails_when_told_keeps_it_from_nobody(doomed: Device) -> None:
    service = service_on(doomed)
    heard: list[str] = []

    def fails(reason: str) -> None:
        heard.append(reason)
        raise RuntimeError("nobody may suffer from this")

    service.on_device_lost(fails)
    service.on_device_lost(heard.append)
    fail("lost:1")
    for _ in range(2):
        with pytest.raises(DeviceLost):
            service.forward(ForwardCall(KEY), oracle.random_tensor(1, SHAPE))
    assert len(heard) == 2


def test_calls_under_way_all_hear_of_it(doomed: Device) -> None:
    service = service_on(doomed)
    failures: list[None] = []
    x = np.ones((4, 4, 256, 256), np.float32) * np.arange(4, dtype=np.float32)[:, None, None, None]

    def work() -> None:
        try:
            for _ in range(100):
                service.forward(ForwardCall(KEY), x)
        except DeviceLost:
            failures.append(None)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    fail("fault:3")
    for thread in threads:
        thread.join(60)
    assert len(failures) == 8


def test_health_tells_before_the_server_has_ended(doomed: Device) -> None:
    with in_process(service=service_on(doomed)) as server, grpc.insecure_channel(server.address) as channel:
        lost = threading.Event()
        server.on_device_lost(lambda _: lost.set())
        stub = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == serving
        fail("lost:1")
        with sharednorm.connect(server.address) as hub, pytest.raises(DeviceLost):
            hub.layer("bn")(oracle.random_tensor(1, SHAPE))
        assert lost.wait(5)
        assert (
            stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.NOT_SERVING
        )
        with sharednorm.connect(server.address) as hub:
            assert hub.layer("bn").numOfProps == 0  # what needs no GPU can still be asked
