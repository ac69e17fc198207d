"""How a call is run, as far as a real server does not show it at will."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
import pytest

from sharednorm.v1 import service_pb2
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.handlers import StreamCall, UnaryCall


class Aborted(Exception):
    """What a context raises to end a call."""


class Context:
    """A call as gRPC shows it to a handler, in the state that a test wants: gone, or ended behind its back."""

    def __init__(self, *, active: bool = True) -> None:
        self.active = active
        self.code: grpc.StatusCode | None = None
        self.trailing: tuple[tuple[str, bytes], ...] = ()
        self.callbacks: list[Callable[[], None]] = []

    def is_active(self) -> bool:
        """Say whether the client is there."""
        return self.active

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Remember what to do at the end."""
        self.callbacks.append(callback)
        return self.active

    def set_trailing_metadata(self, metadata: tuple[tuple[str, bytes], ...]) -> None:
        """Remember metadata."""
        self.trailing = metadata

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call."""
        self.code = code
        raise Aborted(details)

    @property
    def reason(self) -> str:
        """The reason in the trailing metadata."""
        return service_pb2.ErrorDetail.FromString(dict(self.trailing)["sharednorm-error-bin"]).reason


@pytest.fixture
def pool() -> Iterator[CallPool]:
    made = CallPool(2)
    yield made
    made.shutdown()


def on(pool: CallPool, function: Callable[..., Any], *arguments: object) -> Any:
    return pool.submit(function, *arguments).result(10)


def test_gRPC_finds_the_pool_where_it_looks_for_it(pool: CallPool) -> None:  # noqa: N802
    for call in (UnaryCall("A", lambda request, _: request, pool), StreamCall("B", lambda each, *_: each, pool)):
        assert isinstance(call.experimental_thread_pool, ThreadPoolExecutor)
        assert call.experimental_thread_pool is pool


def test_a_call_whose_client_has_gone_is_not_begun(pool: CallPool) -> None:
    ran: list[bytes] = []

    def behaviour(request: bytes, _: Callable[[], bool]) -> bytes:
        ran.append(request)
        return b""

    context = Context(active=False)
    with pytest.raises(Aborted):
        on(pool, UnaryCall("A", behaviour, pool), b"", context)
    assert (context.code, context.reason, ran) == (grpc.StatusCode.CANCELLED, "CANCELLED", [])


def test_a_call_that_arrives_after_the_end_is_refused_and_one_from_before_is_run(pool: CallPool) -> None:
    call = UnaryCall("A", lambda request, _: request, pool)
    assert on(pool, call, b"early", Context()) == b"early"
    pool.close()
    context = Context()
    with pytest.raises(Aborted):
        on(pool, call, b"late", context)
    assert (context.code, context.reason) == (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE")


def test_a_call_has_ended_when_its_answer_has_left(pool: CallPool) -> None:
    context = Context()
    on(pool, UnaryCall("A", lambda request, _: request, pool), b"", context)
    assert not pool.wait_idle(0.05)
    for callback in context.callbacks:
        callback()
    assert pool.wait_idle(5)


def test_a_call_that_gRPC_has_ended_already_does_not_hold_the_pool(pool: CallPool) -> None:  # noqa: N802
    with pytest.raises(Aborted):
        on(pool, UnaryCall("A", lambda request, _: request, pool), b"", Context(active=False))
    assert pool.wait_idle(5)


def test_no_answer_is_given_to_a_client_that_has_gone(pool: CallPool) -> None:
    context = Context()

    def behaviour(_: Iterator[bytes], __: Callable[[], bool], ___: Callable[[], None]) -> Iterator[bytes]:
        yield b"one"
        context.active = False
        yield b"two"
        raise AssertionError("nobody reads this")

    assert on(pool, lambda: list(StreamCall("B", behaviour, pool)(iter([]), context))) == [b"one"]  # type: ignore[arg-type]


def test_a_pool_that_is_shut_down_counts_nothing(pool: CallPool) -> None:
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(int)
    assert pool.wait_idle(0)
