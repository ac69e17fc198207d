"""Calls with tensors: by which way they go, and what happens when a way is closed or the server is busy.

There are three ways: memory that the server shares with this process, a direct connection, and gRPC. All carry the same
messages, and give the same answers and errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
from google.protobuf.message import Message

from sharednorm.codec import frames, wire
from sharednorm.core.arrays import contiguous, results
from sharednorm.core.types import Array
from sharednorm.errors import (
    LimitExceeded,
    SharedNormError,
)
from sharednorm.transport import tracing
from sharednorm.transport.base import A, Answer, I
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.direct import DirectLink, Unreachable
from sharednorm.transport.grpc import Connection
from sharednorm.transport.methods import R, T, TensorMethod
from sharednorm.transport.progress import Meter, ProgressCallback
from sharednorm.transport.retry import RetryPolicy
from sharednorm.transport.selector import TransportSelector, Way
from sharednorm.transport.shared_memory import SharedRegions

# Smaller tensors are sent: that is one copy, too.
_SHARE_BYTES = 1 << 16

_NOTHING = memoryview(b"")
_NOBODY = Meter(None, "", 0, 0)


@dataclass
class _Call(Generic[R, T]):
    # One call, by whichever way.
    method: TensorMethod[R, T]
    request: R
    sources: list[Array]
    like: Array | None
    out: Array | None
    left: Deadline
    meter: Meter


class ServerClient:
    """Makes calls with tensors to one server, for any number of threads.

    Args:
        connection: To the server, which has been greeted.
        transport: "auto", or the one way to go.
        progress: Told how far calls have come; None: nobody.

    Raises:
        ServerUnavailable: The one way to go is not there.
    """

    def __init__(self, connection: Connection, transport: str, progress: ProgressCallback | None) -> None:
        self._connection = connection
        self._ways = TransportSelector(connection, transport)
        self._progress = progress
        self._share_bytes = _SHARE_BYTES

    @property
    def connection(self) -> Connection:
        """To the server."""
        return self._connection

    def of(self, kind: str, name: str) -> ServerClient:
        """Return itself."""
        del kind, name
        return self

    def partition(self, items: Sequence[I], layer_of: Callable[[I], str]) -> list[tuple[ServerClient, list[int]]]:
        """Return itself, and the places of all items."""
        del layer_of
        return [(self, list(range(len(items))))]

    def rebalance(self) -> bool:
        """Return False: there is no other server."""
        return False

    @property
    def requested_transport(self) -> str:
        """The way that was asked for: one of them, or "auto"."""
        return self._ways.requested_transport

    @property
    def transport(self) -> str:
        """The way that calls go now: "shm", "direct" or "grpc"."""
        return self._ways.transport

    def close(self) -> None:
        """End what runs."""
        self._ways.close()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array for a tensor that will be sent, in shared memory if there is some.

        Raises:
            LimitExceeded: The server shares no more, and `transport` is "shm".
        """
        self._connection.require_open()
        left = self._connection.deadline()
        way = self._ways.current(left) if math.prod(shape) * dtype.itemsize >= self._share_bytes else None
        while way is not None and way.regions is not None:
            try:
                return way.regions.empty(shape, dtype, left)
            except Unreachable as error:  # noqa: PERF203 - the loop is one try, and seldom a second
                way = self._ways.look_again(way, left, error)
            except (OSError, EOFError) as error:
                raise self._ways.typed(error, left) from None
            except LimitExceeded:
                if self._ways.requested_transport == "shm":
                    raise
                break
        return results.empty(shape, dtype)

    def call(
        self,
        method: TensorMethod[R, T],
        request: R,
        tensors: Sequence[Array],
        like: Array | None,
        out: Array | None,
        attempts: RetryPolicy,
    ) -> Answer[T]:
        """Make a call with tensors.

        Args:
            method: Which.
            request: The call, without data.
            tensors: Its data: the gradient, and the input that is sent again behind it; or the input.
            like: A tensor of the shape and type of the answer's; None: it brings none.
            out: Where the answer's tensor has to be, of that shape and type; None: anywhere.
            attempts: Makes it again while the server is away, and has the deadline.

        Raises:
            SharedNormError: What the connection raises, or the server has answered.
        """
        sources = [contiguous(tensor) for tensor in tensors]
        nbytes = sum(source.nbytes for source in sources)
        meter = Meter(self._progress, method.name, nbytes, 0 if like is None else like.nbytes)
        call = _Call(method, request, sources, like, out, attempts.left, meter)
        with tracing.span(method.name, request, self._connection.address.text):
            return attempts.run(lambda: self._once(call), meter.restart)

    def plain(self, method: str, number: int, request: Message, answer: type[A], attempts: RetryPolicy) -> A:
        """Make a call without a tensor that a direct connection takes, too; see `call` for the arguments."""
        with tracing.span(method, request, self._connection.address.text):
            return attempts.run(lambda: self._plainly(method, number, request, answer, attempts.left))

    def _plainly(self, method: str, number: int, request: Message, answer: type[A], left: Deadline) -> A:
        self._connection.require_open()
        way = self._ways.current(left)
        while way is not None:
            try:
                return wire.parse(
                    answer, way.link.call(number, request.SerializeToString(), [], _NOTHING, left, _NOBODY)
                )
            except Unreachable as error:  # noqa: PERF203 - the loop is one try, and seldom a second
                way = self._ways.look_again(way, left, error)
            except (OSError, EOFError, SharedNormError) as error:
                raise self._ways.typed(error, left) from None
        return self._connection.call_within(method, request, answer, RetryPolicy(left, away=False))

    def _once(self, call: _Call[R, T]) -> Answer[T]:
        self._connection.require_open()
        way = self._ways.current(call.left)
        while way is not None:
            try:
                return self._directly(way, call)
            except Unreachable as error:  # noqa: PERF203 - the loop is one try, and seldom a second
                way = self._ways.look_again(way, call.left, error)
            except (OSError, EOFError, SharedNormError) as error:
                if error is call.meter.error:
                    raise
                raise self._ways.typed(error, call.left) from None
        target, room = _room(call)
        data = [wire.payload(source) for source in call.sources]
        message = self._connection.call_tensor(call.method, call.request, data, room, call.left, call.meter)
        return _placed(call, message, target)

    def _directly(self, way: Way, call: _Call[R, T]) -> Answer[T]:
        if way.regions is not None and max(source.nbytes for source in call.sources) >= self._share_bytes:
            try:
                return self._shared(way.link, way.regions, call)
            except _NoRoom as error:
                if self._ways.requested_transport == "shm":
                    raise error.reason from None
        target, room = _room(call)
        data = [wire.payload(source) for source in call.sources]
        encoded = call.request.SerializeToString()
        message = way.link.call(call.method.number, encoded, data, room, call.left, call.meter)
        return _placed(call, wire.parse(call.method.answer, message), target)

    def _shared(self, link: DirectLink, regions: SharedRegions, call: _Call[R, T]) -> Answer[T]:
        inputs: list[Array] = [_lent(regions, source, call.left) for source in call.sources]
        target: Array | None = _shared_room(regions, call)
        places = [*(regions.find(tensor) for tensor in inputs), *[(0, 0)] * (2 - len(inputs))]
        places.append((0, 0) if target is None else regions.find(target))
        if None in places:
            raise Unreachable("the session has ended")  # by another thread, meanwhile
        packed = frames.PLACES.pack(*(number for place in places if place is not None for number in place))
        call.meter.sent(sum(source.nbytes for source in inputs))
        encoded = call.request.SerializeToString()
        try:
            message = link.call(call.method.number, encoded, [], _NOTHING, call.left, call.meter, packed)
        except (SharedNormError, Unreachable):
            raise  # answered, or not sent
        except BaseException:
            for tensor in (*inputs, *([] if target is None else [target])):
                regions.abandon(tensor)
            raise
        answer = _placed(call, wire.parse(call.method.answer, message), target)
        if target is not None:
            call.meter.received(target.nbytes)
        return Answer(answer.message, answer.tensor, tuple(inputs))


