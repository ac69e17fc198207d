"""What a layer remembers, and how it changes."""

# ruff: noqa: NPY002 - a layer draws from the global generator, as the original
from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import (
    ARRAY_FIELDS,
    LayerState,
    Moments,
    StateUpdate,
    accumulate_gradients,
    blank_state,
    initial_state,
    require_initialized,
    step,
    update_params,
    updated,
)
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.errors import (
    InvalidConfiguration,
    InvalidShape,
    LayerEmpty,
    NonFiniteInput,
    UnsupportedDType,
    error_classes,
)
from tests.support.oracle import Model, batch_moments, random_tensor

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
VALUES = np.array([1.5, -2.0, 0.25], np.float32)


def config(**changes: Any) -> LayerConfig:
    return LayerConfig(**{"kind": LayerKind.BATCH_NORM_2D, "maps": 3, **changes})


def moments(x: np.ndarray[Any, Any]) -> Moments:
    return Moments(*batch_moments(x))


def assert_unchanged_but(before: LayerState, after: LayerState, *changed: str) -> None:
    fields = {*ARRAY_FIELDS, "num_of_props", "version", "initialized"} - set(changed)
    for name in fields:
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name), err_msg=name)


def test_a_new_layer_begins_as_puzzlelibs_does() -> None:
    np.random.seed(7)
    state = initial_state(CONFIG, 0.01, np.random)
    np.random.seed(7)
    np.testing.assert_array_equal(state.scale, np.random.normal(1.0, 0.01, (1, 3, 1, 1)).astype(np.float32).ravel())
    assert_unchanged_but(blank_state(CONFIG), state, "scale")
    assert all(getattr(state, name).dtype == np.float32 for name in ARRAY_FIELDS)
    assert (state.num_of_props, state.version, state.initialized) == (0, 0, True)


def test_without_affine_the_scale_is_one_and_the_draw_is_made_all_the_same() -> None:
    np.random.seed(7)
    state = initial_state(config(affine=False), 0.5, np.random)
    after = np.random.random()
    np.random.seed(7)
    np.random.normal(1.0, 0.0, 3)
    assert state.scale.tolist() == [1.0, 1.0, 1.0]
    assert after == np.random.random()


def test_an_empty_layer_draws_nothing_and_is_not_ready() -> None:
    np.random.seed(7)
    state = initial_state(CONFIG, 0.01, np.random, empty=True)
    first = np.random.random()
    np.random.seed(7)
    assert first == np.random.random()
    with pytest.raises(LayerEmpty, match="stem was created with empty=True: call load"):
        require_initialized(state, "stem")
    require_initialized(blank_state(CONFIG), "stem")


@pytest.mark.parametrize("sscale", [-0.1, float("nan"), float("inf"), "0.1", None, True, 1j])
def test_sscale_is_a_finite_number_not_below_zero(sscale: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="sscale"):
        initial_state(CONFIG, sscale, np.random)


def test_arrays_of_a_state_cannot_be_written_to() -> None:
    for name in ARRAY_FIELDS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(blank_state(CONFIG), name)[0] = 1.0


REGIMES = [(1.0, 0.1), (1.0, 0.0), (0.5, 0.1), (5.0, 0.25), (0.0, 0.1), (1.0, 1.0), (0.0, 0.0)]


