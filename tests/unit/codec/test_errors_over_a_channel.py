"""Errors over a real channel: the same class, message and metadata come back; and what gRPC itself says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest

from sharednorm import errors
from sharednorm.codec.convert import ERROR_KEY, error_from_call, error_to_status
from sharednorm.errors import (
    CallCancelled,
    DeadlineExceeded,
    IncompatibleServer,
    InternalError,
    LayerNotFound,
    LimitExceeded,
    ModuleError,
    PermissionDenied,
    ServerUnavailable,
    SharedNormError,
    Unauthenticated,
    error_classes,
)
from sharednorm.v1 import service_pb2

Trailing = tuple[tuple[str, str | bytes], ...]

every_error = pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
both_kinds = pytest.mark.parametrize("kind", ["unary", "stream"])

ANYTHING_IN_TEXT = "Grad hat 3 Maps, erwartet 5 — 層 \U0001f9ca\n\ttab, 100 % and \x00"


# --- Over a real channel ----------------------------------------------------------------------------


Act = Callable[[grpc.ServicerContext], bytes]


def identity(data: bytes) -> bytes:
    return data


class Handler(grpc.GenericRpcHandler):
    """Answers one unary and one stream method by the same function."""

    def __init__(self, act: Act) -> None:
        self._act = act

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        if details.method == "/t/unary":
            return grpc.unary_unary_rpc_method_handler(self._unary)
        if details.method == "/t/stream":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return None

    def _unary(self, _request: bytes, context: grpc.ServicerContext) -> bytes:
        return self._act(context)

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield from requests
        yield self._act(context)


@contextmanager
def serving(act: Act, **options: int) -> Iterator[str]:
    pool = futures.ThreadPoolExecutor(4)
    server = grpc.server(pool, [Handler(act)], options=[(f"grpc.{key}", value) for key, value in options.items()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(10)
        pool.shutdown()


def call(channel: grpc.Channel, kind: str, *, timeout: float = 10.0, method: str | None = None) -> None:
    path = f"/t/{method or kind}"
    if kind == "unary":
        channel.unary_unary(path, identity, identity)(b"request", timeout=timeout)
    else:
        list(channel.stream_stream(path, identity, identity)(iter([b"one", b"two"]), timeout=timeout))


def failure(
    target: str, kind: str, *, timeout: float = 10.0, method: str | None = None, **options: int
) -> SharedNormError:
    """Make a call that fails, and return its typed error."""
    with grpc.insecure_channel(target, [(f"grpc.{key}", value) for key, value in options.items()]) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, kind, timeout=timeout, method=method)
        return error_from_call(caught.value, target, timeout)


def ends_with(error: SharedNormError) -> Act:
    code, text, trailing = error_to_status(error)
    return aborts(code, text, trailing)


def aborts(code: grpc.StatusCode, text: str, trailing: Trailing = ()) -> Act:
    def act(context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata(trailing)
        context.abort(code, text)
        raise AssertionError("abort raises")

    return act


@both_kinds
@every_error
def test_every_error_comes_back_as_its_class(cls: type[SharedNormError], kind: str) -> None:
    sent = cls(ANYTHING_IN_TEXT, {"limit": "max_tensor_bytes", "value": "12"})
    with serving(ends_with(sent)) as target:
        got = failure(target, kind)
    assert (type(got), got.message, got.metadata) == (cls, sent.message, sent.metadata)


@both_kinds
@pytest.mark.parametrize("character", ["m", "é", "層", "\x00"])
def test_the_largest_error_comes_back_every_time(character: str, kind: str) -> None:
    # Between its soft and its hard limit gRPC refuses metadata by chance, so once is not enough.
    sent = InternalError(character * 4096, {"a" * 200: "b" * 800, "more": "c" * 5000})
    with serving(ends_with(sent)) as target, grpc.insecure_channel(target) as channel:
        for _ in range(50):
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, kind)
            got = error_from_call(caught.value, target, 10)
            assert (type(got), got.message) == (InternalError, sent.message)


UNKNOWN_REASON = [
    (grpc.StatusCode.INVALID_ARGUMENT, ModuleError),
    (grpc.StatusCode.OUT_OF_RANGE, ModuleError),
    (grpc.StatusCode.FAILED_PRECONDITION, ModuleError),
    (grpc.StatusCode.NOT_FOUND, LayerNotFound),
    (grpc.StatusCode.ALREADY_EXISTS, errors.ConfigurationMismatch),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitExceeded),
    (grpc.StatusCode.UNAVAILABLE, ServerUnavailable),
    (grpc.StatusCode.UNIMPLEMENTED, IncompatibleServer),
    (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    (grpc.StatusCode.CANCELLED, CallCancelled),
    (grpc.StatusCode.ABORTED, InternalError),
    (grpc.StatusCode.DATA_LOSS, InternalError),
    (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
    (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
    (grpc.StatusCode.UNKNOWN, InternalError),
]


@both_kinds
@pytest.mark.parametrize(("code", "expected"), UNKNOWN_REASON, ids=lambda value: getattr(value, "name", None))
def test_a_reason_of_a_later_release_keeps_its_words(
    code: grpc.StatusCode, expected: type[SharedNormError], kind: str
) -> None:
    detail = service_pb2.ErrorDetail(reason="MOON_TOO_FULL", message="wait for a new moon", metadata={"moon": "full"})
    with serving(aborts(code, "short", ((ERROR_KEY, detail.SerializeToString()),))) as target:
        got = failure(target, kind)
    assert type(got) is expected
    assert got.message == "wait for a new moon"
    assert got.metadata == {"moon": "full", "reason": "MOON_TOO_FULL"}


def test_a_reason_of_a_later_release_without_words_has_those_of_the_status() -> None:
    detail = service_pb2.ErrorDetail(reason="MOON_TOO_FULL").SerializeToString()
    with serving(aborts(grpc.StatusCode.ABORTED, "short", ((ERROR_KEY, detail),))) as target:
        assert failure(target, "unary").message == "short"


@both_kinds
@pytest.mark.parametrize(("code", "expected"), UNKNOWN_REASON, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("value", [None, b"\xff\xff not a detail", b""], ids=["none", "garbage", "empty"])
def test_a_status_without_a_readable_detail_keeps_its_text(
    code: grpc.StatusCode, expected: type[SharedNormError], kind: str, value: bytes | None
) -> None:
    trailing: Trailing = () if value is None else ((ERROR_KEY, value),)
    with serving(aborts(code, "the moon is full", trailing)) as target:
        got = failure(target, kind)
    assert type(got) is expected
    assert target in got.message
    assert "the moon is full" in got.message or code is grpc.StatusCode.DEADLINE_EXCEEDED


@both_kinds
def test_a_handler_that_breaks_is_an_internal_error(kind: str) -> None:
    def act(_context: grpc.ServicerContext) -> bytes:
        raise RuntimeError("boom")

    with serving(act) as target:
        got = failure(target, kind)
    assert type(got) is InternalError
    assert "UNKNOWN" in got.message


# --- What gRPC itself says --------------------------------------------------------------------------


@both_kinds
def test_nobody_listens(kind: str) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can
        target = f"127.0.0.1:{reserved.getsockname()[1]}"
        got = failure(target, kind)
    assert type(got) is ServerUnavailable
    assert f"sharednorm serve --listen {target}" in got.message


@both_kinds
def test_no_answer_in_time(kind: str) -> None:
    over = threading.Event()

    def act(_context: grpc.ServicerContext) -> bytes:
        over.wait(10)
        return b""

    with serving(act) as target:
        got = failure(target, kind, timeout=0.2)
        over.set()
    assert type(got) is DeadlineExceeded
    assert f"{target} did not answer within 0.2 s" in got.message


@both_kinds
def test_a_server_that_does_not_know_the_method(kind: str) -> None:
    with serving(lambda _context: b"") as target:
        got = failure(target, kind, method="Forward")
    assert type(got) is IncompatibleServer
    assert "is it a sharednorm server?" in got.message


@both_kinds
def test_an_answer_that_is_larger_than_this_side_takes(kind: str) -> None:
    with serving(lambda _context: bytes(5 << 20)) as target:
        got = failure(target, kind)
    assert type(got) is LimitExceeded
    assert str(4 << 20) in got.message


@both_kinds
def test_a_request_that_is_larger_than_the_server_takes(kind: str) -> None:
    with serving(lambda _context: b"", max_receive_message_length=2) as target:
        got = failure(target, kind)
    assert type(got) is LimitExceeded
    assert "larger than max" in got.message


@both_kinds
def test_a_request_that_is_larger_than_this_side_sends(kind: str) -> None:
    with serving(lambda _context: b"") as target:
        got = failure(target, kind, max_send_message_length=2)
    assert type(got) is LimitExceeded
    assert "larger than max" in got.message


@both_kinds
def test_a_call_that_was_given_up(kind: str) -> None:
    def act(context: grpc.ServicerContext) -> bytes:
        context.cancel()
        return b""

    with serving(act) as target:
        got = failure(target, kind)
    assert type(got) is CallCancelled


def test_a_stream_that_its_own_side_cancelled() -> None:
    with serving(lambda _context: b"") as target, grpc.insecure_channel(target) as channel:
        stream = channel.stream_stream("/t/stream", identity, identity)(iter([b"one"]), timeout=10)
        stream.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert type(error_from_call(caught.value, target, 10)) is CallCancelled


def test_an_error_without_a_status() -> None:
    got = error_from_call(grpc.RpcError("odd"), "host:1", 1.0)
    assert type(got) is InternalError
    assert "odd" in got.message
