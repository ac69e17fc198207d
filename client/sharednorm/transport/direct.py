"""Direct connections to a server: calls with tensors over sockets of our own; `codec/frames.py` has what travels there.

Each call that runs has a connection to itself, and gives it back for the next one.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from sharednorm.codec import frames, wire
from sharednorm.codec.convert import error_from_detail
from sharednorm.errors import InternalError, MalformedMessage, SharedNormError
from sharednorm.transport import tracing
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.progress import Meter
from sharednorm.v1 import direct_pb2, service_pb2

# Longest wait for a connection: whoever is not reached within that, a firewall perhaps in between, is reached by gRPC.
CONNECT_SECONDS = 1.0
# Longest wait for the welcome where there is another way; it takes long from a server that is very busy, and for ever
# from a program that is none.
WELCOME_SECONDS = 5.0
_MOST_IDLE = 64
_FRESH_SECONDS = 0.2


class Unreachable(Exception):
    """No connection could be made, and nothing was sent. The message says why."""


class SessionLost(Unreachable):
    """The server is there, and does not know the session any more."""


@dataclass(frozen=True)
class Place:
    """Where a server takes direct connections.

    Attributes:
        host: Its host; "" for a unix socket.
        port: Its port; 0 for a unix socket.
        path: Of the unix socket.
        instance: Which server is expected there.
        traces: Whether it takes the span of a call.
    """

    host: str
    port: int
    path: str
    instance: bytes
    traces: bool = False

    def connect(self, seconds: float) -> socket.socket:
        """Return a connected socket, which blocks.

        Raises:
            Unreachable: Nobody answers there.
        """
        try:
            if self.path:
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.settimeout(seconds)
                    sock.connect(self.path)
                except BaseException:
                    sock.close()
                    raise
            else:
                sock = socket.create_connection((self.host, self.port), seconds)
            sock.settimeout(None)
            frames.tune(sock)
        except OSError as error:
            raise Unreachable(f"{self}: {error.strerror or error}") from None
        return sock

    def __str__(self) -> str:
        """Name it."""
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


class DirectLink:
    """Direct connections to one place, for any number of threads.

    Args:
        place: Where.
        session: What the server shares memory under; empty if it shares none.
        patient: Whether to wait for a welcome as long as a call may take, since there is no other way.
    """

    def __init__(self, place: Place, session: bytes, *, patient: bool) -> None:
        self.place = place
        self._patient = patient
        self._session = session
        self._idle: deque[PooledConnection] = deque()
        self._lanes: set[PooledConnection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def probe(self, left: Deadline) -> None:
        """Connect once, and keep the connection for the first call.

        Raises:
            Unreachable: Nobody answers there, or another server.
        """
        self._idle.append(self._open(left))

    def call(
        self,
        method: int,
        message: bytes,
        data: Sequence[memoryview],
        answer: memoryview,
        left: Deadline,
        meter: Meter,
        places: bytes = b"",
    ) -> bytes:
        """Make a call.

        Args:
            method: Which.
            message: Its request, without data.
            data: Its data, one part after the other.
            answer: Filled with the data of the answer.
            left: When it has to be over.
            meter: Told how far it has come.
            places: Where in shared memory the data are instead, as `frames.PLACES`.

        Returns:
            The answer, without data.

        Raises:
            Unreachable: Nothing was sent, since nobody answers there.
            OSError, EOFError: The connection broke, or time was up: BlockingIOError.
            MalformedMessage: The answer is not one.
            SharedNormError: What the server answered.
        """
        lane = self._take(left)
        try:
            result = lane.call(method, message, data, answer, left, meter, places)
        except BaseException:
            self._drop(lane)
            raise
        if len(self._idle) >= _MOST_IDLE or self._closed:
            self._drop(lane)
        else:
            self._idle.append(lane)
            if self._closed:  # since a moment ago
                self._drop_idle()
        if isinstance(result, SharedNormError):
            raise result
        return result

    def close(self) -> None:
        """End all connections; calls that run on them break off."""
        with self._lock:
            self._closed = True
            lanes = list(self._lanes)
        for lane in lanes:
            lane.shut()
        self._drop_idle()

    def _take(self, left: Deadline) -> PooledConnection:
        while True:
            try:
                lane = self._idle.pop()
            except IndexError:
                return self._open(left)
            if lane.alive():
                return lane
            self._drop(lane)

    def _open(self, left: Deadline) -> PooledConnection:
        seconds = min(CONNECT_SECONDS, left.left())
        if not seconds:
            raise BlockingIOError
        sock = self.place.connect(seconds)
        lane = PooledConnection(sock, self.place, self._session, welcome_seconds(left, patient=self._patient))
        with self._lock:
            if not self._closed:
                self._lanes.add(lane)
                return lane
        lane.close()
        raise EOFError

    def _drop_idle(self) -> None:
        while self._idle:
            with suppress(IndexError):  # another thread has taken it, and will find it broken
                self._drop(self._idle.pop())

    def _drop(self, lane: PooledConnection) -> None:
        with self._lock:
            self._lanes.discard(lane)
        lane.shut()  # so that the server sees it also while a forked child has the socket, too
        lane.close()


class PooledConnection:
    """One connection: one call at a time."""

    def __init__(self, sock: socket.socket, place: Place, session: bytes, seconds: float) -> None:
        self._sock = sock
        self._traces = place.traces
        self._reader = frames.Reader(sock)
        self._timeout = self._used = 0.0
        try:
            handshake(sock, self._reader, place, seconds, session)
        except BaseException:
            sock.close()
            raise
        # Of a hub that nobody has closed. Not in __del__, which in a cycle may come behind the socket's own warning.
        weakref.finalize(self, sock.close).atexit = False

    def call(
        self,
        method: int,
        message: bytes,
        data: Sequence[memoryview],
        answer: memoryview,
        left: Deadline,
        meter: Meter,
        places: bytes,
    ) -> bytes | SharedNormError:
        """Make a call; an error that the server has answered with is returned."""
        self._bound(left)
        nbytes = sum(part.nbytes for part in data)
        micros = int(left.left() * 1e6)
        flags = frames.SHARED if places else 0
        trace = tracing.frame() if self._traces else b""
        if trace:
            flags |= frames.TRACED
        head = frames.REQUEST.pack(method, flags, len(message), nbytes, micros) + places + trace
        if nbytes <= frames.WAIT_BYTES:
            frames.send(self._sock, head, message, *data)
        else:
            frames.send(self._sock, head, message)
            status, size, _ = self._reply()
            if status != frames.GO_ON:
                return self._failed(status, size)
            for part in data:
                for begin in range(0, part.nbytes, frames.STEP_BYTES):
                    step = part[begin : begin + frames.STEP_BYTES]
                    self._sock.sendall(step)
                    meter.sent(step.nbytes)
                    _require(left)
        self._bound(left)
        status, size, answer_bytes = self._reply()
        if status != frames.OK:
            return self._failed(status, size)
        self._bound(left)
        result = self._reader.take(size)
        if answer_bytes != answer.nbytes:
            raise MalformedMessage(f"the answer has {answer_bytes} bytes of data (expected: {answer.nbytes})")
        done = 0
        while done < answer_bytes:
            got = self._reader.take_some(answer[done : done + frames.STEP_BYTES])
            done += got
            meter.received(got)
            _require(left)
        self._used = time.monotonic()
        return result

    def alive(self) -> bool:
        """Return whether the server has not closed the connection since the last call, as far as one can see.

        Not if that was a moment ago: no server stops and is there again so soon.
        """
        if time.monotonic() < self._used + _FRESH_SECONDS:
            return True
        try:
            self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # closed, or bytes that nobody has asked for

    def shut(self) -> None:
        """Break off whatever runs."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket; nothing runs any more."""
        self._sock.close()

    def _bound(self, left: Deadline) -> None:
        # As long as nothing else is asked for than a hub's timeout, one request to the system does for all calls.
        seconds = left.left()
        if not seconds:
            raise BlockingIOError
        if seconds < self._timeout * 0.9 or seconds > self._timeout:
            frames.set_timeout(self._sock, socket.SO_RCVTIMEO, seconds)
            frames.set_timeout(self._sock, socket.SO_SNDTIMEO, seconds)
            self._timeout = seconds

    def _reply(self) -> tuple[int, int, int]:
        status, _, size, data_bytes = frames.REPLY.unpack(self._reader.start(frames.REPLY.size))
        if size > frames.MAX_MESSAGE_BYTES:
            raise MalformedMessage(f"the answer has a message of {size} bytes")
        return status, size, data_bytes

    def _failed(self, status: int, size: int) -> SharedNormError:
        if status == frames.NO_SESSION:
            raise SessionLost("the server does not know the session any more")
        if status != frames.ERROR:
            raise MalformedMessage(f"the answer has status {status}")
        detail = wire.parse(service_pb2.ErrorDetail, self._reader.take(size))
        known = error_from_detail(detail)
        return known or InternalError(detail.message, {**detail.metadata, "reason": detail.reason})


