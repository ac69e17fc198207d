"""How every call is run: on which threads, how it fails, and how one knows that it has ended."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, ParamSpec, TypeVar

import grpc

from sharednorm.codec.convert import error_to_status
from sharednorm.errors import (
    CallCancelled,
    InternalError,
    LimitExceeded,
    ServerBusy,
    ServerUnavailable,
    SharedNormError,
)
from sharednorm_server.access import TokenFile
from sharednorm_server.logs import in_call, new_call
from sharednorm_server.requests import Wanted
from sharednorm_server.watching import NOBODY, Origin, Seen, Watcher, working_on

P = ParamSpec("P")
T = TypeVar("T")

Unary = Callable[[bytes, Wanted], bytes]
"""Makes an answer of a request; may ask whether somebody still waits for it."""

Stream = Callable[[Iterator[bytes], Wanted, Callable[[], None]], Iterator[bytes]]
"""Makes answers of requests; may ask whether somebody still waits for them, and say that the requests may come."""

WAY = "grpc"
"""What calls by gRPC are called, among the ways that calls come."""

_GIVEN_UP = grpc.StatusCode.CANCELLED.name

_STOPPING = "the server is stopping: try again when it, or another one, has been started"

_log = logging.getLogger(__name__)


class CallPool(ThreadPoolExecutor):
    """The threads that run calls. Knows how many calls, waiting ones included, have not ended.

    Args:
        workers: Most calls that run at a time; others wait.
    """

    def __init__(self, workers: int) -> None:
        super().__init__(workers, thread_name_prefix="call")
        self._changed = threading.Condition()
        self._unfinished = 0  # a call that runs is counted twice: its answer may leave later
        self._calls = 0
        self._closed = False
        self._late = threading.local()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function on one of the threads, and count it until it has returned."""
        late, arrived = self._closed, time.perf_counter()

        def run() -> T:
            self._late.value, self._late.arrived = late, arrived
            return fn(*args, **kwargs)

        self._count(1, calls=1)
        try:
            future = super().submit(run)
        except BaseException:
            self._count(-1, calls=-1)
            raise
        future.add_done_callback(lambda _: self._count(-1, calls=-1))
        return future

    def close(self) -> None:
        """Refuse the calls that arrive from now on; those that have arrived are run."""
        self._closed = True

    def begin_elsewhere(self) -> None:
        """Count a call that runs on another thread, until `end_elsewhere`.

        Raises:
            ServerUnavailable: It arrived after `close`.
        """
        self._count(1)
        if self._closed:
            self._count(-1)
            raise ServerUnavailable(_STOPPING)

    def end_elsewhere(self) -> None:
        """Say that such a call is over."""
        self._count(-1)

    def begin(self, context: grpc.ServicerContext) -> None:
        """Count a call until its answer has left: longer than the function that makes the answer runs.

        Raises:
            ServerUnavailable: It arrived after `close`.
            CallCancelled: It waited for a thread longer than its client did for the call.
        """
        self._count(1)
        if not context.add_callback(lambda: self._count(-1)):
            self._count(-1)
        if self._late.value:
            raise ServerUnavailable(_STOPPING)
        if not context.is_active():
            raise CallCancelled("the call was given up before it began")

    @property
    def closed(self) -> bool:
        """Whether calls are refused."""
        return self._closed

    @property
    def arrived(self) -> float:
        """When the call that runs on this thread came, by `time.perf_counter`."""
        arrived: float = self._late.arrived
        return arrived

    @property
    def calls(self) -> int:
        """How many calls run on these threads or wait for one."""
        return self._calls

    def wait_idle(self, timeout: float) -> bool:
        """Wait until every call has ended; return False if that took longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._unfinished == 0, timeout)

    def _count(self, difference: int, calls: int = 0) -> None:
        with self._changed:
            self._unfinished += difference
            self._calls += calls
            self._changed.notify_all()


class UnaryCall:
    """A method with one request and one answer, as gRPC calls it."""

    def __init__(
        self, name: str, behaviour: Unary, pool: CallPool, watcher: Watcher = NOBODY, tokens: TokenFile | None = None
    ) -> None:
        self.name = name
        self._watcher = watcher
        self._tokens = tokens
        self._behaviour = behaviour
        self.experimental_thread_pool = pool  # where gRPC runs this, instead of the server's own pool

    def __call__(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer a request, or end the call with a typed error."""
        call, pool = new_call(self.name), self.experimental_thread_pool
        seen = self._watcher.begin(self.name, WAY, call.id, lambda: _origin(context), pool.arrived)
        with in_call(call), working_on(seen):
            return self._answer(request, context, seen)

    def _answer(self, request: bytes, context: grpc.ServicerContext, seen: Seen) -> bytes:
        pool = self.experimental_thread_pool
        seen.started()
        seen.moved(len(request), 0)
        try:
            pool.begin(context)
            with _caller(self._tokens, self.name, context):
                answer = self._behaviour(request, context.is_active)
            seen.moved(0, len(answer))
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
            _refuse(self.name, error, context, seen)
        else:
            return answer
        finally:
            seen.ended()


