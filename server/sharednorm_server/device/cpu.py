"""The CPU: the library's own arithmetic, on the threads of this process.

A tensor that arrives bit by bit is reduced as it does, and an output that is asked for in parts is computed part by
part, each while it is in the processor's cache; both give the bits that the whole would.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from sharednorm.arithmetic.base import Arithmetic, ArrivingGradient, ArrivingInput, WriteRange
from sharednorm.arithmetic.select import arithmetic
from sharednorm.arithmetic.thread_pool import num_threads, set_num_threads
from sharednorm.core.arrays import results
from sharednorm.core.dtypes import check_dtype, dtype_of
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, blank_state
from sharednorm.core.types import Array, LayerKind, Vector, Wide
from sharednorm.errors import LimitExceeded
from sharednorm_server.device.base import DeviceTensor, Gradients, Output, TrainedBatch


@dataclass(frozen=True)
class CpuTensor:
    """A tensor in this process's memory, referenced and not copied."""

    array: Array
    dtype_name: str
    moments: Moments | None = field(default=None, compare=False)  # of one that arrived for a forward
    gradient: ArrivingGradient | None = field(default=None, compare=False)  # of one that arrived for a backward

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
        implementation: The arithmetic; None for the one that `arithmetic()` chooses.
        threads: Threads that one computation uses; None for one a CPU of this process.
    """

    def __init__(self, implementation: Arithmetic | None = None, threads: int | None = None) -> None:
        if threads is not None:
            set_num_threads(threads)
        self._arithmetic = arithmetic() if implementation is None else implementation
        count = num_threads()
        self.used_bytes = 0  # its memory is the process's
        self.description = f"cpu ({self._arithmetic.name}, {count} thread{'' if count == 1 else 's'})"

    def warm_up(self) -> None:
        """Compile, or load from numba's cache, what the first float32 calls would wait for."""
        config = LayerConfig(LayerKind.BATCH_NORM_2D, maps=1)
        values = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
        state, x = blank_state(config), self.load(values)
        batch = self.forward(x, state, config).moments
        list(self.evaluate(x, state, config).parts(16))
        arriving = self._arithmetic.arriving_gradient(values, values, batch)
        arriving.parameter_gradients(state.scale, config.epsilon)
        arriving.write(0, 4, np.empty(4, np.float32))

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

    def receive(self, shape: tuple[int, ...], dtype_name: str, *, train: bool) -> CpuIncoming:
        """Make room for a tensor that arrives bit by bit, and take its moments meanwhile if `train`.

        Raises:
            LimitExceeded: There is no memory for it.
        """
        array = _room(shape, dtype_name)
        return CpuIncoming(array, moments=self._arithmetic.arriving(array) if train else None)

    def receive_gradient(self, x: DeviceTensor, batch: Moments) -> CpuIncoming:
        """Make room for the gradient of a forward of `x`, and take the backward's sums as it arrives.

        Raises:
            LimitExceeded: There is no memory for it.
        """
        array = _room(x.shape, x.dtype_name)
        return CpuIncoming(array, gradient=self._arithmetic.arriving_gradient(_own(x).array, array, batch))

    def receive_input(self, grad: DeviceTensor, batch: Moments) -> CpuIncoming:
        """Make room for the input of a forward whose gradient is here, and take the backward's sums as it arrives.

        Raises:
            LimitExceeded: There is no memory for it.
        """
        array = _room(grad.shape, grad.dtype_name)
        return CpuIncoming(array, gradient=self._arithmetic.arriving_gradient(array, _own(grad).array, batch))

    def forward(
        self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> TrainedBatch:
        """Normalize a batch by its own statistics, with the state's scale and bias."""
        tensor = _own(x)
        if tensor.moments is not None:
            return TrainedBatch(self.normalize_batch(x, tensor.moments, state, config, out), tensor.moments)
        data, moments = self._arithmetic.forward(tensor.array, state.scale, state.bias, config.epsilon, out)
        return TrainedBatch(_Whole(data, tensor.dtype_name), moments)

    def normalize_batch(
        self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> Output:
        """Normalize a batch whose moments are known, with the state's scale and bias."""
        return self._normalize(_own(x), batch.mean, batch.biased_var, state, config, out)

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None) -> Output:
        """Normalize a batch by the state's running statistics, with its scale and bias."""
        mean, var = state.mean.astype(np.float64), state.var.astype(np.float64)
        return self._normalize(_own(x), mean, var, state, config, out)

    def backward(
        self,
        x: DeviceTensor,
        grad: DeviceTensor,
        batch: Moments,
        scale: Vector,
        config: LayerConfig,
        *,
        input_grad: bool,
        out: Array | None = None,
    ) -> Gradients:
        """Return the gradients of a training forward."""
        inputs, grads = _own(x), _own(grad)
        arrived = inputs.gradient or grads.gradient  # of the one that came bit by bit, beside the other
        if arrived is not None:
            vectors = arrived.parameter_gradients(scale, config.epsilon)
            if not input_grad:
                return Gradients(None, *vectors)

            def whole() -> Array:
                result = results.empty(inputs.shape, inputs.array.dtype) if out is None else out
                arrived.write(0, result.size, result.reshape(-1))
                return result

            return Gradients(_Parts(inputs, lambda: arrived.write, whole), *vectors)
        data, scale_grad, bias_grad = self._arithmetic.backward(
            inputs.array, grads.array, batch, scale, config.epsilon, input_grad=input_grad, out=out
        )
        return Gradients(None if data is None else _Whole(data, inputs.dtype_name), scale_grad, bias_grad)

    def _normalize(
        self, x: CpuTensor, mean: Wide, var: Wide, state: LayerState, config: LayerConfig, out: Array | None
    ) -> Output:
        by = (x.array, mean, var, state.scale, state.bias, config.epsilon)
        return _Parts(x, lambda: self._arithmetic.normalizing(*by), lambda: self._arithmetic.normalize(*by, out))


class CpuIncoming:
    """A tensor that arrives in memory of its own."""

    def __init__(
        self, array: Array, *, moments: ArrivingInput | None = None, gradient: ArrivingGradient | None = None
    ) -> None:
        self._array = array
        self._moments, self._gradient = moments, gradient
        self._memory = array.reshape(-1).view(np.uint8).data
        self._there = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self._array.nbytes

    def space(self, most: int) -> memoryview:
        """Return memory for the next bytes."""
        return self._memory[self._there : self._there + most]

    def filled(self, nbytes: int) -> None:
        """Reduce what can be reduced now that so many more bytes are there."""
        self._there += nbytes
        arriving = self._moments or self._gradient
        if arriving is not None:
            arriving.arrived(self._there // self._array.itemsize)

    def finish(self) -> CpuTensor:
        """Return the tensor, when all bytes have been filled in."""
        moments = self._moments.moments() if self._moments is not None else None
        return CpuTensor(self._array, check_dtype(self._array.dtype), moments, self._gradient)


class _Whole:
    """An output that is there."""

    def __init__(self, data: Array, dtype_name: str) -> None:
        self.dtype_name = dtype_name
        self._data = data

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._data.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self._data.nbytes

    def array(self) -> Array:
        """Return it."""
        return self._data

    def parts(self, most: int) -> Iterator[memoryview]:
        """Give its bytes in order."""
        data = self._data.reshape(-1).view(np.uint8).data
        for begin in range(0, data.nbytes, most):
            yield data[begin : begin + most]


class _Parts:
    """An output of the shape and type of a tensor, that is computed in parts."""

    def __init__(self, like: CpuTensor, write: Callable[[], WriteRange], whole: Callable[[], Array]) -> None:
        self.dtype_name = like.dtype_name
        self._like = like.array
        self._write = write
        self._whole = whole

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._like.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self._like.nbytes

    def array(self) -> Array:
        """Compute the whole."""
        return self._whole()

    def parts(self, most: int) -> Iterator[memoryview]:
        """Compute its bytes in order, in memory that stays in the processor's cache."""
        write = self._write()
        size, step = self._like.size, most // self._like.itemsize
        room = np.empty(min(size, step), self._like.dtype)
        memory = room.view(np.uint8).data
        for begin in range(0, size, step):
            end = min(begin + step, size)
            write(begin, end, room[: end - begin])
            yield memory[: (end - begin) * room.itemsize]


def _room(shape: tuple[int, ...], dtype_name: str) -> Array:
    # Address space, if it is new, which becomes memory page by page as bytes arrive: a client that declares gigabytes
    # and sends little costs little.
    try:
        return results.empty(shape, dtype_of(dtype_name))
    except MemoryError as error:
        raise LimitExceeded(
            f"no memory for a {dtype_name} tensor of shape {shape} ({math.prod(shape)} values)", {"limit": "memory"}
        ) from error


def _own(x: DeviceTensor) -> CpuTensor:
    if not isinstance(x, CpuTensor):
        raise TypeError(f"{type(x).__name__} was not loaded by this device")
    return x