def welcome_seconds(left: Deadline, *, patient: bool) -> float:
    """Return how long to wait for a welcome."""
    return max(1e-3, left.left() if patient else min(WELCOME_SECONDS, left.left() / 2))


def handshake(
    sock: socket.socket,
    reader: frames.Reader,
    place: Place,
    seconds: float,
    session: bytes = b"",
    *,
    memory: bool = False,
) -> bytes:
    """Say which server is expected and what the connection is for; return the session of one for memory.

    Args:
        sock: The connection.
        reader: What reads from it.
        place: Where it leads.
        seconds: How long to wait for the welcome.
        session: In whose memory calls may have their tensors; empty: none.
        memory: Whether it is for memory; otherwise it is for calls.

    Raises:
        Unreachable: Another server is there, this one takes no more connections, or it refuses this one.
        SessionLost: It does not know the session, or shares no memory.
    """
    purpose = direct_pb2.CONNECTION_PURPOSE_MEMORY if memory else direct_pb2.CONNECTION_PURPOSE_CALLS
    hello = direct_pb2.Hello(protocol=wire.PROTOCOL, instance=place.instance, purpose=purpose, session=session)
    frames.set_timeout(sock, socket.SO_RCVTIMEO, seconds)
    try:
        sock.sendall(frames.greeting(hello))
        magic, size, _ = frames.GREETING.unpack(reader.start(frames.GREETING.size))
        if magic != frames.MAGIC or size > frames.MAX_GREETING_BYTES:
            raise Unreachable(f"{place}: no sharednorm server of protocol {wire.PROTOCOL} is there")
        welcome = wire.parse(direct_pb2.Welcome, reader.take(size))
    except (OSError, EOFError, MalformedMessage) as error:
        raise Unreachable(f"{place}: no welcome ({error!r})") from None
    if welcome.status == direct_pb2.WELCOME_STATUS_NO_SESSION:
        raise SessionLost(f"{place}: the server does not know the session, or shares no memory")
    if welcome.status != direct_pb2.WELCOME_STATUS_OK:
        known = {
            int(direct_pb2.WELCOME_STATUS_OTHER_SERVER): "another server is there",
            int(direct_pb2.WELCOME_STATUS_FULL): "the server has as many direct connections as it takes",
        }
        why = known.get(welcome.status, welcome.error.message or "the connection was refused")
        raise Unreachable(f"{place}: {why}")
    return welcome.session


def _require(left: Deadline) -> None:
    if not left.left():
        raise BlockingIOError