@pytest.mark.parametrize("averaging", list(Averaging))
@pytest.mark.parametrize(("init_factor", "min_factor"), REGIMES)
def test_thirty_steps_are_those_of_float64(averaging: Averaging, init_factor: float, min_factor: float) -> None:
    layer = config(init_factor=init_factor, min_factor=min_factor, averaging=averaging)
    model = Model(3, init_factor=init_factor, min_factor=min_factor, averaging=averaging.value)
    state = blank_state(layer)
    for number in range(1, 31):
        x = random_tensor(number, (2 + number % 3, 3, 4, number))
        model.train(x)
        before, state = state, step(state, layer, moments(x))
        assert_unchanged_but(before, state, "mean", "var", "num_of_props", "version")
        assert (state.num_of_props, state.version) == (number, number)
        np.testing.assert_allclose(state.mean, model.mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(state.var, model.var, rtol=2e-6)


@pytest.mark.torch
@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
def test_thirty_steps_are_those_of_torch(momentum: float | None) -> None:
    import torch

    peer = torch.nn.BatchNorm2d(3, momentum=momentum)
    # torch's momentum=None is the cumulative average; a fixed one is the floor without a beginning.
    layer = (
        config(init_factor=1.0, min_factor=0.0) if momentum is None else config(init_factor=0.0, min_factor=momentum)
    )
    state = blank_state(layer)
    for number in range(1, 31):
        x = random_tensor(number, (4, 3, 5, 2))
        peer(torch.from_numpy(x))
        state = step(state, layer, moments(x))
        np.testing.assert_allclose(state.mean, peer.running_mean.numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.var, peer.running_var.numpy(), rtol=1e-5)


def test_the_variance_taken_in_is_the_unbiased_one() -> None:
    x = np.array([[1.0, 10.0, 0.0], [3.0, 20.0, 0.0]], np.float32)
    state = step(blank_state(config(kind=LayerKind.BATCH_NORM)), config(kind=LayerKind.BATCH_NORM), moments(x))
    assert (state.mean.tolist(), state.var.tolist()) == ([2.0, 15.0, 0.0], [2.0, 50.0, 0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
def test_a_poisoned_batch_is_refused_with_its_maps(bad: float) -> None:
    batch = Moments(4, np.array([0.0, bad, 0.0]), np.array([1.0, 1.0, 1.0]))
    with pytest.raises(NonFiniteInput, match=r"in 1 of 3 maps \(1\)") as caught:
        step(blank_state(CONFIG), CONFIG, batch)
    assert caught.value.metadata == {"maps": "1"}
    batch = Moments(4, np.zeros(3), np.array([abs(bad) * 4, np.nan, 1.0]))
    with pytest.raises(NonFiniteInput, match=r"in 2 of 3 maps \(0, 1\)"):
        step(blank_state(CONFIG), CONFIG, batch)


def test_a_variance_at_the_edge_of_float32_is_kept() -> None:
    largest = float(np.finfo(np.float32).max)
    state = step(blank_state(CONFIG), CONFIG, Moments(2, np.zeros(3), np.full(3, largest)))
    assert state.var.tolist() == [largest] * 3


def test_many_poisoned_maps_are_named_briefly() -> None:
    wide = config(maps=5000)
    with pytest.raises(NonFiniteInput, match=r"in 5000 of 5000 maps \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        step(blank_state(wide), wide, Moments(4, np.full(5000, np.nan), np.ones(5000)))


def test_where_allowed_a_poisoned_batch_poisons_its_own_maps_only() -> None:
    layer = config(nonfinite=NonFinitePolicy.ALLOW)
    state = step(
        blank_state(layer), layer, Moments(2, np.array([np.nan, 1.0, np.inf]), np.array([np.nan, 1.0, np.nan]))
    )
    np.testing.assert_array_equal(state.mean, np.array([np.nan, 1.0, np.inf], np.float32))
    np.testing.assert_array_equal(state.var, np.array([np.nan, 1.0, np.nan], np.float32))
    # The first batch has the weight 1, so what was there before does not come through.
    healed = step(updated(state, layer, StateUpdate(num_of_props=0)), layer, Moments(2, np.ones(3), np.ones(3)))
    assert (healed.mean.tolist(), healed.var.tolist()) == ([1.0] * 3, [1.0] * 3)


def test_a_weight_of_zero_keeps_a_non_finite_batch_out() -> None:
    layer = config(nonfinite=NonFinitePolicy.ALLOW, init_factor=0.0, min_factor=0.0)
    state = step(blank_state(layer), layer, Moments(2, np.full(3, np.nan), np.full(3, np.nan)))
    assert (state.mean.tolist(), state.var.tolist(), state.version) == ([0.0] * 3, [1.0] * 3, 1)


def test_gradients_accumulate_with_scale_and_momentum() -> None:
    state = accumulate_gradients(blank_state(CONFIG), VALUES, -VALUES, scale=1.0, momentum=0.0)
    np.testing.assert_array_equal(state.scale_grad, VALUES)
    np.testing.assert_array_equal(state.bias_grad, -VALUES)
    before, state = state, accumulate_gradients(state, VALUES, VALUES, scale=0.5, momentum=0.9)
    np.testing.assert_allclose(state.scale_grad, 1.4 * VALUES, rtol=1e-6)
    np.testing.assert_allclose(state.bias_grad, -0.4 * VALUES, rtol=1e-6)
    assert_unchanged_but(before, state, "scale_grad", "bias_grad")


def test_a_multiplier_of_zero_drops_what_is_not_finite() -> None:
    poison = np.array([np.nan, np.inf, 1.0], np.float32)
    poisoned = accumulate_gradients(blank_state(CONFIG), poison, poison, scale=1.0, momentum=0.0)
    healed = accumulate_gradients(poisoned, VALUES, VALUES, scale=1.0, momentum=0.0)
    np.testing.assert_array_equal(healed.scale_grad, VALUES)
    kept = accumulate_gradients(healed, poison, poison, scale=0.0, momentum=1.0)
    np.testing.assert_array_equal(kept.bias_grad, VALUES)


def test_gradients_beyond_float32_become_infinite_without_a_warning() -> None:
    state = accumulate_gradients(blank_state(CONFIG), VALUES, VALUES, scale=1e300, momentum=1e300)
    np.testing.assert_array_equal(state.scale_grad, np.array([np.inf, -np.inf, np.inf], np.float32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1", None, 1j])
def test_multipliers_and_rates_are_finite_numbers(bad: Any) -> None:
    state = blank_state(CONFIG)
    with pytest.raises(InvalidConfiguration, match="scale"):
        accumulate_gradients(state, VALUES, VALUES, scale=bad, momentum=0.0)
    with pytest.raises(InvalidConfiguration, match="momentum"):
        accumulate_gradients(state, VALUES, VALUES, scale=1.0, momentum=bad)
    with pytest.raises(InvalidConfiguration, match="learnRate"):
        update_params(state, CONFIG, bad)


def test_an_optimizers_step_adds_the_gradients() -> None:
    state = accumulate_gradients(blank_state(CONFIG), VALUES, 2 * VALUES, scale=1.0, momentum=0.0)
    after = update_params(state, CONFIG, 0.1)
    np.testing.assert_allclose(after.scale, 1 + 0.1 * VALUES, rtol=1e-6)
    np.testing.assert_allclose(after.bias, 0.2 * VALUES, rtol=1e-6)
    assert_unchanged_but(state, after, "scale", "bias")
    fixed = config(affine=False)
    assert_unchanged_but(state, update_params(state, fixed, 0.1))


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1), (1, 3, 1, 1, 1), (3, 1)])
def test_an_update_takes_c_values_of_any_such_shape(shape: tuple[int, ...]) -> None:
    state = updated(blank_state(CONFIG), CONFIG, StateUpdate(mean=VALUES.reshape(shape)))
    np.testing.assert_array_equal(state.mean, VALUES)
    assert_unchanged_but(blank_state(CONFIG), state, "mean")


def test_an_update_copies() -> None:
    given = VALUES.copy()
    state = updated(blank_state(CONFIG), CONFIG, StateUpdate(mean=given))
    given[:] = 9.0
    np.testing.assert_array_equal(state.mean, VALUES)


@pytest.mark.parametrize(
    "given", [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3], np.int8), np.array([1, 2, 3], ">f8")]
)
def test_an_update_takes_whatever_holds_real_numbers(given: Any) -> None:
    assert updated(blank_state(CONFIG), CONFIG, StateUpdate(bias=given)).bias.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("update", "error", "said"),
    [
        (StateUpdate(scale=[1, 2]), InvalidShape, r"scale has shape \(2,\) \(expected: 3 values"),
        (StateUpdate(bias=np.zeros((1, 3, 2, 1))), InvalidShape, "bias has shape"),
        (StateUpdate(mean=5.0), InvalidShape, "mean has shape"),
        (StateUpdate(mean=[[1], [2, 3]]), InvalidShape, "mean is not an array"),
        (StateUpdate(var=["a", "b", "c"]), UnsupportedDType, "var holds <U1"),
        (StateUpdate(var=[1j, 1, 1]), UnsupportedDType, "var holds complex128"),
        (StateUpdate(var=[True, True, False]), UnsupportedDType, "var holds bool"),
        (StateUpdate(var=[1, -1e-9, 1]), InvalidConfiguration, "var has a negative value"),
        (StateUpdate(num_of_props=-1), InvalidConfiguration, "numOfProps is -1"),
        (StateUpdate(num_of_props=2**53 + 1), InvalidConfiguration, "numOfProps is"),
        (StateUpdate(num_of_props=1.5), InvalidConfiguration, "numOfProps is 1.5"),  # type: ignore[arg-type]
        (StateUpdate(num_of_props=True), InvalidConfiguration, "numOfProps is True"),
    ],
)
def test_an_update_that_does_not_fit(update: StateUpdate, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        updated(blank_state(CONFIG), CONFIG, update)


def test_maps_of_six_are_not_two_by_three() -> None:
    with pytest.raises(InvalidShape):
        updated(blank_state(config(maps=6)), config(maps=6), StateUpdate(mean=np.zeros((2, 3))))


def test_without_affine_scale_and_bias_are_fixed() -> None:
    fixed = config(affine=False)
    for update in (StateUpdate(scale=[1, 1, 2]), StateUpdate(bias=[0, 0, 1]), StateUpdate(scale=[1, np.nan, 1])):
        with pytest.raises(InvalidConfiguration, match="not affine"):
            updated(blank_state(fixed), fixed, update)
    updated(blank_state(fixed), fixed, StateUpdate(scale=[1, 1, 1], bias=[0, 0, 0], mean=VALUES))


def test_an_empty_layer_wants_all_four_at_once() -> None:
    empty = initial_state(CONFIG, 0.0, np.random, empty=True)
    with pytest.raises(LayerEmpty, match="must be set together"):
        updated(empty, CONFIG, StateUpdate(scale=VALUES, bias=VALUES, mean=VALUES))
    with pytest.raises(LayerEmpty):
        updated(empty, CONFIG, StateUpdate(num_of_props=3))
    full = updated(empty, CONFIG, StateUpdate(VALUES, VALUES, VALUES, abs(VALUES), num_of_props=3))
    assert (full.initialized, full.num_of_props, full.version) == (True, 3, 0)


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.reason)
def test_errors_survive_pickling_whole(cls: type[Any]) -> None:
    back = pickle.loads(pickle.dumps(cls("what was wrong", {"fields": "maps"})))
    assert (type(back), str(back), back.metadata) == (cls, "what was wrong", {"fields": "maps"})
