"""Rules between two things that a client says, or that one says and the layer knows."""

from __future__ import annotations

import enum
import math

from sharednorm.core.dtypes import check_dtype, dtype_of
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState
from sharednorm.core.types import LayerKind
from sharednorm.errors import ConfigurationMismatch, InvalidShape, MalformedMessage
from sharednorm_server.layers.requests import ForwardFacts
from sharednorm_server.store.base import LayerKey


def require_same_config(existing: LayerConfig, requested: LayerConfig, key: LayerKey) -> None:
    """Check that a layer is configured as somebody expects.

    Raises:
        ConfigurationMismatch: It is not; message and metadata name each field that differs, with both values.
    """
    differences = existing.differences(requested)
    if differences:
        values = {name: f"{_shown(old)} (requested: {_shown(new)})" for name, (old, new) in differences.items()}
        listed = ", ".join(f"{_WORDS.get(name, name)} is {text}" for name, text in values.items())
        raise ConfigurationMismatch(
            f"{key} exists with another configuration: {listed}; use the same one, another name, or delete the layer",
            values,
        )


def check_facts(facts: ForwardFacts, config: LayerConfig) -> None:
    """Check what a client remembers of a forward.

    Raises:
        InvalidShape, TooFewValues: The layer cannot have trained on such an input.
        MalformedMessage: Its moments are of another number of values.
    """
    config.check_shape(facts.shape, train=True)
    values = math.prod(facts.shape) // config.maps
    if facts.moments.count != values:
        raise MalformedMessage(
            f"the forward's moments have count {facts.moments.count}, and its input has {values} values a map"
        )


def require_same_tensor(
    shape: tuple[int, ...], dtype_name: str, grad_shape: tuple[int, ...], grad_dtype_name: str
) -> None:
    """Check that a gradient is one of a forward: the shape and element type of its input.

    Raises:
        InvalidShape, UnsupportedDType: It is not.
    """
    if grad_shape != shape:
        raise InvalidShape(f"Grad has shape {grad_shape} (expected: {shape}, that of the forward's input)")
    check_dtype(dtype_of(grad_dtype_name), dtype_of(dtype_name))


# What a field of the contract is called by those who make layers.
_WORDS = {"init_factor": "initFactor", "min_factor": "minFactor"}


def _shown(value: object) -> str:
    if isinstance(value, LayerKind):
        return value.label
    return str(value.value if isinstance(value, enum.Enum) else value)


def same_parameters(one: LayerState, other: LayerState) -> bool:
    """Return whether nobody has changed scale and bias from one state of a layer to another."""
    # States are immutable, and one that follows from another shares what did not change.
    return one.scale is other.scale and one.bias is other.bias


def same_statistics(one: LayerState, other: LayerState) -> bool:
    """Return whether nobody has changed the statistics from one state of a layer to another."""
    return one.mean is other.mean and one.var is other.var and one.num_of_props == other.num_of_props
