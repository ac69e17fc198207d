"""Handles and the local backend: what no backend-independent test can see."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sharednorm import BatchNorm, BatchNorm1D, BatchNorm2D, BatchNorm3D, InplaceInTraining, InvalidShape, TooFewValues
from sharednorm.arithmetic.numpy_impl import NumpyArithmetic
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, StateUpdate, blank_state, step
from sharednorm.core.types import Array, LayerKind, Vector
from sharednorm.errors import BackwardInEval, InvalidName, NonFiniteInput
from sharednorm.layers.backend import ForwardResult, SavedForward
from sharednorm.layers.batch_norm import Layer
from sharednorm.layers.local_backend import LocalBackend
from tests.support.oracle import Model, random_tensor

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
X, GRAD = random_tensor(1, (4, 3, 5, 5)), random_tensor(2, (4, 3, 5, 5))


def backend(config: LayerConfig = CONFIG) -> LocalBackend:
    return LocalBackend(config, blank_state(config), NumpyArithmetic())


def test_every_local_layer_is_a_layer() -> None:
    layers: list[Layer] = [BatchNorm(3), BatchNorm1D(3), BatchNorm2D(3), BatchNorm3D(3)]
    assert [repr(layer)[:14].split("(")[0] for layer in layers] == [
        "BatchNorm", "BatchNorm1D", "BatchNorm2D", "BatchNorm3D",
    ]  # fmt: skip


def test_texts() -> None:
    assert str(BatchNorm2D(3)) == "Module BatchNorm2D (name: None)"
    assert repr(BatchNorm(8, name="fc", minFactor=0.5)) == (
        "BatchNorm(8, epsilon=1e-05, initFactor=1.0, minFactor=0.5, affine=True, name='fc', averaging='standard', "
        "nonfinite='refuse')"
    )
    assert repr(BatchNorm2D(3).vars["scale"]) == "Variable('scale', 3 values)"


@pytest.mark.parametrize("name", [None, ""])
def test_a_local_layer_needs_no_name(name: str | None) -> None:
    bn = BatchNorm2D(3, name=name)
    content = bn.save(None)
    assert content is not None
    BatchNorm2D(3).load(content)
    with pytest.raises(InvalidName):
        BatchNorm2D(3, name=" ")


def test_the_input_is_referenced_until_it_is_forgotten() -> None:
    bn = BatchNorm2D(3)
    x = X.copy()
    gone = weakref.ref(x)
    bn(x)
    assert bn.inData is x
    del x
    gc.collect()
    assert gone() is not None
    bn.reset()
    gc.collect()
    assert gone() is None


def test_a_new_forward_lets_the_one_before_go() -> None:
    bn = BatchNorm2D(3)
    x = X.copy()
    gone = weakref.ref(x)
    bn(x)
    del x
    bn(X)
    gc.collect()
    assert gone() is None


class Keeper(LocalBackend):
    """A backend that keeps inputs under tokens, as a server does, and hears which of them to forget."""

    def __init__(self) -> None:
        super().__init__(CONFIG, blank_state(CONFIG), NumpyArithmetic())
        self.kept: list[str] = []
        self.train = True

    def default_train(self) -> bool:
        return self.train

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        result = super().forward(x, train=train, release=release, out=out)
        if release:
            self.kept.remove(release)
        if result.saved is None:
            return result
        token = f"token {result.saved.version}"
        self.kept.append(token)
        saved = result.saved
        return ForwardResult(result.data, SavedForward(x, saved.moments, saved.scale, saved.version, token))


def test_a_handle_releases_what_it_will_not_ask_for() -> None:
    keeper = Keeper()
    bn = Layer(keeper, None, False, None)
    bn(X)
    assert keeper.kept == ["token 1"]
    bn(X)
    assert keeper.kept == ["token 2"]
    bn.backward(GRAD)
    bn.evalMode()
    bn.evalMode()
    bn(X)
    assert keeper.kept == []
    bn(X)
    bn.trainMode()
    bn(X)
    bn.reset()
    with pytest.raises(NonFiniteInput):
        bn(np.full_like(X, np.nan))
    assert keeper.kept == ["token 3"]
    bn(X)
    assert keeper.kept == ["token 4"]


def test_a_handle_that_has_not_chosen_follows_the_layers_default() -> None:
    keeper = Keeper()
    bn = Layer(keeper, None, False, None)
    one = random_tensor(1, (1, 3, 1, 1))
    with pytest.raises(TooFewValues):
        bn(one)
    bn(X)
    keeper.train = False
    assert bn.train is False
    # The last forward was in train mode, and its backward still belongs to it.
    bn.backward(GRAD)
    bn(one)
    assert (keeper.read().version, bn.savemean) == (1, None)
    with pytest.raises(BackwardInEval):
        bn.backward(one)
    keeper.train = True
    with pytest.raises(BackwardInEval):
        bn.backward(one)
    bn.trainMode()
    keeper.train = False
    assert bn.train is True


def test_in_place_a_handle_that_has_not_chosen_asks_first() -> None:
    keeper = Keeper()
    bn = Layer(keeper, None, True, None)
    x = X.copy()
    with pytest.raises(InplaceInTraining):
        bn(x)
    keeper.train = False
    assert bn(x) is x
    np.testing.assert_allclose(x, Model(3).evaluate(X), rtol=1e-6, atol=2e-6)


def test_the_backend_itself_refuses_to_train_in_place() -> None:
    local = backend()
    x = X.copy()
    with pytest.raises(InplaceInTraining):
        local.forward(x, train=True, release="", out=x)
    np.testing.assert_array_equal(x, X)
    assert local.read().version == 0


def test_a_state_read_before_stays_what_it_was() -> None:
    bn = BatchNorm2D(3)
    before, mean = bn.snapshot(), bn.mean
    bn(X)
    assert (before.version, before.mean.tolist(), mean.ravel().tolist()) == (0, [0.0] * 3, [0.0] * 3)


def test_an_assigned_array_is_copied() -> None:
    bn = BatchNorm2D(3)
    values = np.ones(3, np.float32)
    bn.mean = values
    values[:] = 7
    assert bn.mean.ravel().tolist() == [1.0] * 3


def test_numpys_seed_decides_the_scale() -> None:
    np.random.seed(5)  # noqa: NPY002 - the original's generator
    one = BatchNorm2D(3).scale
    np.random.seed(5)  # noqa: NPY002
    np.testing.assert_array_equal(BatchNorm2D(3).scale, one)


def test_steps_of_many_threads_have_one_order() -> None:
    local = backend()
    watched: list[LayerState] = []
    done = threading.Event()

    def train(worker: int) -> list[tuple[int, Moments]]:
        found = []
        for number in range(50):
            x = random_tensor(1000 * worker + number, (2 + worker, 3, 4, 5))
            saved = local.forward(x, train=True, release="", out=None).saved
            assert saved is not None
            found.append((saved.version, saved.moments))
        return found

    def watch() -> None:
        while not done.is_set():
            watched.append(local.read())

    with ThreadPoolExecutor(5) as pool:
        watcher = pool.submit(watch)
        futures = [pool.submit(train, worker) for worker in range(4)]
        try:
            steps = dict(pair for future in futures for pair in future.result(timeout=60))
        finally:
            done.set()
        watcher.result(timeout=60)
    assert sorted(steps) == list(range(1, 201))
    history = [blank_state(CONFIG)]
    for version in range(1, 201):
        history.append(step(history[-1], CONFIG, steps[version]))
    for seen in [*watched, local.read()]:
        expected = history[seen.version]
        assert (seen.num_of_props, seen.mean.tobytes(), seen.var.tobytes()) == (
            expected.num_of_props, expected.mean.tobytes(), expected.var.tobytes(),
        )  # fmt: skip


def test_gradients_of_many_threads_are_all_counted() -> None:
    local = backend(LayerConfig(LayerKind.BATCH_NORM, 3))
    x = random_tensor(1, (8, 3))
    ones = np.ones((8, 3), np.float32)

    def differentiate(_: int) -> None:
        handle = Layer(local, None, False, True)
        for _ in range(25):
            handle(x)
            handle.backward(ones, momentum=1.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(differentiate, range(4), timeout=60))
    assert local.read().bias_grad.tolist() == [800.0] * 3


class Interrupted(NumpyArithmetic):
    """An arithmetic during whose forward something else happens."""

    def __init__(self) -> None:
        self.meanwhile: list[Any] = []

    def forward(
        self, x: Array, scale: Vector, bias: Vector, epsilon: float, out: Array | None = None
    ) -> tuple[Array, Moments]:
        result = super().forward(x, scale, bias, epsilon, out)
        while self.meanwhile:
            self.meanwhile.pop()()
        return result


def test_a_step_uses_the_parameters_that_it_is_ordered_behind() -> None:
    arithmetic = Interrupted()
    local = LocalBackend(CONFIG, blank_state(CONFIG), arithmetic)
    bn = Layer(local, None, False, True)
    values = np.array([2.0, 3.0, 4.0], np.float32)
    arithmetic.meanwhile.append(lambda: local.update(StateUpdate(scale=values, bias=-values)))
    model = Model(3)
    model.scale, model.bias = values.astype(np.float64), -values.astype(np.float64)
    np.testing.assert_allclose(bn(X), model.train(X), rtol=1e-6, atol=2e-6)
    bn.backward(GRAD)
    assert bn.grad is not None
    np.testing.assert_allclose(bn.grad, model.backward(GRAD), rtol=1e-5, atol=1e-5)


def test_a_step_that_is_refused_at_its_end_leaves_what_happened_meanwhile() -> None:
    arithmetic = Interrupted()
    local = LocalBackend(CONFIG, blank_state(CONFIG), arithmetic)
    arithmetic.meanwhile.append(lambda: local.update(StateUpdate(num_of_props=5)))
    with pytest.raises(NonFiniteInput):
        local.forward(np.full_like(X, np.nan), train=True, release="", out=None)
    assert (local.read().num_of_props, local.read().version) == (5, 0)


def test_another_shape_may_follow(recwarn: pytest.WarningsRecorder) -> None:
    bn = BatchNorm2D(3)
    bn(X)
    other = random_tensor(3, (2, 3, 9, 1))
    bn(other)
    with pytest.raises(InvalidShape):
        bn.backward(GRAD)
    bn.backward(random_tensor(4, other.shape))
    assert bn.grad is not None
    assert bn.grad.shape == other.shape
    assert not recwarn.list


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_a_layer_of_its_own(duplicate: Callable[[BatchNorm2D], BatchNorm2D]) -> None:
    x = np.random.default_rng(0).normal(3, 2, (4, 3, 5, 5)).astype(np.float32)
    original = BatchNorm2D(3, minFactor=0.25, name="bn")
    original(x)
    original.backward(x)
    original.evalMode()
    twin = duplicate(original)
    assert (twin.name, twin.train, twin.numOfProps, twin.inData, twin.grad) == ("bn", False, 1, None, None)
    for name in ("scale", "bias", "mean", "var"):
        np.testing.assert_array_equal(getattr(twin, name), getattr(original, name))
        assert not getattr(twin, name).flags.writeable
    np.testing.assert_array_equal(twin.vars["scale"].grad, original.vars["scale"].grad)
    before = original.mean
    twin.trainMode()
    twin(x + 5)
    twin.vars["bias"].data = [7, 8, 9]
    assert (original.numOfProps, original.bias.ravel().tolist()) == (1, [0, 0, 0])
    np.testing.assert_array_equal(original.mean, before)
    assert twin.bias.ravel().tolist() == [7, 8, 9]
