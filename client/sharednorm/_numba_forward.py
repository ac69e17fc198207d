"""Compiled kernels of the forward: moments of tiles, their merge, and the normalization."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharednorm._numba_common import (
    CHUNK,
    FINISH,
    SPREAD_SPACE,
    STRIP,
    SUMS,
    UNIT,
    at_least_zero,
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
from sharednorm._numba_half import LANES
from sharednorm._numba_plan import Plan
from sharednorm._numba_vector import (
    add,
    expect_load,
    fence,
    first,
    keep,
    load,
    load_part,
    load_wide,
    mul,
    spread,
    store_part,
    store_wide,
    stream,
    sub,
    take_ticket,
    total,
    widen,
)

MADE_OF = "cd9f82b827c82253"
"""Hash of the files that these kernels are made of besides this one, the only one that numba's cache watches."""


@inlined
def _row_moments(tag: Any, x: int, start: int, length: int) -> tuple[float, float]:
    # The mean and m2 of consecutive elements: float64 sums of the differences from the first of them. Since the
    # origin is a value of the tile, (origin - mean)**2 is at most m2, and s2 - s1**2 / n keeps log2(n) bits less
    # than float64 has.
    origin = spread(np.float64(first(load_part(tag, x, start, 1))))
    s1 = spread(0.0)
    s2 = spread(0.0)
    end = start + length
    i = start
    while i + LANES <= end:
        d = sub(widen(load(tag, x, i)), origin)
        s1 = add(s1, d)
        s2 = add(s2, mul(d, d))
        i += LANES
    if i < end:
        d = keep(sub(widen(load_part(tag, x, i, end - i)), origin), end - i)
        s1 = add(s1, d)
        s2 = add(s2, mul(d, d))
    t1 = total(s1)
    m2 = total(s2) - t1 * (t1 / length)
    return first(origin) + t1 / length, at_least_zero(m2)


@inlined
def _column_moments(tag: Any, x: int, start: int, rows: int, size: int, columns: int, mean: Any, m2: Any) -> None:
    # The mean and m2 of each column of a block, rows `size` elements apart. The origin of a column is its first value.
    inverse = spread(1.0 / rows)
    for left in range(0, columns, STRIP):
        right = min(columns, left + STRIP)
        for j in range(left, right, LANES):
            store_wide(mean, j, spread(0.0))
            store_wide(m2, j, spread(0.0))
        end = start + right
        row = 1  # row 0 differs from itself by nothing
        while row + 4 <= rows:
            for j in range(left, right, LANES):
                i = start + j
                origin = widen(fetch(tag, x, i, end))
                skip = row * size
                expect_load(tag, x, i + skip + 4 * size)
                expect_load(tag, x, i + skip + 5 * size)
                expect_load(tag, x, i + skip + 6 * size)
                expect_load(tag, x, i + skip + 7 * size)
                a = sub(widen(fetch(tag, x, i + skip, end + skip)), origin)
                skip += size
                b = sub(widen(fetch(tag, x, i + skip, end + skip)), origin)
                skip += size
                c = sub(widen(fetch(tag, x, i + skip, end + skip)), origin)
                skip += size
                d = sub(widen(fetch(tag, x, i + skip, end + skip)), origin)
                store_wide(mean, j, add(load_wide(mean, j), add(add(a, b), add(c, d))))
                squares = add(add(mul(a, a), mul(b, b)), add(mul(c, c), mul(d, d)))
                store_wide(m2, j, add(load_wide(m2, j), squares))
            row += 4
        while row < rows:
            skip = row * size
            for j in range(left, right, LANES):
                i = start + j
                a = sub(widen(fetch(tag, x, i + skip, end + skip)), widen(fetch(tag, x, i, end)))
                store_wide(mean, j, add(load_wide(mean, j), a))
                store_wide(m2, j, add(load_wide(m2, j), mul(a, a)))
            row += 1
        for j in range(left, right, LANES):
            s1 = load_wide(mean, j)
            share = mul(s1, inverse)
            # An infinity in row 0 is an origin that leaves only NaN; one value alone must show it too.
            store_wide(mean, j, add(widen(fetch(tag, x, start + j, end)), share))
            store_wide(m2, j, sub(load_wide(m2, j), mul(s1, share)))


