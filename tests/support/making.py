"""The type of the fixture `make_layer`, through which one suite runs over every backend."""

from __future__ import annotations

from typing import Any, Protocol

import sharednorm


class MakeLayer(Protocol):
    """Makes a layer."""

    def __call__(self, kind: str, maps: int, **options: Any) -> sharednorm.Layer:
        """Return a layer of a kind, "BatchNorm" to "BatchNorm3D", by the constructor of that name."""
        ...
