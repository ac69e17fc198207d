"""The CPU: the library's own arithmetic, on the threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sharednorm.config import Array, LayerConfig, LayerKind, Vector, check_dtype
from sharednorm.normalization import Arithmetic, arithmetic, num_threads, set_num_threads
from sharednorm.state import LayerState, Moments, blank_state
from sharednorm_server.device import DeviceTensor, TrainedBatch


@dataclass(frozen=True)
class CpuTensor:
    """A tensor in this process's memory, referenced and not copied."""

    array: Array
    dtype_name: str

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self.array.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.array.shape


class CpuDevice:
    """Computes with one implementation of the arithmetic.

    Args:
        implementation: The arithmetic; None for the one that `sharednorm.normalization` chooses.
        threads: Threads that one computation uses; None for one a CPU of this process.
    """

    def __init__(self, implementation: Arithmetic | None = None, threads: int | None = None) -> None:
        if threads is not None:
            set_num_threads(threads)
        self._arithmetic = arithmetic() if implementation is None else implementation
        count = num_threads()
        self.description = f"cpu ({self._arithmetic.name}, {count} thread{'' if count == 1 else 's'})"

    def warm_up(self) -> None:
        """Compile, or load from numba's cache, what the first float32 calls would wait for."""
        config = LayerConfig(LayerKind.BATCH_NORM_2D, maps=1)
        state, x = blank_state(config), self.load(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2))
        batch = self.forward(x, state, config).moments
        self.evaluate(x, state, config)
        self.backward(x, x.array, batch, state.scale, config, input_grad=True)

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Do nothing: this device is there as long as the process is."""

    def close(self) -> None:
        """Do nothing: this device is there as long as the process is."""

    def load(self, x: Array) -> CpuTensor:
        """Reference a tensor.

        Raises:
            UnsupportedDType: Its element type is not float32, float16 or bfloat16.
        """
        return CpuTensor(x, check_dtype(x.dtype))

    def forward(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> TrainedBatch:
        """Normalize a batch by its own statistics, with the state's scale and bias."""
        return TrainedBatch(*self._arithmetic.forward(_array(x), state.scale, state.bias, config.epsilon))

    def normalize_batch(self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch whose moments are known, with the state's scale and bias."""
        return self._arithmetic.normalize(
            _array(x), batch.mean, batch.biased_var, state.scale, state.bias, config.epsilon
        )

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch by the state's running statistics, with its scale and bias."""
        mean, var = state.mean.astype(np.float64), state.var.astype(np.float64)
        return self._arithmetic.normalize(_array(x), mean, var, state.scale, state.bias, config.epsilon)

    def backward(
        self, x: DeviceTensor, grad: Array, batch: Moments, scale: Vector, config: LayerConfig, *, input_grad: bool
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward: of its input (None unless asked for), scale and bias."""
        return self._arithmetic.backward(_array(x), grad, batch, scale, config.epsilon, input_grad=input_grad)


def _array(x: DeviceTensor) -> Array:
    if not isinstance(x, CpuTensor):
        raise TypeError(f"{type(x).__name__} was not loaded by this device")
    return x.array
