"""The compiled kernel of the forward: moments of tiles, their merge, and the normalization."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharednorm.arithmetic.numba.half import LANES
from sharednorm.arithmetic.numba.moments import tile_moments
from sharednorm.arithmetic.numba.simd import (
    add,
    fence,
    load,
    load_part,
    mul,
    spread,
    store_part,
    stream,
    sub,
    take_ticket,
)
from sharednorm.arithmetic.numba.tile_access import (
    ARRIVED,
    CHUNK,
    FINISH,
    SUMS,
    UNIT,
    arrived_tile,
    channels_of,
    clip,
    column_tile,
    fetch,
    first_channel,
    inlined,
    kernel,
    put,
    row_length,
    row_tile,
    spread_out,
    tile_count,
    unaligned,
)
from sharednorm.arithmetic.numba.tiling import Plan

MADE_OF = "5db7a34063ce558e"
"""Hash of the files that these kernels are made of besides this one, the only one that numba's cache watches."""


@inlined
def _finish(plan: Plan, unit: int, slots: Any, mean: Any, m2: Any, scale: Any, bias: Any, epsilon: float,
            hi: Any, factor: Any, offset: Any) -> None:  # fmt: skip
    # Chan's merge of a unit's slots, in their order, as in `normalization.merge`, and `normalization.affine`.
    channel = first_channel(plan, unit)
    for c in range(channel, channel + channels_of(plan, unit)):
        count = tile_count(plan, 0)
        a, b = slots[c, 0, 0], slots[c, 0, 1]
        for tile in range(1, plan.tiles):
            more = tile_count(plan, tile)
            delta = slots[c, tile, 0] - a
            share = more / (count + more)
            a += delta * share
            b += slots[c, tile, 1] + delta * delta * (count * share)
            count += more
        mean[c], m2[c] = a, b
        if len(hi):
            hi[c] = np.float32(a)
            factor[c] = clip(scale[c] / np.sqrt(b / count + epsilon))
            offset[c] = clip(bias[c] - (a - hi[c]) * np.float64(factor[c]))


@inlined
def _apply_run(tag: Any, x: int, y: int, start: int, length: int, hi: Any, factor: Any, offset: Any,
               streaming: bool) -> None:  # fmt: skip
    # Consecutive elements of one channel.
    h, f, o = spread(hi), spread(factor), spread(offset)
    end = start + length
    i = start
    if streaming:
        head = min(length, unaligned(tag, y, start))
        store_part(tag, y, i, head, add(mul(sub(load_part(tag, x, i, head), h), f), o))
        i += head
        while i + LANES <= end:
            stream(tag, y, i, add(mul(sub(load(tag, x, i), h), f), o))
            i += LANES
    while i < end:
        put(tag, y, i, end, add(mul(sub(fetch(tag, x, i, end), h), f), o))
        i += LANES


@inlined
def _apply_spread(tag: Any, x: int, y: int, start: int, length: int, h: int, f: int, o: int,
                  streaming: bool) -> None:  # fmt: skip
    # Consecutive elements, each with coefficients of its own, whose addresses are given; 16 more may be read there.
    one = np.float32(0)
    end = start + length
    j = 0
    if streaming:
        j = min(length, unaligned(tag, y, start))
        d = sub(load_part(tag, x, start, j), load(one, h, 0))
        store_part(tag, y, start, j, add(mul(d, load(one, f, 0)), load(one, o, 0)))
        while j + LANES <= length:
            d = sub(load(tag, x, start + j), load(one, h, j))
            stream(tag, y, start + j, add(mul(d, load(one, f, j)), load(one, o, j)))
            j += LANES
    while j < length:
        d = sub(fetch(tag, x, start + j, end), load(one, h, j))
        put(tag, y, start + j, end, add(mul(d, load(one, f, j)), load(one, o, j)))
        j += LANES


@inlined
def _apply_tile(tag: Any, plan: Plan, unit: int, tile: int, x: int, y: int, hi: Any, factor: Any, offset: Any,
                spare: Any, streaming: bool) -> None:  # fmt: skip
    channel = first_channel(plan, unit)
    if not plan.columns:
        start, length = row_tile(plan, unit, tile)
        _apply_run(tag, x, y, start, length, hi[channel], factor[channel], offset[channel], streaming)
        return
    start, rows, fold = column_tile(plan, unit, tile)
    channels = channels_of(plan, unit)
    size = row_length(plan)
    if not plan.spread:
        for row in range(rows):
            i = start + row * size
            for _ in range(fold):
                for c in range(channel, channel + channels):
                    _apply_run(tag, x, y, i, plan.space, hi[c], factor[c], offset[c], streaming)
                    i += plan.space
        return
    spread_out(hi, channel, channels, plan.space, fold, spare[0])
    spread_out(factor, channel, channels, plan.space, fold, spare[1])
    spread_out(offset, channel, channels, plan.space, fold, spare[2])
    columns = fold * channels * plan.space
    h, f, o = spare[0].ctypes.data, spare[1].ctypes.data, spare[2].ctypes.data
    for row in range(rows):
        _apply_spread(tag, x, y, start + row * size, columns, h, f, o, streaming)


