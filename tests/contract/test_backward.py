"""Backward: gradients, what is left out, accumulation, the optimizer's step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.making import MakeLayer
from tests.support.oracle import DTYPES, KINDS, Model, batch_moments, random_tensor, rounding, shape_of


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind_and_type(make_layer: MakeLayer, kind: str, name: str) -> None:
    bn = make_layer(kind, 7, sscale=0.5)
    model = Model(7)
    model.scale = bn.scale.ravel().astype(np.float64)
    x, grad = random_tensor(1, shape_of(kind, 7), name), random_tensor(2, shape_of(kind, 7), name)
    bn(x)
    model.train(x)
    assert bn.backward(grad) is None  # type: ignore[func-returns-value]
    expected = model.backward(grad)
    assert bn.grad is not None
    assert (bn.grad.shape, bn.grad.dtype, bn.grad.flags.c_contiguous) == (x.shape, x.dtype, True)
    np.testing.assert_allclose(bn.grad.astype(np.float64), expected, rtol=4 * rounding(name), atol=4e-6)
    for found, wanted in (
        (bn.vars["scale"].grad, model.scale_grad),
        (bn.vars["bias"].grad, model.bias_grad),
        (bn.scalegrad, model.scale_grad),
        (bn.biasgrad, model.bias_grad),
    ):
        assert found is not None
        np.testing.assert_allclose(found.ravel(), wanted, rtol=1e-5, atol=1e-4)


def test_backward_changes_nothing_but_gradients(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    x = random_tensor(1, (4, 3, 5, 5))
    bn(x)
    before = bn.snapshot()
    bn.backward(random_tensor(2, x.shape))
    after = bn.snapshot()
    for name in ("scale", "bias", "mean", "var", "num_of_props", "version"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert after.scale_grad.any()


def test_saved_moments_of_the_batch(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm1D", 3, epsilon=0.25)
    x = random_tensor(1, (4, 3, 6))
    bn(x)
    count, mean, m2 = batch_moments(x)
    assert bn.savemean is not None
    assert bn.saveinvvar is not None
    np.testing.assert_allclose(bn.savemean.ravel(), mean, rtol=1e-6)
    np.testing.assert_allclose(bn.saveinvvar.ravel(), 1 / np.sqrt(m2 / count + 0.25), rtol=1e-6)


def test_accumulation_with_scale_and_momentum(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    for number, (scale, momentum) in enumerate([(1.0, 0.0), (1.0, 1.0), (0.5, 0.9), (-2.0, 0.0), (0.0, 0.5), (1, 1)]):
        x, grad = random_tensor(number, (4, 3, 5, 5)), random_tensor(number + 50, (4, 3, 5, 5))
        bn(x)
        model.train(x)
        bn.backward(grad, scale=scale, momentum=momentum)
        model.backward(grad, scale=scale, momentum=momentum)
        np.testing.assert_allclose(bn.vars["scale"].grad.ravel(), model.scale_grad, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(bn.getVar("bias").grad.ravel(), model.bias_grad, rtol=1e-5, atol=1e-4)
    bn.zeroGradParams()
    assert not bn.vars["scale"].grad.any()
    assert not bn.vars["bias"].grad.any()


def test_the_arguments_by_position_are_the_originals(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm", 3, sscale=0.0), Model(3)
    x, grad = random_tensor(1, (6, 3)), random_tensor(2, (6, 3))
    bn(x)
    model.train(x)
    bn.backward(grad, True, False, 2.0, 0.5)
    model.backward(grad, scale=2.0, momentum=0.5)
    assert bn.grad is None
    np.testing.assert_allclose(bn.vars["scale"].grad.ravel(), model.scale_grad, rtol=1e-5, atol=1e-5)


def test_without_the_inputs_gradient_the_others_are_this_batchs(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    for number in range(3):
        x, grad = random_tensor(number, (4, 3, 5, 5)), random_tensor(number + 50, (4, 3, 5, 5))
        bn(x)
        model.train(x)
        bn.backward(grad, updGrad=False)
        model.backward(grad)
        assert bn.grad is None
        np.testing.assert_allclose(bn.vars["scale"].grad.ravel(), model.scale_grad, rtol=1e-5, atol=1e-4)
    bn.backward(grad)
    assert bn.grad is not None


def test_without_parameter_gradients_the_accumulated_ones_stay(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    x, grad = random_tensor(1, (4, 3, 5, 5)), random_tensor(2, (4, 3, 5, 5))
    bn(x)
    model.train(x)
    bn.backward(grad)
    before = bn.vars["scale"].grad
    bn.backward(-grad, updParamGrads=False)
    np.testing.assert_array_equal(bn.vars["scale"].grad, before)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad, model.backward(-grad), rtol=3e-6, atol=4e-6)
    assert bn.scalegrad is not None
    np.testing.assert_array_equal(bn.scalegrad, -before)


def test_one_forward_may_be_differentiated_several_times(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    x, grad = random_tensor(1, (4, 3, 5, 5)), random_tensor(2, (4, 3, 5, 5))
    bn(x)
    results = set()
    for _ in range(3):
        bn.backward(grad)
        assert bn.grad is not None
        results.add(bn.grad.tobytes())
    assert len(results) == 1


def test_backward_uses_the_scale_of_its_forward(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    x, grad = random_tensor(1, (4, 3, 5, 5)), random_tensor(2, (4, 3, 5, 5))
    bn(x)
    model.train(x)
    bn.scale = [5.0, 6.0, 7.0]
    bn.backward(grad)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad, model.backward(grad), rtol=3e-6, atol=4e-6)


def test_backward_belongs_to_the_last_forward(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    for number in range(5):
        x = random_tensor(number, (4, 3, 5, 5))
        bn(x)
        model.train(x)
    grad = random_tensor(50, x.shape)
    bn.backward(grad)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad, model.backward(grad), rtol=3e-6, atol=4e-6)


def test_not_affine(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, affine=False), Model(3, affine=False)
    assert (bn.scale.ravel().tolist(), bn.bias.ravel().tolist()) == ([1.0] * 3, [0.0] * 3)
    x, grad = random_tensor(1, (4, 3, 5, 5)), random_tensor(2, (4, 3, 5, 5))
    np.testing.assert_allclose(bn(x), model.train(x), rtol=6e-7, atol=2e-6)
    bn.backward(grad)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad, model.backward(grad), rtol=3e-6, atol=4e-6)
    assert (bn.scalegrad, bn.biasgrad) == (None, None)
    assert not bn.vars["scale"].grad.any()
    bn.updateParams(0.5)
    assert (bn.scale.ravel().tolist(), bn.bias.ravel().tolist()) == ([1.0] * 3, [0.0] * 3)
    assert bn.numOfParams() == 6


def test_an_optimizers_step_adds_with_the_originals_sign(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0), Model(3)
    x, grad = random_tensor(1, (4, 3, 5, 5)), random_tensor(2, (4, 3, 5, 5))
    bn(x)
    model.train(x)
    bn.backward(grad)
    model.backward(grad)
    bn.updateParams(0.01)
    model.update_params(0.01)
    np.testing.assert_allclose(bn.scale.ravel(), model.scale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(bn.bias.ravel(), model.bias, rtol=1e-5, atol=1e-5)
    assert np.sign(bn.bias.ravel()).tolist() == np.sign(grad.sum(axis=(0, 2, 3))).tolist()
    np.testing.assert_allclose(bn(x), model.train(x), rtol=1e-5, atol=1e-5)


def test_variables_can_be_set(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    values: Any = np.array([1.0, 2.0, 3.0], np.float32).reshape(1, 3, 1, 1)
    for name in ("scale", "bias"):
        bn.vars[name].data = values
        bn.vars[name].grad = -values
        np.testing.assert_array_equal(getattr(bn, name), values)
        np.testing.assert_array_equal(bn.getVar(name).grad, -values)
    bn.updateParams(1.0)
    assert not bn.scale.any()
    with pytest.raises(KeyError):
        bn.getVar("mean")
