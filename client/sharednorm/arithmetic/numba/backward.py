"""The compiled kernel of the backward: two sums of tiles, their merge, and the gradient of the input."""

from __future__ import annotations

from typing import Any

import numpy as np

from sharednorm.arithmetic.numba.half import LANES
from sharednorm.arithmetic.numba.simd import (
    add,
    expect_load,
    fence,
    keep,
    load,
    load_lanes,
    load_part,
    mul,
    spread,
    store_lanes,
    store_part,
    stream,
    sub,
    take_ticket,
    total,
    widen,
)
from sharednorm.arithmetic.numba.tile_access import (
    ARRIVED,
    CHUNK,
    FINISH,
    STRIP,
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
    unaligned,
)
from sharednorm.arithmetic.numba.tiling import Plan

MADE_OF = "5db7a34063ce558e"
"""Hash of the files that these kernels are made of besides this one, the only one that numba's cache watches."""


@inlined
def _row_sums(tag: Any, x: int, g: int, start: int, length: int, mean: float) -> tuple[float, float]:
    # The sums of g and of g * (x - mean) over consecutive elements.
    centre = spread(mean)
    s1 = spread(0.0)
    s2 = spread(0.0)
    end = start + length
    i = start
    while i + LANES <= end:
        a = widen(load(tag, g, i))
        s1 = add(s1, a)
        s2 = add(s2, mul(a, sub(widen(load(tag, x, i)), centre)))
        i += LANES
    if i < end:
        # Behind the end both are 0, g too: 0 * (0 - mean) adds nothing, but 0 * (0 - infinity) would.
        a = widen(load_part(tag, g, i, end - i))
        s1 = add(s1, a)
        s2 = add(s2, keep(mul(a, sub(widen(load_part(tag, x, i, end - i)), centre)), end - i))
    return total(s1), total(s2)


@inlined
def _column_sums(tag: Any, x: int, g: int, start: int, rows: int, size: int, columns: int, centre: Any,
                 s1: Any, s2: Any) -> None:  # fmt: skip
    # The same two sums of each column of a block, rows `size` elements apart.
    for left in range(0, columns, STRIP):
        right = min(columns, left + STRIP)
        for j in range(left, right, LANES):
            store_lanes(s1, j, spread(0.0))
            store_lanes(s2, j, spread(0.0))
        row = 0
        while row + 2 <= rows:
            i, k = start + row * size, start + (row + 1) * size
            for j in range(left, right, LANES):
                expect_load(tag, g, k + size + j)
                expect_load(tag, x, k + size + j)
                expect_load(tag, g, k + 2 * size + j)
                expect_load(tag, x, k + 2 * size + j)
                mean = load_lanes(centre, j)
                a = widen(fetch(tag, g, i + j, i + right))
                b = widen(fetch(tag, g, k + j, k + right))
                c = mul(a, sub(widen(fetch(tag, x, i + j, i + right)), mean))
                d = mul(b, sub(widen(fetch(tag, x, k + j, k + right)), mean))
                store_lanes(s1, j, add(load_lanes(s1, j), add(a, b)))
                store_lanes(s2, j, add(load_lanes(s2, j), add(c, d)))
            row += 2
        if row < rows:
            i = start + row * size
            for j in range(left, right, LANES):
                a = widen(fetch(tag, g, i + j, i + right))
                c = mul(a, sub(widen(fetch(tag, x, i + j, i + right)), load_lanes(centre, j)))
                store_lanes(s1, j, add(load_lanes(s1, j), a))
                store_lanes(s2, j, add(load_lanes(s2, j), c))


@inlined
def _sum_of(values: Any, channel: int, space: int, channels: int, fold: int) -> Any:
    # Over the columns of one channel, and its folds.
    if space == 1 and fold == 1:
        return values[channel]
    s = spread(0.0)
    for k in range(fold):
        start = (k * channels + channel) * space
        for j in range(0, space, LANES):
            s = add(s, keep(load_lanes(values, start + j), space - j))
    return total(s)


@inlined
def _tile_sums(tag: Any, plan: Plan, unit: int, tile: int, x: int, g: int, mean: Any, slots: Any, wide: Any) -> None:
    channel = first_channel(plan, unit)
    if not plan.columns:
        start, length = row_tile(plan, unit, tile)
        slots[channel, tile, 0], slots[channel, tile, 1] = _row_sums(tag, x, g, start, length, mean[channel])
        return
    start, rows, fold = column_tile(plan, unit, tile)
    channels = channels_of(plan, unit)
    centre, s1, s2 = wide[0], wide[1], wide[2]
    spread_out(mean, channel, channels, plan.space, fold, centre)
    size = row_length(plan)
    _column_sums(tag, x, g, start, rows, size, fold * channels * plan.space, centre, s1, s2)
    for c in range(channels):
        slots[channel + c, tile, 0] = _sum_of(s1, c, plan.space, channels, fold)
        slots[channel + c, tile, 1] = _sum_of(s2, c, plan.space, channels, fold)