class StreamCall:
    """A method with any number of requests and answers, as gRPC calls it."""

    def __init__(
        self, name: str, behaviour: Stream, pool: CallPool, watcher: Watcher = NOBODY, tokens: TokenFile | None = None
    ) -> None:
        self.name = name
        self._watcher = watcher
        self._tokens = tokens
        self._behaviour = behaviour
        self.experimental_thread_pool = pool  # where gRPC runs this, instead of the server's own pool

    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Answer requests, or end the call with a typed error."""
        call = new_call(self.name)  # this may end in another thread, so that it is never held over an answer
        pool = self.experimental_thread_pool
        seen = self._watcher.begin(self.name, WAY, call.id, lambda: _origin(context), pool.arrived)
        seen.started()
        try:
            pool.begin(context)
            with in_call(call), working_on(seen), _caller(self._tokens, self.name, context):
                answers = self._behaviour(
                    _counted(requests, seen), context.is_active, lambda: context.send_initial_metadata(())
                )
                first = next(answers, None)  # all that asks who calls comes before it
            if first is None:
                return
            for answer in itertools.chain((first,), answers):
                if not context.is_active():
                    seen.failed(_GIVEN_UP)
                    return
                seen.moved(0, len(answer))
                yield answer
        except grpc.RpcError:
            seen.failed(_GIVEN_UP)
            raise  # the client has gone while it was being listened to; gRPC raised this and knows it
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
            with in_call(call):
                _refuse(self.name, error, context, seen)
        finally:
            seen.ended()


class Doorkeeper(grpc.ServerInterceptor):
    """Refuses calls before anything of their bodies is read: of those who may not, and when there are too many.

    Args:
        service: The full name of the service that is guarded; others are open.
        tokens: Who may call; None: everybody.
        pool: Knows how many calls there are.
        most: Most at a time, those that wait included; but a group's members wait for each other, and are not counted.
        watcher: Is told of those that are refused.
    """

    def __init__(self, service: str, tokens: TokenFile | None, pool: CallPool, most: int, watcher: Watcher) -> None:
        self._watcher = watcher
        self._tokens = tokens
        self._prefix = f"/{service}/"
        self._pool = pool
        self._most = most

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Return what handles a call."""
        handler = continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        name = details.method[len(self._prefix) :]
        try:
            if self._tokens is not None:
                self._tokens.admit(name, dict(details.invocation_metadata))
            self._require_room()
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
            refused = error

            def refuse(_: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
                call = new_call(name)
                seen = self._watcher.begin(name, WAY, call.id, lambda: _origin(context), time.perf_counter())
                try:
                    with in_call(call):
                        _refuse(name, refused, context, seen)
                finally:
                    seen.ended()

            return grpc.stream_stream_rpc_method_handler(refuse)
        return handler

    def _require_room(self) -> None:
        if self._pool.calls >= self._most:
            raise ServerBusy(
                f"{self._most} calls run or wait already (max_calls = {self._most}): try again in a moment",
                {"limit": "max_calls", "value": str(self._most), "retry_seconds": "0.1"},
            )


def _caller(tokens: TokenFile | None, name: str, context: grpc.ServicerContext) -> AbstractContextManager[None]:
    if tokens is None:
        return nullcontext()
    return tokens.as_caller(name, dict(context.invocation_metadata()))


def _origin(context: grpc.ServicerContext) -> Origin:
    told = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
    return Origin(context.peer(), told.get("traceparent", ""), told.get("tracestate", ""))


def _counted(requests: Iterator[bytes], seen: Seen) -> Iterator[bytes]:
    for request in requests:
        seen.moved(len(request), 0)
        yield request


def _refuse(name: str, error: Exception, context: grpc.ServicerContext, seen: Seen) -> NoReturn:
    known = known_error(name, error)
    _log.debug("%s refused: %s: %s", name, known.reason, known.message)
    code, text, metadata = error_to_status(known)
    seen.failed(code.name)
    context.set_trailing_metadata(metadata)
    context.abort(code, text)


def known_error(name: str, error: Exception) -> SharedNormError:
    """Return the error that a call ends with; one that nobody meant to raise goes to the log."""
    if isinstance(error, SharedNormError):
        return error
    identity = secrets.token_hex(4)
    _log.error("defect %s in %s", identity, name, exc_info=error)
    if isinstance(error, MemoryError):
        return LimitExceeded("the server has not enough memory for this call", {"limit": "memory"})
    return InternalError(f"the server failed; its log has the details under defect {identity}", {"id": identity})


def method_handler(call: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return what gRPC registers. Requests and answers are bytes; parsing them is part of the call."""
    if isinstance(call, StreamCall):
        return grpc.stream_stream_rpc_method_handler(call)
    return grpc.unary_unary_rpc_method_handler(call)
