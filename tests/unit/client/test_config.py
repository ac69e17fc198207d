"""The rules: what a layer may be configured with, fed and called."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sharednorm.core.dtypes import check_dtype, dtype_of
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.core.validation import check_name, check_namespace, is_finite, is_integer
from sharednorm.errors import InvalidConfiguration, InvalidName, InvalidShape, TooFewValues, UnsupportedDType
from tests.support.oracle import dtype

GOOD: dict[str, Any] = {"kind": LayerKind.BATCH_NORM_2D, "maps": 3}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("kind", "BatchNorm2D", "kind"),
        ("maps", 0, "maps"),
        ("maps", -1, "maps"),
        ("maps", 2**17 + 1, "maps"),
        ("maps", 3.0, "maps"),
        ("maps", True, "maps"),
        ("maps", "3", "maps"),
        ("maps", None, "maps"),
        ("epsilon", 0.0, "epsilon"),
        ("epsilon", -1e-5, "epsilon"),
        ("epsilon", math.nan, "epsilon"),
        ("epsilon", math.inf, "epsilon"),
        ("epsilon", "1e-5", "epsilon"),
        ("epsilon", np.complex64(1), "epsilon"),
        ("epsilon", 10**400, "epsilon"),
        ("init_factor", -0.1, "initFactor"),
        ("init_factor", math.inf, "initFactor"),
        ("init_factor", None, "initFactor"),
        ("min_factor", -0.1, "minFactor"),
        ("min_factor", 1.1, "minFactor"),
        ("min_factor", math.nan, "minFactor"),
        ("affine", 1, "affine"),
        ("affine", None, "affine"),
        ("averaging", "standard", "averaging"),
        ("nonfinite", "refuse", "nonfinite"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_its_name(name: str, value: object, said: str) -> None:
    with pytest.raises(InvalidConfiguration, match=rf"^{said} is .*expected: "):
        LayerConfig(**{**GOOD, name: value})


def test_the_bounds_themselves_are_allowed() -> None:
    config = LayerConfig(LayerKind.BATCH_NORM, 2**17, epsilon=5e-324, init_factor=0.0, min_factor=0.0)
    assert (config.maps, config.min_factor) == (2**17, 0.0)
    assert LayerConfig(LayerKind.BATCH_NORM, 1, min_factor=1.0).factor(100) == 1.0


def test_numbers_of_numpy_become_pythons() -> None:
    config = LayerConfig(LayerKind.BATCH_NORM, np.int32(3), epsilon=np.float32(0.5), init_factor=1, min_factor=0)
    assert [type(v) for v in (config.maps, config.epsilon, config.init_factor, config.min_factor)] == [
        int, float, float, float,
    ]  # fmt: skip
    assert config == LayerConfig(LayerKind.BATCH_NORM, 3, 0.5, 1.0, 0.0)


def parse(**changes: Any) -> LayerConfig:
    values: dict[str, Any] = {
        "kind": LayerKind.BATCH_NORM_2D, "maps": 3, "epsilon": 1e-5, "init_factor": 1.0, "min_factor": 0.1,
        "affine": True, "averaging": "standard", "nonfinite": "refuse",
    }  # fmt: skip
    return LayerConfig.parse(**{**values, **changes})


def test_the_choices_come_by_name_or_by_member() -> None:
    assert parse() == LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    assert parse(averaging="printed").averaging is Averaging.PRINTED
    assert parse(averaging=Averaging.PRINTED).averaging is Averaging.PRINTED
    assert parse(nonfinite="allow").nonfinite is NonFinitePolicy.ALLOW


@pytest.mark.parametrize("value", ["Standard", "", None, 1, np.array(["standard", "printed"])])
def test_another_choice_is_refused_with_the_choices(value: object) -> None:
    with pytest.raises(InvalidConfiguration, match=r"averaging is .*'standard' or 'printed'"):
        parse(averaging=value)
    with pytest.raises(InvalidConfiguration, match=r"nonfinite is .*'refuse' or 'allow'"):
        parse(nonfinite=value)


def test_the_factor_falls_to_its_floor() -> None:
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    assert [config.factor(n) for n in (1, 2, 4, 10, 11, 10**9)] == [1.0, 0.5, 0.25, 0.1, 0.1, 0.1]
    assert LayerConfig(LayerKind.BATCH_NORM_2D, 3, init_factor=5.0).factor(1) == 1.0
    assert LayerConfig(LayerKind.BATCH_NORM_2D, 3, min_factor=0.0).factor(1000) == 0.001
    assert LayerConfig(LayerKind.BATCH_NORM_2D, 3, init_factor=0.0, min_factor=0.0).factor(1) == 0.0


def test_differences_name_each_field_with_both_values() -> None:
    one = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    assert one.differences(LayerConfig(LayerKind.BATCH_NORM_2D, 3)) == {}
    other = LayerConfig(LayerKind.BATCH_NORM_1D, 4, 1e-4, 0.5, 0.2, False, Averaging.PRINTED, NonFinitePolicy.ALLOW)
    assert one.differences(other) == {
        "kind": (LayerKind.BATCH_NORM_2D, LayerKind.BATCH_NORM_1D),
        "maps": (3, 4),
        "epsilon": (1e-5, 1e-4),
        "init_factor": (1.0, 0.5),
        "min_factor": (0.1, 0.2),
        "affine": (True, False),
        "averaging": (Averaging.STANDARD, Averaging.PRINTED),
        "nonfinite": (NonFinitePolicy.REFUSE, NonFinitePolicy.ALLOW),
    }


def test_kinds_know_their_ranks_shapes_and_labels() -> None:
    found = [(kind.rank, LayerConfig(kind, 3).state_shape, kind.label) for kind in LayerKind]
    assert found == [
        (2, (1, 3, 1, 1), "BatchNorm"),
        (3, (1, 3, 1, 1), "BatchNorm1D"),
        (4, (1, 3, 1, 1), "BatchNorm2D"),
        (5, (1, 3, 1, 1, 1), "BatchNorm3D"),
    ]


@pytest.mark.parametrize(
    ("kind", "shape", "error", "said"),
    [
        (LayerKind.BATCH_NORM, (4, 3, 1), InvalidShape, r"Data must be 2d matrix, got shape \(4, 3, 1\)"),
        (LayerKind.BATCH_NORM_1D, (4, 3), InvalidShape, "Data must be 3d tensor"),
        (LayerKind.BATCH_NORM_2D, (), InvalidShape, "Data must be 4d tensor"),
        (LayerKind.BATCH_NORM_3D, (4, 3, 2, 2), InvalidShape, "Data must be 5d tensor"),
        (LayerKind.BATCH_NORM_2D, (4, 5, 2, 2), InvalidShape, r"Data has 5 maps \(expected: 3\)"),
        (LayerKind.BATCH_NORM_2D, (0, 3, 2, 2), InvalidShape, "Data is empty"),
        (LayerKind.BATCH_NORM_2D, (4, 3, 0, 2), InvalidShape, "Data is empty"),
        (LayerKind.BATCH_NORM_2D, (1, 3, 1, 1), TooFewValues, "one value a map"),
        (LayerKind.BATCH_NORM, (1, 3), TooFewValues, "one value a map"),
    ],
)
def test_shapes_that_a_layer_does_not_take(
    kind: LayerKind, shape: tuple[int, ...], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        LayerConfig(kind, 3).check_shape(shape, train=True)


def test_one_value_a_map_is_enough_in_eval_mode_and_two_in_training() -> None:
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    config.check_shape((1, 3, 1, 1), train=False)
    config.check_shape((2, 3, 1, 1), train=True)
    config.check_shape((1, 3, 1, 2), train=True)


def test_the_message_of_a_gradient_says_grad() -> None:
    with pytest.raises(InvalidShape, match=r"Grad has 5 maps \(expected: 3\)"):
        LayerConfig(LayerKind.BATCH_NORM, 3).check_shape((2, 5), train=False, what="Grad")


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_either_byte_order_of_the_three_types_is_accepted(name: str) -> None:
    assert check_dtype(dtype(name)) == name
    assert check_dtype(dtype(name).newbyteorder(">")) == name
    assert check_dtype(dtype(name), dtype(name)) == name
    assert dtype_of(name) == dtype(name)


@pytest.mark.parametrize("given", ["float64", "int32", "complex64", "bool", "O", "U3", "V4", "M8[s]", "f4,f4"])
def test_other_types_are_not(given: str) -> None:
    with pytest.raises(UnsupportedDType, match=r"Unsupported dtype .*expected: float32, float16, bfloat16"):
        check_dtype(np.dtype(given))
    with pytest.raises(UnsupportedDType, match="Expected dtype float16, got"):
        check_dtype(np.dtype(given), np.dtype("float16"))
    with pytest.raises(UnsupportedDType):
        dtype_of(given)


def test_a_chosen_type_excludes_the_other_two() -> None:
    with pytest.raises(UnsupportedDType, match="Expected dtype float32, got float16"):
        check_dtype(np.dtype("float16"), np.dtype("float32"))


@pytest.mark.parametrize(
    "name", ["a", "stem/bn", "/absolute", "слой-1", "層", "a b", "\N{SNOWMAN}", "x" * 512, "é" * 256]
)
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "pass name="),
        (" \t", "pass name="),
        (None, "pass name="),
        (3, "pass name="),
        (b"bytes", "pass name="),
        ("x" * 513, "513 bytes"),
        ("é" * 257, "514 bytes"),
        ("x" * 10_000, "10000 bytes"),
        ("a\x00b", "U\\+0000"),
        ("a\nb", "U\\+000A"),
        ("a\x7f", "U\\+007F"),
        ("a\x85", "U\\+0085"),
        ("a\ud800", "U\\+D800"),
    ],
)
def test_bad_names(name: object, said: str) -> None:
    with pytest.raises(InvalidName, match=said) as caught:
        check_name(name)
    assert len(str(caught.value)) < 400


def test_namespaces() -> None:
    assert check_namespace("") == "default"
    assert check_namespace("team/a") == "team/a"
    assert check_namespace("n" * 128) == "n" * 128
    bad: tuple[object, ...] = ("n" * 129, "a\x00", "a\udfff", None, 3)
    for namespace in bad:
        with pytest.raises(InvalidName):
            check_namespace(namespace)


def test_what_counts_as_a_number() -> None:
    yes: tuple[object, ...] = (0, -1.5, np.float16(2), np.int8(3), 5e-324)
    no: tuple[object, ...] = (True, np.True_, "1", None, math.nan, -math.inf, np.float32("inf"), 1j, 10**400, [1.0])
    assert [is_finite(value) for value in yes] == [True] * 5
    assert [is_finite(value) for value in no] == [False] * 10
    assert [is_integer(value) for value in (0, -3, np.uint8(1), 10**400)] == [True] * 4
    assert [is_integer(value) for value in (True, np.True_, 1.0, "1", None)] == [False] * 5