@inlined
def _apply_between(tag: Any, channels: int, space: int, i: int, end: int, x: int, y: int, hi: Any, factor: Any,
                   offset: Any, streaming: bool) -> None:  # fmt: skip
    while i < end:
        row = i // space
        channel = row % channels
        stop = min((row + 1) * space, end)
        _apply_run(tag, x, y, i, stop - i, hi[channel], factor[channel], offset[channel], streaming)
        i = stop


@kernel
def forward(tag: Any, plan: Plan, task: int, items: int, ticket: Any, x: int, y: int, slots: Any, mean: Any, m2: Any,
            scale: Any, bias: Any, epsilon: float, hi: Any, factor: Any, offset: Any,
            streaming: bool) -> None:  # fmt: skip
    """Take tickets and do what they stand for until none is left. Any number of threads may do so at once.

    Args:
        tag: Says the element type, see `simd`.
        plan: The cut of the shape.
        task: What a ticket stands for.
        items: Number of tickets.
        ticket: The next one; int64 (1,).
        x: Address of the input.
        y: Address of the output; x itself, or memory that x does not overlap.
        slots: Partial (mean, m2) of each channel and tile; float64 (C, tiles, 2).
        mean: Mean of each channel; float64 (C,).
        m2: Sum of squared deviations of each channel; float64 (C,).
        scale: Multiplier; float32 (C,).
        bias: Added after it; float32 (C,).
        epsilon: Added to the variance.
        hi: The mean's upper part; float32 (C,), or (0,) if nothing but moments is wanted, and y is not written. So for
            the next two:
        factor: What a deviation is multiplied by.
        offset: What is added then.
        streaming: Whether the output goes past the caches. Not if y is x.
    """
    columns_mean = np.empty(plan.width + LANES, np.float64)
    columns_m2 = np.empty(plan.width + LANES, np.float64)
    spare = np.empty((3, plan.width + LANES), np.float32)
    item = take_ticket(ticket)
    while item < items:
        if task == UNIT:
            for tile in range(plan.tiles):
                tile_moments(tag, plan, item, tile, x, slots, columns_mean, columns_m2)
            _finish(plan, item, slots, mean, m2, scale, bias, epsilon, hi, factor, offset)
            # The last tile read is the likeliest to be in the cache still.
            for tile in range(plan.tiles - 1 if len(hi) else -1, -1, -1):
                _apply_tile(tag, plan, item, tile, x, y, hi, factor, offset, spare, streaming)
        elif task == SUMS:
            tile_moments(tag, plan, item // plan.tiles, item % plan.tiles, x, slots, columns_mean, columns_m2)
        elif task == ARRIVED:
            unit, tile = arrived_tile(plan, item)
            tile_moments(tag, plan, unit, tile, x, slots, columns_mean, columns_m2)
        elif task == FINISH:
            _finish(plan, item, slots, mean, m2, scale, bias, epsilon, hi, factor, offset)
        elif not plan.spread:
            begin, end = item * CHUNK, min((item + 1) * CHUNK, plan.samples * plan.channels * plan.space)
            _apply_between(tag, plan.channels, plan.space, begin, end, x, y, hi, factor, offset, streaming)
        else:
            _apply_tile(tag, plan, item // plan.tiles, item % plan.tiles, x, y, hi, factor, offset, spare, streaming)
        item = take_ticket(ticket)
    fence()


@kernel
def apply_range(tag: Any, length: int, channels: int, space: int, begin: int, end: int, x: int, y: int, hi: Any,
                factor: Any, offset: Any) -> None:  # fmt: skip
    """Normalize consecutive values, in this thread.

    Args:
        tag: Says the element type, see `simd`.
        length: After how many values the coefficients repeat, if there is one for each value; 0: one a channel.
        channels: C.
        space: S.
        begin: The first value.
        end: The one behind the last.
        x: Address of the input, of its value 0.
        y: Address that value 0 of the output would have.
        hi: Upper part of the mean; float32 (C,), or (length + 16,). So for the next two:
        factor: What a deviation is multiplied by.
        offset: What is added then.
    """
    if not length:
        _apply_between(tag, channels, space, begin, end, x, y, hi, factor, offset, False)
        return
    h, f, o = hi.ctypes.data, factor.ctypes.data, offset.ctypes.data
    i = begin
    while i < end:
        column = i % length
        stop = min(end, i - column + length)
        _apply_spread(tag, x, y, i, stop - i, h + 4 * column, f + 4 * column, o + 4 * column, False)
        i = stop
