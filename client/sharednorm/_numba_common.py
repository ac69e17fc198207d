"""What the forward and the backward kernels share: where a tile lies, and how its elements are walked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from sharednorm._numba_vector import LANES, load, load_part, store, store_part, width

# Tasks of a kernel: what one ticket stands for.
SUMS = 0
"""A tile: its partial results into their slots."""
FINISH = 1
"""A unit: its slots merged, and the coefficients of its channels."""
APPLY = 2
"""A tile: its output from its channels' coefficients."""
UNIT = 3
"""A unit: all three, while its values are in a core's cache."""

# Below this S a row of output is computed with one coefficient per column, from it on with one per channel.
SPREAD_SPACE = 32

# Columns summed at a time, so that their sums stay in the first cache.
STRIP = 512

LARGEST = float(np.finfo(np.float32).max)


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
def first_channel(plan: Any, unit: int) -> int:
    """Return the first channel of a unit."""
    return unit * plan.group


@inlined
def channels_of(plan: Any, unit: int) -> int:
    """Return the number of channels of a unit."""
    return min(plan.group, plan.channels - unit * plan.group)


@inlined
def row_tile(plan: Any, unit: int, tile: int) -> tuple[int, int]:
    """Return the first element and the length of a tile of rows."""
    pieces = plan.tiles // plan.samples
    sample, piece = tile // pieces, tile % pieces
    start = piece * plan.step
    return (sample * plan.channels + unit) * plan.space + start, min(plan.step, plan.space - start)


@inlined
def column_tile(plan: Any, unit: int, tile: int) -> tuple[int, int, int]:
    """Return the first element, the number of rows, and the samples folded into a row of a tile of columns."""
    size = plan.channels * plan.space
    rows = plan.samples // plan.fold
    row = tile * plan.step
    if row >= rows:
        return rows * plan.fold * size, 1, plan.samples % plan.fold
    return row * plan.fold * size + unit * plan.group * plan.space, min(plan.step, rows - row), plan.fold


@inlined
def tile_count(plan: Any, tile: int) -> int:
    """Return the values of one channel in a tile."""
    if plan.columns:
        _, rows, fold = column_tile(plan, 0, tile)
        return rows * fold * plan.space
    return row_tile(plan, 0, tile)[1]


@inlined
def unaligned(tag: Any, address: int, index: int) -> int:
    """Return how many elements from an index on lie before the first that 16 elements' bytes divide."""
    return (-(address + index * width(tag)) % (LANES * width(tag))) // width(tag)


@inlined
def clip(value: float) -> np.float32:
    """Return a number as a finite float32, or NaN."""
    return np.float32(min(max(value, -LARGEST), LARGEST)) if value == value else np.float32(value)


@inlined
def spread_out(values: Any, channel: int, channels: int, space: int, fold: int, out: Any) -> None:
    """Write one value of each channel as one of each column."""
    j = 0
    for _ in range(fold):
        for c in range(channel, channel + channels):
            for _ in range(space):
                out[j] = values[c]
                j += 1
