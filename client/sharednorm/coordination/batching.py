"""Many small requests in one call: reads of many layers, and the bounds of such a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from sharednorm.codec import convert, frames
from sharednorm.coordination.state_cache import StateCache
from sharednorm.core.limits import MAX_BATCH_ENTRIES, MAX_BATCH_MAPS
from sharednorm.errors import InternalError, MalformedMessage, SharedNormError
from sharednorm.transport.base import Transport
from sharednorm.v1 import service_pb2

T = TypeVar("T")


def read_many(
    exchange: Transport, copies: Sequence[tuple[StateCache, int]]
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
    parts = exchange.partition(copies, lambda each: each[0].name)
    for part, places in parts:
        yield from _read_from(part, copies, places)


def _read_from(
    exchange: Transport, copies: Sequence[tuple[StateCache, int]], places: Sequence[int]
) -> Iterator[tuple[int, SharedNormError | None]]:
    for indices in grouped(places, lambda index: copies[index][1]):
        readings = [copies[index][0].ask() for index in indices]
        answer = exchange.plain(
            "BatchGetStats",
            frames.BATCH_GET_STATS,
            service_pb2.BatchGetStatsRequest(reads=[reading.request for reading in readings]),
            service_pb2.BatchGetStatsResponse,
            exchange.connection.retrying(),
        )
        require_results("BatchGetStats", len(answer.results), len(indices))
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