@inlined
def _finish(plan: Plan, unit: int, slots: Any, mean: Any, m2: Any, scale: Any, epsilon: float, sums: Any,
            coefficients: Any) -> None:  # fmt: skip
    # A unit's slots added in their order, and `normalization.input_gradient`.
    channel = first_channel(plan, unit)
    count = plan.samples * plan.space
    for c in range(channel, channel + channels_of(plan, unit)):
        a, b = 0.0, 0.0
        for tile in range(plan.tiles):
            a += slots[c, tile, 0]
            b += slots[c, tile, 1]
        sums[0, c], sums[1, c] = a, b
        inv_std = 1.0 / np.sqrt(m2[c] / count + epsilon)
        factor = scale[c] * inv_std
        hi = np.float32(mean[c])
        slope = clip(-factor * inv_std * inv_std * (b / count))
        coefficients[0, c], coefficients[1, c], coefficients[2, c] = hi, clip(factor), slope
        coefficients[3, c] = clip(-factor * (a / count) - (mean[c] - hi) * np.float64(slope))


@inlined
def _apply_run(tag: Any, x: int, g: int, y: int, start: int, length: int, coefficients: Any, channel: int,
               streaming: bool) -> None:  # fmt: skip
    # Consecutive elements of one channel: g * factor + (x - hi) * slope + offset.
    h, f = spread(coefficients[0, channel]), spread(coefficients[1, channel])
    s, o = spread(coefficients[2, channel]), spread(coefficients[3, channel])
    end = start + length
    i = start
    if streaming:
        head = min(length, unaligned(tag, y, start))
        a = mul(sub(load_part(tag, x, i, head), h), s)
        store_part(tag, y, i, head, add(add(a, mul(load_part(tag, g, i, head), f)), o))
        i += head
        while i + LANES <= end:
            a = mul(sub(load(tag, x, i), h), s)
            stream(tag, y, i, add(add(a, mul(load(tag, g, i), f)), o))
            i += LANES
    while i < end:
        a = mul(sub(fetch(tag, x, i, end), h), s)
        put(tag, y, i, end, add(add(a, mul(fetch(tag, g, i, end), f)), o))
        i += LANES


@inlined
def _apply_spread(tag: Any, x: int, g: int, y: int, start: int, length: int, h: int, f: int, s: int, o: int,
                  streaming: bool) -> None:  # fmt: skip
    # Consecutive elements, each with coefficients of its own, whose addresses are given; 16 more may be read there.
    one = np.float32(0)
    end = start + length
    j = 0
    if streaming:
        j = min(length, unaligned(tag, y, start))
        a = mul(sub(load_part(tag, x, start, j), load(one, h, 0)), load(one, s, 0))
        a = add(a, mul(load_part(tag, g, start, j), load(one, f, 0)))
        store_part(tag, y, start, j, add(a, load(one, o, 0)))
        while j + LANES <= length:
            a = mul(sub(load(tag, x, start + j), load(one, h, j)), load(one, s, j))
            a = add(a, mul(load(tag, g, start + j), load(one, f, j)))
            stream(tag, y, start + j, add(a, load(one, o, j)))
            j += LANES
    while j < length:
        a = mul(sub(fetch(tag, x, start + j, end), load(one, h, j)), load(one, s, j))
        a = add(a, mul(fetch(tag, g, start + j, end), load(one, f, j)))
        put(tag, y, start + j, end, add(a, load(one, o, j)))
        j += LANES


@inlined
def _apply_tile(tag: Any, plan: Plan, unit: int, tile: int, x: int, g: int, y: int, coefficients: Any, spare: Any,
                streaming: bool) -> None:  # fmt: skip
    channel = first_channel(plan, unit)
    if not plan.columns:
        start, length = row_tile(plan, unit, tile)
        _apply_run(tag, x, g, y, start, length, coefficients, channel, streaming)
        return
    start, rows, fold = column_tile(plan, unit, tile)
    channels = channels_of(plan, unit)
    size = row_length(plan)
    if not plan.spread:
        for row in range(rows):
            i = start + row * size
            for _ in range(fold):
                for c in range(channel, channel + channels):
                    _apply_run(tag, x, g, y, i, plan.space, coefficients, c, streaming)
                    i += plan.space
        return
    for k in range(4):
        spread_out(coefficients[k], channel, channels, plan.space, fold, spare[k])
    columns = fold * channels * plan.space
    h, f, s, o = (spare[0].ctypes.data, spare[1].ctypes.data, spare[2].ctypes.data, spare[3].ctypes.data)
    for row in range(rows):
        _apply_spread(tag, x, g, y, start + row * size, columns, h, f, s, o, streaming)


