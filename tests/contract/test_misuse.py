"""Bad input: the class of the error, a message that helps, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sharednorm import (
    BackwardInEval,
    BackwardWithoutForward,
    InvalidConfiguration,
    InvalidName,
    InvalidShape,
    Layer,
    ModuleError,
    NonFiniteInput,
    TooFewValues,
    UnsupportedDType,
)
from tests.support.making import MakeLayer
from tests.support.oracle import KINDS, SPATIAL, random_tensor, shape_of
from tests.support.unchanged import unchanged

SHAPE = (4, 3, 5, 5)
X, GRAD = random_tensor(1, SHAPE), random_tensor(2, SHAPE)


def zeros(*shape: int, dtype: Any = np.float32) -> Any:
    return np.zeros(shape, dtype)


def with_value(value: float) -> Any:
    x = X.copy()
    x[1, 1, 2, 3] = value
    return x


BAD_DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "rank 0": (zeros(), InvalidShape, r"Data must be 4d tensor, got shape \(\)"),
    "rank 3": (zeros(4, 3, 5), InvalidShape, r"Data must be 4d tensor, got shape \(4, 3, 5\)"),
    "rank 5": (zeros(4, 3, 5, 5, 5), InvalidShape, "Data must be 4d tensor"),
    "maps": (zeros(4, 5, 5, 5), InvalidShape, r"Data has 5 maps \(expected: 3\)"),
    "no maps": (zeros(4, 0, 5, 5), InvalidShape, r"Data has 0 maps \(expected: 3\)"),
    "channels last": (zeros(4, 5, 5, 3), InvalidShape, "Data has 5 maps"),
    "N = 0": (zeros(0, 3, 5, 5), InvalidShape, "Data is empty"),
    "H = 0": (zeros(4, 3, 0, 5), InvalidShape, "Data is empty"),
    "float64": (zeros(*SHAPE, dtype=np.float64), UnsupportedDType, r"Unsupported dtype float64 .*astype\(np.float32\)"),
    "int32": (zeros(*SHAPE, dtype=np.int32), UnsupportedDType, "Unsupported dtype int32"),
    "bool": (zeros(*SHAPE, dtype=bool), UnsupportedDType, "Unsupported dtype bool"),
    "complex64": (zeros(*SHAPE, dtype=np.complex64), UnsupportedDType, "Unsupported dtype complex64"),
    "object": (zeros(*SHAPE, dtype=object), UnsupportedDType, "Unsupported dtype object"),
    "text": (np.full(SHAPE, "a"), UnsupportedDType, "Unsupported dtype <U1"),
    "records": (zeros(*SHAPE, dtype="f4,f4"), UnsupportedDType, "Unsupported dtype"),
    "list": (X.tolist(), UnsupportedDType, "Data is a builtins.list .*expected: a NumPy array"),
    "number": (3.0, UnsupportedDType, "expected: a NumPy array"),
    "None": (None, UnsupportedDType, "expected: a NumPy array"),
    "masked": (np.ma.masked_array(X, mask=X > 0), UnsupportedDType, "MaskedArray .*expected: a NumPy array"),
}
BAD_BATCHES: dict[str, tuple[Any, type[Exception], str]] = {
    "one value a map": (zeros(1, 3, 1, 1), TooFewValues, "one value a map.*at least 2 in train mode"),
    "NaN": (with_value(np.nan), NonFiniteInput, r"in 1 of 3 maps \(1\)"),
    "infinity": (with_value(np.inf), NonFiniteInput, r"in 1 of 3 maps \(1\)"),
    "minus infinity": (with_value(-np.inf), NonFiniteInput, r"in 1 of 3 maps \(1\)"),
    "variance beyond float32": (with_value(3e38), NonFiniteInput, r"in 1 of 3 maps \(1\)"),
    "half infinity": (with_value(np.inf).astype(np.float16), NonFiniteInput, r"in 1 of 3 maps \(1\)"),
}


def used(make_layer: MakeLayer, kind: str = "BatchNorm2D", shape: tuple[int, ...] = SHAPE) -> Layer:
    """Return a layer with a history: statistics, gradients, a saved forward."""
    bn = make_layer(kind, shape[1])
    bn(random_tensor(1, shape))
    bn.backward(random_tensor(2, shape))
    return bn


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(make_layer: MakeLayer, case: str, train: bool) -> None:
    data, error, said = BAD_DATA[case]
    bn = used(make_layer)
    if not train:
        bn.evalMode()
        bn(X)
    with pytest.raises(error, match=said) as caught, unchanged(bn):
        bn(data)
    assert isinstance(caught.value, ModuleError)


@pytest.mark.parametrize("chosen", [True, False], ids=["chosen", "default"])
@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_training_batches(make_layer: MakeLayer, case: str, chosen: bool) -> None:
    data, error, said = BAD_BATCHES[case]
    bn = used(make_layer)
    if chosen:
        bn.trainMode()
        bn(X)
    with pytest.raises(error, match=said) as caught, unchanged(bn):
        bn(data)
    assert isinstance(caught.value, ModuleError)
    # The forward before it is still the one to differentiate.
    bn.backward(GRAD)


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_eval_takes_them(make_layer: MakeLayer, case: str) -> None:
    data = BAD_BATCHES[case][0]
    bn = used(make_layer)
    bn.evalMode()
    y = bn(data)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(data))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_its_own_rank_only(make_layer: MakeLayer, kind: str) -> None:
    bn = used(make_layer, kind, shape_of(kind, 3))
    wanted = "2d matrix" if kind == "BatchNorm" else f"{2 + len(SPATIAL[kind])}d tensor"
    for other in set(KINDS) - {kind}:
        with pytest.raises(InvalidShape, match=f"Data must be {wanted}"), unchanged(bn):
            bn(random_tensor(1, shape_of(other, 3)))
        with pytest.raises(InvalidShape, match=f"Grad must be {wanted}"), unchanged(bn):
            bn.backward(random_tensor(1, shape_of(other, 3)))


@pytest.mark.torch
def test_a_tensor_of_torch_is_refused_with_the_way_out(make_layer: MakeLayer) -> None:
    import torch

    bn = used(make_layer)
    with pytest.raises(UnsupportedDType, match=r"torch.Tensor .*\.numpy\(\)"), unchanged(bn):
        bn(torch.zeros(SHAPE))


BAD_GRADIENTS: dict[str, tuple[Any, type[Exception], str]] = {
    "rank": (zeros(4, 3, 25), InvalidShape, "Grad must be 4d tensor"),
    "maps": (zeros(4, 5, 5, 5), InvalidShape, r"Grad has 5 maps \(expected: 3\)"),
    "batch": (zeros(3, 3, 5, 5), InvalidShape, r"Grad has shape \(3, 3, 5, 5\) \(expected: \(4, 3, 5, 5\)"),
    "batch of one": (zeros(1, 3, 5, 5), InvalidShape, "Grad has shape"),
    "height": (zeros(4, 3, 6, 5), InvalidShape, "Grad has shape"),
    "width": (zeros(4, 3, 5, 1), InvalidShape, "Grad has shape"),
    "swapped": (zeros(5, 3, 4, 5), InvalidShape, "Grad has shape"),
    "empty": (zeros(0, 3, 5, 5), InvalidShape, "Grad is empty"),
    "another type": (zeros(*SHAPE, dtype=np.float16), UnsupportedDType, "Expected dtype float32, got float16"),
    "float64": (zeros(*SHAPE, dtype=np.float64), UnsupportedDType, "Expected dtype float32, got float64"),
    "list": (GRAD.tolist(), UnsupportedDType, "Grad is a builtins.list .*expected: a NumPy array"),
    "None": (None, UnsupportedDType, "Grad is a builtins.NoneType"),
}


@pytest.mark.parametrize("case", BAD_GRADIENTS)
def test_bad_gradients(make_layer: MakeLayer, case: str) -> None:
    grad, error, said = BAD_GRADIENTS[case]
    bn = used(make_layer)
    with pytest.raises(error, match=said), unchanged(bn):
        bn.backward(grad)
    bn.backward(GRAD)


@pytest.mark.parametrize("value", [np.nan, np.inf, "1", None, 1j, 10**400])
def test_multipliers_that_are_no_finite_numbers(make_layer: MakeLayer, value: Any) -> None:
    bn = used(make_layer)
    with pytest.raises(InvalidConfiguration, match=r"scale is .*expected: a finite number"), unchanged(bn):
        bn.backward(GRAD, scale=value)
    with pytest.raises(InvalidConfiguration, match="momentum is"), unchanged(bn):
        bn.backward(GRAD, momentum=value)
    with pytest.raises(InvalidConfiguration, match="learnRate is"), unchanged(bn):
        bn.updateParams(value)


def test_backward_without_a_forward(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3)
    with pytest.raises(BackwardWithoutForward, match="expected: a forward in train mode"), unchanged(bn):
        bn.backward(GRAD)
    with pytest.raises(NonFiniteInput):
        bn(with_value(np.nan))
    with pytest.raises(BackwardWithoutForward), unchanged(bn):
        bn.backward(GRAD)


def test_backward_in_eval_mode(make_layer: MakeLayer) -> None:
    bn = used(make_layer)
    bn.evalMode()
    with pytest.raises(BackwardInEval, match="no gradients in eval mode"), unchanged(bn):
        bn.backward(GRAD)
    bn(X)
    with pytest.raises(BackwardInEval), unchanged(bn):
        bn.backward(GRAD)


@pytest.mark.parametrize(
    ("name", "values", "error"),
    [
        ("scale", [1.0, 2.0], InvalidShape),
        ("bias", zeros(1, 3, 2, 1), InvalidShape),
        ("mean", 0.0, InvalidShape),
        ("mean", [[1.0], [2.0, 3.0]], InvalidShape),
        ("var", [1.0, -1.0, 1.0], InvalidConfiguration),
        ("var", ["a", "b", "c"], UnsupportedDType),
        ("scale", None, InvalidShape),
        ("var", None, InvalidShape),
        ("numOfProps", None, InvalidConfiguration),
        ("numOfProps", -1, InvalidConfiguration),
        ("numOfProps", 1.5, InvalidConfiguration),
        ("numOfProps", 1 << 64, InvalidConfiguration),
    ],
)
def test_values_that_a_state_cannot_take(make_layer: MakeLayer, name: str, values: Any, error: type[Exception]) -> None:
    bn = used(make_layer)
    with pytest.raises(error, match=f"{name} "), unchanged(bn):
        setattr(bn, name, values)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_values_that_a_variable_cannot_take(make_layer: MakeLayer, name: str) -> None:
    bn = used(make_layer)
    for values in (None, [1.0, 2.0], 5.0):
        with pytest.raises(InvalidShape, match=f"{name} "), unchanged(bn):
            bn.vars[name].data = values  # type: ignore[assignment]
        with pytest.raises(InvalidShape, match=f"{name}_grad "), unchanged(bn):
            bn.vars[name].grad = values  # type: ignore[assignment]


def test_what_is_fixed_without_affine(make_layer: MakeLayer) -> None:
    bn = make_layer("BatchNorm2D", 3, affine=False)
    for name in ("scale", "bias"):
        with pytest.raises(InvalidConfiguration, match="not affine"), unchanged(bn):
            setattr(bn, name, [1.0, 2.0, 3.0])


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"maps": 0}, InvalidConfiguration, "maps is 0"),
    ({"maps": 2.5}, InvalidConfiguration, "maps is 2.5"),
    ({"epsilon": 0.0}, InvalidConfiguration, "epsilon is 0.0"),
    ({"epsilon": float("nan")}, InvalidConfiguration, "epsilon is nan"),
    ({"initFactor": -1.0}, InvalidConfiguration, "initFactor is -1.0"),
    ({"minFactor": 1.5}, InvalidConfiguration, "minFactor is 1.5"),
    ({"sscale": -0.1}, InvalidConfiguration, "sscale is -0.1"),
    ({"sscale": "0.1"}, InvalidConfiguration, "sscale is '0.1'"),
    ({"affine": "yes"}, InvalidConfiguration, "affine is 'yes'"),
    ({"inplace": 1}, InvalidConfiguration, "inplace is 1"),
    ({"empty": None}, InvalidConfiguration, "empty is None"),
    ({"averaging": "both"}, InvalidConfiguration, "averaging is 'both'"),
    ({"nonfinite": "ignore"}, InvalidConfiguration, "nonfinite is 'ignore'"),
    ({"name": "a\x00b"}, InvalidName, "control character"),
    ({"name": "x" * 10_000}, InvalidName, "10000 bytes"),
    ({"name": 7}, InvalidName, "7"),
]


@pytest.mark.parametrize(("options", "error", "said"), BAD_OPTIONS, ids=lambda value: str(value)[:30])
def test_bad_constructor_arguments(
    make_layer: MakeLayer, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    maps = {**options}.pop("maps", 3)
    rest = {name: value for name, value in options.items() if name != "maps"}
    for kind in KINDS:
        with pytest.raises(error, match=said):
            make_layer(kind, maps, **rest)


@pytest.mark.parametrize("name", ["слой/1", "層", "a b", "/absolute/name", "a.b", "x" * 512])
def test_good_names(make_layer: MakeLayer, name: str, backend: str) -> None:
    unique = f"{name}{backend}"[-512:]
    bn = make_layer("BatchNorm", 3, name=unique)
    assert bn.name == unique
    content = bn.save(None)
    assert content is not None
    other = make_layer("BatchNorm", 3)
    other.load(content, name=unique)
    np.testing.assert_array_equal(other.scale, bn.scale)


def test_calls_that_fail_one_after_the_other(make_layer: MakeLayer) -> None:
    bn = used(make_layer)
    calls: list[tuple[Callable[[Any], object], Any]] = [(bn, case[0]) for case in (BAD_DATA | BAD_BATCHES).values()]
    calls += [(bn.backward, case[0]) for case in BAD_GRADIENTS.values()]
    with unchanged(bn):
        for call, given in calls:
            with pytest.raises(ModuleError):
                call(given)
