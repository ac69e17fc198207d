"""Messages to the library's own types and back: nothing is lost, and nothing unchecked gets through."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharednorm.codec import convert
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.errors import (
    InvalidConfiguration,
    InvalidName,
    MalformedMessage,
    NotSupported,
)
from sharednorm.v1 import layer_pb2, tensor_pb2

NAN, INF = math.nan, math.inf


def sent(message: Any) -> Any:
    """Send a message over the wire, as bytes."""
    return type(message).FromString(message.SerializeToString())


# --- Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stem/bn", "層/ß", "a" * 512, " x "])
def test_names_go_there_and_back(name: str) -> None:
    ref = convert.ref_to_proto("lab", name, "7f", "site-a")
    assert convert.ref_from_proto(sent(ref)) == ("lab", name, "7f", "site-a", 0, False)
    ref.seen_version = 1 << 60
    ref.strong = True
    assert convert.ref_from_proto(sent(ref))[4:] == (1 << 60, True)


def test_an_unset_namespace_is_the_default_one() -> None:
    assert convert.ref_from_proto(layer_pb2.LayerRef(name="bn")) == ("default", "bn", "", "", 0, False)


@pytest.mark.parametrize(
    "ref",
    [
        layer_pb2.LayerRef(),
        layer_pb2.LayerRef(name=" \t"),
        layer_pb2.LayerRef(name="a" * 513),
        layer_pb2.LayerRef(name="a\nb"),
        layer_pb2.LayerRef(namespace="a\x00", name="bn"),
        layer_pb2.LayerRef(namespace="n" * 129, name="bn"),
        layer_pb2.LayerRef(name="bn", domain=" "),
        layer_pb2.LayerRef(name="bn", domain="d" * 257),
        layer_pb2.LayerRef(name="bn", domain="a\tb"),
    ],
    ids=[
        *("unset", "blank", "long", "line feed", "NUL in the namespace", "long namespace"),
        *("blank domain", "long domain", "tab in the domain"),
    ],
)
def test_bad_names_are_refused(ref: layer_pb2.LayerRef) -> None:
    with pytest.raises(InvalidName):
        convert.ref_from_proto(ref)


# --- Configurations ---------------------------------------------------------------------------------

configs = st.builds(
    LayerConfig,
    kind=st.sampled_from(LayerKind),
    maps=st.integers(1, 1 << 17),
    epsilon=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    init_factor=st.floats(min_value=0, allow_infinity=False),
    min_factor=st.floats(min_value=0, max_value=1),
    affine=st.booleans(),
    averaging=st.sampled_from(Averaging),
    nonfinite=st.sampled_from(NonFinitePolicy),
)


@given(configs)
def test_configurations_go_there_and_back_to_the_last_bit(config: LayerConfig) -> None:
    assert convert.config_from_proto(sent(convert.config_to_proto(config))) == config


def a_config(**changed: Any) -> layer_pb2.LayerConfig:
    fields: dict[str, Any] = {
        "kind": layer_pb2.LAYER_KIND_BATCH_NORM_2D, "maps": 3, "epsilon": 1e-5, "init_factor": 1.0,
        "min_factor": 0.1, "affine": True,
    }  # fmt: skip
    return layer_pb2.LayerConfig(**(fields | changed))


def test_unset_averaging_and_policy_mean_their_defaults() -> None:
    config = convert.config_from_proto(a_config())
    assert config == LayerConfig(LayerKind.BATCH_NORM_2D, 3)
    assert (config.averaging, config.nonfinite) == (Averaging.STANDARD, NonFinitePolicy.REFUSE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("kind", number) for number in (0, 5, -1, (1 << 31) - 1)],
        *[("averaging", number) for number in (3, -1)],
        *[("nonfinite", number) for number in (3, -1)],
        *[("maps", number) for number in (0, (1 << 17) + 1, (1 << 32) - 1)],
        *[("epsilon", number) for number in (0.0, -1e-5, NAN, INF, -INF)],
        *[("init_factor", number) for number in (-1.0, NAN, INF)],
        *[("min_factor", number) for number in (-0.1, 1.1, NAN, INF)],
    ],
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    word = {"init_factor": "initFactor", "min_factor": "minFactor"}.get(name, name)
    with pytest.raises(InvalidConfiguration, match=rf"{word} is .*\(expected: "):
        convert.config_from_proto(sent(a_config(**{name: value})))


@pytest.mark.parametrize("train", [None, True, False])
def test_modes_go_there_and_back(train: bool | None) -> None:
    assert convert.mode_from_proto(convert.mode_to_proto(train)) is train


def test_the_numbers_of_the_modes_are_those_of_the_contract() -> None:
    assert [convert.mode_from_proto(number) for number in range(3)] == [None, True, False]


@pytest.mark.parametrize("mode", [3, -1, (1 << 31) - 1])
def test_unknown_modes_are_refused(mode: int) -> None:
    with pytest.raises(InvalidConfiguration, match=f"mode is {mode} "):
        convert.mode_from_proto(mode)


# --- Vectors ----------------------------------------------------------------------------------------

VALUES = [1.5, -0.0, 1e-45, 3.4e38, INF, -INF, 0.1]


def as_stock(values: npt.ArrayLike) -> tensor_pb2.FloatVector:
    return tensor_pb2.FloatVector(values=np.asarray(values, np.float32).ravel().tolist())


@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        np.array(VALUES, np.float32),
        np.array(VALUES, np.float32)[::-1],
        np.array(VALUES, ">f4"),
        np.array(VALUES, np.float64).reshape(1, 7, 1, 1),
        np.arange(7),
        np.arange(7).astype(ml_dtypes.bfloat16),
        np.broadcast_to(np.float32(2.5), (7,)),
    ],
    ids=["list", "float32", "reversed", "big-endian", "float64 4d", "integers", "bfloat16", "broadcast"],
)
def test_a_vector_is_what_stock_classes_would_make_of_it(values: npt.ArrayLike) -> None:
    message = convert.vector_to_proto(values)
    assert message.SerializeToString() == as_stock(values).SerializeToString()
    got = convert.vector_from_proto(sent(message), 7)
    np.testing.assert_array_equal(got, np.asarray(values, np.float32).ravel(), strict=True)
    assert not got.flags.writeable


def test_nan_survives_and_what_is_beyond_float32_becomes_infinite() -> None:
    got = convert.vector_from_proto(convert.vector_to_proto(np.array([NAN, 1e300, -1e300])), 3)
    np.testing.assert_array_equal(got, [NAN, INF, -INF])


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 4096, 5000])
def test_vectors_of_any_size(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    message = sent(convert.vector_to_proto(values))
    np.testing.assert_array_equal(convert.vector_from_proto(message, size), values, strict=True)


@pytest.mark.parametrize("maps", [0, 2, 4, 1 << 40])
def test_vectors_of_another_length_are_refused(maps: int) -> None:
    with pytest.raises(MalformedMessage, match=f"has 3 values .expected: {maps}, one a map"):
        convert.vector_from_proto(as_stock([1, 2, 3]), maps)


# --- Moments ----------------------------------------------------------------------------------------


def the_moments(mean: npt.ArrayLike, m2: npt.ArrayLike, count: int = 8) -> Moments:
    return Moments(count, np.asarray(mean, np.float64), np.asarray(m2, np.float64))


@pytest.mark.parametrize("count", [1, 127, 1 << 40, 1 << 53])
@pytest.mark.parametrize("maps", [1, 16, 17, 2048])
def test_moments_go_there_and_back_to_the_last_bit(maps: int, count: int) -> None:
    rng = np.random.default_rng(maps)
    moments = the_moments(rng.normal(1e4, 1, maps), rng.exponential(1e-300, maps), count)
    message = convert.moments_to_proto(moments)
    assert message == tensor_pb2.Moments(count=[count], mean=moments.mean.tolist(), m2=moments.m2.tolist())
    got = convert.moments_from_proto(sent(message), maps)
    assert got.count == count
    np.testing.assert_array_equal(got.mean, moments.mean, strict=True)
    np.testing.assert_array_equal(got.m2, moments.m2, strict=True)
    assert not got.mean.flags.writeable
    assert not got.m2.flags.writeable


def stock_moments(mean: list[float], m2: list[float], count: int = 8) -> tensor_pb2.Moments:
    return tensor_pb2.Moments(count=[count], mean=mean, m2=m2)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (stock_moments([0, 0], [1, 1], count=0), "count 0"),
        (tensor_pb2.Moments(), "no count"),
        (stock_moments([0, 0], [1, 1], count=1 << 54), "count 1.80144e.16"),
        (tensor_pb2.Moments(count=[8, 8, 8], mean=[0, 0], m2=[1, 1]), "3 counts"),
        (tensor_pb2.Moments(count=[NAN], mean=[0, 0], m2=[1, 1]), "count nan"),
        (tensor_pb2.Moments(count=[-1.5], mean=[0, 0], m2=[1, 1]), "count -1.5"),
        (stock_moments([0], [1, 1]), "1 means and 2 m2 .expected: 2 of each"),
        (stock_moments([0, 0], [1]), "2 means and 1 m2"),
        (stock_moments([0, 0, 0], [1, 1, 1]), "3 means and 3 m2"),
        (stock_moments([0, 0], [1, -1e-300]), "negative m2"),
        (stock_moments([0, 0], [-INF, 1]), "negative m2"),
        (stock_moments([0, 0], [1, NAN]), "NaN or an infinity"),
        (stock_moments([0, 0], [1, INF]), "NaN or an infinity"),
        (stock_moments([0, NAN], [1, 1]), "NaN or an infinity"),
        (stock_moments([-INF, 0], [1, 1]), "NaN or an infinity"),
    ],
)
def test_moments_that_cannot_be_are_refused(message: tensor_pb2.Moments, words: str) -> None:
    with pytest.raises(MalformedMessage, match=words):
        convert.moments_from_proto(sent(message), 2)


@pytest.mark.parametrize("count", [[8.0, 8.0], [8.5], [0.25]])
def test_counts_of_a_later_release_are_refused_as_such(count: list[float]) -> None:
    with pytest.raises(NotSupported, match=r"Moments.count: .* not served by this release"):
        convert.moments_from_proto(tensor_pb2.Moments(count=count, mean=[0, 0], m2=[1, 1]), 2)


def test_doubles_go_there_and_back_to_the_last_bit() -> None:
    values = np.array([0.1, 1e300, -1e-300])
    got = convert.doubles_from_proto(sent(convert.doubles_to_proto(values)), 3)
    np.testing.assert_array_equal(got, values, strict=True)
    assert not got.flags.writeable
    with pytest.raises(MalformedMessage, match=r"3 values .expected: 2"):
        convert.doubles_from_proto(convert.doubles_to_proto(values), 2)


def test_moments_of_a_layer_that_allows_it_may_be_non_finite_but_not_negative() -> None:
    got = convert.moments_from_proto(stock_moments([NAN, INF], [NAN, INF]), 2, allow_nonfinite=True)
    np.testing.assert_array_equal(got.mean, [NAN, INF])
    np.testing.assert_array_equal(got.m2, [NAN, INF])
    with pytest.raises(MalformedMessage, match="negative"):
        convert.moments_from_proto(stock_moments([NAN, 0], [NAN, -1]), 2, allow_nonfinite=True)