@inlined
def _apply_between(tag: Any, channels: int, space: int, i: int, end: int, x: int, g: int, y: int, coefficients: Any,
                   streaming: bool) -> None:  # fmt: skip
    while i < end:
        row = i // space
        channel = row % channels
        stop = min((row + 1) * space, end)
        _apply_run(tag, x, g, y, i, stop - i, coefficients, channel, streaming)
        i = stop


@kernel
def backward(tag: Any, plan: Plan, task: int, items: int, ticket: Any, x: int, g: int, y: int, slots: Any, mean: Any,
             m2: Any, scale: Any, epsilon: float, sums: Any, coefficients: Any, streaming: bool) -> None:  # fmt: skip
    """Take tickets and do what they stand for until none is left. Any number of threads may do so at once.

    Args:
        tag: Says the element type, see `simd`.
        plan: The cut of the shape.
        task: What a ticket stands for.
        items: Number of tickets.
        ticket: The next one; int64 (1,).
        x: Address of the forward's input.
        g: Address of the gradient of its output.
        y: Address of the gradient of its input, which overlaps neither.
        slots: Partial sums of each channel and tile; float64 (C, tiles, 2).
        mean: Mean of each channel; float64 (C,).
        m2: Sum of squared deviations of each channel; float64 (C,).
        scale: Multiplier of the forward; float32 (C,).
        epsilon: Added to the variance.
        sums: Sums of g and of g * (x - mean); float64 (2, C).
        coefficients: hi, factor, slope and offset of `normalization.InputGradient`; float32 (4, C).
        streaming: Whether the output goes past the caches.
    """
    wide = np.empty((3, plan.width + LANES), np.float64)
    spare = np.empty((4, plan.width + LANES), np.float32)
    item = take_ticket(ticket)
    while item < items:
        if task == UNIT:
            for tile in range(plan.tiles):
                _tile_sums(tag, plan, item, tile, x, g, mean, slots, wide)
            _finish(plan, item, slots, mean, m2, scale, epsilon, sums, coefficients)
            for tile in range(plan.tiles - 1, -1, -1):
                _apply_tile(tag, plan, item, tile, x, g, y, coefficients, spare, streaming)
        elif task == SUMS:
            _tile_sums(tag, plan, item // plan.tiles, item % plan.tiles, x, g, mean, slots, wide)
        elif task == ARRIVED:
            unit, tile = arrived_tile(plan, item)
            _tile_sums(tag, plan, unit, tile, x, g, mean, slots, wide)
        elif task == FINISH:
            _finish(plan, item, slots, mean, m2, scale, epsilon, sums, coefficients)
        elif not plan.spread:
            begin, end = item * CHUNK, min((item + 1) * CHUNK, plan.samples * plan.channels * plan.space)
            _apply_between(tag, plan.channels, plan.space, begin, end, x, g, y, coefficients, streaming)
        else:
            _apply_tile(tag, plan, item // plan.tiles, item % plan.tiles, x, g, y, coefficients, spare, streaming)
        item = take_ticket(ticket)
    fence()


@kernel
def apply_range(tag: Any, length: int, channels: int, space: int, begin: int, end: int, x: int, g: int, y: int,
                coefficients: Any) -> None:  # fmt: skip
    """Write consecutive values of the gradient of the input, in this thread.

    Args:
        tag: Says the element type, see `simd`.
        length: After how many values the coefficients repeat, if there is one for each value; 0: one a channel.
        channels: C.
        space: S.
        begin: The first value.
        end: The one behind the last.
        x: Address of the forward's input, of its value 0.
        g: Address of the gradient of its output.
        y: Address that value 0 of the result would have.
        coefficients: hi, factor, slope and offset of `normalization.InputGradient`; float32 (4, C or length + 16).
    """
    if not length:
        _apply_between(tag, channels, space, begin, end, x, g, y, coefficients, False)
        return
    h, f = coefficients[0].ctypes.data, coefficients[1].ctypes.data
    s, o = coefficients[2].ctypes.data, coefficients[3].ctypes.data
    i = begin
    while i < end:
        column = i % length
        stop = min(end, i - column + length)
        skip = 4 * column
        _apply_spread(tag, x, g, y, i, stop - i, h + skip, f + skip, s + skip, o + skip, False)
        i = stop
