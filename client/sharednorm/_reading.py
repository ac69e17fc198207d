"""What a handle has read of its layer: for how long it may be used, and how it is read again, alone or with others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sharednorm import _frames as frames
from sharednorm import convert
from sharednorm._server import Exchanger
from sharednorm.config import MAX_BATCH_ENTRIES, MAX_BATCH_MAPS
from sharednorm.errors import InternalError, MalformedMessage, SharedNormError
from sharednorm.state import LayerState, require_initialized
from sharednorm.v1 import layer_pb2, service_pb2

T = TypeVar("T")


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


class LayerCopy:
    """Parameters and statistics of a layer, without gradients, as a handle has read them last.

    Args:
        ref: The layer.
        max_age: Seconds for which they may be used.
    """

    def __init__(self, ref: layer_pb2.LayerRef, max_age: float) -> None:
        self.max_age = max_age
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
            if copy is None or not self._fresh or time.monotonic() >= copy.asked + self.max_age:
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


def read_many(
    exchange: Exchanger, copies: Sequence[tuple[LayerCopy, int]]
) -> Iterator[tuple[int, SharedNormError | None]]:
    """Read many layers, in as few calls as there can be.

    Args:
        exchange: With the server.
        copies: What is to be read again, and how many maps it has.

    Yields:
        The index of each, and why it could not be read, or None.

    Raises:
        SharedNormError: What a call as a whole has ended with.
    """
    divided = exchange.divided(copies, lambda each: each[0].name)
    for part, places in divided:
        yield from _read_from(part, copies, places)


def _read_from(
    exchange: Exchanger, copies: Sequence[tuple[LayerCopy, int]], places: Sequence[int]
) -> Iterator[tuple[int, SharedNormError | None]]:
    for indices in grouped(places, lambda index: copies[index][1]):
        readings = [copies[index][0].ask() for index in indices]
        answer = exchange.plain(
            "GetManyStats",
            frames.GET_MANY_STATS,
            service_pb2.GetManyStatsRequest(reads=[reading.request for reading in readings]),
            service_pb2.GetManyStatsResponse,
            exchange.connection.patience(),
        )
        require_results("GetManyStats", len(answer.results), len(indices))
        for index, reading, result in zip(indices, readings, answer.results, strict=True):
            if result.WhichOneof("result") == "stats":
                try:
                    copies[index][0].learn(reading, result.stats)
                except SharedNormError as error:
                    yield index, error
                else:
                    yield index, None
            else:
                yield index, error_of(result.error)


def grouped(items: Iterable[T], maps_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in their order, so many at a time as go into one call of many."""
    group: list[T] = []
    maps = 0
    for item in items:
        more = maps_of(item)
        if group and (len(group) == MAX_BATCH_ENTRIES or maps + more > MAX_BATCH_MAPS):
            yield group
            group, maps = [], 0
        group.append(item)
        maps += more
    if group:
        yield group


def require_results(method: str, results: int, requests: int) -> None:
    """Check that an answer has one result for each request.

    Raises:
        MalformedMessage: It has not.
    """
    if results != requests:
        raise MalformedMessage(f"the answer to {method} has {results} results (expected: {requests})")


def error_of(detail: service_pb2.ErrorDetail) -> SharedNormError:
    """Return the error that a result describes."""
    known = convert.error_from_detail(detail)
    return known or InternalError(detail.message, {**detail.metadata, "reason": detail.reason})
