"""Stores: what remembers. A store knows no device, no RPC, and no arithmetic.

A record is immutable; `put` is atomic and returns only when the record is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from sharednorm.config import LayerConfig
from sharednorm.state import LayerState


@dataclass(frozen=True, order=True)
class LayerKey:
    """Names a layer; ordered by namespace, then by the code points of the name.

    Attributes:
        namespace: Whose.
        name: What it is called there.
        uid: Which of the layers that have had this name, one after the other; "" in a question means whichever
            has it now. Two keys of one name are equal, since never two layers have it.
    """

    namespace: str
    name: str
    uid: str = field(default="", compare=False)

    def __str__(self) -> str:
        """For messages."""
        return f"layer {self.name!r} of namespace {self.namespace!r}"


@dataclass(frozen=True)
class LayerRecord:
    """All that is kept of a layer.

    Attributes:
        key: Its name.
        config: Its configuration.
        state: Parameters, statistics, gradients, version.
        train: The mode of calls that do not choose one.
    """

    key: LayerKey
    config: LayerConfig
    state: LayerState
    train: bool = True


class Store(Protocol):
    """What remembers layers. Every method may be called from many threads at once."""

    @property
    def description(self) -> str:
        """Its URL without secrets, for example "memory:"."""
        ...

    def get(self, key: LayerKey) -> LayerRecord | None:
        """Return a layer's record, or None."""
        ...

    def create(self, record: LayerRecord) -> bool:
        """Keep a new layer's record; return False, and change nothing, if its key exists."""
        ...

    def put(self, record: LayerRecord) -> bool:
        """Replace an existing layer's record; return False, and change nothing, if its key does not exist."""
        ...

    def delete(self, key: LayerKey) -> bool:
        """Forget a layer; return False if its key does not exist."""
        ...

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
