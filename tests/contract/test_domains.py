"""Several sets of running statistics in one layer, on every backend."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.core.types import Array
from sharednorm.errors import InvalidName, LayerEmpty, LayerNotFound
from tests.support import oracle
from tests.support.making import MakeLayer

SHAPE = (4, 3, 5, 2)


def batch(seed: int, shift: float = 0.0) -> Array:
    x: Array = oracle.random_tensor(seed, SHAPE) + np.float32(shift)
    return x


def assert_statistics(layer: sharednorm.Layer, model: oracle.Model) -> None:
    np.testing.assert_allclose(layer.mean.ravel(), model.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.var.ravel(), model.var, rtol=1e-5)


def test_each_domain_has_the_statistics_of_its_own_batches(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3, sscale=0.0)
    own.trainMode()
    layers = {"": own, "site-a": own.inDomain("site-a"), "höhle 層": own.inDomain("höhle 層")}
    models = {domain: oracle.Model(3) for domain in layers}
    assert {layer.domain for layer in layers.values()} == set(layers)
    assert own.domains == ("höhle 層", "site-a")
    steps = ["site-a", "", "site-a", "höhle 層", "site-a", "höhle 層", ""]
    for number, domain in enumerate(steps):
        x = batch(number, shift=10.0 * len(domain))
        np.testing.assert_allclose(layers[domain](x), models[domain].train(x), rtol=0, atol=1e-5)
        layers[domain].flush()
        assert own.version == layers["site-a"].version == number + 1
    for domain, layer in layers.items():
        assert layer.numOfProps == steps.count(domain)
        assert_statistics(layer, models[domain])
        layer.evalMode()
        x = batch(99)
        np.testing.assert_allclose(layer(x), models[domain].evaluate(x), rtol=0, atol=1e-4)


def test_a_new_domain_begins_as_a_new_layer_does(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3)
    own.trainMode()
    own(batch(1))
    own.freezeStats()
    inside = own.inDomain("new")
    assert (inside.numOfProps, inside.statsFrozen, inside.version) == (0, False, 1)
    assert not inside.mean.any()
    assert (inside.var == 1).all()
    np.testing.assert_array_equal(inside.scale, own.scale)


def test_parameters_and_their_gradients_are_the_layers(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3, sscale=0.0)
    own.trainMode()
    inside, model = own.inDomain("site-a"), oracle.Model(3)
    inside.bias = np.arange(3)
    model.bias = np.arange(3.0)
    assert own.bias.ravel().tolist() == [0, 1, 2]
    total = {"scale": np.zeros(3), "bias": np.zeros(3)}
    for seed, layer in ((1, inside), (2, own)):
        x, grad = batch(seed), batch(seed + 10)
        np.testing.assert_allclose(layer(x), model.train(x), rtol=0, atol=1e-5)
        layer.backward(grad, momentum=1.0)
        assert layer.grad is not None
        np.testing.assert_allclose(layer.grad, model.backward(grad), rtol=0, atol=1e-5)
        total["scale"] += model.scale_grad
        total["bias"] += model.bias_grad
    for name, right in total.items():
        np.testing.assert_allclose(inside.vars[name].grad.ravel(), right, rtol=1e-4, atol=1e-4)
    inside.updateParams(-0.5)
    np.testing.assert_allclose(own.bias.ravel(), np.arange(3) - 0.5 * total["bias"], rtol=1e-4, atol=1e-4)
    own.zeroGradParams()
    assert not inside.vars["scale"].grad.any()


def test_what_is_frozen_begun_anew_or_set_is_of_one_domain(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3, sscale=0.0)
    own.trainMode()
    a, b = own.inDomain("a"), own.inDomain("b")
    models = {"": oracle.Model(3), "b": oracle.Model(3)}
    for layer in (own, a, b):
        layer(batch(1))
    for model in models.values():
        model.train(batch(1))
    a.freezeStats()
    a.mean = np.array([1.0, 2.0, 3.0])
    for layer in (own, a, b):
        layer(batch(2))
    for model in models.values():
        model.train(batch(2))
    assert [layer.statsFrozen for layer in (own, a, b)] == [False, True, False]
    assert [layer.numOfProps for layer in (own, a, b)] == [2, 1, 2]
    assert a.mean.ravel().tolist() == [1, 2, 3]
    b.resetStats()
    assert (b.numOfProps, bool(b.mean.any())) == (0, False)
    assert_statistics(own, models[""])
    a.numOfProps = 7
    assert [layer.numOfProps for layer in (own, a, b)] == [2, 7, 0]


def test_each_domain_takes_a_delta_once(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3, sscale=0.0)
    gathered = sharednorm.Statistics(3)
    gathered.add(batch(1))
    delta = gathered.take()
    assert delta is not None
    a = own.inDomain("a")
    assert [layer.mergeStats(delta) for layer in (a, own, a, own)] == [True, True, False, False]
    assert own.version == 2
    model = oracle.Model(3)
    model.train(batch(1))
    assert_statistics(a, model)


def test_a_handle_in_a_domain_is_a_handle_of_its_own(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3)
    own.trainMode()
    own.calcMode(np.float32)
    own(batch(1))
    inside = own.inDomain("a")
    assert inside.train
    assert inside.calctype == np.float32
    assert inside.inData is None
    assert inside.name == own.name
    assert type(inside) is type(own)
    inside.evalMode()
    assert own.train
    own.flush()  # another handle does not wait for the steps of this one
    back = inside.inDomain("")
    assert (back.domain, back.numOfProps, back.train) == ("", 1, False)
    assert "domain" in repr(inside)
    assert "'a'" in repr(inside)
    assert "domain" not in repr(own)


def test_a_domain_that_is_deleted(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3)
    own.trainMode()
    a, other, kept = own.inDomain("a"), own.inDomain("a"), own.inDomain("b")
    for layer in (own, a, kept):
        layer(batch(1))
        layer.flush()
    kept.deleteDomain("a")
    assert own.domains == ("b",)
    for layer in (a, other):
        with pytest.raises(LayerNotFound, match=r"has no domain 'a' \(expected: one of 'b'"):
            layer.numOfProps  # noqa: B018 - it asks
        with pytest.raises(LayerNotFound, match="no domain 'a'"):
            layer.resetStats()
        layer.evalMode()
        with pytest.raises(LayerNotFound, match="no domain 'a'"):
            layer(batch(2))
    with pytest.raises(LayerNotFound, match="no domain 'a'"):
        own.deleteDomain("a")
    assert (own.numOfProps, kept.numOfProps, own.version) == (1, 1, 3)
    assert own.inDomain("a").numOfProps == 0  # of that name, and new


@pytest.mark.parametrize("domain", [" ", "a\nb", "d" * 257, None, 3])
def test_names_that_no_domain_has(make_layer: MakeLayer, domain: str) -> None:
    layer = make_layer("BatchNorm", 2)
    with pytest.raises(InvalidName, match="domain"):
        layer.inDomain(domain)
    with pytest.raises(InvalidName, match="domain"):
        layer.deleteDomain(domain)
    assert layer.domains == ()


def test_a_layers_own_statistics_cannot_be_deleted(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm", 2)
    with pytest.raises(InvalidName, match="the layer's own statistics stay"):
        layer.inDomain("a").deleteDomain("")


def test_a_file_of_a_domain(make_layer: MakeLayer, tmp_path: Path) -> None:
    own = make_layer("BatchNorm2D", 3)
    own.trainMode()
    a = own.inDomain("a")
    own(batch(1))
    a(batch(2, shift=5.0))
    a.save(str(tmp_path / "a.npz"), name="x")
    b = own.inDomain("b")
    b.load(str(tmp_path / "a.npz"), name="x")
    np.testing.assert_array_equal(b.mean, a.mean)
    np.testing.assert_array_equal(b.var, a.var)
    assert b.numOfProps == 1
    assert not np.allclose(own.mean, a.mean)


def test_an_empty_layer_is_loaded_through_a_domain(make_layer: MakeLayer) -> None:
    full, empty = make_layer("BatchNorm2D", 3), make_layer("BatchNorm2D", 3, empty=True)
    full.trainMode()
    full(batch(1))
    inside = empty.inDomain("a")
    with pytest.raises(LayerEmpty):
        inside.mean  # noqa: B018 - it asks
    inside.load(full.save(name="x"), name="x")
    np.testing.assert_array_equal(inside.mean, full.mean)
    np.testing.assert_array_equal(empty.scale, full.scale)
    assert not empty.mean.any()


def test_copies_stay_in_their_domain(make_layer: MakeLayer, backend: str) -> None:
    own = make_layer("BatchNorm2D", 3)
    own.trainMode()
    a = own.inDomain("a")
    a(batch(1))
    a.flush()
    for other in (copy.copy(a), copy.deepcopy(a), pickle.loads(pickle.dumps(a))):
        assert (other.domain, other.numOfProps, other.domains) == ("a", 1, ("a",))
    if backend.startswith("local"):
        # What was copied together stays one layer.
        one, two = pickle.loads(pickle.dumps((own, a)))
        one.bias = np.arange(3)
        assert two.bias.ravel().tolist() == [0, 1, 2]
        assert not a.bias.any()


def test_threads_in_different_domains(make_layer: MakeLayer) -> None:
    own = make_layer("BatchNorm2D", 3, sscale=0.0)
    own.trainMode()
    count = 20
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            layer = own.inDomain(f"site-{number}")
            for step in range(count):
                layer(batch(step, shift=number))
            layer.flush()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert own.version == 4 * count
    for number in range(4):
        model = oracle.Model(3)
        for step in range(count):
            model.train(batch(step, shift=number))
        inside = own.inDomain(f"site-{number}")
        assert inside.numOfProps == count
        assert_statistics(inside, model)
