"""Handlers of calls by gRPC: how a method's behaviour is run, watched, and answered."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import grpc

from sharednorm.errors import SharedNormError
from sharednorm_server.auth.tokens import RIGHTS, TokenFile
from sharednorm_server.layers.requests import Wanted
from sharednorm_server.observability.instrumentation import NOBODY, Origin, Seen, Watcher, working_on
from sharednorm_server.observability.logs import in_call, new_call
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.errors import refuse

Unary = Callable[[bytes, Wanted], bytes]
"""Makes an answer of a request; may ask whether the client still waits for it."""

Stream = Callable[[Iterator[bytes], Wanted, Callable[[], None]], Iterator[bytes]]
"""Makes answers of requests; may ask whether the client still waits for them, and say that the requests may come."""

NO_METHOD = "unknown"
"""What a method is called that the contract has not."""

WAY = "grpc"
"""What calls by gRPC are called, among the ways that calls come."""

_GIVEN_UP = grpc.StatusCode.CANCELLED.name


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
        seen = self._watcher.begin(self.name, WAY, call.id, lambda: origin_of(context), pool.arrived)
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
            refuse(self.name, error, context, seen)
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
        seen = self._watcher.begin(self.name, WAY, call.id, lambda: origin_of(context), pool.arrived)
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
                refuse(self.name, error, context, seen)
        finally:
            seen.ended()


class MethodTable(grpc.GenericRpcHandler):
    """The methods of one service, as gRPC finds them. For a name that is none of them there is a typed error, too.

    Args:
        service: The service's full name.
        calls: What is served.
        refuse: Makes the error of another name.
        pool: Runs the calls that end with it.
        watcher: Is told of them.
        tokens: Who may call.
    """

    def __init__(
        self,
        service: str,
        calls: Iterable[UnaryCall | StreamCall],
        refuse: Callable[[str], SharedNormError],
        pool: CallPool,
        watcher: Watcher,
        tokens: TokenFile | None,
    ) -> None:
        self._prefix = f"/{service}/"
        self._handlers = {call.name: method_handler(call) for call in calls}
        self._refuse = refuse
        self._pool, self._watcher, self._tokens = pool, watcher, tokens

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what handles a call; None: it is of another service."""
        if not handler_call_details.method.startswith(self._prefix):
            return None
        name = handler_call_details.method[len(self._prefix) :]
        return self._handlers.get(name) or self._refusing(name)

    def _refusing(self, name: str) -> grpc.RpcMethodHandler[Any, Any]:
        def behaviour(_: Iterator[bytes], __: Wanted, ___: Callable[[], None]) -> Iterator[bytes]:
            raise self._refuse(name)

        return method_handler(StreamCall(known_method(name), behaviour, self._pool, self._watcher, self._tokens))


def _caller(tokens: TokenFile | None, name: str, context: grpc.ServicerContext) -> AbstractContextManager[None]:
    if tokens is None:
        return nullcontext()
    return tokens.as_caller(name, dict(context.invocation_metadata()))


def origin_of(context: grpc.ServicerContext) -> Origin:
    """Return who makes a call by gRPC, and in which trace."""
    told = {name: value for name, value in context.invocation_metadata() if isinstance(value, str)}
    return Origin(context.peer(), told.get("traceparent", ""), told.get("tracestate", ""))


def _counted(requests: Iterator[bytes], seen: Seen) -> Iterator[bytes]:
    for request in requests:
        seen.moved(len(request), 0)
        yield request


def known_method(name: str) -> str:
    """Return a method's name, as logs and metrics have it: those that a stranger makes up are all one."""
    return name if name in RIGHTS else NO_METHOD


def method_handler(call: Any) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return what gRPC registers. Requests and answers are bytes; parsing them is part of the call."""
    if isinstance(call, StreamCall):
        return grpc.stream_stream_rpc_method_handler(call)
    return grpc.unary_unary_rpc_method_handler(call)
