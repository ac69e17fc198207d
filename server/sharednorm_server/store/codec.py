"""What several stores write alike: configurations, and the names of merged deltas."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy


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
