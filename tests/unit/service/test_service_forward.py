"""Forward through the service: what it computes, what it changes, and what it refuses without a change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Array, LayerKind, NonFinitePolicy
from sharednorm.errors import (
    CallCancelled,
    InvalidShape,
    NonFiniteInput,
    TooFewValues,
    UnsupportedDType,
)
from sharednorm_server.layers.requests import ForwardCall
from sharednorm_server.layers.service import LayerService
from tests.support import oracle
from tests.support.service import CONFIG, KEY, MAPS, SHAPE, close, create, new_service

KIND_OF = dict(zip(oracle.KINDS, LayerKind, strict=True))
TRAIN, EVAL = ForwardCall(KEY, train=True), ForwardCall(KEY, train=False)


@pytest.fixture
def service() -> LayerService:
    return new_service()


@pytest.mark.parametrize("kind", oracle.KINDS)
@pytest.mark.parametrize("name", oracle.DTYPES)
def test_steps_and_evaluation_follow_the_model(service: LayerService, kind: str, name: str) -> None:
    config = LayerConfig(KIND_OF[kind], MAPS)
    create(service, config=config)
    model = oracle.Model(MAPS)
    rtol = oracle.rounding(name)
    for number in range(1, 13):
        x = oracle.random_tensor(number, oracle.shape_of(kind, MAPS), name)
        answer = service.forward(TRAIN, x)
        close(answer.output, model.train(x), rtol=rtol, atol=4e-6)
        assert (answer.output.array().dtype, answer.train, answer.version, answer.num_of_props) == (
            x.dtype,
            True,
            number,
            number,
        )
        count, mean, m2 = oracle.batch_moments(x)
        assert answer.moments is not None
        assert answer.moments.count == count
        np.testing.assert_allclose(answer.moments.mean, mean, rtol=1e-6)
        np.testing.assert_allclose(answer.moments.m2, m2, rtol=1e-6)
        evaluated = service.forward(EVAL, x)
        close(evaluated.output, model.evaluate(x), rtol=rtol, atol=4e-6)
        assert (evaluated.train, evaluated.version, evaluated.moments, evaluated.scale) == (False, number, None, None)
    state = service.get_layer(KEY).state
    np.testing.assert_allclose(state.mean, model.mean, rtol=1e-6)
    np.testing.assert_allclose(state.var, model.var, rtol=1e-6)


def test_evaluation_changes_nothing(service: LayerService) -> None:
    create(service)
    before = service.get_layer(KEY)
    service.forward(EVAL, oracle.random_tensor(0, SHAPE))
    assert service.get_layer(KEY) is before


def test_evaluation_takes_one_value_a_map(service: LayerService) -> None:
    create(service, mean=[1, 2, 3], var=[4, 4, 4])
    x = np.zeros((1, MAPS, 1, 1), np.float32)
    expected = -np.array([1, 2, 3]) / np.sqrt(4 + 1e-5)
    np.testing.assert_allclose(service.forward(EVAL, x).output.array().reshape(MAPS), expected, rtol=1e-6)


BAD_INPUTS: dict[str, tuple[Array, type[Exception], str]] = {
    "rank 3": (np.zeros((4, MAPS, 5), np.float32), InvalidShape, "4d tensor"),
    "rank 5": (np.zeros((4, MAPS, 5, 2, 1), np.float32), InvalidShape, "4d tensor"),
    "maps": (np.zeros((4, 2, 5, 2), np.float32), InvalidShape, "2 maps \\(expected: 3\\)"),
    "no images": (np.zeros((0, MAPS, 5, 2), np.float32), InvalidShape, "empty"),
    "no pixels": (np.zeros((4, MAPS, 0, 2), np.float32), InvalidShape, "empty"),
    "float64": (np.zeros(SHAPE), UnsupportedDType, "float64"),
    "int32": (np.zeros(SHAPE, np.int32), UnsupportedDType, "int32"),
}


@pytest.mark.parametrize("call", [TRAIN, EVAL], ids=["train", "eval"])
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_a_bad_input_changes_nothing(service: LayerService, call: ForwardCall, case: str) -> None:
    create(service)
    before = service.get_layer(KEY)
    x, error, text = BAD_INPUTS[case]
    with pytest.raises(error, match=text):
        service.forward(call, x)
    assert service.get_layer(KEY) is before


def test_one_value_a_map_cannot_be_trained_on(service: LayerService) -> None:
    create(service)
    before = service.get_layer(KEY)
    with pytest.raises(TooFewValues, match="one value a map"):
        service.forward(TRAIN, np.zeros((1, MAPS, 1, 1), np.float32))
    assert service.get_layer(KEY) is before


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_poisoned_batch_does_not_poison_the_layer(service: LayerService, poison: float) -> None:
    create(service)
    service.forward(TRAIN, oracle.random_tensor(0, SHAPE))
    before = service.get_layer(KEY)
    x = oracle.random_tensor(1, SHAPE)
    x[2, 1, 0, 0] = poison
    with pytest.raises(NonFiniteInput, match="1 of 3 maps \\(1\\)"):
        service.forward(replace(TRAIN, keep_input=True), x)
    assert service.get_layer(KEY) is before
    assert service.forward(TRAIN, oracle.random_tensor(1, SHAPE)).version == 2


def test_a_layer_that_allows_it_takes_a_poisoned_batch(service: LayerService) -> None:
    create(service, config=replace(CONFIG, nonfinite=NonFinitePolicy.ALLOW))
    x = oracle.random_tensor(1, SHAPE)
    x[2, 1, 0, 0] = np.nan
    service.forward(TRAIN, x)
    assert list(np.isnan(service.get_layer(KEY).state.mean)) == [False, True, False]


def test_check_forward_raises_what_forward_would(service: LayerService) -> None:
    create(service)
    service.check_forward(TRAIN, SHAPE)
    for shape, error in [((4, 2, 5, 2), InvalidShape), ((1, MAPS, 1, 1), TooFewValues), ((1 << 70,), InvalidShape)]:
        with pytest.raises(error):
            service.check_forward(TRAIN, shape)
    service.check_forward(EVAL, (1, MAPS, 1, 1))


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_that_nobody_waits_for_is_not_applied(service: LayerService, keep: bool) -> None:
    create(service)
    before = service.get_layer(KEY)
    with pytest.raises(CallCancelled):
        service.forward(replace(TRAIN, keep_input=keep), oracle.random_tensor(0, SHAPE), wanted=lambda: False)
    assert service.get_layer(KEY) is before


def test_a_call_is_asked_about_once_and_before_the_commit(service: LayerService) -> None:
    create(service)
    versions: list[int] = []

    def wanted() -> bool:
        versions.append(service.get_layer(KEY).state.version)
        return True

    service.forward(TRAIN, oracle.random_tensor(0, SHAPE), wanted)
    assert versions == [0]


def test_a_read_only_input_is_fine(service: LayerService) -> None:
    create(service)
    x = oracle.random_tensor(0, SHAPE)
    x.setflags(write=False)
    assert service.forward(TRAIN, x).version == 1
