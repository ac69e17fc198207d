"""Modes, resetting, in place, empty layers, and the rest of the original's API."""

# ruff: noqa: NPY002 - a layer draws from the global generator, as the original
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sharednorm import (
    BackwardInEval,
    BackwardWithoutForward,
    InplaceInTraining,
    InvalidConfiguration,
    InvalidShape,
    LayerEmpty,
    UnsupportedDType,
)
from tests.support.making import MakeLayer
from tests.support.oracle import DTYPES, KINDS, Model, dtype, random_tensor, rounding, shape_of
from tests.support.unchanged import unchanged

X = random_tensor(1, (4, 3, 5, 5))
GRAD = random_tensor(2, (4, 3, 5, 5))


def test_a_layer_starts_in_train_mode(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    assert (bn.train, bn.numOfProps, bn.inData, bn.data, bn.grad, bn.savemean) == (True, 0, None, None, None, None)
    bn(X)
    assert (bn.numOfProps, bn.inData is X) == (1, True)


@pytest.mark.parametrize("value", ["eval", "", 0, 1, None])
def test_a_mode_is_true_or_false(make_layer: MakeLayer, value: Any) -> None:
    bn = make_layer("BatchNorm2D", 3)
    bn(X)
    with pytest.raises(InvalidConfiguration, match=r"train is .*expected: True or False"):
        bn.train = value
    assert bn.train
    assert bn.inData is X  # not forgotten
    bn.train = np.bool_(False)  # type: ignore[assignment]
    assert not bn.train


@pytest.mark.parametrize("switch", ["method", "attribute"])
def test_setting_a_mode_forgets_the_last_forward(make_layer: MakeLayer, switch: str) -> None:
    bn = make_layer("BatchNorm2D", 3)

    def choose(train: bool) -> None:
        if switch == "attribute":
            bn.train = train
        elif train:
            bn.trainMode()
        else:
            bn.evalMode()

    for train in (True, False, False, True):
        bn.trainMode()
        bn(X)
        bn.backward(GRAD)
        choose(train)
        assert bn.train is train
        kept = (bn.inData, bn.data, bn.grad, bn.savemean, bn.saveinvvar, bn.scalegrad, bn.biasgrad)
        assert kept == (None,) * 7
        error = BackwardWithoutForward if train else BackwardInEval
        with pytest.raises(error), unchanged(bn):
            bn.backward(GRAD)


def test_eval_changes_nothing(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    bn(X)
    model.train(X)
    bn.evalMode()
    before = bn.snapshot()
    np.testing.assert_allclose(bn(GRAD), model.evaluate(GRAD), rtol=1e-6, atol=2e-6)
    after = bn.snapshot()
    assert (after.version, after.num_of_props, after.mean.tobytes()) == (1, 1, before.mean.tobytes())
    assert bn.inData is GRAD
    with pytest.raises(BackwardInEval, match="eval mode"), unchanged(bn):
        bn.backward(GRAD)


def test_reset_keeps_the_mode_and_the_layer(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    bn.reset()
    bn(X)
    bn.backward(GRAD)
    before = bn.snapshot()
    bn.reset()
    assert (bn.inData, bn.data, bn.grad, bn.savemean, bn.train) == (None, None, None, None, True)
    assert bn.snapshot().scale_grad.tobytes() == before.scale_grad.tobytes()
    with pytest.raises(BackwardWithoutForward, match="expected: a forward in train mode"):
        bn.backward(GRAD)
    bn(X)
    bn.backward(GRAD)


@pytest.mark.parametrize("name", DTYPES)
def test_in_place_the_output_replaces_the_input(make_layer: MakeLayer, name: str) -> None:
    bn = make_layer("BatchNorm2D", 3, inplace=True)
    bn.load(state_of(Model(3)), name="")
    bn.evalMode()
    x = random_tensor(1, (4, 3, 5, 5), name)
    given, expected = x.copy(), Model(3).evaluate(x)
    y = bn(given)
    assert (y is given, bn.inData is given, bn.data is given) == (True, True, True)
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=rounding(name), atol=2e-6)


@pytest.mark.parametrize("layout", ["strided", "big-endian", "channels-last", "reversed"])
def test_in_place_in_any_memory_layout(make_layer: MakeLayer, layout: str) -> None:
    bn = make_layer("BatchNorm2D", 3, inplace=True, affine=False)
    bn.mean, bn.var = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    bn.evalMode()
    views: dict[str, Any] = {
        "strided": np.full((4, 3, 5, 10), 7, np.float32)[..., ::2],
        "big-endian": np.empty(X.shape, ">f4"),
        "channels-last": np.empty((4, 5, 5, 3), np.float32).transpose(0, 3, 1, 2),
        "reversed": np.empty(X.shape, np.float32)[::-1],
    }
    given = views[layout]
    given[...] = X
    model = Model(3)
    model.mean, model.var = bn.mean.ravel().astype(np.float64), bn.var.ravel().astype(np.float64)
    assert bn(given) is given
    np.testing.assert_allclose(given, model.evaluate(X), rtol=1e-6, atol=2e-6)
    if layout == "strided":
        assert given.base is not None
        assert (given.base[..., 1::2] == 7).all()


def test_in_place_the_very_object_comes_back(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3, inplace=True, affine=False)
    bn.evalMode()
    given = X.copy().view(type("Mine", (np.ndarray,), {}))
    assert (bn(given) is given, bn.data is given) == (True, True)
    np.testing.assert_allclose(np.asarray(given), Model(3).evaluate(X), rtol=1e-6, atol=2e-6)


def test_in_place_refuses_to_train_before_anything_changes(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3, inplace=True)
    x = X.copy()
    with pytest.raises(InplaceInTraining, match="in-place layer cannot train"), unchanged(bn):
        bn(x)
    np.testing.assert_array_equal(x, X)


def test_in_place_refuses_what_it_cannot_write_to(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3, inplace=True)
    bn.evalMode()
    x = X.copy()
    x.setflags(write=False)
    with pytest.raises(InvalidShape, match="read-only"), unchanged(bn):
        bn(x)
    np.testing.assert_array_equal(x, X)


def state_of(model: Model) -> bytes:
    """Return an HDF5 file of a model, in PuzzleLib's layout, of a layer without a name."""
    import io

    import h5py

    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for index, name in enumerate(("scale", "bias")):
            file[f"params/{index}"] = getattr(model, name).astype(np.float32).reshape(1, -1, 1, 1)
            file[f"links/.{name}"] = index
        for name in ("mean", "var"):
            file[f"attrs/.{name}"] = getattr(model, name).astype(np.float32).reshape(1, -1, 1, 1)
    return stream.getvalue()


def test_an_empty_layer_waits_for_its_state(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3, empty=True)
    calls: list[Any] = [
        lambda: bn(X), lambda: bn.save(None), lambda: bn.scale, lambda: bn.mean, lambda: bn.attrs,
        lambda: bn.vars["scale"].data, lambda: bn.vars["bias"].grad, lambda: bn.updateParams(0.1),
        lambda: setattr(bn, "scale", [1, 2, 3]), lambda: setattr(bn, "numOfProps", 1), bn.zeroGradParams,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LayerEmpty), unchanged(bn):
            call()
    with pytest.raises(BackwardWithoutForward), unchanged(bn):
        bn.backward(GRAD)
    assert (bn.numOfProps, bn.snapshot().initialized, bn.numOfParams()) == (0, False, 6)
    bn.load(state_of(Model(3)), name="")
    np.testing.assert_allclose(bn(X), Model(3).train(X), rtol=1e-6, atol=2e-6)
    assert bn.numOfProps == 1


@pytest.mark.parametrize("name", DTYPES)
def test_calc_mode_takes_one_type_only(make_layer: MakeLayer, name: str) -> None:
    bn = make_layer("BatchNorm", 3)
    assert bn.calctype is None
    bn.calcMode(dtype(name).type)
    assert bn.calctype == dtype(name)
    bn(random_tensor(1, (6, 3), name))
    other = "float16" if name == "float32" else "float32"
    with pytest.raises(UnsupportedDType, match=f"Expected dtype {name}, got {other}"), unchanged(bn):
        bn(random_tensor(1, (6, 3), other))
    bn.calcMode(other)
    bn(random_tensor(1, (6, 3), other))


@pytest.mark.parametrize("given", [np.float64, "int8", None, "nonsense", object(), np.dtype("f4,f4"), 32])
def test_calc_mode_refuses_other_types(make_layer: MakeLayer, given: Any) -> None:
    bn = make_layer("BatchNorm", 3)
    with pytest.raises(UnsupportedDType, match="Unsupported dtype"), unchanged(bn):
        bn.calcMode(given)


def test_sizes_and_shapes(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 512)
    assert (bn.numOfParams(), bn.paramSize(), bn.paramSize("kb"), bn.paramSize("mb")) == (1024, 4096, 4.0, 4 / 1024)
    with pytest.raises(InvalidConfiguration, match="unit is 'gb'"):
        bn.paramSize("gb")
    assert (bn.dataShapeFrom((2, 512, 3, 3)), bn.gradShapeFrom((2, 512, 3, 3))) == ((2, 512, 3, 3),) * 2
    assert (bn.maps, bn.size) == (512, 512)


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_can_be_read(make_layer: MakeLayer, kind: str) -> None:
    numbers = {"epsilon": 1e-3, "initFactor": 0.5, "minFactor": 0.25, "affine": False}
    bn = make_layer(kind, 2, **numbers, averaging="printed", nonfinite="allow")
    found = (bn.epsilon, bn.initFactor, bn.minFactor, bn.affine, bn.averaging, bn.nonfinite, bn.inplace)
    assert found == (1e-3, 0.5, 0.25, False, "printed", "allow", False)
    assert str(bn) == f"Module {kind} (name: {bn.name})"
    assert all(part in repr(bn) for part in (f"{kind}(2", repr(bn.name)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_that_a_layer_is_made_with_has_its_effect(make_layer: MakeLayer, kind: str) -> None:
    numbers = {"epsilon": 0.75, "initFactor": 0.5, "minFactor": 0.125}
    bn = make_layer(kind, 3, **numbers, sscale=0.0)
    model = Model(3, epsilon=0.75, init_factor=0.5, min_factor=0.125)
    for seed in range(6):
        x, grad = random_tensor(seed, shape_of(kind, 3)), random_tensor(seed + 50, shape_of(kind, 3))
        np.testing.assert_allclose(bn(x), model.train(x), rtol=1e-6, atol=2e-6)
        bn.backward(grad)
        assert bn.grad is not None
        np.testing.assert_allclose(bn.grad, model.backward(grad), rtol=3e-6, atol=4e-6)
        np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=1e-6)
        np.testing.assert_allclose(bn.var.ravel(), model.var, rtol=1e-6)
    bn.evalMode()
    np.testing.assert_allclose(bn(x), model.evaluate(x), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_empty_or_in_place(make_layer: MakeLayer, kind: str) -> None:
    x = random_tensor(1, shape_of(kind, 3))
    with pytest.raises(LayerEmpty):
        make_layer(kind, 3, empty=True)(x)
    bn = make_layer(kind, 3, inplace=True, affine=False)
    with pytest.raises(InplaceInTraining):
        bn(x)
    bn.evalMode()
    expected = Model(3).evaluate(x)
    assert bn(x) is x
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=2e-6)


def test_scale_is_drawn_as_the_original_draws_it(make_layer: MakeLayer) -> None:
    np.random.seed(11)
    bn = make_layer("BatchNorm2D", 5, sscale=0.3)
    np.random.seed(11)
    np.testing.assert_array_equal(bn.scale, np.random.normal(1.0, 0.3, (1, 5, 1, 1)).astype(np.float32))


def test_statistics_are_read_only_and_can_be_assigned(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    for name in ("scale", "bias", "mean", "var"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(bn, name)[...] = 5
        setattr(bn, name, np.array([1.0, 2.0, 3.0]))
        assert getattr(bn, name).ravel().tolist() == [1.0, 2.0, 3.0]
    bn.numOfProps = 41
    bn(X)
    assert (bn.numOfProps, bn.version) == (42, 1)
    vars_of, attrs = bn.vars, bn.attrs
    assert (sorted(vars_of), sorted(attrs)) == (["bias", "scale"], ["mean", "var"])
    with pytest.raises(TypeError):
        attrs["mean"] = bn.mean  # type: ignore[index]


def test_where_allowed_a_nan_goes_through(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3, nonfinite="allow", sscale=0.0)
    x = X.copy()
    x[0, 1, 0, 0] = np.nan
    y = bn(x)
    np.testing.assert_array_equal(np.isnan(y), np.broadcast_to(np.array([0, 1, 0]).reshape(1, 3, 1, 1), y.shape))
    assert np.isnan(bn.mean.ravel()).tolist() == [False, True, False]
    assert bn.numOfProps == 1
    bn.backward(GRAD)
    assert bn.grad is not None
    assert np.isfinite(bn.grad[:, [0, 2]]).all()
