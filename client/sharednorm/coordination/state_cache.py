"""The parameters and statistics that a handle has read of its layer, and for how long it may use them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from sharednorm.codec import convert
from sharednorm.core.state import LayerState, require_initialized
from sharednorm.errors import MalformedMessage
from sharednorm.v1 import layer_pb2, service_pb2


@dataclass(frozen=True)
class _Copy:
    # What was read, the server's name of it, and when it was asked for.
    state: LayerState
    tag: bytes
    asked: float


@dataclass(frozen=True)
class Reading:
    """A question that has been asked.

    Attributes:
        request: The question.
        copy: What the answer may say is still so.
        changes: Changes that the handle had made before it asked.
        asked: When, by the monotonic clock.
    """

    request: service_pb2.GetStatsRequest
    copy: _Copy | None
    changes: int
    asked: float


class StateCache:
    """Parameters and statistics of a layer, without gradients, as a handle has read them last.

    Args:
        ref: The layer.
        max_staleness: Seconds for which the handle may use them.
    """

    def __init__(self, ref: layer_pb2.LayerRef, max_staleness: float) -> None:
        self.max_staleness = max_staleness
        self._ref = ref
        self._lock = threading.Lock()
        self._copy: _Copy | None = None
        self._fresh = False
        self._changes = 0  # of the handle's own

    @property
    def name(self) -> str:
        """The layer's."""
        return self._ref.name

    def current(self) -> LayerState | None:
        """Return what was read, if it may still be used."""
        with self._lock:
            copy = self._copy
            if copy is None or not self._fresh or time.monotonic() >= copy.asked + self.max_staleness:
                return None
            return copy.state

    def changed(self) -> None:
        """Say that the handle may have changed the layer: what was read before is to be asked for again."""
        with self._lock:
            self._fresh = False
            self._changes += 1

    def ask(self) -> Reading:
        """Return the question for the layer's state; if it is the one that is here, the answer will be without it."""
        with self._lock:
            copy, changes = self._copy, self._changes
        tag = b"" if copy is None else copy.tag
        return Reading(service_pb2.GetStatsRequest(ref=self._ref, unless_tag=tag), copy, changes, time.monotonic())

    def learn(self, reading: Reading, answer: service_pb2.GetStatsResponse) -> LayerState:
        """Return the state that an answer brings or confirms, and keep it.

        Raises:
            LayerEmpty: The layer has none yet.
            MalformedMessage: The answer is not one to the question.
        """
        if not answer.unchanged:
            state = convert.state_from_proto(answer.layer, answer.state)
        elif reading.copy is not None and answer.tag == reading.copy.tag:
            state = reading.copy.state
        else:
            raise MalformedMessage("the answer says that the layer is unchanged, and is of another tag than the call")
        require_initialized(state, self._ref.name)
        with self._lock:
            # Else the answer may be of the state before a change, or older than another one.
            if reading.changes == self._changes and (self._copy is None or reading.asked >= self._copy.asked):
                self._copy, self._fresh = _Copy(state, answer.tag, reading.asked), True
        return state
