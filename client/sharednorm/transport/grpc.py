"""Calls by gRPC: deadlines, typed errors, and tensors in one message or in a stream of chunks."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import grpc
from google.protobuf.message import DecodeError, Message

from sharednorm._version import __version__
from sharednorm.codec import convert, wire
from sharednorm.core.address import Address
from sharednorm.errors import (
    CallCancelled,
    HubClosed,
    IncompatibleServer,
    MalformedMessage,
    ServerUnavailable,
    SharedNormError,
)
from sharednorm.transport import tracing
from sharednorm.transport.base import A, ServerInfo
from sharednorm.transport.channel import SERVICE, open_channel, proxy_hint
from sharednorm.transport.credentials import Credentials
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.methods import R, T, TensorMethod
from sharednorm.transport.progress import Meter
from sharednorm.transport.retry import RetryPolicy
from sharednorm.v1 import service_pb2

_MAX_CHUNK_BYTES = 16 << 20
_CLOSE_SECONDS = 1.0
# https://github.com/grpc/grpc/blob/master/doc/health-checking.md: of the whole server; the answer has status 1.
_HEALTH, _SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"
_LEAST_SECONDS = 1e-3  # less would be no call at all
# From here on a stream's chunks wait until the server lets them come, which takes less than a hundredth of their time.
_WAIT_BYTES = 8 << 20


class Connection:
    """One channel to one server, for any number of threads of the process that opened it.

    Args:
        address: Where the server listens.
        timeout: Seconds that a call may take.
        credentials: What it is made with.

    Every call raises HubClosed after `close` and in a forked child, ServerUnavailable,
    DeadlineExceeded or IncompatibleServer as the case may be, and what the server answered.
    """

    def __init__(self, address: Address, timeout: float, credentials: Credentials | None = None) -> None:
        credentials = credentials or Credentials()
        self.address = address
        self.timeout = timeout
        self.info: ServerInfo | None = None
        self.direct: service_pb2.DirectEndpoint | None = None
        self.state = ""  # which one the server's layers are in; servers that share them have the same
        self._process = os.getpid()
        self._closed = False
        self._metadata = credentials.metadata
        self._channel = open_channel(address, credentials.tls)

    def __reduce__(self) -> tuple[object, ...]:
        """Refuse to travel to another process, saying what to do instead."""
        raise TypeError(
            f"a connection to {self.address.text} cannot be pickled: pass the address and the layer's name, "
            "and connect in the other process"
        )

    @property
    def text(self) -> str:
        """Where the server listens, as `connect` was told."""
        return self.address.text

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Cut off running calls, which raise HubClosed, and let go of the socket. Again: nothing."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._process:
            _close_bounded(self._channel)

    def handshake(self, left: Deadline | None = None) -> ServerInfo:
        """Ask the server what it is, and remember the answer in `info`; None: within the usual timeout.

        Raises:
            IncompatibleServer: It speaks another protocol, or is not a sharednorm server.
        """
        attempts = RetryPolicy(self.deadline() if left is None else left, away=False)
        request = service_pb2.GetServerInfoRequest(protocol=wire.PROTOCOL)
        answer = self.call("GetServerInfo", request, service_pb2.GetServerInfoResponse, attempts)
        if answer.protocol != wire.PROTOCOL:
            raise IncompatibleServer(
                f"the server at {self.address.text} (release {answer.version or 'unknown'}) speaks protocol "
                f"{answer.protocol}, and this library (release {__version__}) speaks protocol {wire.PROTOCOL}: "
                "install the same release on both sides"
            )
        self.state = answer.state_id
        self.direct = answer.direct if answer.HasField("direct") else None
        self.info = ServerInfo(
            answer.version,
            answer.protocol,
            answer.device,
            answer.store,
            answer.max_unary_bytes,
            answer.max_tensor_bytes,
            answer.chunk_bytes,
            answer.signals_chunks,
        )
        return self.info

    def health(self, left: Deadline) -> str:
        """Return what the server says of itself, where it answers: "" if it is well, else why it takes no calls."""
        self.require_open()
        call = self._channel.unary_unary(_HEALTH, _identity, _identity)
        try:
            answer = call(b"", timeout=max(left.left(), _LEAST_SECONDS))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return ""  # something in between that lets nothing else pass; it answers
            raise self._typed(error) from _bare(error)
        except ValueError as error:
            raise self._typed(error) from error
        return "" if answer == _SERVING else "takes no calls now"

    def deadline(self) -> Deadline:
        """Return a deadline that begins now."""
        return Deadline(self.timeout)

    def retrying(self) -> RetryPolicy:
        """Return what makes a call again while the server is away, as long as a call may take from now on."""
        return RetryPolicy(self.deadline())

    def call(self, method: str, request: Message, answer: type[A], attempts: RetryPolicy | None = None) -> A:
        """Make a call without a tensor and return its answer.

        Args:
            method: Which.
            request: What it asks.
            answer: Class of the answer.
            attempts: How it is made again, and until when; None: only if the server is busy, within the usual timeout.
        """
        attempts = attempts or RetryPolicy(self.deadline(), away=False)
        with tracing.span(method, request, self.address.text):
            return self.call_within(method, request, answer, attempts)

    def call_within(self, method: str, request: Message, answer: type[A], attempts: RetryPolicy) -> A:
        """Make such a call within the span that runs."""
        encoded, left = request.SerializeToString(), attempts.left
        data = attempts.run(lambda: self._unary(method, encoded, max(left.left(), _LEAST_SECONDS)))
        try:
            return answer.FromString(data)
        except (DecodeError, UnicodeDecodeError) as error:  # the latter by protobuf's pure Python runtime
            raise MalformedMessage(f"the answer of {self.address.text} to {method} cannot be parsed") from error

    def call_tensor(
        self,
        method: TensorMethod[R, T],
        request: R,
        data: Sequence[memoryview],
        answer: memoryview,
        left: Deadline,
        meter: Meter,
    ) -> T:
        """Make a call with a tensor, whole if it is small and in chunks if it is large.

        Args:
            method: Which.
            request: The call, without data.
            data: Its data, one part after the other.
            answer: Filled with the data of the answer.
            left: When the call has to be over.
            meter: Told how far it has come.

        Returns:
            The answer without data.

        Raises:
            MalformedMessage: The answer cannot be parsed, or brings another number of bytes.
        """
        nbytes = sum(part.nbytes for part in data)
        if max(nbytes, answer.nbytes) > self._unary_bytes():
            return self._stream(method, request, data, answer, left, meter)
        encoded = wire.encode(request, *data)
        found, got = wire.decode(method.answer, self._unary(method.name, encoded, left.left()))
        if got.nbytes != answer.nbytes:
            raise MalformedMessage(f"the answer to {method.name} has {got.nbytes} bytes, not {answer.nbytes}")
        if answer.nbytes:
            answer[:] = got
        return found

    def _unary(self, method: str, request: bytes, timeout: float) -> bytes:
        self.require_open()
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", _identity, _identity)
        try:
            return call(request, timeout=timeout, metadata=(*self._metadata, *tracing.metadata()))
        except (grpc.RpcError, ValueError) as error:
            raise self._typed(error) from _bare(error)

    def _stream(
        self,
        method: TensorMethod[R, T],
        request: R,
        data: Sequence[memoryview],
        answer: memoryview,
        left: Deadline,
        meter: Meter,
    ) -> T:
        self.require_open()
        start = self._channel.stream_stream(f"/{SERVICE}/{method.name}Stream", _identity, _identity)
        nbytes = sum(part.nbytes for part in data)
        waits = nbytes >= _WAIT_BYTES and self.info is not None and self.info.signals_chunks
        messages = _Messages(method.stream_header(request), data, self._chunk_bytes(), meter)
        if not waits:
            messages.go_on()
        try:
            metadata = (*self._metadata, *tracing.metadata())
            call = start(iter(messages), timeout=left.left(), metadata=metadata)
        except ValueError as error:
            raise self._typed(error) from error
        try:
            if waits:
                call.initial_metadata()  # there when the chunks may come, or the call is over
                messages.go_on()
            return _receive(method, call, answer, meter)
        except grpc.RpcError as error:
            if messages.error is not None:
                raise messages.error from None
            raise self._typed(error) from _bare(error)
        finally:
            # Nothing if the call is over; otherwise something went wrong here, and the server should know.
            call.cancel()
            messages.go_on()  # to their end

    def _unary_bytes(self) -> int:
        return min(wire.MAX_UNARY_BYTES, self.info.max_unary_bytes) if self.info else wire.MAX_UNARY_BYTES

    def _chunk_bytes(self) -> int:
        liked = self.info.chunk_bytes if self.info else 0
        return min(liked or wire.DEFAULT_CHUNK_BYTES, _MAX_CHUNK_BYTES)

    def require_open(self) -> None:
        """Raise HubClosed if no call can be made any more."""
        if os.getpid() != self._process:
            raise HubClosed(
                f"the hub of {self.address.text} belongs to the process that this one was forked from, and its "
                'connection did not survive that: use the start method "spawn", or fork before the first connect()'
            )
        if self._closed:
            raise HubClosed(f"the hub of {self.address.text} was closed: connect again")

    def was_closed(self) -> HubClosed:
        """Return the error of a call that `close` has cut off."""
        return HubClosed(f"the hub of {self.address.text} was closed during the call: connect again")

    def _typed(self, error: grpc.RpcError | ValueError) -> SharedNormError:
        if self._closed:
            return self.was_closed()
        if isinstance(error, ValueError):
            raise error  # not of a closed channel: a defect here, to be seen as it is
        typed = convert.error_from_call(error, self.address.text, self.timeout)
        if isinstance(typed, CallCancelled):
            # Nobody here gave it up: gRPC says so, too, of a call that a stopping server cuts off.
            typed = ServerUnavailable(
                f"the server at {self.address.text} cut the call off, as one that stops does (is it running? start "
                f"one with `sharednorm serve --listen {self.address.text}`)"
            )
        hint = proxy_hint(self.address) if isinstance(typed, ServerUnavailable) else ""
        return ServerUnavailable(typed.message + hint, typed.metadata) if hint else typed


def _close_bounded(channel: grpc.Channel) -> None:
    # grpcio's close cancels all calls at once, and then waits until the socket has taken the message that
    # was on its way: with a server that hangs, until the keepalive gives it up. Nobody has to wait for that.
    closing = threading.Thread(target=channel.close, name="sharednorm-close", daemon=True)
    try:
        closing.start()
    except RuntimeError:  # the interpreter is ending, and starts no threads any more
        return
    closing.join(_CLOSE_SECONDS)


def _identity(data: bytes) -> bytes:
    return data


def _bare(error: grpc.RpcError | ValueError) -> BaseException:
    # A stream's error is the stream itself. With its traceback it would be in a cycle with the frame
    # that holds it, and the tensor in that frame would stay until the garbage collector comes by.
    return error.with_traceback(None)


class _Messages:
    """The messages of a stream towards the server.

    They are made in a thread of gRPC's, which waits for the network between two of them and ends with the call.

    Attributes:
        error: What the meter has raised there, so that the call was given up.
    """

    def __init__(self, header: Message, data: Sequence[memoryview], chunk_bytes: int, meter: Meter) -> None:
        self.error: Exception | None = None
        self._header, self._data, self._chunk_bytes, self._meter = header, data, chunk_bytes, meter
        self._may_go_on = threading.Event()

    def go_on(self) -> None:
        """Have the chunks sent, behind the header."""
        self._may_go_on.set()

    def __iter__(self) -> Iterator[bytes]:
        """Give the header, then the chunks."""
        yield self._header.SerializeToString()
        self._may_go_on.wait()
        for offset, chunk in wire.chunks(self._data, self._chunk_bytes):
            yield wire.encode_chunk(offset, chunk)
            try:
                self._meter.sent(chunk.nbytes)
            except Exception as error:  # noqa: BLE001 - the caller's thread raises it
                self.error = error
                return


def _receive(method: TensorMethod[R, T], messages: Iterable[bytes], answer: memoryview, meter: Meter) -> T:
    found: T | None = None
    order = wire.ChunkOrder(answer.nbytes)
    for message in messages:
        part, chunk = wire.decode(method.stream_answer, message)
        if part.HasField("header") != (found is None):
            raise MalformedMessage(f"the answer to {method.name} does not begin with its header, or repeats it")
        if found is None:
            found = cast("T", part.header)
        else:
            order.take(part.offset, chunk.nbytes)
            answer[part.offset : part.offset + chunk.nbytes] = chunk
            meter.received(chunk.nbytes)
    if found is None:
        raise MalformedMessage(f"the answer to {method.name} is empty (expected: a header and chunks)")
    order.finish()
    return found
