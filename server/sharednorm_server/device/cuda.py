"""A GPU: the kernels of `sharednorm_kernels`, through PyCUDA.

Tensors pass through pinned memory (`_cuda_staging`) to the GPU's memory and streams (`_cuda_gpu`), which belong to one
thread (`_cuda_worker`); what is launched there is `_cuda_compute`. Here the calls of the other threads become its
tasks.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import pycuda.driver as cuda

from sharednorm.config import Array, LayerConfig, LayerKind, Vector, check_dtype, dtype_of
from sharednorm.errors import LimitExceeded, SharedNormError
from sharednorm.normalization import arithmetic
from sharednorm.state import LayerState, Moments, RunningStatistics, batch_weight, blank_state
from sharednorm_kernels import DeviceLimits, FatbinMissing, Plan, fatbin, plan
from sharednorm_server.config import StartError
from sharednorm_server.device import DeviceFault, DeviceTensor, TrainedBatch, _cuda_compute
from sharednorm_server.device._cuda_compute import Affine, Statistics, Tensors
from sharednorm_server.device._cuda_gpu import Bytes, DeviceBuffer, Gpu, Part
from sharednorm_server.device._cuda_staging import Staging
from sharednorm_server.device._cuda_worker import CudaWorker, Issued

LEAST_CAPABILITY = (8, 0)
_CLOSE_SECONDS = 5.0

# Bytes a map: float64 mean and m2, then float32 running mean and variance; float32 gradients of scale and bias.
_MOMENTS, _FACTS, _PARAM_GRADS = 16, 24, 8


@dataclass(frozen=True, eq=False)
class CudaTensor:
    """A tensor in a GPU's memory, or on its way there."""

    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype_name: str
    plan: Plan
    owner: CudaDevice
    uploads: list[Future[None]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self.buffer.nbytes

    def settle(self) -> None:
        """Raise what went wrong on its way; only after a computation has used it, so that all has happened."""
        while self.uploads:
            self.uploads.pop().result()

    def tensors(self, gpu: Gpu) -> Tensors:
        """Return it for the computations of a task, which wait until it has come."""
        return Tensors(self.plan, self.dtype_name, gpu.wait_for_copies_into(self.buffer))


class CudaDevice:
    """Computes on one GPU.

    Args:
        ordinal: Its number.
        memory_bytes: Most bytes of its memory to use; None for nine tenths of what is free now.

    Raises:
        StartError: It is not there or cannot be used; the message says what is missing.
    """

    def __init__(self, ordinal: int = 0, memory_bytes: int | None = None) -> None:
        name = f"cuda:{ordinal}"
        image = _image()
        self._worker = CudaWorker(name, lambda post: _open(name, ordinal, image, memory_bytes, post))
        self._staging = Staging(self._worker)
        self.description, self._limits = self._worker.call(lambda gpu: (gpu.name, gpu.limits))
        atexit.register(self.close)

    @property
    def used_bytes(self) -> int:
        """Bytes of the GPU's memory that are held now."""
        return self._worker.call(lambda gpu: gpu.used)

    def warm_up(self) -> None:
        """Launch kernels of each kind once, and see that this GPU computes what it should.

        Raises:
            StartError: It does not.
        """
        for shape in ((2, 3, 5, 7), (8, 2, 64, 64)):
            try:
                right = self._computes_right(shape)
            except (DeviceFault, SharedNormError) as error:
                raise StartError(f"{self.description} cannot be used: {error}") from error
            if not right:
                raise StartError(
                    f"{self.description} computes wrong results for the shape {shape}: please report this, and pass "
                    "--device cpu"
                )

    def on_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called, from any thread, once the GPU has failed for good; it gets the reason."""
        self._worker.on_lost(callback)

    def close(self) -> None:
        """Give the GPU back, after the last call. A lost one stays as it is until the process ends."""
        atexit.unregister(self.close)
        if self._worker.lost or self._staging.wait_idle(_CLOSE_SECONDS):
            self._worker.close()
        else:
            self._worker.abandon()

    def load(self, x: Array) -> CudaTensor:
        """Bring a tensor to the GPU.

        Raises:
            UnsupportedDType: Its element type is not float32, float16 or bfloat16.
            LimitExceeded: The kernels cannot compute with a tensor of that shape.
            DeviceOutOfMemory: The GPU has no room for it.
        """
        dtype_name = check_dtype(x.dtype)
        how = _plan(x.shape, x.dtype.itemsize, self._limits)
        buffer = self._worker.call(lambda gpu: gpu.allocate(x.nbytes))
        return CudaTensor(buffer, x.shape, dtype_name, how, self, self._staging.upload(_bytes_of(x), buffer))

    def forward(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> TrainedBatch:
        """Normalize a batch by its own statistics, with the state's scale and bias."""
        tensor, maps = self._own(x), config.maps
        weight = batch_weight(state, config)

        def compute(gpu: Gpu, y: int, facts: int) -> None:
            statistics = Statistics(
                gpu.vector(state.mean), gpu.vector(state.var),
                facts + _MOMENTS * maps, facts + (_MOMENTS + 4) * maps, weight,
            )  # fmt: skip
            _cuda_compute.forward(gpu, tensor.tensors(gpu), _affine(gpu, state, config), statistics, y, facts)

        output = _empty(tensor)
        facts, read = self._run(compute, tensor, output, _FACTS * maps)
        mean, m2 = read[: _MOMENTS * maps].view(np.float64).reshape(2, maps)
        statistics = RunningStatistics(*read[_MOMENTS * maps :].view(np.float32).reshape(2, maps).copy())
        self._worker.post(partial(_adopt, statistics, facts, maps))
        return TrainedBatch(output, Moments(tensor.plan.view.count, mean, m2), statistics)

    def normalize_batch(self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch whose moments are known, with the state's scale and bias."""
        tensor = self._own(x)

        def compute(gpu: Gpu, y: int, _: int) -> None:
            moments = gpu.upload(_packed(batch))
            _cuda_compute.normalize(gpu, tensor.tensors(gpu), _affine(gpu, state, config), moments, y)

        output = _empty(tensor)
        self._run(compute, tensor, output)
        return output

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig) -> Array:
        """Normalize a batch by the state's running statistics, with its scale and bias."""
        tensor = self._own(x)

        def compute(gpu: Gpu, y: int, _: int) -> None:
            mean, var = gpu.vector(state.mean), gpu.vector(state.var)
            _cuda_compute.evaluate(gpu, tensor.tensors(gpu), _affine(gpu, state, config), mean, var, y)

        output = _empty(tensor)
        self._run(compute, tensor, output)
        return output

    def backward(
        self, x: DeviceTensor, grad: Array, batch: Moments, scale: Vector, config: LayerConfig, *, input_grad: bool
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward: of its input (None unless asked for), scale and bias."""
        tensor, upper, maps = self._own(x), self.load(grad), config.maps

        def compute(gpu: Gpu, dx: int, params: int) -> None:
            _cuda_compute.backward(
                gpu, tensor.tensors(gpu), gpu.wait_for_copies_into(upper.buffer), gpu.upload(_packed(batch)),
                gpu.vector(scale), config.epsilon, dx if input_grad else None, params,
            )  # fmt: skip

        output = _empty(tensor) if input_grad else None
        _, read = self._run(compute, tensor, output, _PARAM_GRADS * maps)
        upper.settle()
        scale_grad, bias_grad = read.view(np.float32).reshape(2, maps)
        return output, scale_grad, bias_grad

    def _run(
        self, compute: Callable[[Gpu, int, int], None], tensor: CudaTensor, output: Array | None, facts_bytes: int = 0
    ) -> tuple[DeviceBuffer, Bytes]:
        """Have something computed, and bring back what came out.

        Args:
            compute: Launches it, given the addresses of the output and of the facts.
            tensor: What it reads.
            output: Where the output goes; None: there is none.
            facts_bytes: Size of what else it writes.

        Returns:
            The facts, on the GPU and here.
        """
        data = _bytes_of(output) if output is not None else np.empty(0, np.uint8)
        chunk = self._staging.take()
        # What fits into the chunk beside the facts comes with them; for a small tensor that is all.
        first = min(data.nbytes, chunk.nbytes - facts_bytes)

        def task(gpu: Gpu) -> Issued[tuple[DeviceBuffer, DeviceBuffer]]:
            out, facts = gpu.allocate(data.nbytes or 1), gpu.allocate(facts_bytes or 1)
            compute(gpu, out.address, facts.address)
            mark = gpu.copy_out([Part(facts, 0, facts_bytes), Part(out, 0, first)], chunk)
            return Issued(mark, (out, facts))

        future: Future[tuple[DeviceBuffer, DeviceBuffer]] | None = None
        try:
            future = self._worker.submit(task)
            out, facts = future.result()
            read = chunk[:facts_bytes].copy()
            data[:first] = chunk[facts_bytes : facts_bytes + first]
        finally:
            self._staging.give_back(chunk, after=future)
            del future  # one that failed refers to this frame
        tensor.settle()
        self._staging.download(out, first, data)
        return facts, read

    def _own(self, x: DeviceTensor) -> CudaTensor:
        if not isinstance(x, CudaTensor) or x.owner is not self:
            raise TypeError(f"{type(x).__name__} was not loaded by {self.description}")
        return x

    def _computes_right(self, shape: Sequence[int]) -> bool:
        config = LayerConfig(LayerKind.BATCH_NORM_2D, maps=shape[1])
        random = np.random.default_rng(0)
        x, grad = random.normal(3.0, 2.0, (2, *shape)).astype(np.float32)
        state, tensor = blank_state(config), self.load(x)
        trained = self.forward(tensor, state, config)
        grads = self.backward(tensor, grad, trained.moments, state.scale, config, input_grad=True)
        reference = arithmetic("numpy")
        output, moments = reference.forward(x, state.scale, state.bias, config.epsilon)
        expected = (output, moments.mean, moments.m2, *reference.backward(
            x, grad, moments, state.scale, config.epsilon, input_grad=True
        ))  # fmt: skip
        actual = (trained.output, trained.moments.mean, trained.moments.m2, *grads)
        return all(
            got is not None and wanted is not None and np.allclose(got, wanted, rtol=1e-4, atol=1e-4)
            for got, wanted in zip(actual, expected, strict=True)
        )


def _open(
    name: str, ordinal: int, image: bytes, memory_bytes: int | None, post: Callable[[Callable[[Gpu], None]], None]
) -> Gpu:
    try:
        cuda.init()
        there = [f"cuda:{number} ({cuda.Device(number).name()})" for number in range(cuda.Device.count())]
    except cuda.Error as error:
        raise StartError(f"there is no GPU that can be used: {error} (`sharednorm doctor` says more)") from error
    if ordinal >= len(there):
        raise StartError(f"there is no {name} (available: {', '.join(there) or 'no GPU'})")
    capability = cuda.Device(ordinal).compute_capability()
    if capability < LEAST_CAPABILITY:
        raise StartError(
            f"{there[ordinal]} has compute capability {_dotted(capability)} (expected: {_dotted(LEAST_CAPABILITY)} or "
            "later): pass another --device"
        )
    try:
        return Gpu(ordinal, image, memory_bytes, post)
    except cuda.Error as error:
        raise StartError(f"{there[ordinal]} cannot be used: {error} (`sharednorm doctor` says more)") from error


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _image() -> bytes:
    try:
        return fatbin()
    except FatbinMissing as error:
        raise StartError(str(error)) from error


@lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], itemsize: int, limits: DeviceLimits) -> Plan:
    try:
        return plan(shape, itemsize, limits)
    except ValueError as error:
        raise LimitExceeded(f"the GPU cannot compute with this tensor: {error}", {"limit": "shape"}) from error


def _empty(tensor: CudaTensor) -> Array:
    return np.empty(tensor.shape, dtype_of(tensor.dtype_name))


def _bytes_of(array: Array) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _packed(batch: Moments) -> npt.NDArray[np.float64]:
    return np.concatenate([batch.mean, batch.m2])


def _affine(gpu: Gpu, state: LayerState, config: LayerConfig) -> Affine:
    return Affine(gpu.vector(state.scale), gpu.vector(state.bias), config.epsilon)


def _adopt(statistics: RunningStatistics, facts: DeviceBuffer, maps: int, gpu: Gpu) -> None:
    gpu.adopt(statistics.mean, facts, _MOMENTS * maps)
    gpu.adopt(statistics.var, facts, (_MOMENTS + 4) * maps)
