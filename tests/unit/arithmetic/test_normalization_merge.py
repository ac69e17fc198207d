"""Merging moments: as of all data at once, in any grouping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharednorm.arithmetic.formulas import merge
from sharednorm.core.state import Moments
from tests.support import oracle


def moments_of(x: oracle.Array) -> Moments:
    return Moments(*oracle.batch_moments(x))


def parts_of(seed: int, counts: list[int], centre: float) -> list[oracle.Array]:
    rng = np.random.default_rng(seed)
    return [rng.normal(centre + rng.normal(0, 10), rng.uniform(0.01, 3), (count, 3)) for count in counts]


@given(
    counts=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    centre=st.sampled_from([0.0, 1e4, -1e6]),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_is_the_moments_of_all_values(counts: list[int], centre: float, seed: int, data: st.DataObject) -> None:
    parts = parts_of(seed, counts, centre)
    whole = moments_of(np.concatenate(parts))
    cut = data.draw(st.integers(0, len(parts) - 1))
    singles = [moments_of(part) for part in parts]
    left_to_right = merge(singles)
    grouped = merge([*([merge(singles[:cut])] if cut else []), merge(singles[cut:])])
    for found in (left_to_right, grouped):
        assert found.count == whole.count
        np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(found.m2, whole.m2, rtol=1e-9, atol=1e-9 * (abs(centre) + 1) ** 2 * 1e-12)


def test_one_part_is_itself_and_its_own_copy() -> None:
    part = moments_of(np.arange(12.0).reshape(4, 3))
    found = merge([part])
    np.testing.assert_array_equal(found.mean, part.mean)
    np.testing.assert_array_equal(found.m2, part.m2)
    assert not np.shares_memory(found.mean, part.mean)
    assert not np.shares_memory(found.m2, part.m2)


def test_parts_are_left_alone() -> None:
    parts = [moments_of(part) for part in parts_of(1, [3, 4, 5], 0)]
    before = [(part.mean.copy(), part.m2.copy()) for part in parts]
    merge(parts)
    for part, (mean, m2) in zip(parts, before, strict=True):
        np.testing.assert_array_equal(part.mean, mean)
        np.testing.assert_array_equal(part.m2, m2)


def test_unequal_parts_are_weighed_by_their_counts() -> None:
    many, one = Moments(3, np.array([1.0]), np.array([6.0])), Moments(1, np.array([5.0]), np.array([0.0]))
    found = merge([many, one])
    assert (found.count, float(found.mean[0]), float(found.m2[0])) == (4, 2.0, 18.0)


def test_a_non_finite_channel_stays_alone() -> None:
    bad = Moments(2, np.array([0.0, np.inf, np.nan]), np.array([1.0, np.nan, np.nan]))
    good = Moments(2, np.ones(3), np.ones(3))
    for found in (merge([bad, good]), merge([good, bad])):
        np.testing.assert_array_equal(np.isfinite(found.mean), [True, False, False])
        np.testing.assert_array_equal(np.isfinite(found.m2), [True, False, False])


def test_nothing_to_merge() -> None:
    with pytest.raises(ValueError, match="no moments to merge"):
        merge([])
