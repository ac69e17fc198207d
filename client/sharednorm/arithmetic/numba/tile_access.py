"""What the forward and the backward kernels share: where a tile lies, and how its elements are walked."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numba import njit

from sharednorm.arithmetic.numba.half import LANES
from sharednorm.arithmetic.numba.simd import load, load_part, spread, store, store_lanes, store_part, width
from sharednorm.arithmetic.numba.tiling import Plan

# Tasks of a kernel: what one ticket stands for.
SUMS = 0
"""A tile: its partial results into their slots."""
FINISH = 1
"""A unit: its slots merged, and the coefficients of its channels."""
APPLY = 2
"""A piece of the output, from the coefficients: a tile where they are spread out, else a chunk."""
UNIT = 3
"""A unit: all three, while its values are in a core's cache."""
ARRIVED = 4
"""A tile, as SUMS; but tiles are counted in the order in which a tensor that arrives in C order completes them."""

CHUNK = 1 << 16
"""Consecutive values in a chunk."""
STRIP = 512
"""Columns summed at a time, so that their sums stay in the first cache."""
LARGEST = float(np.finfo(np.float32).max)

_log = logging.getLogger(__name__)


def items_of(plan: Plan, task: int) -> int:
    """Return the number of tickets of a task."""
    if task in {UNIT, FINISH}:
        return plan.units
    if task == APPLY and not plan.spread:
        return -(-plan.samples * plan.channels * plan.space // CHUNK)
    return plan.units * plan.tiles


def arrived_items(plan: Plan, values: int) -> int:
    """Return how many tickets of ARRIVED are complete once the first `values` of a tensor have come."""
    if not plan.columns:
        pieces = plan.tiles // plan.samples
        rows, rest = divmod(values, plan.space)
        return rows * pieces + rest // plan.step
    if values == plan.samples * plan.channels * plan.space:
        return plan.units * plan.tiles
    return values // (plan.step * plan.fold * plan.channels * plan.space) * plan.units


def kernel(function: Any) -> Any:
    """Compile a function that Python calls, without the GIL; kept on disk, so that the next process need not."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # numba found no folder for it: neither the package's nor the user's cache can be written.
        _log.warning("compiled kernels cannot be kept on disk; set NUMBA_CACHE_DIR to a folder that can be written")
        return njit(nogil=True)(function)


def inlined(function: Any) -> Any:
    """Compile a function that only kernels call: its code becomes part of theirs, and of their entry in the cache."""
    return njit(nogil=True)(function)


@inlined
def fetch(tag: Any, address: int, index: int, end: int) -> Any:
    """Return the 16 elements from an index on; those from `end` on are 0."""
    if index + LANES <= end:
        return load(tag, address, index)
    return load_part(tag, address, index, end - index)


@inlined
def put(tag: Any, address: int, index: int, end: int, value: Any) -> None:
    """Store 16 elements from an index on; those from `end` on are left as they are."""
    if index + LANES <= end:
        store(tag, address, index, value)
    else:
        store_part(tag, address, index, end - index, value)


@inlined
def first_channel(plan: Plan, unit: int) -> int:
    """Return the first channel of a unit."""
    return unit * plan.group


@inlined
def channels_of(plan: Plan, unit: int) -> int:
    """Return the number of channels of a unit."""
    return min(plan.group, plan.channels - unit * plan.group)


@inlined
def row_length(plan: Plan) -> int:
    """Return the values from one row of a block of columns to the next."""
    return plan.fold * plan.channels * plan.space


@inlined
def row_tile(plan: Plan, unit: int, tile: int) -> tuple[int, int]:
    """Return the first element and the length of a tile of rows."""
    pieces = plan.tiles // plan.samples
    sample, piece = tile // pieces, tile % pieces
    start = piece * plan.step
    return (sample * plan.channels + unit) * plan.space + start, min(plan.step, plan.space - start)


@inlined
def column_tile(plan: Plan, unit: int, tile: int) -> tuple[int, int, int]:
    """Return the first element, the number of rows, and the samples folded into a row of a tile of columns."""
    size = plan.channels * plan.space
    rows = plan.samples // plan.fold
    row = tile * plan.step
    if row >= rows:
        return rows * plan.fold * size, 1, plan.samples % plan.fold
    return row * plan.fold * size + unit * plan.group * plan.space, min(plan.step, rows - row), plan.fold


@inlined
def arrived_tile(plan: Plan, item: int) -> tuple[int, int]:
    """Return the unit and the tile of a ticket of ARRIVED."""
    if plan.columns:
        return item % plan.units, item // plan.units
    pieces = plan.tiles // plan.samples
    row = item // pieces
    return row % plan.channels, row // plan.channels * pieces + item % pieces


@inlined
def tile_count(plan: Plan, tile: int) -> Any:
    """Return the values of one channel in a tile."""
    if plan.columns:
        _, rows, fold = column_tile(plan, 0, tile)
        return rows * fold * plan.space
    return row_tile(plan, 0, tile)[1]


@inlined
def unaligned(tag: Any, address: int, index: int) -> int:
    """Return how many elements from an index on lie before the first that 16 elements' bytes divide."""
    size: int = width(tag)
    return (-(address + index * size) % (LANES * size)) // size


@inlined
def clip(value: float) -> Any:
    """Return a number as float32, the largest finite one instead of one beyond it, and NaN as NaN."""
    if value > LARGEST:
        return np.float32(LARGEST)
    if value < -LARGEST:
        return np.float32(-LARGEST)
    return np.float32(value)


@inlined
def spread_out(values: Any, channel: int, channels: int, space: int, fold: int, out: Any) -> None:
    """Write one value of each channel as one of each column; `out` has room for 15 more."""
    # Whole vectors: what is too much is overwritten by the next channel's, or lies in the 15 values behind the last.
    j = 0
    for _ in range(fold):
        for c in range(channel, channel + channels):
            value = spread(values[c])
            for k in range(j, j + space, LANES):
                store_lanes(out, k, value)
            j += space
