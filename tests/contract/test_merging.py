"""Statistics that are gathered without a layer, and merged into one, each part once."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm import Statistics, StatisticsDelta
from sharednorm.core.state import MAX_MERGED
from sharednorm.errors import InvalidConfiguration, InvalidShape, LayerEmpty, NonFiniteInput, UnsupportedDType
from tests.support import oracle
from tests.support.making import MakeLayer


def taken(statistics: Statistics) -> StatisticsDelta:
    delta = statistics.take()
    assert delta is not None
    return delta


def gathered(*batches: oracle.Array) -> StatisticsDelta:
    statistics = Statistics(batches[0].shape[1])
    for batch in batches:
        statistics.add(batch)
    return taken(statistics)


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_what_is_gathered(name: str) -> None:
    parts = [oracle.random_tensor(seed, (seed + 1, 4, 3, 5), name) for seed in range(4)]
    parts.append(np.empty((0, 4, 2, 2), oracle.dtype(name)))
    statistics = Statistics(4)
    assert (statistics.count, statistics.take()) == (0, None)
    assert statistics.mean.tolist() == [0] * 4
    assert statistics.var.tolist() == [1] * 4
    for part in parts:
        statistics.add(part)
    wide = np.concatenate([np.moveaxis(part.astype(np.float64), 1, 0).reshape(4, -1) for part in parts], axis=1)
    assert statistics.count == wide.shape[1] == 150
    np.testing.assert_allclose(statistics.mean, wide.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(statistics.var, wide.var(axis=1, ddof=1), rtol=1e-6)
    assert repr(statistics) == "<Statistics of 4 maps, 150 values each>"


def test_deltas_are_what_has_come_since() -> None:
    statistics = Statistics(3)
    first, second = oracle.random_tensor(1, (5, 3)), oracle.random_tensor(2, (7, 3))
    statistics.add(first)
    delta = taken(statistics)
    assert statistics.take() is None
    statistics.add(second)
    later = taken(statistics)
    assert (delta.count, later.count, statistics.count) == (5, 7, 12)
    assert delta.id != later.id
    np.testing.assert_allclose(later.mean, second.astype(np.float64).mean(axis=0), rtol=1e-6)
    whole = Statistics(3)
    whole.merge(later)
    whole.merge(delta)
    whole.merge(Statistics(3))
    np.testing.assert_allclose(whole.var, np.concatenate([first, second]).astype(np.float64).var(axis=0, ddof=1), 1e-6)
    both = Statistics(3)
    both.merge(statistics)
    assert taken(both).count == 12
    other: Statistics = pickle.loads(pickle.dumps(both))
    other.add(first)
    assert (other.count, both.count) == (17, 12)


def test_threads_lose_nothing() -> None:
    statistics, deltas = Statistics(2), []
    batch = oracle.random_tensor(1, (4, 2))

    def work() -> None:
        for _ in range(50):
            statistics.add(batch)
            deltas.append(statistics.take())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert statistics.count == 800
    assert sum(delta.count for delta in deltas if delta is not None) == 800


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        (np.ones(3, np.float32), InvalidShape),
        (np.ones((2, 4), np.float32), InvalidShape),
        (np.ones((2, 3, 0), np.float32), InvalidShape),
        (np.ones((2, 3)), UnsupportedDType),
        (np.full((2, 3), np.inf, np.float32), NonFiniteInput),
    ],
)
def test_what_cannot_be_gathered(batch: oracle.Array, error: type[Exception]) -> None:
    statistics = Statistics(3)
    with pytest.raises(error):
        statistics.add(batch)
    assert statistics.count == 0
    with pytest.raises(InvalidShape, match=r"of 2 maps \(expected: 3\)"):
        statistics.merge(gathered(np.ones((4, 2), np.float32)))


@pytest.mark.parametrize("maps", [0, -1, 2.5, "3", 1 << 18])
def test_maps_that_no_layer_has(maps: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="maps is"):
        Statistics(maps)


def test_a_delta_is_one_step_and_counts_once(make_layer: MakeLayer) -> None:
    layer, model = make_layer("BatchNorm2D", 3, sscale=0.0), oracle.Model(3)
    layer.trainMode()
    parts = [oracle.random_tensor(seed, (seed + 2, 3, 4, 2)) for seed in range(3)]
    x = oracle.random_tensor(9, (4, 3, 2, 2))
    layer(x)
    model.train(x)
    delta = gathered(*parts)
    assert layer.mergeStats(delta) is True
    model.train(np.concatenate(parts))
    for again in (delta, pickle.loads(pickle.dumps(delta))):
        assert layer.mergeStats(again) is False
    assert (layer.numOfProps, layer.version) == (2, 2)
    np.testing.assert_allclose(layer.mean.ravel(), model.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.var.ravel(), model.var, rtol=1e-6)
    layer(x)
    layer.bias = np.ones(3)
    layer.resetStats()
    assert layer.mergeStats(delta) is False  # it stays known
    other = gathered(*parts)
    assert layer.mergeStats(other) is True  # the same numbers, gathered anew
    np.testing.assert_allclose(layer.mean.ravel(), np.asarray(other.mean), rtol=1e-6)


def test_what_a_layer_does_not_merge(make_layer: MakeLayer) -> None:
    layer: Any = make_layer("BatchNorm", 2)
    good = gathered(oracle.random_tensor(1, (4, 2)))
    layer.freezeStats()
    with pytest.raises(InvalidConfiguration, match=r"frozen \(expected: unfreezeStats"):
        layer.mergeStats(good)
    layer.unfreezeStats()
    with pytest.raises(InvalidShape, match=r"of 3 maps \(expected: 2\)"):
        layer.mergeStats(gathered(oracle.random_tensor(1, (4, 3))))
    for wrong in (None, b"x", Statistics(2)):
        with pytest.raises(InvalidConfiguration, match="the delta is a"):
            layer.mergeStats(wrong)
    with pytest.raises(NonFiniteInput):
        layer.mergeStats(StatisticsDelta(b"x", 4, np.array([np.nan, 0]), np.ones(2)))
    with pytest.raises(InvalidConfiguration, match="the name of the delta has 0 bytes"):
        layer.mergeStats(StatisticsDelta(b"", 4, np.zeros(2), np.ones(2)))
    assert layer.version == 0
    assert layer.mergeStats(good)
    with pytest.raises(LayerEmpty):
        make_layer("BatchNorm", 2, empty=True).mergeStats(good)


def test_a_layer_knows_the_last_deltas_again() -> None:
    layer = sharednorm.BatchNorm(2)
    deltas = [StatisticsDelta(str(number).encode(), 4, np.zeros(2), np.ones(2)) for number in range(MAX_MERGED + 1)]
    for delta in deltas:
        assert layer.mergeStats(delta)
    assert not layer.mergeStats(deltas[1])
    assert layer.mergeStats(deltas[0])


def test_workers_that_send_again_count_once(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm", 2, initFactor=1.0, minFactor=0.0)
    deltas = [gathered(oracle.random_tensor(seed, (6, 2))) for seed in range(12)]
    merged: list[bool] = []

    def work() -> None:
        merged.extend(layer.mergeStats(delta) for delta in deltas)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(merged) == layer.numOfProps == 12
    np.testing.assert_allclose(layer.mean.ravel(), np.mean([delta.mean for delta in deltas], axis=0), rtol=1e-5)
