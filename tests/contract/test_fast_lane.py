"""Outputs where they were asked for, and calls that are begun and waited for later: on every backend."""

from __future__ import annotations

from concurrent.futures import wait

import numpy as np
import pytest

from sharednorm.errors import (
    InplaceInTraining,
    InvalidConfiguration,
    InvalidShape,
    NonFiniteInput,
    TooFewValues,
    UnsupportedDType,
)
from tests.support.making import MakeLayer
from tests.support.oracle import DTYPES, Array, Model, random_tensor
from tests.support.unchanged import unchanged

SHAPE = (4, 3, 6, 5)
LARGE = (8, 3, 256, 192)  # 4.7 MB: travels in chunks


@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_an_output_where_it_was_asked_for(make_layer: MakeLayer, train: bool, shape: tuple[int, ...]) -> None:
    x = random_tensor(1, shape)
    plain, given = make_layer("BatchNorm2D", 3, sscale=0.0), make_layer("BatchNorm2D", 3, sscale=0.0)
    plain.train = given.train = train
    expected, out = plain(x), np.full(shape, np.nan, np.float32)
    assert given(x, out=out) is out
    assert given.data is out
    assert out.tobytes() == expected.tobytes()
    if train:
        given.backward(x)
        plain.backward(x)
        assert given.grad is not None
        assert plain.grad is not None
        assert given.grad.tobytes() == plain.grad.tobytes()


@pytest.mark.parametrize("name", DTYPES)
def test_an_output_of_other_strides(make_layer: MakeLayer, name: str) -> None:
    x = random_tensor(1, SHAPE, name)
    plain, given = make_layer("BatchNorm2D", 3, sscale=0.0), make_layer("BatchNorm2D", 3, sscale=0.0)
    expected = plain(x)
    for out in (
        np.empty((4, 6, 5, 3), x.dtype).transpose(0, 3, 1, 2),  # channels last
        np.empty((4, 3, 6, 10), x.dtype)[..., ::2],
        np.empty(SHAPE, x.dtype)[::-1],
    ):
        given.load(plain.save(name="bn"), name="bn")
        assert given(x, out=out) is out
        np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
def test_in_eval_mode_an_output_may_overlap_the_data(make_layer: MakeLayer, shape: tuple[int, ...]) -> None:
    bn = make_layer("BatchNorm2D", 3)
    bn.evalMode()
    x = random_tensor(1, shape)
    expected = bn(x)
    same = x.copy()
    assert bn(same, out=same) is same
    assert same.tobytes() == expected.tobytes()
    both = np.concatenate([x, x])
    bn(both[: len(x)], out=both[1 : len(x) + 1])
    assert both[1 : len(x) + 1].tobytes() == expected.tobytes()


def test_an_output_that_cannot_be_one(make_layer: MakeLayer) -> None:
    bn, x = make_layer("BatchNorm2D", 3), random_tensor(1, SHAPE)
    bn.trainMode()
    bn(x)
    frozen = np.empty_like(x)
    frozen.setflags(write=False)
    both = np.concatenate([x, x])
    for data, out, error, words in (
        (x, np.empty((4, 3, 5, 6), np.float32), InvalidShape, "out has shape"),
        (x, np.empty(SHAPE, np.float16), UnsupportedDType, "out has dtype float16"),
        (x, frozen, InvalidShape, "read-only"),
        (x, x.tolist(), UnsupportedDType, "out is a builtins.list"),
        (x, x, InplaceInTraining, "out overlaps"),
        (both[:4], both[1:5], InplaceInTraining, "out overlaps"),
    ):
        with unchanged(bn), pytest.raises(error, match=words):
            bn(data, out=out)


def test_an_in_place_layer_has_one_place(make_layer: MakeLayer) -> None:
    bn, x = make_layer("BatchNorm2D", 3, inplace=True), random_tensor(1, SHAPE)
    bn.evalMode()
    with pytest.raises(InvalidConfiguration, match="in place"):
        bn(x, out=np.empty_like(x))
    assert bn(x, out=x) is x


# --- Calls that are begun -------------------------------------------------------------------------------


def test_calls_of_one_layer_keep_their_order(make_layer: MakeLayer) -> None:
    bn, model = make_layer("BatchNorm2D", 3, sscale=0.0, minFactor=0.3), Model(3, min_factor=0.3)
    batches = [random_tensor(seed, (seed % 5 + 2, *SHAPE[1:])) for seed in range(30)]
    futures = [bn.forward_async(x) for x in batches]
    for x, future in zip(batches, futures, strict=True):
        np.testing.assert_allclose(future.result(60), model.train(x), rtol=1e-5, atol=4e-6)
    np.testing.assert_allclose(bn.mean.ravel(), model.mean, rtol=1e-5, atol=1e-6)
    assert bn.numOfProps == 30


def test_flush_waits_for_what_was_begun(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    bn.flush()
    futures = [bn.forward_async(random_tensor(seed, SHAPE)) for seed in range(4)]
    bn.flush()
    assert all(future.done() for future in futures)
    assert bn.numOfProps == 4


def test_what_comes_next_waits_for_what_was_begun(make_layer: MakeLayer) -> None:
    bn, x = make_layer("BatchNorm2D", 3), random_tensor(1, LARGE)
    future = bn.forward_async(x)
    bn.backward(x)  # of that forward
    assert future.done()
    assert bn.data is future.result()
    future = bn.forward_async(x)
    bn.evalMode()
    assert future.done()
    assert bn.numOfProps == 2
    first, out = bn.forward_async(x), np.empty_like(x)
    second = bn.forward_async(x, out)
    assert bn(x).tobytes() == first.result(0).tobytes()
    assert second.result(0) is out


def test_layers_do_not_wait_for_each_other(make_layer: MakeLayer) -> None:
    layers = [make_layer("BatchNorm2D", 3, sscale=0.0) for _ in range(6)]
    x = random_tensor(1, SHAPE)
    futures = [bn.forward_async(x) for _ in range(5) for bn in layers]
    assert not wait(futures, timeout=60).not_done
    assert len({future.result().tobytes() for future in futures}) == 1
    assert [bn.numOfProps for bn in layers] == [5] * 6


def test_an_error_of_a_call_that_was_begun(make_layer: MakeLayer) -> None:
    bn, x = make_layer("BatchNorm2D", 3), random_tensor(1, SHAPE)
    bn.trainMode()
    poisoned: Array = x.copy()
    poisoned[0, 0, 0, 0] = np.nan
    with pytest.raises(TooFewValues):
        bn.forward_async(x[:1, :, :1, :1])  # what can be seen at once is said at once
    failing, fine = bn.forward_async(poisoned), bn.forward_async(x)
    with pytest.raises(NonFiniteInput):
        failing.result(60)
    assert fine.result(60).shape == SHAPE
    assert bn.numOfProps == 1


def test_a_callback_may_call_the_layer(make_layer: MakeLayer) -> None:
    bn, x = make_layer("BatchNorm2D", 3), random_tensor(1, SHAPE)
    again: list[Array] = []
    future = bn.forward_async(x)
    future.add_done_callback(lambda _: again.append(bn(x)))
    bn.reset()
    assert len(again) == 1
    assert bn.numOfProps == 2
