"""What several stores write alike: configurations, the names of merged deltas, and running statistics."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy, Vector


def config_to_text(config: LayerConfig) -> str:
    """Return a configuration as JSON."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return json.dumps({name: getattr(value, "name", value) for name, value in values.items()})


@functools.lru_cache(4096)
def config_from_text(text: str | bytes) -> LayerConfig:
    """Return the configuration of a text."""
    values: dict[str, Any] = json.loads(text)
    kinds: dict[str, Any] = {"kind": LayerKind, "averaging": Averaging, "nonfinite": NonFinitePolicy}
    for name, kind in kinds.items():
        values[name] = kind[values[name]]
    return LayerConfig(**values)


def names_to_bytes(names: Iterable[bytes]) -> bytes:
    """Return names, each behind its length."""
    return b"".join(bytes([len(name)]) + name for name in names)


def names_from_bytes(data: bytes) -> tuple[bytes, ...]:
    """Return the names of such bytes."""
    names, at = [], 0
    while at < len(data):
        end = at + 1 + data[at]
        names.append(data[at + 1 : end])
        at = end
    return tuple(names)


def statistics_to_bytes(vector: npt.NDArray[np.floating[Any]]) -> bytes:
    """Return a running mean or variance as little-endian float64."""
    return vector.astype("<f8").tobytes()


def statistics_from_bytes(data: bytes) -> Vector:
    """Return a running mean or variance as records have it today, float32.

    Raises:
        ValueError: A value is not a float32. A later release has written it; to round it would change the layer.
    """
    wide = np.frombuffer(data, "<f8")
    with np.errstate(over="ignore"):  # which is no float32, and so refused below
        vector = wide.astype(np.float32)
    if not np.array_equal(vector, wide, equal_nan=True):
        raise ValueError("running statistics beyond float32, which a newer release has written")
    vector.setflags(write=False)
    return vector


def widened(data: bytes) -> bytes:
    """Return a running mean or variance that was stored as float32 as float64, which has the same values."""
    return statistics_to_bytes(np.frombuffer(data, "<f4"))
