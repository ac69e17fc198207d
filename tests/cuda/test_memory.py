"""Memory of the GPU: what is held, what is given back, and what happens when there is no more."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import StateUpdate, blank_state
from sharednorm.core.types import LayerKind
from sharednorm.errors import DeviceOutOfMemory, InputEvicted
from sharednorm_server.device.base import Device
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import BackwardCall, ForwardCall, LayerKey
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.memory import MemoryStore
from tests.emulation.load import fail
from tests.support import oracle
from tests.support.kernels import cuda

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 4)
SHAPE = (4, 4, 64, 64)
TENSOR_BYTES = 4 * 4 * 64 * 64 * 4
KEY = LayerKey("default", "bn")


@pytest.fixture
def small() -> Iterator[Device]:
    """A GPU of which no more than five tensors and a little may be used."""
    cuda.prepare()
    from sharednorm_server.device.cuda.device import CudaDevice

    device = CudaDevice(memory_bytes=5 * TENSOR_BYTES + (64 << 10))
    yield device
    cuda.mend()
    device.close()


def settled(device: Device) -> int:
    """Return what is used once everything that is to be given back has been."""
    gc.collect()
    return device.used_bytes  # handed in behind every release


def service_on(device: Device, activation_cache_bytes: int = 1 << 30) -> LayerService:
    service = LayerService(MemoryStore(), Placement(device), activation_cache_bytes)
    service.create_layer(KEY, CONFIG, StateUpdate(), sscale=0.0, empty=False)
    return service


def test_everything_is_given_back(device: Device) -> None:
    x = oracle.random_tensor(1, SHAPE)
    state = blank_state(CONFIG)
    for _ in range(20):
        tensor = device.load(x)
        trained = device.forward(tensor, state, CONFIG)
        device.backward(tensor, device.load(x), trained.moments, state.scale, CONFIG, input_grad=True)
        device.normalize_batch(tensor, trained.moments, state, CONFIG).array()
        list(device.evaluate(tensor, state, CONFIG).parts(1 << 20))
    assert TENSOR_BYTES <= settled(device) < TENSOR_BYTES + 4096  # the last tensor, and a few vectors
    del tensor, trained, state
    assert settled(device) < 256


def test_what_no_longer_has_a_step_has_no_copy(device: Device) -> None:
    # A step leaves statistics on the GPU; those of the step before go with the state that they belonged to.
    service = service_on(device)
    used = []
    for seed in range(30):
        service.forward(ForwardCall(KEY), oracle.random_tensor(seed, SHAPE))
        used.append(settled(device))
    assert max(used[5:]) - min(used[5:]) < 1024


def test_inputs_that_are_kept_make_room(small: Device) -> None:
    service = service_on(small)
    answers = [
        service.forward(ForwardCall(KEY, keep_input=True), oracle.random_tensor(seed, SHAPE)) for seed in range(12)
    ]
    assert all(answer.saved_input for answer in answers)
    assert service.get_layer(KEY).state.version == 12
    grad = oracle.random_tensor(20, SHAPE)
    assert service.backward(BackwardCall(KEY, answers[-1].saved_input), grad).grad is not None
    with pytest.raises(InputEvicted):
        service.backward(BackwardCall(KEY, answers[0].saved_input), grad)


def test_a_call_without_room_is_refused_and_changes_nothing(small: Device) -> None:
    service = service_on(small)
    x = oracle.random_tensor(1, SHAPE)
    service.forward(ForwardCall(KEY), x)
    before = service.get_layer(KEY)
    for shape in ((12, 4, 64, 64), (24, 4, 64, 64)):  # no room for the output, and not for the input
        with pytest.raises(DeviceOutOfMemory, match=r"has no room for this call: \d+ bytes are needed, \d+ of \d+"):
            service.forward(ForwardCall(KEY), oracle.random_tensor(2, shape))
        assert service.get_layer(KEY) is before
    assert settled(small) < 1024
    assert service.forward(ForwardCall(KEY), x).version == 2


@pytest.mark.skipif(cuda.REAL, reason="the failure is the emulated driver's: they need PyCUDA on it")
def test_a_driver_without_memory(small: Device) -> None:
    service = service_on(small)
    x = oracle.random_tensor(1, SHAPE)
    service.forward(ForwardCall(KEY, keep_input=True), x)
    fail("allocation:1+")
    with pytest.raises(DeviceOutOfMemory, match="its memory is full"):
        service.forward(ForwardCall(KEY), oracle.random_tensor(2, (8, 4, 64, 64)))
    fail()
    assert service.get_layer(KEY).state.version == 1
    assert service.forward(ForwardCall(KEY), x).version == 2


@pytest.mark.skipif(cuda.REAL, reason="the failure is the emulated driver's: they need PyCUDA on it")
def test_pinned_memory_that_is_not_to_be_had(small: Device) -> None:
    fail("allocation:2+")  # the first is the tensor's own
    with pytest.raises(DeviceOutOfMemory):
        small.load(oracle.random_tensor(1, SHAPE))
    fail()
    assert small.load(oracle.random_tensor(1, SHAPE)).nbytes == TENSOR_BYTES


def test_many_threads_share_few_chunks(device: Device) -> None:
    # 24 threads, each with a tensor of three chunks, of which there are 16: each gets its own numbers.
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 1)
    state, failures = blank_state(config), []

    def work(number: int) -> None:
        x = np.full((3, 1, 1024, 1000), float(number), np.float32)
        x[0] += 1
        moments = device.forward(device.load(x), state, config).moments
        if abs(float(moments.mean[0]) - number - 1 / 3) > 1e-6:
            failures.append((number, moments.mean))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert settled(device) < 4096


def test_an_idle_device_holds_nothing_of_the_last_call(device: Device) -> None:
    device.forward(device.load(oracle.random_tensor(1, SHAPE)), blank_state(CONFIG), CONFIG)
    end = time.monotonic() + 5
    while settled(device) > 256 and time.monotonic() < end:
        time.sleep(0.01)
    assert settled(device) <= 256


@pytest.mark.skipif(cuda.REAL, reason="the counts are the emulated driver's: they need PyCUDA on it")
def test_a_closed_device_leaves_nothing() -> None:
    cuda.prepare()
    from sharednorm_server.device.cuda.device import CudaDevice

    before = cuda.held()
    device = CudaDevice()
    tensor = device.load(oracle.random_tensor(1, SHAPE))
    device.forward(tensor, blank_state(CONFIG), CONFIG)
    device.close()
    assert cuda.held() == before
    device.close()
    with pytest.raises(RuntimeError, match="cuda:0 has been closed"):
        device.load(oracle.random_tensor(1, SHAPE))
