"""A GPU: the kernels of `sharednorm_kernels`, through PyCUDA.

Tensors pass through pinned memory (`staging`) to the GPU's memory and streams (`context`), which belong to one
thread (`worker`); what is launched there is `launches`. Here the calls of the other threads become its
tasks.
"""

from __future__ import annotations

import atexit
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
import pycuda.driver as cuda

from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.dtypes import check_dtype, dtype_of
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, RunningAverages, batch_weight, blank_state
from sharednorm.core.types import Array, LayerKind, Vector
from sharednorm.errors import LimitExceeded, SharedNormError
from sharednorm_kernels import DeviceLimits, FatbinMissing, Plan, fatbin, plan
from sharednorm_server.device.base import DeviceFault, DeviceTensor, Gradients, Output, TrainedBatch
from sharednorm_server.device.cuda import launches
from sharednorm_server.device.cuda.context import Bytes, DeviceBuffer, Gpu, Part
from sharednorm_server.device.cuda.launches import Affine, Statistics
from sharednorm_server.device.cuda.staging import Staging
from sharednorm_server.device.cuda.tensors import Computed, CudaIncoming, CudaOutput, CudaTensor
from sharednorm_server.device.cuda.worker import CudaWorker, Issued
from sharednorm_server.errors import StartError

LEAST_CAPABILITY = (8, 0)
_CLOSE_SECONDS = 5.0

# Of an output that come back with the facts: all of a small one, and a large one gets the chunk free again soon.
_FIRST_BYTES = 1 << 20