class _NoRoom(Exception):
    # There is no shared memory for a call, which has not been made.
    def __init__(self, reason: LimitExceeded) -> None:
        self.reason = reason
        super().__init__(reason)


def _room(call: _Call[R, T]) -> tuple[Array | None, memoryview]:
    # Where the answer is received: in `out` itself, unless its strides forbid that, or a call that fails in the middle
    # would leave a tensor half overwritten that it was to read.
    like, out = call.like, call.out
    if like is None:
        return None, memoryview(b"")
    if out is not None and out.flags.c_contiguous and out.dtype.isnative and not _overlaps(out, call):
        target = out
    else:
        target = results.empty(like.shape, like.dtype.newbyteorder("="))
    return target, target.reshape(-1).view(np.uint8).data


def _shared_room(regions: SharedRegions, call: _Call[R, T]) -> Array | None:
    like, out = call.like, call.out
    if like is None:
        return None
    if out is not None and not _overlaps(out, call) and regions.find(out) is not None:
        return out
    return _empty(regions, like, call.left)


def _lent(regions: SharedRegions, source: Array, left: Deadline) -> Array:
    # A tensor in shared memory: itself if it is there, else a copy.
    if regions.find(source) is not None:
        return source
    copy = _empty(regions, source, left)
    np.copyto(copy, source)
    return copy


def _empty(regions: SharedRegions, like: Array, left: Deadline) -> Array:
    try:
        return regions.empty(like.shape, like.dtype.newbyteorder("="), left)
    except LimitExceeded as error:
        raise _NoRoom(error) from None


def _overlaps(out: Array, call: _Call[R, T]) -> bool:
    return any(np.may_share_memory(out, source) for source in call.sources)


def _placed(call: _Call[R, T], message: T, target: Array | None) -> Answer[T]:
    if target is None:
        return Answer(message, None)
    wire.to_native(target)
    if call.out is not None and target is not call.out:
        np.copyto(call.out, target)
        target = call.out
    return Answer(message, target)
