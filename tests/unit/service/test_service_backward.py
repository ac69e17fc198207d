"""Backward through the service: by a kept input, or with the input sent again; it never touches statistics."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from sharednorm.core.types import Array
from sharednorm.errors import (
    BackwardWithoutForward,
    CallCancelled,
    InputEvicted,
    InvalidConfiguration,
    InvalidShape,
    LayerNotFound,
    MalformedMessage,
    TooFewValues,
    UnsupportedDType,
)
from sharednorm_server.layers.requests import BackwardCall, ForwardAnswer, ForwardCall, ForwardFacts, LayerKey
from sharednorm_server.layers.service import LayerService
from tests.support import oracle
from tests.support.service import CONFIG, KEY, MAPS, SHAPE, close, create, new_service

KEEP = ForwardCall(KEY, train=True, keep_input=True)


@pytest.fixture
def service() -> LayerService:
    made = new_service()
    create(made, scale=[0.5, 1.0, 2.0], bias=[0, 1, 2])
    return made


def facts(answer: ForwardAnswer, x: Array) -> ForwardFacts:
    assert answer.moments is not None
    assert answer.scale is not None
    return ForwardFacts(x.shape, "float32", answer.moments, answer.scale)


def test_gradients_by_a_kept_input(service: LayerService) -> None:
    x, grad = oracle.random_tensor(1, SHAPE), oracle.random_tensor(2, SHAPE)
    token = service.forward(KEEP, x).saved_input
    answer = service.backward(BackwardCall(KEY, saved_input=token), grad)
    expected = oracle.gradients(x, grad, np.array([0.5, 1.0, 2.0]), 1e-5)
    for got, wanted in zip((answer.grad, answer.scale_grad, answer.bias_grad), expected, strict=True):
        close(got, wanted)
    state = service.get_layer(KEY).state
    np.testing.assert_array_equal(state.scale_grad, answer.scale_grad)
    np.testing.assert_array_equal(state.bias_grad, answer.bias_grad)


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_the_input_sent_again_gives_the_same_bits(service: LayerService, name: str) -> None:
    x, grad = oracle.random_tensor(1, SHAPE, name), oracle.random_tensor(2, SHAPE, name)
    forward = service.forward(KEEP, x)
    kept = service.backward(BackwardCall(KEY, saved_input=forward.saved_input), grad)
    again = replace(facts(forward, x), dtype_name=name)
    sent = service.backward(BackwardCall(KEY, forward=again), grad, x)
    assert kept.grad is not None
    assert sent.grad is not None
    assert kept.grad.array().tobytes() == sent.grad.array().tobytes()
    np.testing.assert_array_equal(kept.scale_grad, sent.scale_grad)


def test_a_backward_uses_the_scale_of_its_forward(service: LayerService) -> None:
    x, grad = oracle.random_tensor(1, SHAPE), oracle.random_tensor(2, SHAPE)
    token = service.forward(KEEP, x).saved_input
    service.backward(BackwardCall(KEY, saved_input=token), grad)
    service.update_params(KEY, 3.0)
    answer = service.backward(BackwardCall(KEY, saved_input=token), grad)
    close(answer.grad, oracle.gradients(x, grad, np.array([0.5, 1, 2]), 1e-5)[0])


def test_a_backward_never_changes_statistics(service: LayerService) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    before = service.get_layer(KEY).state
    service.backward(BackwardCall(KEY, saved_input=token), oracle.random_tensor(2, SHAPE))
    after = service.get_layer(KEY).state
    assert (after.version, after.num_of_props) == (before.version, before.num_of_props)
    for name in ("scale", "bias", "mean", "var"):
        assert getattr(after, name) is getattr(before, name)


def test_a_kept_input_may_be_used_again(service: LayerService) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    grad = oracle.random_tensor(2, SHAPE)
    first = service.backward(BackwardCall(KEY, saved_input=token), grad)
    second = service.backward(BackwardCall(KEY, saved_input=token), grad)
    assert first.grad is not None
    assert second.grad is not None
    np.testing.assert_array_equal(first.grad.array(), second.grad.array())


@pytest.mark.parametrize(("scale", "momentum"), [(1.0, 0.0), (0.5, 0.9), (-2.0, 1.0), (0.0, 0.0)])
def test_gradients_accumulate(service: LayerService, scale: float, momentum: float) -> None:
    model = oracle.Model(MAPS)
    model.scale = np.array([0.5, 1.0, 2.0])
    for number in range(4):
        x, grad = oracle.random_tensor(number, SHAPE), oracle.random_tensor(number + 9, SHAPE)
        model.train(x)
        model.backward(grad, scale=scale, momentum=momentum)
        token = service.forward(KEEP, x).saved_input
        service.backward(BackwardCall(KEY, saved_input=token, scale=scale, momentum=momentum), grad)
        state = service.get_layer(KEY).state
        np.testing.assert_allclose(state.scale_grad, model.scale_grad, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(state.bias_grad, model.bias_grad, rtol=1e-5, atol=1e-4)


def test_parameter_gradients_may_be_left_alone(service: LayerService) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    before = service.get_layer(KEY)
    call = BackwardCall(KEY, saved_input=token, param_grads=False)
    assert service.backward(call, oracle.random_tensor(2, SHAPE)).scale_grad is not None
    assert service.get_layer(KEY) is before


def test_the_input_gradient_may_be_left_out(service: LayerService) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    answer = service.backward(BackwardCall(KEY, saved_input=token, input_grad=False), oracle.random_tensor(2, SHAPE))
    assert answer.grad is None
    assert answer.bias_grad is not None


def test_a_layer_that_is_not_affine_has_no_parameter_gradients() -> None:
    service = new_service()
    create(service, config=replace(CONFIG, affine=False))
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    before = service.get_layer(KEY)
    answer = service.backward(BackwardCall(KEY, saved_input=token), oracle.random_tensor(2, SHAPE))
    assert (answer.scale_grad, answer.bias_grad) == (None, None)
    assert answer.grad is not None
    assert service.get_layer(KEY) is before


# --- what is kept ---------------------------------------------------------------------------------------


def test_only_training_keeps_an_input(service: LayerService) -> None:
    x = oracle.random_tensor(1, SHAPE)
    assert service.forward(replace(KEEP, train=False), x).saved_input == ""
    assert service.forward(replace(KEEP, keep_input=False), x).saved_input == ""


def test_the_oldest_input_is_evicted_and_can_be_sent_again() -> None:
    x, grad = oracle.random_tensor(1, SHAPE), oracle.random_tensor(2, SHAPE)
    service = new_service(activation_cache_bytes=x.nbytes * 2)
    create(service)
    first = service.forward(KEEP, x)
    for number in range(2):
        service.forward(KEEP, oracle.random_tensor(number, SHAPE))
    with pytest.raises(InputEvicted):
        service.backward(BackwardCall(KEY, saved_input=first.saved_input), grad)
    answer = service.backward(BackwardCall(KEY, forward=facts(first, x)), grad, x)
    close(answer.grad, oracle.gradients(x, grad, np.ones(MAPS), 1e-5)[0])


def test_an_input_beyond_the_budget_is_not_kept() -> None:
    service = new_service(activation_cache_bytes=8)
    create(service)
    answer = service.forward(KEEP, oracle.random_tensor(1, SHAPE))
    assert (answer.version, answer.saved_input) == (1, "")


@pytest.mark.parametrize("train", [True, False])
def test_a_forward_releases_the_one_before(service: LayerService, train: bool) -> None:
    x = oracle.random_tensor(1, SHAPE)
    token = service.forward(KEEP, x).saved_input
    service.forward(ForwardCall(KEY, train=train, release_input=token), x)
    with pytest.raises(InputEvicted):
        service.backward(BackwardCall(KEY, saved_input=token), x)


def test_a_handle_needs_room_for_one_input_only() -> None:
    x = oracle.random_tensor(1, SHAPE)
    service = new_service(activation_cache_bytes=2 * x.nbytes)
    create(service)
    others = service.forward(KEEP, x).saved_input
    mine = ""
    for _ in range(3):
        mine = service.forward(replace(KEEP, release_input=mine), x).saved_input
    for token in (others, mine):
        assert service.backward(BackwardCall(KEY, saved_input=token), x).grad is not None


def test_a_forward_that_fails_releases_nothing(service: LayerService) -> None:
    x = oracle.random_tensor(1, SHAPE)
    token = service.forward(KEEP, x).saved_input
    with pytest.raises(InvalidShape):
        service.forward(replace(KEEP, release_input=token), x[0])
    assert service.backward(BackwardCall(KEY, saved_input=token), x).grad is not None


def test_nobody_uses_or_releases_another_layers_input(service: LayerService) -> None:
    x, other = oracle.random_tensor(1, SHAPE), LayerKey("default", "other")
    create(service, other)
    token = service.forward(KEEP, x).saved_input
    with pytest.raises(InputEvicted):
        service.backward(BackwardCall(other, saved_input=token), x)
    service.forward(ForwardCall(other, train=True, release_input=token), x)
    assert service.backward(BackwardCall(KEY, saved_input=token), x).grad is not None


def test_inputs_end_with_their_layer(service: LayerService) -> None:
    x = oracle.random_tensor(1, SHAPE)
    token = service.forward(KEEP, x).saved_input
    service.delete_layer(KEY)
    create(service)
    with pytest.raises(InputEvicted):
        service.backward(BackwardCall(KEY, saved_input=token), x)


def test_a_deleted_layers_inputs_take_no_memory(service: LayerService) -> None:
    x = oracle.random_tensor(1, SHAPE)
    watched = weakref.ref(x)
    service.forward(KEEP, x)
    del x
    assert watched() is not None
    service.delete_layer(KEY)
    gc.collect()
    assert watched() is None


# --- what is refused ------------------------------------------------------------------------------------

BAD_GRADIENTS: dict[str, tuple[Array, type[Exception], str]] = {
    "another batch size": (np.zeros((3, MAPS, 5, 2), np.float32), InvalidShape, "expected: \\(4, 3, 5, 2\\)"),
    "transposed": (np.zeros((4, MAPS, 2, 5), np.float32), InvalidShape, "expected: \\(4, 3, 5, 2\\)"),
    "maps": (np.zeros((4, 2, 5, 2), np.float32), InvalidShape, "Grad has 2 maps"),
    "rank": (np.zeros((4, MAPS, 10), np.float32), InvalidShape, "Grad must be 4d"),
    "empty": (np.zeros((0, MAPS, 5, 2), np.float32), InvalidShape, "Grad is empty"),
    "one value a map": (np.zeros((1, MAPS, 1, 1), np.float32), TooFewValues, "one value"),
    "float16": (np.zeros(SHAPE, np.float16), UnsupportedDType, "Expected dtype float32, got float16"),
    "float64": (np.zeros(SHAPE), UnsupportedDType, "float64"),
}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "sent again"])
@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_a_gradient_of_another_tensor_changes_nothing(service: LayerService, case: str, again: bool) -> None:
    x = oracle.random_tensor(1, SHAPE)
    forward = service.forward(KEEP, x)
    before = service.get_layer(KEY)
    call = BackwardCall(KEY, forward=facts(forward, x)) if again else BackwardCall(KEY, saved_input=forward.saved_input)
    grad, error, text = BAD_GRADIENTS[case]
    with pytest.raises(error, match=text):
        service.backward(call, grad, x if again else None)
    assert service.get_layer(KEY) is before


def test_check_backward_raises_what_backward_would(service: LayerService) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    call = BackwardCall(KEY, saved_input=token)
    service.check_backward(call, SHAPE, "float32")
    with pytest.raises(InvalidShape):
        service.check_backward(call, (4, MAPS, 5, 3), "float32")
    with pytest.raises(UnsupportedDType):
        service.check_backward(call, SHAPE, "bfloat16")
    with pytest.raises(InputEvicted):
        service.check_backward(replace(call, saved_input="x"), SHAPE, "float32")
    with pytest.raises(LayerNotFound):
        service.check_backward(replace(call, key=LayerKey("default", "other")), SHAPE, "float32")


def test_a_backward_without_a_forward(service: LayerService) -> None:
    with pytest.raises(BackwardWithoutForward, match="saved_input"):
        service.backward(BackwardCall(KEY), oracle.random_tensor(2, SHAPE))


@pytest.mark.parametrize("field", ["scale", "momentum"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("param_grads", [False, True])
def test_multipliers_are_finite(service: LayerService, field: str, value: float, param_grads: bool) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    before = service.get_layer(KEY)
    call = BackwardCall(KEY, saved_input=token, param_grads=param_grads)
    call = replace(call, scale=value) if field == "scale" else replace(call, momentum=value)
    with pytest.raises(InvalidConfiguration, match=field):
        service.backward(call, oracle.random_tensor(2, SHAPE))
    assert service.get_layer(KEY) is before


def test_facts_that_contradict_themselves(service: LayerService) -> None:
    x, grad = oracle.random_tensor(1, SHAPE), oracle.random_tensor(2, SHAPE)
    good = facts(service.forward(KEEP, x), x)
    before = service.get_layer(KEY)
    wrong_count = replace(good, moments=replace(good.moments, count=41))
    for call, sent, error in [
        (BackwardCall(KEY, forward=wrong_count), x, MalformedMessage),
        (BackwardCall(KEY, forward=good), None, MalformedMessage),
        (BackwardCall(KEY, forward=good), x.astype(np.float16), MalformedMessage),
        (BackwardCall(KEY, forward=good), x[:2], MalformedMessage),
        (BackwardCall(KEY, forward=replace(good, shape=(1, MAPS, 1, 1))), x, TooFewValues),
        (BackwardCall(KEY, forward=replace(good, dtype_name="float16")), x, UnsupportedDType),
    ]:
        with pytest.raises(error):
            service.backward(call, grad, sent)
    assert service.get_layer(KEY) is before


def test_gradients_that_nobody_waits_for_are_not_added(service: LayerService) -> None:
    token = service.forward(KEEP, oracle.random_tensor(1, SHAPE)).saved_input
    before = service.get_layer(KEY)
    with pytest.raises(CallCancelled):
        service.backward(BackwardCall(KEY, saved_input=token), oracle.random_tensor(2, SHAPE), wanted=lambda: False)
    assert service.get_layer(KEY) is before
