"""Compiled: the moments of one tile, of each of its channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharednorm.arithmetic.numba.half import LANES
from sharednorm.arithmetic.numba.simd import (
    add,
    expect_load,
    first,
    keep,
    load,
    load_lanes,
    load_part,
    mul,
    spread,
    store_lanes,
    sub,
    total,
    widen,
)
from sharednorm.arithmetic.numba.tile_access import (
    STRIP,
    channels_of,
    column_tile,
    fetch,
    first_channel,
    inlined,
    row_length,
    row_tile,
)
from sharednorm.arithmetic.numba.tiling import Plan


@inlined
def _row_moments(tag: Any, x: int, start: int, length: int) -> tuple[float, float]:
    # The mean and m2 of consecutive elements: float64 sums of the differences from the first of them. Since the
    # origin is a value of the tile, n * (origin - mean)**2 is at most n * m2. So s2 - s1**2 / n keeps log2(n) bits
    # less than float64 has, and cannot come out negative.
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
    return first(origin) + t1 / length, m2


@inlined
def _column_moments(tag: Any, x: int, start: int, rows: int, size: int, columns: int, mean: Any, m2: Any) -> None:
    # The mean and m2 of each column of a block, rows `size` elements apart. The origin of a column is its first value.
    inverse = spread(1.0 / rows)
    for left in range(0, columns, STRIP):
        right = min(columns, left + STRIP)
        for j in range(left, right, LANES):
            store_lanes(mean, j, spread(0.0))
            store_lanes(m2, j, spread(0.0))
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
                store_lanes(mean, j, add(load_lanes(mean, j), add(add(a, b), add(c, d))))
                squares = add(add(mul(a, a), mul(b, b)), add(mul(c, c), mul(d, d)))
                store_lanes(m2, j, add(load_lanes(m2, j), squares))
            row += 4
        while row < rows:
            skip = row * size
            for j in range(left, right, LANES):
                i = start + j
                a = sub(widen(fetch(tag, x, i + skip, end + skip)), widen(fetch(tag, x, i, end)))
                store_lanes(mean, j, add(load_lanes(mean, j), a))
                store_lanes(m2, j, add(load_lanes(m2, j), mul(a, a)))
            row += 1
        for j in range(left, right, LANES):
            s1 = load_lanes(mean, j)
            share = mul(s1, inverse)
            store_lanes(mean, j, add(widen(fetch(tag, x, start + j, end)), share))
            store_lanes(m2, j, sub(load_lanes(m2, j), mul(s1, share)))


@inlined
def _merge_folds(mean: Any, m2: Any, fold: int, columns: int, rows: int) -> None:
    # Columns `columns` apart belong to one (c, s): merge them into the first of them. All have the same count, `rows`.
    inverse = spread(1.0 / fold)
    for j in range(0, columns, LANES):
        origin = load_lanes(mean, j)
        inner = load_lanes(m2, j)
        s1 = spread(0.0)
        s2 = spread(0.0)
        for k in range(1, fold):
            d = sub(load_lanes(mean, j + k * columns), origin)
            s1 = add(s1, d)
            s2 = add(s2, mul(d, d))
            inner = add(inner, load_lanes(m2, j + k * columns))
        share = mul(s1, inverse)
        between = mul(sub(s2, mul(s1, share)), spread(np.float64(rows)))
        store_lanes(mean, j, add(origin, share))
        store_lanes(m2, j, add(inner, between))


@inlined
def _merge_space(mean: Any, m2: Any, start: int, space: int, count: int) -> tuple[float, float]:
    # The moments of one channel from those of its columns, each of `count` values.
    origin = spread(mean[start])
    inner = spread(0.0)
    s1 = spread(0.0)
    s2 = spread(0.0)
    for j in range(0, space, LANES):
        d = keep(sub(load_lanes(mean, start + j), origin), space - j)
        s1 = add(s1, d)
        s2 = add(s2, mul(d, d))
        inner = add(inner, keep(load_lanes(m2, start + j), space - j))
    t1 = total(s1)
    between = total(s2) - t1 * (t1 / space)
    return first(origin) + t1 / space, total(inner) + between * count


@inlined
def tile_moments(tag: Any, plan: Plan, unit: int, tile: int, x: int, slots: Any, mean: Any, m2: Any) -> None:
    """Write the mean and m2 of each channel of a tile into its slot; `mean` and `m2` are room for those of columns."""
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
        slots[channel + c, tile, 0], slots[channel + c, tile, 1] = a, b
