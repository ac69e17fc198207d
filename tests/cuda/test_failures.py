"""A launch that is refused, and a GPU that is lost: nothing is committed, everybody hears of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import sharednorm
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import StateUpdate
from sharednorm.core.types import LayerKind
from sharednorm.errors import DeviceOutOfMemory, InternalError, ServerUnavailable
from sharednorm_server.cli.main import DEVICE_LOST
from sharednorm_server.device.base import Device, DeviceFault
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import ForwardCall, LayerKey
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.memory import MemoryStore
from tests.emulation.load import fail
from tests.emulation.process import run
from tests.support import oracle
from tests.support.kernels import cuda
from tests.support.processes.distributions import ROOT
from tests.support.processes.server import in_process, server_process

pytestmark = pytest.mark.skipif(cuda.REAL, reason="the failures are the emulated driver's: they need PyCUDA on it")

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 4)
SHAPE = (4, 4, 8, 8)
KEY = LayerKey("default", "bn")


@pytest.fixture
def breakable(device: Device) -> Iterator[Device]:
    """A GPU whose failures end with the test."""
    yield device
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
    with in_process(service=service_on(breakable)) as server, sharednorm.connect(server.address, timeout=2) as hub:
        bn = hub.layer("bn")
        fail("launch:1")
        with pytest.raises(InternalError) as caught:
            bn(oracle.random_tensor(1, SHAPE))
        assert "resources" not in str(caught.value)
        bn(oracle.random_tensor(1, SHAPE))
        assert bn.numOfProps == 1


@pytest.mark.parametrize("transport", ["direct", "grpc"])
def test_a_call_that_fails_while_its_tensor_arrives_leaves_the_connection_to_the_next(
    breakable: Device, transport: str
) -> None:
    x = oracle.random_tensor(1, (8, 4, 256, 256))  # several steps: the first finds no memory on its way to the GPU
    service = service_on(breakable)
    with (
        in_process(service=service) as server,
        sharednorm.connect(server.address, transport=transport, timeout=2) as hub,
    ):
        bn = hub.layer("bn")
        for _ in range(3):
            fail("allocation:2+")  # the first is the tensor's own
            with pytest.raises(DeviceOutOfMemory):
                bn(x)
            fail()
        assert bn.numOfProps == 0
        bn(x)
        assert bn.numOfProps == 1


def test_what_a_lost_gpu_is_to_those_who_use_it() -> None:
    settings = {"SHAREDNORM_LEFT_OUT": "nothing", "PYTEST_ADDOPTS": "-p no:xdist"}
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/lost_gpu.py"], settings=settings)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "6 passed" in done.stdout


def test_a_server_that_loses_its_gpu_ends_with_its_own_exit_code() -> None:
    # Enough launches for the start, its check of the kernels included, and for the first forward.
    env = {**cuda.environment(), "SHAREDNORM_EMULATED_FAIL": "fault:12"}
    with server_process("--device", "cuda", env=env) as server, sharednorm.connect(server.address, timeout=2) as hub:
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


def test_the_process_of_a_lost_gpu_ends_in_order_also_without_a_server() -> None:
    code = (
        "from tests.support import oracle; from tests.support.kernels import cuda; cuda.prepare()\n"
        "from sharednorm_server.device.cuda.device import CudaDevice\n"
        "from tests.emulation.load import fail\n"
        "device = CudaDevice(); fail('lost:1')\n"
        "try: device.load(oracle.random_tensor(1, (4, 4, 8, 8)))\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    assert _ran(code) == "DeviceLost"


def test_a_gpu_that_is_lost_while_nobody_uses_it_is_closed_in_order() -> None:
    code = (
        "from tests.support import oracle; from tests.support.kernels import cuda; cuda.prepare()\n"
        "from sharednorm_server.device.cuda.device import CudaDevice\n"
        "from tests.emulation.load import fail\n"
        "device = CudaDevice(); tensor = device.load(oracle.random_tensor(1, (4, 4, 8, 8))); device.used_bytes\n"
        "fail('lost:1'); device.close(); print('closed')\n"
    )
    assert _ran(code) == "closed"


def test_a_device_that_nobody_closes_is_closed_at_exit() -> None:
    code = (
        "from tests.support import oracle; from tests.support.kernels import cuda; cuda.prepare()\n"
        "from sharednorm_server.device.cuda.device import CudaDevice\n"
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
