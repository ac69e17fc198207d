"""A `LayerService` for tests, with devices that let a test act in the middle of a computation."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, StateUpdate
from sharednorm.core.types import Array, LayerKind
from sharednorm_server.device.base import DeviceTensor, Output, TrainedBatch
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import LayerKey, LayerRecord
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.base import AnyStore, CommitHandle
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.records import Note

KEY = LayerKey("default", "bn")
MAPS = 3
CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, MAPS)
SHAPE = (4, MAPS, 5, 2)


class InterruptedDevice(CpuDevice):
    """The CPU device; after each computation of an output it lets the test do something, before it returns.

    Attributes:
        forwards: How often moments were taken.
        renormalized: How often an output was made again from known moments.
        interrupt: What to do; it gets the number of outputs that have been made so far.
    """

    def __init__(self) -> None:
        super().__init__(arithmetic("numpy"))
        self.forwards = 0
        self.renormalized = 0
        self.interrupt: Callable[[int], object] = lambda _: None

    def forward(
        self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> TrainedBatch:
        """Normalize a batch by its own statistics."""
        result = super().forward(x, state, config, out)
        self.forwards += 1
        self.interrupt(self.forwards + self.renormalized)
        return result

    def normalize_batch(
        self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> Output:
        """Normalize a batch whose moments are known."""
        result = super().normalize_batch(x, batch, state, config, out)
        self.renormalized += 1
        self.interrupt(self.forwards + self.renormalized)
        return result


class SlowStore(MemoryStore):
    """A store that takes a while to keep a record, as one with a disk does; whoever forgets a lock shows."""

    def put(self, record: LayerRecord, note: Note | None = None) -> CommitHandle | None:
        """Replace a record, later."""
        time.sleep(0.0005)
        return super().put(record, note)


def new_service(
    device: CpuDevice | None = None, activation_cache_bytes: int = 1 << 20, store: AnyStore | None = None
) -> LayerService:
    """Return a service without layers."""
    return LayerService(
        store or MemoryStore(), Placement(device or CpuDevice(arithmetic("numpy"))), activation_cache_bytes
    )


def create(service: LayerService, key: LayerKey = KEY, config: LayerConfig = CONFIG, **state: object) -> None:
    """Create a layer whose scale is 1, or what the keywords say."""
    update = StateUpdate(**state)  # type: ignore[arg-type]  # a test's shorthand
    service.create_layer(key, config, update, sscale=0.0, empty=False)


def close(
    actual: Array | Output | None, expected: npt.NDArray[np.float64], *, rtol: float = 2e-6, atol: float = 2e-5
) -> None:
    """Check that an array is there and has the expected values."""
    assert actual is not None
    if not isinstance(actual, np.ndarray):
        actual = actual.array()
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=rtol, atol=atol)
