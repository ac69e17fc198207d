"""The arithmetic compiled by numba, on a team of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm import _numba_backward, _numba_forward
from sharednorm._numba_common import APPLY, FINISH, SUMS, UNIT, items_of
from sharednorm._numba_plan import Plan, plan_of
from sharednorm._tensors import contiguous, output
from sharednorm.config import Array, Vector
from sharednorm.normalization import Wide, affine, parameter_gradients, threads
from sharednorm.state import Moments

# How an element type is told to a kernel; see `_numba_vector`.
TAGS: dict[str, Any] = {"float32": np.float32(0), "float16": np.uint16(0), "bfloat16": np.int16(0)}

# Below this many values, one thread is done before another has woken up.
INLINE_VALUES = 1 << 18
# From this size on, an output is written past the caches: it would not stay in them anyway, and a write through
# them first reads what it overwrites.
STREAM_BYTES = 1 << 22
# Fused work needs units that share out among the threads with at most this much waiting for the last.
IMBALANCE = 1.25

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
        call.run(SUMS)
        call.run(FINISH)
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
        if out is not None and result is not out:
            np.copyto(out, result)
        return result if out is None else out

    def forward(self, x: Array, scale: Vector, bias: Vector, epsilon: float) -> tuple[Array, Moments]:
        """Return the batch normalized by its own mean and biased variance, and its moments."""
        source = contiguous(x)
        result = output(source, None)
        call = _Forward(source, result, scale, bias, epsilon)
        for task in _tasks(call.plan, threads.count):
            call.run(task)
        return result, call.moments

    def backward(
        self, x: Array, grad: Array, batch: Moments, scale: Vector, epsilon: float, *, input_grad: bool = True
    ) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of one forward: of x (None unless `input_grad`), of scale, and of bias."""
        source, grads = contiguous(x), contiguous(grad)
        result = output(source, None) if input_grad else None
        call = _Backward(source, grads, result, batch, scale, epsilon)
        for task in _tasks(call.plan, threads.count) if input_grad else (SUMS, FINISH):
            call.run(task)
        return result, *parameter_gradients(batch, epsilon, call.sums[0], call.sums[1])


class _Forward:
    """One call of the forward kernels: its memory, which a run of each of its tasks fills in."""

    def __init__(self, x: Array, y: Array, scale: Vector, bias: Vector, epsilon: float, *, wanted: bool = True) -> None:
        self.plan = _plan(x)
        channels = self.plan.channels
        self._x, self._y, self._epsilon = x, y, float(epsilon)
        self._scale, self._bias = _own(scale, np.float32), _own(bias, np.float32)
        self._slots = np.empty((channels, self.plan.tiles, 2))
        self._mean, self._m2 = np.empty(channels), np.empty(channels)
        self.hi, self.factor, self.offset = (np.empty(channels if wanted else 0, np.float32) for _ in range(3))

    @property
    def moments(self) -> Moments:
        """What SUMS and FINISH, or UNIT, have found."""
        return Moments(self.plan.samples * self.plan.space, self._mean, self._m2)

    def run(self, task: int) -> None:
        """Do a task for all of its items."""
        plan, ticket = self.plan, np.zeros(1, np.int64)
        items = items_of(plan, task)
        tag, x, y = TAGS[self._x.dtype.name], _address(self._x), _address(self._y)
        streaming = _streams(self._x, self._y)

        def work() -> None:
            _numba_forward.forward(tag, plan, task, items, ticket, x, y, self._slots, self._mean, self._m2, self._scale,
                                   self._bias, self._epsilon, self.hi, self.factor, self.offset, streaming)  # fmt: skip

        threads.run(work, _team(plan, task, items))


class _Backward:
    """One call of the backward kernels."""

    def __init__(self, x: Array, grad: Array, y: Array | None, batch: Moments, scale: Vector, epsilon: float) -> None:
        self.plan = _plan(x)
        channels = self.plan.channels
        self._x, self._grad, self._y = x, grad, x if y is None else y
        self._mean, self._m2 = _own(batch.mean, np.float64), _own(batch.m2, np.float64)
        self._scale, self._epsilon = _own(scale, np.float32), float(epsilon)
        self._slots = np.empty((channels, self.plan.tiles, 2))
        self._coefficients = np.empty((4, channels), np.float32)
        self.sums = np.empty((2, channels))

    def run(self, task: int) -> None:
        """Do a task for all of its items."""
        plan, ticket = self.plan, np.zeros(1, np.int64)
        items = items_of(plan, task)
        tag, x, grad, y = TAGS[self._x.dtype.name], _address(self._x), _address(self._grad), _address(self._y)
        streaming = _streams(self._x, self._y)

        def work() -> None:
            _numba_backward.backward(tag, plan, task, items, ticket, x, grad, y, self._slots, self._mean, self._m2,
                                     self._scale, self._epsilon, self.sums, self._coefficients, streaming)  # fmt: skip

        threads.run(work, _team(plan, task, items))


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
    values = plan.channels * plan.tiles if task == FINISH else plan.samples * plan.channels * plan.space
    return 1 if values <= INLINE_VALUES else min(threads.count, items)


def _streams(x: Array, y: Array) -> bool:
    return y.nbytes >= STREAM_BYTES and _address(y) != _address(x) and _address(y) % y.itemsize == 0


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _own(values: npt.NDArray[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    # A copy: numba would compile each kernel once more for a read-only array, and for a strided one.
    return np.array(values, dtype)
