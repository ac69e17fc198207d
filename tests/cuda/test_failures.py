"""A launch that is refused, and a GPU that is lost: nothing is committed, everybody hears of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import sharednorm
from sharednorm.config import LayerConfig, LayerKind
from sharednorm.errors import DeviceLost, InternalError, ServerUnavailable
from sharednorm.state import StateUpdate
from sharednorm_server.cli import DEVICE_LOST
from sharednorm_server.device import Device, DeviceFault
from sharednorm_server.placement import Placement
from sharednorm_server.requests import ForwardCall, LayerKey
from sharednorm_server.service import LayerService
from sharednorm_server.store.memory import MemoryStore
from tests.emulation.load import fail
from tests.support import cuda, oracle
from tests.support.distributions import ROOT
from tests.support.server import in_process, server_process

pytestmark = pytest.mark.skipif(cuda.REAL, reason="the failures are the emulated driver's: they need PyCUDA on it")

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 4)
SHAPE = (4, 4, 8, 8)
KEY = LayerKey("default", "bn")


@pytest.fixture
def breakable(device: Device) -> Iterator[Device]:
    """A GPU whose failures end with the test."""
    yield device
    fail()


@pytest.fixture
def doomed() -> Iterator[Device]:
    """A GPU that a test may lose: its thread stays behind."""
    cuda.prepare()
    from sharednorm_server.device.cuda import CudaDevice

    device = CudaDevice()
    yield device
    device.close()
    fail()


def service_on(device: Device) -> LayerService:
    service = LayerService(MemoryStore(), Placement(device), 1 << 20)
    service.create_layer(KEY, CONFIG, StateUpdate(), sscale=0.0, empty=False)
    return service


def test_a_launch_that_is_refused_fails_its_call_alone(breakable: Device) -> None:
    service, x = service_on(breakable), oracle.random_tensor(1, SHAPE)
    service.forward(ForwardCall(KEY), x)
    before = service.get_layer(KEY)
    fail("launch:1")
    with pytest.raises(DeviceFault, match=r"cuda:0 refused a call: .*too many resources"):
        service.forward(ForwardCall(KEY), x)
    assert service.get_layer(KEY) is before
    assert service.forward(ForwardCall(KEY), x).version == 2


def test_the_client_gets_an_internal_error_without_internals(breakable: Device) -> None:
    with in_process(service=service_on(breakable)) as server, sharednorm.connect(server.address) as hub:
        bn = hub.layer("bn")
        fail("launch:1")
        with pytest.raises(InternalError) as caught:
            bn(oracle.random_tensor(1, SHAPE))
        assert "resources" not in str(caught.value)
        bn(oracle.random_tensor(1, SHAPE))
        assert bn.numOfProps == 1


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


def test_a_server_that_loses_its_gpu_ends_with_its_own_exit_code() -> None:
    # Enough launches for the start, its check of the kernels included, and for the first forward.
    env = {**cuda.environment(), "SHAREDNORM_EMULATED_FAIL": "fault:12"}
    with server_process("--device", "cuda", env=env) as server, sharednorm.connect(server.address) as hub:
        bn = hub.BatchNorm2D(4, name="bn")
        x = oracle.random_tensor(1, SHAPE)
        assert bn(x).shape == SHAPE
        with pytest.raises(ServerUnavailable):
            _use(bn, x, times=100)
        assert server.wait() == DEVICE_LOST
        assert "cuda:0 (Emulated H200) has failed" in server.log()
        assert "PyCUDA ERROR" not in server.log()


def _use(bn: sharednorm.Layer, x: npt.NDArray[np.float32], times: int) -> None:
    for _ in range(times):
        bn(x)


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


def test_the_process_of_a_lost_gpu_ends_in_order_also_without_a_server() -> None:
    code = (
        "from tests.support import cuda, oracle; cuda.prepare()\n"
        "from sharednorm_server.device.cuda import CudaDevice\n"
        "from tests.emulation.load import fail\n"
        "device = CudaDevice(); fail('lost:1')\n"
        "try: device.load(oracle.random_tensor(1, (4, 4, 8, 8)))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    assert _ran(code) == "DeviceLost"


def test_a_device_that_nobody_closes_is_closed_at_exit() -> None:
    code = (
        "from tests.support import cuda, oracle; cuda.prepare()\n"
        "from sharednorm_server.device.cuda import CudaDevice\n"
        "device = CudaDevice(); tensor = device.load(oracle.random_tensor(1, (4, 4, 8, 8))); print(tensor.nbytes)\n"
    )
    assert _ran(code) == "4096"


def _ran(code: str) -> str:
    env = {"PYTHONPATH": str(ROOT), **cuda.environment()}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" or "has failed" in done.stderr
    return done.stdout.strip()
