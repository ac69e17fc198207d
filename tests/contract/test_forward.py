"""Forward: train, eval, the running statistics, kinds, types, memory layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.making import MakeLayer
from tests.support.oracle import (
    DTYPES,
    KINDS,
    Array,
    Model,
    batch_moments,
    dtype,
    normalized,
    random_tensor,
    rounding,
    shape_of,
)

ODD = [1, 2, 7, 31, 127]


def assert_output(y: Array, expected: Any, name: str = "float32") -> None:
    np.testing.assert_allclose(y.astype(np.float64), expected, rtol=rounding(name), atol=2e-6)


def test_the_example_of_the_originals_documentation(make_layer: MakeLayer) -> None:
    data = np.arange(5 * 3 * 10 * 10).reshape(5, 3, 10, 10).astype(np.float32)
    bn = make_layer("BatchNorm2D", 3)
    y = bn(data)
    count, mean, m2 = batch_moments(data)
    np.testing.assert_allclose(bn.mean.ravel(), mean, rtol=1e-7)
    np.testing.assert_allclose(bn.var.ravel(), m2 / (count - 1), rtol=1e-7)
    np.testing.assert_array_equal(bn.bias, np.zeros((1, 3, 1, 1), np.float32))
    np.testing.assert_allclose(bn.scale, np.ones((1, 3, 1, 1)), atol=0.1)
    assert_output(y, normalized(data, mean, m2 / count, bn.scale, bn.bias, 1e-5))
    assert {each.shape for each in (bn.mean, bn.var, bn.scale, bn.bias)} == {(1, 3, 1, 1)}
    assert (bn.numOfProps, bn.version) == (1, 1)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_train_then_eval_of_every_kind_and_type(make_layer: MakeLayer, kind: str, name: str) -> None:
    bn = make_layer(kind, 7, sscale=0.5)
    bn.bias = np.linspace(-1, 1, 7)
    model = Model(7)
    model.scale, model.bias = (each.ravel().astype(np.float64) for each in (bn.scale, bn.bias))
    x = random_tensor(1, shape_of(kind, 7), name)
    y = bn(x)
    assert (y.shape, y.dtype, y.flags.c_contiguous, y.flags.writeable) == (x.shape, dtype(name), True, True)
    assert_output(y, model.train(x), name)
    np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=2e-7)
    np.testing.assert_allclose(bn.var.ravel(), model.var, rtol=2e-7)
    bn.evalMode()
    held_out = random_tensor(2, shape_of(kind, 7, batch=1), name)
    assert_output(bn(held_out), model.evaluate(held_out), name)
    assert bn.numOfProps == 1


@pytest.mark.parametrize("kind", KINDS)
def test_state_has_the_shape_of_the_original(make_layer: MakeLayer, kind: str) -> None:
    bn = make_layer(kind, 5)
    shape = (1, 5, 1, 1, 1) if kind == "BatchNorm3D" else (1, 5, 1, 1)
    bn(random_tensor(0, shape_of(kind, 5)))
    bn.backward(random_tensor(1, shape_of(kind, 5)))
    arrays = [bn.mean, bn.var, bn.scale, bn.bias, bn.savemean, bn.saveinvvar, bn.scalegrad, bn.biasgrad]
    arrays += [bn.vars["scale"].data, bn.vars["scale"].grad, bn.vars["bias"].grad, *bn.attrs.values()]
    assert [(each.shape, each.dtype.name) for each in arrays if each is not None] == [(shape, "float32")] * 13


@pytest.mark.parametrize("maps", ODD)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_odd_sizes(make_layer: MakeLayer, maps: int, batch: int) -> None:
    for number, size in enumerate([(1, 2), (7, 31), (127, 1)]):
        bn = make_layer("BatchNorm2D", maps, affine=False)
        x = random_tensor(number, (batch, maps, *size))
        assert_output(bn(x), Model(maps).train(x))


@pytest.mark.parametrize(("mean", "sigma"), [(1e4, 1e-2), (-3e5, 1.0), (0.0, 1e-18), (1e-3, 1e15)])
def test_hard_means_and_spreads(make_layer: MakeLayer, mean: float, sigma: float) -> None:
    values = np.random.default_rng(3).normal(mean, sigma, (16, 5, 14, 14)).astype(np.float32)
    bn = make_layer("BatchNorm2D", 5, sscale=0.0)
    np.testing.assert_allclose(bn(values), Model(5).train(values), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(32, 3, 56, 56), (2, 3, 301, 203), (50_001, 3)], ids=str)
def test_a_large_mean_over_more_values_than_one_sum_takes(make_layer: MakeLayer, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(5).normal(1e4, 1e-2, shape).astype(np.float32)
    bn, model = make_layer("BatchNorm" if len(shape) == 2 else "BatchNorm2D", 3, sscale=0.0), Model(3)
    np.testing.assert_allclose(bn(values), model.train(values), rtol=0, atol=2e-6)
    # Nothing is lost but the one rounding to float32.
    np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=6e-8)
    np.testing.assert_allclose(bn.var.ravel(), model.var, rtol=6.1e-8)


def test_an_outlier_a_constant_and_denormals(make_layer: MakeLayer) -> None:
    values = np.random.default_rng(4).normal(0, 1, (8, 3, 9, 9)).astype(np.float32)
    values[0, 0, 0, 0] = 1e4
    values[:, 1] = 12345.678
    values[:, 2] *= np.float32(1e-41)
    bn = make_layer("BatchNorm2D", 3, sscale=0.0)
    np.testing.assert_allclose(bn(values), Model(3).train(values), rtol=6e-7, atol=2e-6)
    assert bn.var.ravel()[1] == 0.0


def test_the_same_input_gives_the_same_bits(make_layer: MakeLayer) -> None:
    x, grad = random_tensor(1, (9, 31, 17, 5)), random_tensor(2, (9, 31, 17, 5))
    results = set()
    for _ in range(3):
        bn = make_layer("BatchNorm2D", 31, sscale=0.0)
        y = bn(x)
        bn.backward(grad)
        assert bn.grad is not None
        results.add(
            (y.tobytes(), bn.mean.tobytes(), bn.var.tobytes(), bn.grad.tobytes(), bn.vars["scale"].grad.tobytes())
        )
    assert len(results) == 1


REGIMES = [(1.0, 0.1), (1.0, 0.0), (0.5, 0.2), (0.0, 0.1), (1.0, 1.0)]


@pytest.mark.parametrize("averaging", ["standard", "printed"])
@pytest.mark.parametrize(("init_factor", "min_factor"), REGIMES)
def test_running_statistics_over_thirty_steps(
    make_layer: MakeLayer, averaging: str, init_factor: float, min_factor: float
) -> None:
    bn = make_layer("BatchNorm2D", 3, initFactor=init_factor, minFactor=min_factor, averaging=averaging)
    model = Model(3, init_factor=init_factor, min_factor=min_factor, averaging=averaging)
    for number in range(1, 31):
        x = random_tensor(number, (2 + number % 3, 3, 4, number))
        bn(x)
        model.train(x)
        if number in {1, 2, 10, 11, 30}:
            np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=2e-6, atol=1e-6)
            np.testing.assert_allclose(bn.var.ravel(), model.var, rtol=3e-6)
    assert (bn.numOfProps, bn.version, bn.averaging) == (30, 30, averaging)


def non_contiguous(x: Array) -> Array:
    wide: Array = np.repeat(x, 2, axis=3)
    return wide[..., ::2]


def negative_strides(x: Array) -> Array:
    return np.flip(np.ascontiguousarray(np.flip(x)))


def channels_last(x: Array) -> Array:
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def big_endian(x: Array) -> Array:
    swapped: Array = x.astype(x.dtype.newbyteorder(">"))
    return swapped


def read_only(x: Array) -> Array:
    x = x.copy()
    x.setflags(write=False)
    return x


def misaligned(x: Array) -> Array:
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view: Array = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


LAYOUTS = [non_contiguous, negative_strides, channels_last, big_endian, read_only, misaligned, np.asfortranarray]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", DTYPES)
def test_memory_layouts(make_layer: MakeLayer, layout: Any, name: str) -> None:
    x, grad = (random_tensor(seed, (4, 7, 6, 5), name) for seed in (1, 2))
    given = layout(x)
    np.testing.assert_array_equal(given, x)
    bn = make_layer("BatchNorm2D", 7, sscale=0.0)
    model = Model(7)
    assert_output(bn(given), model.train(x), name)
    assert (bn.inData is given, bn.data is not None and bn.data.dtype.isnative) == (True, True)
    bn.backward(layout(grad))
    expected = model.backward(grad)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad.astype(np.float64), expected, rtol=rounding(name) * 4, atol=4e-6)
    np.testing.assert_array_equal(given, x)
    bn.evalMode()
    assert_output(bn(given), model.evaluate(x), name)


def test_one_value_repeated_without_memory_of_its_own(make_layer: MakeLayer) -> None:
    x = np.broadcast_to(random_tensor(1, (1, 3, 1, 4)), (5, 3, 6, 4))
    bn = make_layer("BatchNorm2D", 3, sscale=0.0)
    assert_output(bn(x), Model(3).train(np.array(x)))


def test_subclasses_of_ndarray_count_as_what_they_hold(make_layer: MakeLayer) -> None:
    x = random_tensor(1, (6, 3))
    y = make_layer("BatchNorm", 3, sscale=0.0)(x.view(type("Mine", (np.ndarray,), {})))
    assert type(y) is np.ndarray
    assert_output(y, Model(3).train(x))


def test_a_tensor_of_several_chunks(make_layer: MakeLayer) -> None:
    x, grad = random_tensor(1, (8, 16, 96, 64)), random_tensor(2, (8, 16, 96, 64))
    bn, model = make_layer("BatchNorm2D", 16, sscale=0.0), Model(16)
    assert_output(bn(x), model.train(x))
    bn.backward(grad)
    expected = model.backward(grad)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["BatchNorm1D", "BatchNorm2D", "BatchNorm3D"])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_thirty_steps_of_torch(make_layer: MakeLayer, kind: str, momentum: float | None) -> None:
    import torch

    peer: Any = getattr(torch.nn, kind.lower().replace("batchnorm", "BatchNorm"))(5, momentum=momentum)
    factors = (1.0, 0.0) if momentum is None else (0.0, momentum)
    bn = make_layer(kind, 5, initFactor=factors[0], minFactor=factors[1], sscale=0.0)
    for number in range(30):
        x, grad = (random_tensor(seed, shape_of(kind, 5)) for seed in (number, number + 100))
        theirs = torch.from_numpy(x).requires_grad_()
        y = peer(theirs)
        peer.zero_grad()
        y.backward(torch.from_numpy(grad))
        np.testing.assert_allclose(bn(x), y.detach().numpy(), rtol=1e-5, atol=1e-5)
        bn.backward(grad)
        assert bn.grad is not None
        np.testing.assert_allclose(bn.grad, theirs.grad.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(bn.vars["scale"].grad.ravel(), peer.weight.grad.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(bn.vars["bias"].grad.ravel(), peer.bias.grad.numpy(), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(bn.mean.ravel(), peer.running_mean.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bn.var.ravel(), peer.running_var.numpy(), rtol=1e-5)
    bn.evalMode()
    peer.eval()
    x = random_tensor(1000, shape_of(kind, 5))
    np.testing.assert_allclose(bn(x), peer(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("averaging", ["standard", "printed"])
def test_thirty_steps_of_torch_by_the_weight_of_each(make_layer: MakeLayer, averaging: str) -> None:
    """Torch weighs the batch by its momentum: here the factor of the default layer at each step, or its rest."""
    import torch

    peer: Any = torch.nn.BatchNorm2d(5)
    bn = make_layer("BatchNorm2D", 5, averaging=averaging)
    for number in range(1, 31):
        factor = max(1.0 / number, 0.1)
        peer.momentum = factor if averaging == "standard" else 1.0 - factor
        x = random_tensor(number, shape_of("BatchNorm2D", 5))
        bn(x)
        peer(torch.from_numpy(x))
        np.testing.assert_allclose(bn.mean.ravel(), peer.running_mean.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bn.var.ravel(), peer.running_var.numpy(), rtol=1e-5)