@inlined
def _merge_folds(mean: Any, m2: Any, fold: int, columns: int, rows: int) -> None:
    # Columns `columns` apart belong to one (c, s): merge them into the first of them. All have the same count, `rows`.
    inverse = spread(1.0 / fold)
    for j in range(0, columns, LANES):
        origin = load_wide(mean, j)
        inner = load_wide(m2, j)
        s1 = spread(0.0)
        s2 = spread(0.0)
        for k in range(1, fold):
            d = sub(load_wide(mean, j + k * columns), origin)
            s1 = add(s1, d)
            s2 = add(s2, mul(d, d))
            inner = add(inner, load_wide(m2, j + k * columns))
        share = mul(s1, inverse)
        between = mul(sub(s2, mul(s1, share)), spread(np.float64(rows)))
        store_wide(mean, j, add(origin, share))
        store_wide(m2, j, add(inner, between))


@inlined
def _merge_space(mean: Any, m2: Any, start: int, space: int, count: int) -> tuple[float, float]:
    # The moments of one channel from those of its columns, each of `count` values.
    origin = spread(mean[start])
    inner = spread(0.0)
    s1 = spread(0.0)
    s2 = spread(0.0)
    for j in range(0, space, LANES):
        d = keep(sub(load_wide(mean, start + j), origin), space - j)
        s1 = add(s1, d)
        s2 = add(s2, mul(d, d))
        inner = add(inner, keep(load_wide(m2, start + j), space - j))
    t1 = total(s1)
    between = total(s2) - t1 * (t1 / space)
    return first(origin) + t1 / space, total(inner) + between * count


@inlined
def _tile_moments(tag: Any, plan: Plan, unit: int, tile: int, x: int, slots: Any, mean: Any, m2: Any) -> None:
    channel = first_channel(plan, unit)
    if not plan.columns:
        start, length = row_tile(plan, unit, tile)
        slots[channel, tile, 0], slots[channel, tile, 1] = _row_moments(tag, x, start, length)
        return
    start, rows, fold = column_tile(plan, unit, tile)
    channels = channels_of(plan, unit)
    columns = channels * plan.space
    _column_moments(tag, x, start, rows, row_length(plan), fold * columns, mean, m2)
    if fold > 1:
        _merge_folds(mean, m2, fold, columns, rows)
    for c in range(channels):
        a, b = mean[c], m2[c]
        if plan.space > 1:
            a, b = _merge_space(mean, m2, c * plan.space, plan.space, rows * fold)
        slots[channel + c, tile, 0], slots[channel + c, tile, 1] = a, at_least_zero(b)


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
    if plan.space >= SPREAD_SPACE:
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
    one = np.float32(0)
    for row in range(rows):
        i = start + row * size
        for j in range(0, columns, LANES):
            d = sub(fetch(tag, x, i + j, i + columns), load(one, h, j))
            put(tag, y, i + j, i + columns, add(mul(d, load(one, f, j)), load(one, o, j)))


@inlined
def _apply_chunk(tag: Any, plan: Plan, item: int, x: int, y: int, hi: Any, factor: Any, offset: Any,
                streaming: bool) -> None:  # fmt: skip
    i = item * CHUNK
    end = min(i + CHUNK, plan.samples * plan.channels * plan.space)
    while i < end:
        row = i // plan.space
        channel = row % plan.channels
        stop = min((row + 1) * plan.space, end)
        _apply_run(tag, x, y, i, stop - i, hi[channel], factor[channel], offset[channel], streaming)
        i = stop


@kernel
def forward(tag: Any, plan: Plan, task: int, items: int, ticket: Any, x: int, y: int, slots: Any, mean: Any, m2: Any,
            scale: Any, bias: Any, epsilon: float, hi: Any, factor: Any, offset: Any,
            streaming: bool) -> None:  # fmt: skip
    """Take tickets and do what they stand for until none is left. Any number of threads may do so at once.

    Args:
        tag: Says the element type, see `_numba_vector`.
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
        hi: The mean's upper part; float32 (C,), or (0,) if nothing but moments is wanted. So for the next two:
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
                _tile_moments(tag, plan, item, tile, x, slots, columns_mean, columns_m2)
            _finish(plan, item, slots, mean, m2, scale, bias, epsilon, hi, factor, offset)
            # The last tile read is the likeliest to be in the cache still.
            for tile in range(plan.tiles - 1, -1, -1):
                _apply_tile(tag, plan, item, tile, x, y, hi, factor, offset, spare, streaming)
        elif task == SUMS:
            _tile_moments(tag, plan, item // plan.tiles, item % plan.tiles, x, slots, columns_mean, columns_m2)
        elif task == FINISH:
            _finish(plan, item, slots, mean, m2, scale, bias, epsilon, hi, factor, offset)
        elif plan.space >= SPREAD_SPACE:
            _apply_chunk(tag, plan, item, x, y, hi, factor, offset, streaming)
        else:
            _apply_tile(tag, plan, item // plan.tiles, item % plan.tiles, x, y, hi, factor, offset, spare, streaming)
        item = take_ticket(ticket)
    fence()
