"""Earlier states of layers, to go back to: what is known of one, and when one is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class SnapshotInfo:
    """A state that a layer had.

    Attributes:
        version: The layer's version then.
        taken: When, in seconds since the epoch.
        num_of_props: Steps that the layer's own statistics had taken in.
    """

    version: int
    taken: float
    num_of_props: int


@dataclass(frozen=True)
class SnapshotPolicy:
    """When snapshots are taken, and how long they are kept.

    Attributes:
        every: Seconds between two of a layer that changes; 0: none are taken.
        most: How many of a layer are kept, the newest.
        age: Seconds for which one is kept at the longest; but the newest one always is.
        clock: Seconds since the epoch.
    """

    every: float = 600.0
    most: int = 48
    age: float = 30 * 86400.0
    clock: Callable[[], float] = time.time

    def expired(self, taken: list[SnapshotInfo]) -> list[SnapshotInfo]:
        """Return those of a layer's snapshots, the oldest first, that are not kept any more."""
        oldest = self.clock() - self.age
        return [info for at, info in enumerate(taken[:-1]) if at < len(taken) - self.most or info.taken < oldest]