# Bytes a map: float64 mean and m2, then float32 running mean and variance; float32 gradients of scale and bias.
_MOMENTS, _FACTS, _PARAM_GRADS = 16, 24, 8


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

    def receive(self, shape: tuple[int, ...], dtype_name: str, *, train: bool) -> CudaIncoming:
        """Make room for a tensor that arrives bit by bit, and copy each chunk as soon as it is full.

        Raises:
            LimitExceeded: The kernels cannot compute with a tensor of that shape.
            DeviceOutOfMemory: The GPU has no room for it.
        """
        del train  # the kernels read the whole at once, from memory that is a hundred times faster than a network
        dtype = dtype_of(dtype_name)
        how = _plan(shape, dtype.itemsize, self._limits)
        nbytes = math.prod(shape) * dtype.itemsize
        buffer = self._worker.call(lambda gpu: gpu.allocate(nbytes))
        return CudaIncoming(CudaTensor(buffer, shape, dtype_name, how, self), self._staging)

    def receive_gradient(self, x: DeviceTensor, batch: Moments) -> CudaIncoming:
        """Make room for the gradient of a forward of `x`; raises what `receive` raises."""
        del batch
        return self.receive(x.shape, x.dtype_name, train=False)

    def receive_input(self, grad: DeviceTensor, batch: Moments) -> CudaIncoming:
        """Make room for the input of a forward whose gradient is here; raises what `receive` raises."""
        del batch
        return self.receive(grad.shape, grad.dtype_name, train=False)

    def forward(
        self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> TrainedBatch:
        """Normalize a batch by its own statistics, with the state's scale and bias."""
        tensor, maps = self._own(x), config.maps
        weight = batch_weight(state, config)

        def compute(gpu: Gpu, y: int, facts: int) -> None:
            statistics = Statistics(
                gpu.vector(state.mean), gpu.vector(state.var),
                facts + _MOMENTS * maps, facts + (_MOMENTS + 4) * maps, weight,
            )  # fmt: skip
            launches.forward(gpu, tensor.tensors(gpu), _affine(gpu, state, config), statistics, y, facts)

        output, facts, read = self._run(compute, tensor, tensor.nbytes, _FACTS * maps)
        mean, m2 = read[: _MOMENTS * maps].view(np.float64).reshape(2, maps)
        statistics = RunningAverages(*read[_MOMENTS * maps :].view(np.float32).reshape(2, maps).copy())
        self._worker.post(partial(_adopt, statistics, facts, maps))
        batch = Moments(tensor.plan.view.count, mean, m2)
        return TrainedBatch(CudaOutput(tensor, output, self._staging, out), batch, statistics)

    def normalize_batch(
        self, x: DeviceTensor, batch: Moments, state: LayerState, config: LayerConfig, out: Array | None = None
    ) -> Output:
        """Normalize a batch whose moments are known, with the state's scale and bias."""
        tensor = self._own(x)

        def compute(gpu: Gpu, y: int, _: int) -> None:
            moments = gpu.upload(_packed(batch))
            launches.normalize(gpu, tensor.tensors(gpu), _affine(gpu, state, config), moments, y)

        output, *_ = self._run(compute, tensor, tensor.nbytes)
        return CudaOutput(tensor, output, self._staging, out)

    def evaluate(self, x: DeviceTensor, state: LayerState, config: LayerConfig, out: Array | None = None) -> Output:
        """Normalize a batch by the state's running statistics, with its scale and bias."""
        tensor = self._own(x)

        def compute(gpu: Gpu, y: int, _: int) -> None:
            mean, var = gpu.vector(state.mean), gpu.vector(state.var)
            launches.evaluate(gpu, tensor.tensors(gpu), _affine(gpu, state, config), mean, var, y)

        output, *_ = self._run(compute, tensor, tensor.nbytes)
        return CudaOutput(tensor, output, self._staging, out)

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
        tensor, upper, maps = self._own(x), self._own(grad), config.maps

        def compute(gpu: Gpu, dx: int, params: int) -> None:
            launches.backward(
                gpu, tensor.tensors(gpu), gpu.wait_for_copies_into(upper.buffer), gpu.upload(_packed(batch)),
                gpu.vector(scale), config.epsilon, dx if input_grad else None, params,
            )  # fmt: skip

        output, _, read = self._run(compute, tensor, tensor.nbytes if input_grad else 0, _PARAM_GRADS * maps)
        upper.settle()
        scale_grad, bias_grad = read.view(np.float32).reshape(2, maps)
        dx = CudaOutput(tensor, output, self._staging, out) if input_grad else None
        return Gradients(dx, scale_grad, bias_grad)

    def _run(
        self, compute: Callable[[Gpu, int, int], None], tensor: CudaTensor, output_bytes: int, facts_bytes: int = 0
    ) -> tuple[Computed, DeviceBuffer, Bytes]:
        """Have something computed, and bring back the facts, and as much of the output as comes with them.

        Args:
            compute: Launches it, given the addresses of the output and of the facts.
            tensor: What it reads.
            output_bytes: Size of the output; 0: there is none.
            facts_bytes: Size of what else it writes.

        Returns:
            The output; the facts, on the GPU and here.
        """
        chunk = self._staging.take()
        # What fits into the chunk beside the facts comes with them; for a small tensor that is all.
        first = min(output_bytes, chunk.nbytes - facts_bytes, _FIRST_BYTES)

        def task(gpu: Gpu) -> Issued[tuple[DeviceBuffer, DeviceBuffer]]:
            out, facts = gpu.allocate(output_bytes or 1), gpu.allocate(facts_bytes or 1)
            compute(gpu, out.address, facts.address)
            mark = gpu.copy_out([Part(facts, 0, facts_bytes), Part(out, 0, first)], chunk)
            return Issued(mark, (out, facts))

        future: Future[tuple[DeviceBuffer, DeviceBuffer]] | None = None
        try:
            future = self._worker.submit(task)
            out, facts = future.result()
            read = chunk[: facts_bytes + first].copy()
        finally:
            self._staging.give_back(chunk, after=future)
            del future  # one that failed refers to this frame
        tensor.settle()
        computed = Computed(out if first < output_bytes else None, output_bytes, read[facts_bytes:])
        return computed, facts, read[:facts_bytes]

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
        grads = self.backward(tensor, self.load(grad), trained.moments, state.scale, config, input_grad=True)
        reference = arithmetic("numpy")
        output, moments = reference.forward(x, state.scale, state.bias, config.epsilon)
        expected = (output, moments.mean, moments.m2, *reference.backward(
            x, grad, moments, state.scale, config.epsilon, input_grad=True
        ))  # fmt: skip
        dx = None if grads.input is None else grads.input.array()
        actual = (trained.output.array(), trained.moments.mean, trained.moments.m2, dx, grads.scale, grads.bias)
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


def _bytes_of(array: Array) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _packed(batch: Moments) -> npt.NDArray[np.float64]:
    return np.concatenate([batch.mean, batch.m2])


def _affine(gpu: Gpu, state: LayerState, config: LayerConfig) -> Affine:
    return Affine(gpu.vector(state.scale), gpu.vector(state.bias), config.epsilon)


def _adopt(statistics: RunningAverages, facts: DeviceBuffer, maps: int, gpu: Gpu) -> None:
    gpu.adopt(statistics.mean, facts, _MOMENTS * maps)
    gpu.adopt(statistics.var, facts, (_MOMENTS + 4) * maps)
