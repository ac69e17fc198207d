"""States and updates of a layer as messages and back; and any message at all, through every reader."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given
from hypothesis import strategies as st

from sharednorm.codec import convert
from sharednorm.codec.protobuf_wire import field_header
from sharednorm.core.state import ARRAY_FIELDS, LayerState, StateUpdate
from sharednorm.errors import InvalidConfiguration, InvalidShape, MalformedMessage, SharedNormError, UnsupportedDType
from sharednorm.v1 import layer_pb2, tensor_pb2

NAN, INF = math.nan, math.inf


def sent(message: Any) -> Any:
    """Send a message over the wire, as bytes."""
    return type(message).FromString(message.SerializeToString())


# --- States -----------------------------------------------------------------------------------------


def a_state(maps: int = 3) -> LayerState:
    rng = np.random.default_rng(1)
    vectors = [rng.normal(size=maps).astype(np.float32) for _ in range(5)]
    scale, bias, mean, spread, grad = vectors
    return LayerState(scale, bias, mean, np.abs(spread), grad, -grad, num_of_props=12, version=34)


def a_layer(maps: int = 3) -> layer_pb2.Layer:
    return layer_pb2.Layer(config=layer_pb2.LayerConfig(maps=maps), version=34, num_of_props=12, initialized=True)


def assert_same(got: LayerState, expected: LayerState) -> None:
    for name in ARRAY_FIELDS:
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), strict=True)
        assert not getattr(got, name).flags.writeable
    assert (got.num_of_props, got.version, got.initialized) == (
        expected.num_of_props, expected.version, expected.initialized,
    )  # fmt: skip


def test_states_go_there_and_back() -> None:
    state = a_state()
    assert_same(convert.state_from_proto(a_layer(), sent(convert.state_to_proto(state, gradients=True))), state)


def test_without_gradients_they_are_not_sent_and_read_as_zero() -> None:
    message = convert.state_to_proto(a_state(), gradients=False)
    assert not message.HasField("scale_grad")
    assert not message.HasField("bias_grad")
    got = convert.state_from_proto(a_layer(), message)
    np.testing.assert_array_equal(got.scale_grad, np.zeros(3, np.float32), strict=True)
    np.testing.assert_array_equal(got.bias_grad, np.zeros(3, np.float32), strict=True)


def test_a_state_of_no_steps_says_so() -> None:
    layer = a_layer()
    message = convert.state_to_proto(a_state(), gradients=False)
    message.num_of_props = 0
    assert convert.state_from_proto(layer, sent(message)).num_of_props == 0
    message.ClearField("num_of_props")
    assert convert.state_from_proto(layer, message).num_of_props == 12


@pytest.mark.parametrize("name", ["scale_grad", "bias_grad"])
def test_one_gradient_without_the_other(name: Any) -> None:
    state = a_state()
    message = convert.state_to_proto(state, gradients=True)
    message.ClearField(name)
    got = convert.state_from_proto(a_layer(), message)
    for each in ARRAY_FIELDS:
        right = np.zeros(3, np.float32) if each == name else getattr(state, each)
        np.testing.assert_array_equal(getattr(got, each), right, strict=True)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_state_of_another_release_with_fields_that_this_one_does_not_know(gradients: bool) -> None:
    state = a_state()
    data = convert.state_to_proto(state, gradients=gradients).SerializeToString()
    unknown = field_header(2000, 3) + b"new"
    of_the_state = layer_pb2.LayerState.FromString(data + unknown)
    of_a_vector = layer_pb2.LayerState.FromString(data)
    of_a_vector.mean.ParseFromString(of_a_vector.mean.SerializeToString() + unknown)
    for message in (of_the_state, of_a_vector):
        got = convert.state_from_proto(a_layer(), message)
        for name in ("scale", "bias", "mean", "var"):
            np.testing.assert_array_equal(getattr(got, name), getattr(state, name), strict=True)
            assert not getattr(got, name).flags.writeable


@pytest.mark.parametrize("name", ["scale", "bias", "mean", "var"])
def test_a_state_without_one_of_its_parts_is_refused(name: Any) -> None:
    message = convert.state_to_proto(a_state(), gradients=True)
    message.ClearField(name)
    with pytest.raises(MalformedMessage, match=f"has no {name}"):
        convert.state_from_proto(a_layer(), message)


@pytest.mark.parametrize("name", ARRAY_FIELDS)
@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_part_of_another_length_is_refused(name: str, size: int) -> None:
    message = convert.state_to_proto(a_state(), gradients=True)
    getattr(message, name).CopyFrom(type(getattr(message, name))(values=[1.0] * size))
    with pytest.raises(MalformedMessage, match=f"{name} has {size} values .expected: 3"):
        convert.state_from_proto(a_layer(), message)


def test_a_server_that_claims_billions_of_maps_costs_nothing() -> None:
    message = convert.state_to_proto(a_state(), gradients=False)
    layer = a_layer(maps=(1 << 32) - 1)
    with pytest.raises(MalformedMessage, match="scale has 3 values"):
        convert.state_from_proto(layer, message)


# --- Updates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRAY_FIELDS)
@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1), (1, 3, 1, 1, 1), (3, 1)])
def test_an_update_sets_what_it_names_and_nothing_else(name: str, shape: tuple[int, ...]) -> None:
    values = np.arange(3.0).reshape(shape)
    fields: dict[str, Any] = {name: values}
    message = sent(convert.update_to_proto(StateUpdate(**fields)))
    assert [field.name for field, _ in message.ListFields()] == [name]
    got = convert.update_from_proto(message)
    np.testing.assert_array_equal(np.asarray(getattr(got, name)), np.arange(3, dtype=np.float32), strict=True)
    others = {field: getattr(got, field) for field in (*ARRAY_FIELDS, "num_of_props") if field != name}
    assert set(others.values()) == {None}


@pytest.mark.parametrize("number", [0, 1, 1 << 53, np.int64(7)])
def test_an_update_of_the_steps_alone(number: int) -> None:
    got = convert.update_from_proto(sent(convert.update_to_proto(StateUpdate(num_of_props=number))))
    assert vars(got) == vars(StateUpdate(num_of_props=int(number)))


def test_an_empty_update_is_an_empty_message() -> None:
    message = convert.update_to_proto(StateUpdate())
    assert message.SerializeToString() == b""
    assert vars(convert.update_from_proto(message)) == vars(StateUpdate())


REFUSED: list[tuple[dict[str, Any], type[SharedNormError], str]] = [
    ({"mean": np.zeros((2, 3))}, InvalidShape, r"mean has shape \(2, 3\)"),
    ({"mean": np.zeros((0, 3))}, InvalidShape, r"mean has shape \(0, 3\)"),
    ({"bias": [[1], [2, 3]]}, InvalidShape, "bias is not an array"),
    ({"scale": ["a"]}, UnsupportedDType, "scale holds"),
    ({"scale": [1j]}, UnsupportedDType, "scale holds complex128"),
    ({"scale": [True]}, UnsupportedDType, "scale holds bool"),
    ({"scale": [object()]}, UnsupportedDType, "scale holds object"),
    ({"num_of_props": -1}, InvalidConfiguration, "numOfProps is -1"),
    ({"num_of_props": (1 << 53) + 1}, InvalidConfiguration, "numOfProps is"),
    ({"num_of_props": 1.5}, InvalidConfiguration, "numOfProps is 1.5"),
    ({"num_of_props": True}, InvalidConfiguration, "numOfProps is True"),
]


@pytest.mark.parametrize(("fields", "error", "words"), REFUSED)
def test_a_bad_update_is_refused_before_it_is_sent(
    fields: dict[str, Any], error: type[SharedNormError], words: str
) -> None:
    with pytest.raises(error, match=words):
        convert.update_to_proto(StateUpdate(**fields))


# --- Anything ---------------------------------------------------------------------------------------

READERS: list[tuple[type[Any], Callable[[Any], object]]] = [
    (layer_pb2.LayerRef, convert.ref_from_proto),
    (layer_pb2.LayerConfig, convert.config_from_proto),
    (layer_pb2.LayerState, convert.update_from_proto),
    (layer_pb2.LayerState, lambda message: convert.state_from_proto(a_layer(), message)),
    (layer_pb2.Layer, lambda layer: convert.state_from_proto(layer, convert.state_to_proto(a_state(), gradients=True))),
    (tensor_pb2.FloatVector, lambda message: convert.vector_from_proto(message, 3)),
    (tensor_pb2.DoubleVector, lambda message: convert.doubles_from_proto(message, 3)),
    (tensor_pb2.Moments, lambda message: convert.moments_from_proto(message, 3)),
]


@pytest.mark.parametrize(("cls", "read"), READERS)
@given(data=st.data())
def test_whatever_a_message_says_is_read_or_refused_by_a_typed_error(
    cls: type[Any], read: Callable[[Any], object], data: st.DataObject
) -> None:
    message = data.draw(messages(cls.DESCRIPTOR))
    # Anything else than a typed error fails the test.
    with suppress(SharedNormError):
        read(message)


def messages(descriptor: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for messages of a class, with values from the edges of their types."""
    by_type: dict[str, st.SearchStrategy[Any]] = {
        "double": st.sampled_from([0.0, -0.0, 1e-5, 0.5, 1.0, -1.0, 1e300, NAN, INF, -INF]),
        "float": st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, NAN, INF, -INF]),
        "uint32": st.sampled_from([0, 1, 3, 1 << 17, (1 << 32) - 1]),
        "uint64": st.sampled_from([0, 1, 3, 1 << 53, (1 << 64) - 1]),
        "enum": st.integers(-1, 6),
        "bool": st.booleans(),
        "string": st.text(max_size=5),
    }
    names = {1: "double", 2: "float", 4: "uint64", 8: "bool", 9: "string", 13: "uint32", 14: "enum"}
    choices = {}
    for field in descriptor.fields:
        value = messages(field.message_type) if field.message_type else by_type[names[field.type]]
        choices[field.name] = st.lists(value, max_size=4) if field.is_repeated else value
    return st.fixed_dictionaries({}, optional=choices).map(lambda fields: GetMessageClass(descriptor)(**fields))
