"""What a call that fails must leave as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import sharednorm
from sharednorm.core.state import ARRAY_FIELDS


def seen(layer: sharednorm.Layer) -> dict[str, Any]:
    """Return all that can be seen of a layer and its handle, bit for bit."""
    state = layer.snapshot()
    found: dict[str, Any] = {name: getattr(state, name).tobytes() for name in ARRAY_FIELDS}
    found |= {name: getattr(state, name) for name in ("num_of_props", "version", "initialized")}
    found |= {name: getattr(layer, name) for name in ("train", "calctype", "inplace", "name")}
    for name in ("inData", "data", "grad", "savemean", "saveinvvar", "scalegrad", "biasgrad"):
        value = getattr(layer, name)
        found[name] = None if value is None else (np.asarray(value).tobytes(), value.shape, value.dtype)
    return found


@contextmanager
def unchanged(layer: sharednorm.Layer) -> Iterator[None]:
    """Check that what happens inside changes nothing that can be seen."""
    before = seen(layer)
    yield
    after = seen(layer)
    assert {name for name in before if before[name] != after[name]} == set()
