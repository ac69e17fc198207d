"""What is kept of a layer's changes beside the layer: under which key the last one of each session was made."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sharednorm.core.state import Moments
from sharednorm.core.types import Vector

NUMBER_BYTES = 8
"""So many of a session's bytes are its number, big-endian: sessions that were opened later have higher ones."""


@dataclass(frozen=True)
class CallKey:
    """Which change of a layer a call is: the one of that number of that session."""

    session: bytes
    seq: int


@dataclass(frozen=True, eq=False)
class TakenStep:
    """What makes the output of a step again: the moments of its batch, and the scale and bias that it used."""

    moments: Moments
    scale: Vector
    bias: Vector


@dataclass(frozen=True, eq=False)
class LastChange:
    """The last change that a session has made to a layer, and what it takes to answer it again.

    Attributes:
        seq: Its number in the session.
        content: Stands for what was asked for, without moments.
        version: Of the layer after it.
        num_of_props: Of the statistics after it.
        step: If it was a step: what makes its output again.
        sums: If it was the backward of a group: the sums over all members, float64 (2, C).
    """

    seq: int
    content: bytes
    version: int
    num_of_props: int
    step: TakenStep | None = None
    sums: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Note:
    """What is kept together with a layer's new record.

    Attributes:
        session: Who has made the change.
        change: The change.
        forgotten: Sessions that are not remembered any more.
        floor: The highest number of those that ever were forgotten.
    """

    session: bytes
    change: LastChange
    forgotten: tuple[bytes, ...] = ()
    floor: int = 0


@dataclass
class Remembered:
    """What is known of the sessions that have changed a layer: their last changes, the least recent first.

    Attributes:
        changes: By session.
        floor: The highest number of those that ever were forgotten.
    """

    changes: dict[bytes, LastChange] = field(default_factory=dict)
    floor: int = 0

    def take(self, note: Note) -> None:
        """Remember a change, and forget what has to be forgotten for it."""
        for session in (note.session, *note.forgotten):
            self.changes.pop(session, None)
        self.changes[note.session] = note.change
        self.floor = note.floor

    def copy(self) -> Remembered:
        """Return the same, which changes by itself."""
        return Remembered(dict(self.changes), self.floor)
