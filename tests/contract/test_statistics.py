"""Running statistics apart from the mode: frozen, and begun anew."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from sharednorm.core.state import StateUpdate
from sharednorm.errors import InvalidConfiguration, LayerEmpty, NonFiniteInput
from tests.support import oracle
from tests.support.making import MakeLayer

SHAPE = (4, 3, 5, 2)


def test_frozen_statistics_stay_and_training_goes_on(make_layer: MakeLayer) -> None:
    layer, model = make_layer("BatchNorm2D", 3, sscale=0.0), oracle.Model(3)
    layer.trainMode()
    x = [oracle.random_tensor(seed, SHAPE) for seed in range(6)]
    np.testing.assert_allclose(layer(x[0]), model.train(x[0]), rtol=0, atol=3e-6)
    assert not layer.statsFrozen
    layer.freezeStats()
    assert layer.statsFrozen
    frozen = copy.deepcopy(model)  # takes no batch in from here
    for seed in (1, 2):
        right = model.train(x[seed])
        np.testing.assert_allclose(layer(x[seed]), right, rtol=0, atol=3e-6)  # by the batch, as ever
        layer.backward(x[5])
        np.testing.assert_allclose(layer.grad, model.backward(x[5]), rtol=0, atol=1e-5)
    assert layer.numOfProps == 1
    assert layer.version == 3
    np.testing.assert_allclose(layer.mean.ravel(), frozen.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.var.ravel(), frozen.var, rtol=1e-6)
    layer.evalMode()
    np.testing.assert_allclose(layer(x[3]), frozen.evaluate(x[3]), rtol=0, atol=3e-6)
    layer.trainMode()
    layer.unfreezeStats()
    assert not layer.statsFrozen
    layer(x[4])
    frozen.train(x[4])  # the average goes on where it was
    assert layer.numOfProps == 2
    np.testing.assert_allclose(layer.mean.ravel(), frozen.mean, rtol=1e-6)
    np.testing.assert_allclose(layer.var.ravel(), frozen.var, rtol=1e-6)


def test_what_is_assigned_to_frozen_statistics_is_there(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm", 2)
    layer.freezeStats()
    layer.mean = np.array([1.0, 2.0])
    layer.zeroGradParams()
    assert layer.statsFrozen
    assert layer.mean.ravel().tolist() == [1, 2]
    layer.freezeStats()  # again: nothing
    assert layer.snapshot().stats_frozen


def test_a_poisoned_batch_is_refused_by_frozen_statistics_too(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm", 2)
    layer.trainMode()
    layer.freezeStats()
    with pytest.raises(NonFiniteInput):
        layer(np.array([[1, np.nan], [2, 3]], np.float32))
    assert layer.version == 0


def test_an_empty_layer_has_no_statistics_to_freeze(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm", 2, empty=True)
    with pytest.raises(LayerEmpty):
        layer.freezeStats()
    with pytest.raises(LayerEmpty):
        layer.resetStats()


def test_statistics_that_begin_anew(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm2D", 3)
    layer.trainMode()
    layer.bias = np.arange(3)
    scale = layer.scale.copy()
    for seed in range(3):
        layer(oracle.random_tensor(seed, SHAPE))
    layer.resetStats()
    assert (layer.numOfProps, layer.version) == (0, 3)
    assert not layer.mean.any()
    assert (layer.var == 1).all()
    np.testing.assert_array_equal(layer.scale, scale)
    assert layer.bias.ravel().tolist() == [0, 1, 2]
    assert layer.inData is not None  # which `reset` forgets
    x, model = oracle.random_tensor(9, SHAPE), oracle.Model(3)
    layer(x)
    model.train(x)
    np.testing.assert_allclose(layer.mean.ravel(), model.mean, rtol=1e-6)


def test_what_is_neither_frozen_nor_not(make_layer: MakeLayer) -> None:
    layer: Any = make_layer("BatchNorm", 2)
    with pytest.raises(InvalidConfiguration, match=r"stats_frozen is 1 \(expected: True or False\)"):
        layer._backend.update(StateUpdate(stats_frozen=1))  # type: ignore[arg-type]


def test_all_handles_see_it(make_layer: MakeLayer, backend: str) -> None:
    layer = make_layer("BatchNorm", 2, name=f"frozen by all/{backend}")
    layer.freezeStats()
    if backend.startswith("local"):
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    else:
        others = [make_layer("BatchNorm", 2, name=f"frozen by all/{backend}")]
    for other in others:
        assert other.statsFrozen
        other.trainMode()
        other(oracle.random_tensor(1, (4, 2)))
        assert other.numOfProps == 0
