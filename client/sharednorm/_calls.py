"""Calls to a server: deadlines, typed errors, and the two ways that a tensor travels."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from sharednorm import convert, wire
from sharednorm._address import Address
from sharednorm._channel import SERVICE, open_channel, proxy_hint
from sharednorm._version import __version__
from sharednorm.errors import (
    CallCancelled,
    HubClosed,
    IncompatibleServer,
    MalformedMessage,
    ServerUnavailable,
    SharedNormError,
)
from sharednorm.v1 import service_pb2

_MAX_CHUNK_BYTES = 16 << 20
_CLOSE_SECONDS = 1.0

A = TypeVar("A", bound=Message)
R = TypeVar("R", service_pb2.ForwardRequest, service_pb2.BackwardRequest)
T = TypeVar("T", service_pb2.ForwardResponse, service_pb2.BackwardResponse)


@dataclass(frozen=True)
class ServerInfo:
    """What a server is and what it accepts.

    Attributes:
        version: Its release, for example "0.1.0".
        protocol: Version of the contract that it speaks.
        device: What computes, for example "cpu (numba, 8 threads)".
        store: What remembers, for example "memory:".
        max_unary_bytes: Largest tensor that it takes in one message; larger ones travel in chunks.
        max_tensor_bytes: Largest tensor that it takes.
        chunk_bytes: Size of a chunk that it likes best.
    """

    version: str
    protocol: int
    device: str
    store: str
    max_unary_bytes: int
    max_tensor_bytes: int
    chunk_bytes: int


@dataclass(frozen=True)
class TensorMethod(Generic[R, T]):
    """A method with a tensor in and a tensor out, which exists whole (`name`) and in chunks (`name`Stream).

    Attributes:
        name: Of the unary method.
        answer: Class of its answer, which also stands in the first message of the stream's.
        stream_header: Makes the first message of the stream.
        stream_answer: Class of the messages that come back on the stream.
    """

    name: str
    answer: type[T]
    stream_header: Callable[[R], Message]
    stream_answer: type[service_pb2.ForwardStreamResponse | service_pb2.BackwardStreamResponse]


FORWARD: TensorMethod[service_pb2.ForwardRequest, service_pb2.ForwardResponse] = TensorMethod(
    "Forward",
    service_pb2.ForwardResponse,
    lambda header: service_pb2.ForwardStreamRequest(header=header),
    service_pb2.ForwardStreamResponse,
)
BACKWARD: TensorMethod[service_pb2.BackwardRequest, service_pb2.BackwardResponse] = TensorMethod(
    "Backward",
    service_pb2.BackwardResponse,
    lambda header: service_pb2.BackwardStreamRequest(header=header),
    service_pb2.BackwardStreamResponse,
)


class Deadline:
    """The moment at which a call, with all that it does on the way, has to be over."""

    def __init__(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())


class Connection:
    """One channel to one server, for any number of threads of the process that opened it.

    Args:
        address: Where the server listens.
        timeout: Seconds that a call may take.

    Every call raises HubClosed after `close` and in a forked child, ServerUnavailable,
    DeadlineExceeded or IncompatibleServer as the case may be, and what the server answered.
    """

    def __init__(self, address: Address, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        self.info: ServerInfo | None = None
        self._process = os.getpid()
        self._closed = False
        self._channel = open_channel(address)

    def __reduce__(self) -> tuple[object, ...]:
        """Refuse to travel to another process, saying what to do instead."""
        raise TypeError(
            f"a connection to {self.address.text} cannot be pickled: pass the address and the layer's name, "
            "and connect in the other process"
        )

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

    def greet(self) -> ServerInfo:
        """Ask the server what it is, and remember the answer in `info`.

        Raises:
            IncompatibleServer: It speaks another protocol, or is not a sharednorm server.
        """
        answer = self.call("GetServerInfo", service_pb2.GetServerInfoRequest(), service_pb2.GetServerInfoResponse)
        if answer.protocol != wire.PROTOCOL:
            raise IncompatibleServer(
                f"the server at {self.address.text} (release {answer.version or 'unknown'}) speaks protocol "
                f"{answer.protocol}, and this library (release {__version__}) speaks protocol {wire.PROTOCOL}: "
                "install the same release on both sides"
            )
        self.info = ServerInfo(
            answer.version,
            answer.protocol,
            answer.device,
            answer.store,
            answer.max_unary_bytes,
            answer.max_tensor_bytes,
            answer.chunk_bytes,
        )
        return self.info

    def deadline(self) -> Deadline:
        """Return a deadline that begins now."""
        return Deadline(self.timeout)

    def call(self, method: str, request: Message, answer: type[A]) -> A:
        """Make a call without a tensor and return its answer."""
        data = self._unary(method, request.SerializeToString(), self.timeout)
        try:
            return answer.FromString(data)
        except (DecodeError, UnicodeDecodeError) as error:  # the latter by protobuf's pure Python runtime
            raise MalformedMessage(f"the answer of {self.address.text} to {method} cannot be parsed") from error

    def call_tensor(
        self, method: TensorMethod[R, T], request: R, payloads: Sequence[memoryview], answer_bytes: int, left: Deadline
    ) -> tuple[T, memoryview]:
        """Make a call with a tensor, whole if it is small and in chunks if it is large.

        Args:
            method: Which.
            request: The call, without data.
            payloads: Its data, one part after the other.
            answer_bytes: Bytes of tensor that the answer has to bring.
            left: When the call has to be over.

        Returns:
            The answer without data, and `answer_bytes` bytes of data; read-only for small ones.

        Raises:
            MalformedMessage: The answer cannot be parsed, or brings another number of bytes.
        """
        if max(sum(part.nbytes for part in payloads), answer_bytes) <= self._unary_bytes():
            encoded = wire.encode(request, *payloads)
            answer, data = wire.decode(method.answer, self._unary(method.name, encoded, left.left()))
            if data.nbytes != answer_bytes:
                raise MalformedMessage(f"the answer to {method.name} has {data.nbytes} bytes, not {answer_bytes}")
            return answer, data
        return self._stream(method, request, payloads, answer_bytes, left)

    def _unary(self, method: str, request: bytes, timeout: float) -> bytes:
        self._require_open()
        call = self._channel.unary_unary(f"/{SERVICE}/{method}", _identity, _identity)
        try:
            return call(request, timeout=timeout)
        except (grpc.RpcError, ValueError) as error:
            raise self._typed(error) from _bare(error)

    def _stream(
        self, method: TensorMethod[R, T], request: R, payloads: Sequence[memoryview], answer_bytes: int, left: Deadline
    ) -> tuple[T, memoryview]:
        self._require_open()
        start = self._channel.stream_stream(f"/{SERVICE}/{method.name}Stream", _identity, _identity)
        messages = _messages(method.stream_header(request), payloads, self._chunk_bytes())
        try:
            call = start(messages, timeout=left.left())
        except ValueError as error:
            raise self._typed(error) from error
        try:
            return _receive(method, call, answer_bytes)
        except grpc.RpcError as error:
            raise self._typed(error) from _bare(error)
        finally:
            # Nothing if the call is over; otherwise something went wrong here, and the server should know.
            call.cancel()

    def _unary_bytes(self) -> int:
        return min(wire.MAX_UNARY_BYTES, self.info.max_unary_bytes) if self.info else wire.MAX_UNARY_BYTES

    def _chunk_bytes(self) -> int:
        liked = self.info.chunk_bytes if self.info else 0
        return min(liked or wire.DEFAULT_CHUNK_BYTES, _MAX_CHUNK_BYTES)

    def _require_open(self) -> None:
        if os.getpid() != self._process:
            raise HubClosed(
                f"the hub of {self.address.text} belongs to the process that this one was forked from, and its "
                'connection did not survive that: use the start method "spawn", or fork before the first connect()'
            )
        if self._closed:
            raise HubClosed(f"the hub of {self.address.text} was closed: connect again")

    def _typed(self, error: grpc.RpcError | ValueError) -> SharedNormError:
        if self._closed:
            return HubClosed(f"the hub of {self.address.text} was closed during the call: connect again")
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


def _messages(header: Message, payloads: Sequence[memoryview], chunk_bytes: int) -> Iterator[bytes]:
    # Runs in a thread of gRPC's, which waits for the network between two messages and ends with the call.
    yield header.SerializeToString()
    for offset, chunk in wire.chunks(payloads, chunk_bytes):
        yield wire.encode_chunk(offset, chunk)


def _receive(method: TensorMethod[R, T], messages: Iterable[bytes], answer_bytes: int) -> tuple[T, memoryview]:
    answer: T | None = None
    assembler = wire.Assembler(answer_bytes)
    for message in messages:
        part, chunk = wire.decode(method.stream_answer, message)
        if part.HasField("header") != (answer is None):
            raise MalformedMessage(f"the answer to {method.name} does not begin with its header, or repeats it")
        if answer is None:
            answer = cast("T", part.header)
        else:
            assembler.add(part.offset, chunk)
    if answer is None:
        raise MalformedMessage(f"the answer to {method.name} is empty (expected: a header and chunks)")
    return answer, assembler.finish() if answer_bytes else memoryview(b"")
