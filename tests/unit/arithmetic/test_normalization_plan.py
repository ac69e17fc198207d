"""The cut of a shape: every element in exactly one tile, whatever the sizes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sharednorm.arithmetic.numba.tile_access import (
    APPLY,
    CHUNK,
    FINISH,
    SUMS,
    UNIT,
    channels_of,
    column_tile,
    items_of,
    row_length,
    row_tile,
    tile_count,
)
from sharednorm.arithmetic.numba.tiling import BLOCK, PIECE, Plan, plan_of

sizes = st.one_of(st.integers(1, 40), st.sampled_from([127, 1023, 1024, 1025, 5000]))


@given(samples=sizes, channels=sizes, space=st.one_of(sizes, st.sampled_from([PIECE - 1, PIECE, PIECE + 1])))
@example(samples=70001, channels=7, space=1)
@example(samples=1, channels=1, space=1)
@example(samples=3, channels=1, space=5 * PIECE)
def test_tiles_cover_every_element_once(samples: int, channels: int, space: int) -> None:
    if samples * channels * space > 300_000:
        samples = max(1, 300_000 // (channels * space))
    plan = plan_of(samples, channels, space)
    times = np.zeros(samples * channels * space, np.int8)
    owner = np.arange(times.size) // space % channels
    for unit in range(plan.units):
        for tile in range(plan.tiles):
            covered = elements(plan, unit, tile)
            times[covered] += 1
            mine = owner[covered]
            assert unit * plan.group <= mine.min()
            assert mine.max() < unit * plan.group + channels_of.py_func(plan, unit)
            assert covered.size == tile_count.py_func(plan, tile) * channels_of.py_func(plan, unit)
    assert (times == 1).all()


def elements(plan: Plan, unit: int, tile: int) -> npt.NDArray[np.int64]:
    if not plan.columns:
        start, length = row_tile.py_func(plan, unit, tile)
        assert 1 <= length <= PIECE
        return np.arange(start, start + length)
    start, rows, fold = column_tile.py_func(plan, unit, tile)
    columns = fold * channels_of.py_func(plan, unit) * plan.space
    assert columns <= plan.width
    assert rows * columns <= max(BLOCK, columns)
    result: npt.NDArray[np.int64] = (
        start + np.arange(rows)[:, None] * row_length.py_func(plan) + np.arange(columns)
    ).ravel()
    return result


@pytest.mark.parametrize(
    ("shape", "units"),
    [((32, 64, 112 * 112), 64), ((32, 2048, 49), 2048 // 32), ((32, 128, 28 * 28), 64), ((128, 10, 1), 1)],
)
def test_units_of_common_shapes(shape: tuple[int, int, int], units: int) -> None:
    assert plan_of(*shape).units == units


def test_few_channels_of_many_values_are_still_many_tiles() -> None:
    for shape in ((4, 1, 4096 * 4096), (1, 3, 4096 * 4096), (10**6, 1, 1), (10**6, 16, 1)):
        assert items_of(plan_of(*shape), SUMS) >= 15


def test_items() -> None:
    plan = plan_of(4, 8, 100_000)
    assert items_of(plan, UNIT) == items_of(plan, FINISH) == 8
    assert items_of(plan, SUMS) == 8 * 4 * 7
    assert items_of(plan, APPLY) == -(-3_200_000 // CHUNK)
