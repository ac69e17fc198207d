"""The arithmetic compiled by numba, on a team of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm.arithmetic.base import WriteRange
from sharednorm.arithmetic.formulas import InputGradient, affine, parameter_gradients
from sharednorm.arithmetic.numba import backward as backward_kernels
from sharednorm.arithmetic.numba import forward as forward_kernels
from sharednorm.arithmetic.numba.tile_access import APPLY, ARRIVED, FINISH, SUMS, UNIT, arrived_items, items_of
from sharednorm.arithmetic.numba.tiling import LANES, Plan, plan_of
from sharednorm.arithmetic.thread_pool import threads
from sharednorm.core.arrays import contiguous, output, placed
from sharednorm.core.dtypes import check_dtype
from sharednorm.core.state import Moments
from sharednorm.core.types import Array, Vector, Wide

# How an element type is told to a kernel; see `simd`.
TAGS: dict[str, Any] = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}

# Below this many values, one thread is done before another has woken up.
INLINE_VALUES = 1 << 18
# From this size on, an output is written past the caches: it would not stay in them anyway, and a write through
# them first reads what it overwrites.
STREAM_BYTES = 1 << 22
# Fused work needs units that share out among the threads with at most this much waiting for the last.
IMBALANCE = 1.25

# Most coefficients that are spread out for parts of a result, one a value; beyond, channels are gone through.
MOST_SPREAD = 1 << 20

NOTHING = np.empty(0, np.float32)


class NumbaArithmetic:
    """`Arithmetic` compiled: several threads, one trip through memory where a channel's values fit in a cache."""

    @property
    def name(self) -> str:
        """Which one: numba."""
        return "numba"

    def moments(self, x: Array) -> Moments:
        """Return the moments of a batch, per channel."""
        source = contiguous(x)
        call = _Forward(source, source, NOTHING, NOTHING, 0.0, wanted=False)
        for task in _tasks(call.plan, threads.count):
            if task != APPLY:
                call.run(task)
        return call.moments

    def normalize(
        self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> Array:
        """Return (x - mean) / sqrt(var + epsilon) * scale + bias, into `out` (which may be x) if given."""
        source = contiguous(x)
        result = output(source, out)
        call = _Forward(source, result, scale, bias, epsilon)
        by = affine(mean, var, scale, bias, epsilon)
        call.hi, call.factor, call.offset = by.hi, by.factor, by.offset
        call.run(APPLY)
        return placed(result, out)

    def forward(
        self, x: Array, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> tuple[Array, Moments]:
        """Return the batch normalized by its own mean and biased variance, into `out` if given, and its moments."""
        source = contiguous(x)
        result = output(source, out)
        call = _Forward(source, result, scale, bias, epsilon)
        for task in _tasks(call.plan, threads.count):
            call.run(task)
        return placed(result, out), call.moments

    def backward(
        self,
        x: Array,
        grad: Array,
        batch: Moments,
        scale: Vector,
        epsilon: float,
        *,
        input_grad: bool = True,
        out: Array | None = None,
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of one forward: of x (None unless `input_grad`), of scale, and of bias."""
        source, grads = contiguous(x), contiguous(grad)
        result = _gradient_output(source, grads, out) if input_grad else None
        call = _Backward(source, grads, result, batch, scale, epsilon)
        for task in _tasks(call.plan, threads.count) if input_grad else (SUMS, FINISH):
            call.run(task)
        placed_result = None if result is None else placed(result, out)
        return placed_result, *parameter_gradients(batch, epsilon, call.sums[0], call.sums[1])

    def gradient_sums(self, x: Array, grad: Array, mean: Wide) -> tuple[Wide, Wide]:
        """Return the sums of `grad` and of `grad * (x - mean)`."""
        # Only the mean matters: the coefficients that come with the sums are nobody's.
        unknown = np.ones(len(mean))
        call = _Backward(
            contiguous(x), contiguous(grad), None, Moments(1, mean, unknown), unknown.astype(np.float32), 1.0
        )
        call.run(SUMS)
        call.run(FINISH)
        return call.sums[0], call.sums[1]

    def differentiate(self, x: Array, grad: Array, by: InputGradient, out: Array | None = None) -> Array:
        """Return the gradient of the input, into `out` if given."""
        source, grads = contiguous(x), contiguous(grad)
        result = _gradient_output(source, grads, out)
        unknown = np.ones(len(by.hi))
        call = _Backward(source, grads, result, Moments(1, unknown, unknown), by.factor, 1.0)
        call.coefficients[:] = by.hi, by.factor, by.slope, by.offset
        call.run(APPLY)
        return placed(result, out)

    def arriving(self, x: Array) -> _ArrivingInput:
        """Return what takes the moments of a tensor while its memory is being filled."""
        return _ArrivingInput(_Forward(x, x, NOTHING, NOTHING, 0.0, wanted=False))

    def arriving_gradient(self, x: Array, grad: Array, batch: Moments) -> _ArrivingGradient:
        """Return a backward of two tensors, the memory of one of which is being filled."""
        return _ArrivingGradient(_Backward(x, grad, None, batch, NOTHING, 0.0), batch)

    def normalizing(self, x: Array, mean: Wide, var: Wide, scale: Vector, bias: Vector, epsilon: float) -> WriteRange:
        """Return what writes parts of a result."""
        plan, by = _plan(x), affine(mean, var, scale, bias, epsilon)
        length = _repeat(plan)
        hi, factor, offset = (_spread(values, plan, length) for values in (by.hi, by.factor, by.offset))

        def write(begin: int, end: int, out: Array) -> None:
            tag, y = TAGS[check_dtype(x.dtype)], _address(out) - begin * x.itemsize
            forward_kernels.apply_range(
                tag, length, plan.channels, plan.space, begin, end, _address(x), y, hi, factor, offset
            )

        return write


class _ArrivingInput:
    """`normalization.ArrivingInput`: the tiles of a forward, in the order in which they become complete."""

    def __init__(self, call: _Forward) -> None:
        self._call = call
        self._done = 0

    def arrived(self, values: int) -> None:
        """Take the moments of the tiles that are complete."""
        ready = arrived_items(self._call.plan, values)
        if ready > self._done:
            self._call.run(ARRIVED, self._done, ready)
            self._done = ready

    def moments(self) -> Moments:
        """Return the moments, when all values are there."""
        self._call.run(FINISH)
        return self._call.moments


class _ArrivingGradient:
    """`normalization.ArrivingGradient`: the tiles of a backward, in the order in which they become complete."""

    def __init__(self, call: _Backward, batch: Moments) -> None:
        self._call = call
        self._batch = batch
        self._done = 0
        self._length = _repeat(call.plan)
        self._coefficients = call.coefficients

    def arrived(self, values: int) -> None:
        """Take the sums of the tiles that are complete."""
        ready = arrived_items(self._call.plan, values)
        if ready > self._done:
            self._call.run(ARRIVED, self._done, ready)
            self._done = ready

    def parameter_gradients(self, scale: Vector, epsilon: float) -> tuple[Vector, Vector]:
        """Return the gradients of scale and bias, when all values are there."""
        self._call.finish(scale, epsilon)
        self._coefficients = np.stack([_spread(c, self._call.plan, self._length) for c in self._call.coefficients])
        return parameter_gradients(self._batch, epsilon, self._call.sums[0], self._call.sums[1])

    def write(self, begin: int, end: int, out: Array) -> None:
        """Write values of the input's gradient."""
        x, grad, plan = self._call.x, self._call.grad, self._call.plan
        tag, y = TAGS[check_dtype(x.dtype)], _address(out) - begin * x.itemsize
        backward_kernels.apply_range(
            tag, self._length, plan.channels, plan.space, begin, end, _address(x), _address(grad), y, self._coefficients
        )


class _Forward:
    """One call of the forward kernels: its memory, which a run of each of its tasks fills in."""

    def __init__(self, x: Array, y: Array, scale: Vector, bias: Vector, epsilon: float, *, wanted: bool = True) -> None:
        self.plan = _plan(x)
        channels = self.plan.channels
        self._memory, self._epsilon = (x, y), float(epsilon)  # which lives as long as its addresses are used
        self._at = TAGS[check_dtype(x.dtype)], _address(x), _address(y), _streams(x, y)
        self._scale, self._bias = _own(scale, np.float32), _own(bias, np.float32)
        self._slots = np.empty((channels, self.plan.tiles, 2))
        self._mean, self._m2 = np.empty(channels), np.empty(channels)
        self.hi, self.factor, self.offset = (np.empty(channels if wanted else 0, np.float32) for _ in range(3))

    @property
    def moments(self) -> Moments:
        """What SUMS and FINISH, or UNIT, have found."""
        return Moments(self.plan.samples * self.plan.space, self._mean, self._m2)

    def run(self, task: int, first: int = 0, items: int | None = None) -> None:
        """Do a task for its items, from `first` up to `items`, without it for all."""
        plan, ticket = self.plan, np.array((first,))
        items = items_of(plan, task) if items is None else items
        tag, x, y, streaming = self._at

        def work() -> None:
            forward_kernels.forward(tag, plan, task, items, ticket, x, y, self._slots, self._mean, self._m2,
                                    self._scale, self._bias, self._epsilon, self.hi, self.factor, self.offset,
                                    streaming)  # fmt: skip

        threads.run(work, _team(plan, task, items - first))


class _Backward:
    """One call of the backward kernels."""

    def __init__(self, x: Array, grad: Array, y: Array | None, batch: Moments, scale: Vector, epsilon: float) -> None:
        self.plan = _plan(x)
        channels = self.plan.channels
        self.x, self.grad, self._y = x, grad, x if y is None else y
        self._mean, self._m2 = _own(batch.mean, np.float64), _own(batch.m2, np.float64)
        self._scale, self._epsilon = _own(scale, np.float32), float(epsilon)
        self._slots = np.empty((channels, self.plan.tiles, 2))
        self.coefficients = np.empty((4, channels), np.float32)
        self.sums = np.empty((2, channels))

    def finish(self, scale: Vector, epsilon: float) -> None:
        """Merge the sums, and take the coefficients for a scale and an epsilon that were not known before."""
        self._scale, self._epsilon = _own(scale, np.float32), float(epsilon)
        self.run(FINISH)

    def run(self, task: int, first: int = 0, items: int | None = None) -> None:
        """Do a task for its items, from `first` up to `items`, without it for all."""
        plan, ticket = self.plan, np.array((first,))
        items = items_of(plan, task) if items is None else items
        tag, x, grad, y = TAGS[check_dtype(self.x.dtype)], _address(self.x), _address(self.grad), _address(self._y)
        streaming = _streams(self.x, self._y)

        def work() -> None:
            backward_kernels.backward(tag, plan, task, items, ticket, x, grad, y, self._slots, self._mean, self._m2,
                                     self._scale, self._epsilon, self.sums, self.coefficients, streaming)  # fmt: skip

        threads.run(work, _team(plan, task, items - first))


def _plan(x: Array) -> Plan:
    samples, channels = x.shape[:2]
    return plan_of(samples, channels, x.size // (samples * channels))


def _tasks(plan: Plan, count: int) -> tuple[int, ...]:
    # One task where its items share out well among the threads, else three of finer grain. Same tiles, same slots,
    # same order of merging: the same bits.
    rounds = -(-plan.units // count)
    small = plan.samples * plan.channels * plan.space <= INLINE_VALUES
    return (UNIT,) if small or rounds * count <= IMBALANCE * plan.units else (SUMS, FINISH, APPLY)


def _team(plan: Plan, task: int, items: int) -> int:
    values = plan.samples * plan.channels * plan.space
    if task == FINISH:
        values = plan.channels * plan.tiles
    elif task == ARRIVED:
        values = values // (plan.units * plan.tiles) * items
    return 1 if values <= INLINE_VALUES else min(threads.count, items)


def _gradient_output(x: Array, grad: Array, out: Array | None) -> Array:
    # Written as it goes only where neither of what is read lies.
    apart = out is None or not (np.may_share_memory(out, x) or np.may_share_memory(out, grad))
    return output(x, out if apart else None)


def _repeat(plan: Plan) -> int:
    # After how many values the coefficients of parts repeat: after as many rows of the tensor as make it worth while;
    # 0 where channels are long enough to be gone through one by one, or the rows too long to be spread out.
    row = plan.channels * plan.space
    return row * max(1, 1024 // row) if plan.spread and row <= MOST_SPREAD else 0


def _spread(values: Vector, plan: Plan, length: int) -> npt.NDArray[np.float32]:
    if not length:
        return _own(values, np.float32)
    row = np.repeat(values, plan.space)
    return np.concatenate([np.tile(row, length // row.size), np.zeros(LANES, np.float32)])


def _streams(x: Array, y: Array) -> bool:
    return y.nbytes >= STREAM_BYTES and _address(y) != _address(x) and _address(y) % y.itemsize == 0


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _own(values: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    # A copy: numba would compile each kernel once more for a read-only array, and for a strided one.
    return np.array(values, dtype)
