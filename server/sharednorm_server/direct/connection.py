"""One direct connection: calls, one after the other, each read, done and answered by the connection's thread.

A call that waits for other members of a group is answered by the thread of whoever comes last, which so need not wake
any other; the connection's own one reads again meanwhile, and sees when the client goes.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NoReturn

from sharednorm.codec import frames, wire
from sharednorm.codec.convert import error_to_detail, error_to_status
from sharednorm.errors import DeadlineExceeded, MalformedMessage, NotSupported, SharedNormError
from sharednorm.v1 import direct_pb2, service_pb2
from sharednorm_server.device.tensor_io import Incoming, Output
from sharednorm_server.direct.shared_memory import InRegions, SessionEnded, SharedMemorySession
from sharednorm_server.observability.instrumentation import Origin, Seen, Watcher, working_on
from sharednorm_server.observability.logs import in_call, new_call
from sharednorm_server.rpc import unserved
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.errors import known_error
from sharednorm_server.rpc.group_methods import PendingGroupCall
from sharednorm_server.rpc.handlers import NO_METHOD
from sharednorm_server.rpc.servicer import Servicer
from sharednorm_server.rpc.tensor_io import Arriving, Here, InMessage

# A reply that fits the socket's buffer leaves at once. For one that does not, and for a tensor on its way, a client is
# given up that neither sends nor takes anything for so long, or sooner at its call's deadline.
STALL_SECONDS = 30.0
DIRECT, SHARED = "direct", "shm"
"""What calls on direct connections are called, by where their tensors are."""
_GIVEN_UP = "CANCELLED"
_LONGEST_SECONDS = 24 * 3600.0


class Turns:
    """Who may run a call now: so many at a time, each of which is counted until its answer has left.

    Args:
        pool: Counts the calls, and knows whether the server is stopping.
        workers: Most that run at a time; others wait.
    """

    def __init__(self, pool: CallPool, workers: int) -> None:
        self._pool = pool
        self._free = threading.BoundedSemaphore(workers)

    @contextmanager
    def one(self, patience: float) -> Iterator[None]:
        """Wait for a turn, at most so many seconds, and have it as long as the context lasts.

        Raises:
            ServerUnavailable: The server is stopping.
            DeadlineExceeded: None has come.
        """
        self._pool.begin_elsewhere()
        try:
            if not (self._free.acquire(blocking=False) or self._free.acquire(timeout=patience)):
                raise DeadlineExceeded("the server was busy with other calls for as long as this one could wait")
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._pool.end_elsewhere()

    @contextmanager
    def none(self) -> Iterator[None]:
        """Count a call that waits for others as long as the context lasts; raises what `begin_none` raises."""
        self.begin_none()
        try:
            yield
        finally:
            self.end_none()

    def begin_none(self) -> None:
        """Count a call that waits for others, until `end_none`, without a turn: it does next to nothing.

        Raises:
            ServerUnavailable: The server is stopping.
        """
        self._pool.begin_elsewhere()

    def end_none(self) -> None:
        """Say that such a call is over."""
        self._pool.end_elsewhere()


class DirectConnection:
    """One connection.

    Args:
        servicer: What the calls are handed to.
        turns: Who may run one.
        connection: The socket.
        reader: What reads from it.
        session: Whose memory the calls may name; None: nobody's.
        peer: Whose it is, in words.
        watcher: Is told of the calls.
    """

    def __init__(
        self,
        servicer: Servicer,
        turns: Turns,
        connection: socket.socket,
        reader: frames.Reader,
        session: SharedMemorySession | None,
        peer: str,
        watcher: Watcher,
    ) -> None:
        self._watcher = watcher
        self._peer = peer
        self._servicer = servicer
        self._turns = turns
        self._session = session
        self._connection = connection
        self._reader = reader
        self._end = 0.0  # when the call that runs has to be over
        self._answering = False  # whether the answer has begun, behind which no error can be told
        self._meeting: PendingGroupCall | None = None  # the last one
        self._telling = threading.Lock()  # held by whoever answers that
        self._gone = False  # whether the connection's thread, and so perhaps the socket, has gone

    def serve(self) -> None:
        """Do calls until the client closes the connection."""
        try:
            self._serve()
        finally:
            with self._telling:
                self._gone = True

    def _serve(self) -> None:
        while True:
            method, flags, message_bytes, data_bytes, micros = frames.REQUEST.unpack(
                self._reader.start(frames.REQUEST.size)
            )
            if message_bytes > frames.MAX_MESSAGE_BYTES:
                raise EOFError
            if self._meeting is not None and not self._meeting.future.done():
                raise EOFError  # a call before the last one's answer: not a client of ours
            self._answering = False
            self._end = time.monotonic() + min(micros * 1e-6, _LONGEST_SECONDS)
            shared = None
            if flags & ~(frames.SHARED | frames.TRACED):
                self._refuse_flags(method, flags)
            if flags & frames.SHARED:
                places = frames.PLACES.unpack(self._read(frames.PLACES.size))
                if self._session is None or data_bytes:
                    raise EOFError  # not a client of ours
                shared = InRegions(self._session, places)
            parent = b""
            if flags & frames.TRACED:
                parent = self._read(frames.TRACE.size)
            message = self._read(message_bytes)
            small = self._read(data_bytes) if data_bytes <= frames.WAIT_BYTES else None
            if self._reader.waiting:
                raise EOFError  # the next call, before this one's answer: not a client of ours
            here = shared or (None if small is None else InMessage(memoryview(small)))
            call, way = new_call(METHODS.get(method, NO_METHOD)), DIRECT if shared is None else SHARED
            origin = partial(self._origin, parent)
            seen = self._watcher.begin(call.method, way, call.id, origin, time.perf_counter())
            with in_call(call), working_on(seen):
                self._call(method, message, here, data_bytes, seen)

    def _refuse_flags(self, method: int, flags: int) -> NoReturn:
        # What stands behind the request is not known, so that this is the connection's last answer.
        error = NotSupported(f"this release knows no flags {flags:#x} of a request (expected: 1, 2, or both)")
        detail = error_to_detail(error).SerializeToString()
        self._connection.sendall(frames.REPLY.pack(frames.ERROR, 0, len(detail), 0) + detail)
        raise EOFError(f"unknown flags, method {method}")

    def _origin(self, parent: bytes) -> Origin:
        if not parent:
            return Origin(self._peer)
        trace, span, flags = frames.TRACE.unpack(parent)
        return Origin(self._peer, f"00-{trace.hex()}-{span.hex()}-{flags:02x}")

    def _call(self, method: int, message: bytes, here: Here | None, data_bytes: int, seen: Seen) -> None:
        seen.moved(frames.REQUEST.size + len(message) + data_bytes, 0)
        if method in _TOGETHER:
            self._meet(method, message, seen)
            return
        data = _Data(self, data_bytes)
        try:
            # A member that joins waits for the others, who need the turns.
            joins = method == direct_pb2.DIRECT_METHOD_JOIN_GROUP
            with self._turns.none() if joins else self._turns.one(max(0.0, self._end - time.monotonic())):
                seen.started()
                if here is not None:
                    self._send(*self._answer(method, message, here), seen, shared=isinstance(here, InRegions))
                    return
                with ExitStack() as until_sent:
                    answer = self._answer(method, message, Arriving(data.begin, data.fill, until_sent))
                    self._send(*answer, seen, shared=False)
        except SessionEnded:
            seen.failed(_GIVEN_UP)
            self._connection.sendall(frames.REPLY.pack(frames.NO_SESSION, 0, 0, 0))
        except Exception as error:
            if self._answering or (isinstance(error, (OSError, EOFError)) and not isinstance(error, SharedNormError)):
                seen.failed(_GIVEN_UP)
                raise  # on the connection nobody can be told anything any more
            data.skip()
            self._connection.sendall(_refusal(method, error, seen))
        finally:
            seen.ended()

    def _meet(self, method: int, message: bytes, seen: Seen) -> None:
        groups = self._servicer.groups
        try:
            self._turns.begin_none()
            try:
                meeting = groups.moments(message) if method == frames.SYNCHRONIZE_MOMENTS else groups.gradients(message)
            except BaseException:
                self._turns.end_none()
                raise
        except Exception as error:  # noqa: BLE001 - the member gets it
            refusal = _refusal(method, error, seen)
            seen.ended()
            self._connection.sendall(refusal)
            return
        seen.started()
        self._meeting = meeting
        self._answering = True
        meeting.future.add_done_callback(lambda _: self._tell(method, meeting, seen))

    def _tell(self, method: int, meeting: PendingGroupCall, seen: Seen) -> None:
        """Answer a meeting, in whichever thread, which must not wait for this client."""
        try:
            try:
                answer = meeting.answer()
                frame = frames.REPLY.pack(frames.OK, 0, len(answer), 0) + answer
            except Exception as error:  # noqa: BLE001 - the member gets it
                frame = _refusal(method, error, seen)
            seen.moved(0, len(frame))
            seen.ended()
            rest = self._send_now(frame)
            if rest:
                threading.Thread(target=self._send_later, args=(rest,), name="direct-answer", daemon=True).start()
                return
        except BaseException:
            self._turns.end_none()
            raise
        self._turns.end_none()

    def _send_now(self, frame: bytes) -> bytes:
        """Send what the socket takes at once; return the rest."""
        if not self._telling.acquire(blocking=False):
            return frame  # the last answer is still on its way, to a client that has not waited for it
        try:
            if self._gone:
                return b""
            return frame[self._connection.send(frame, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return frame
        except OSError:
            return b""  # the connection's own thread finds out
        finally:
            self._telling.release()

    def _send_later(self, rest: bytes) -> None:
        try:
            with self._telling, suppress(OSError):
                if not self._gone:
                    self._connection.sendall(rest)
        finally:
            self._turns.end_none()

    def _answer(self, method: int, message: bytes, tensors: Here | Arriving) -> tuple[bytes, Output | None]:
        name, servicer = METHODS.get(method), self._servicer
        if method == frames.FORWARD:
            forward = servicer.forward(unserved.parse(service_pb2.ForwardRequest, message), tensors, self._wanted)
            return forward.response.SerializeToString(), forward.output
        if method == frames.BACKWARD:
            backward = servicer.backward(unserved.parse(service_pb2.BackwardRequest, message), tensors, self._wanted)
            return backward.response.SerializeToString(), backward.output
        if name is None:
            raise NotSupported(f"this release knows no method {method} (expected: 1 to {max(METHODS)})")
        if not isinstance(tensors, InMessage) or tensors.nbytes:
            raise MalformedMessage(f"the call comes with data, and {name} takes none")
        unary = servicer.plain.get(name) or servicer.groups.unary().get(name)
        if unary is None:
            raise unserved.method_error(name)
        return unary(message, self._wanted), None

    def _send(self, message: bytes, output: Output | None, seen: Seen, *, shared: bool) -> None:
        self._answering = True  # what goes wrong from here on goes wrong behind the change
        if shared:
            try:
                if output is not None:
                    output.array()  # that is, there
                    output = None
            finally:
                if self._session is not None and self._session.ended:
                    self._session.close()  # what this call has kept in its memory has to go, too
        data_bytes = 0 if output is None else output.nbytes
        head = frames.REPLY.pack(frames.OK, 0, len(message), data_bytes)
        seen.moved(0, len(head) + len(message) + data_bytes)
        if output is None:
            frames.send(self._connection, head, message)
        elif data_bytes <= frames.WAIT_BYTES:
            frames.send(self._connection, head, message, wire.payload(output.array()))
        else:
            frames.set_timeout(self._connection, socket.SO_SNDTIMEO, min(self.left(), STALL_SECONDS))
            frames.send(self._connection, head, message)
            for part in output.parts(frames.STEP_BYTES):
                self._connection.sendall(part)
                self.left()
            frames.set_timeout(self._connection, socket.SO_SNDTIMEO, STALL_SECONDS)

    def _wanted(self) -> bool:
        if time.monotonic() >= self._end:
            return False
        # Also of a call that was read a moment ago: it may have waited in the socket for long, as after a stop.
        try:
            return self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def left(self) -> float:
        """Return the seconds that are left of the call, more than 0.

        Raises:
            EOFError: None are left, so that nobody waits for the answer.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise EOFError
        return left

    def _read(self, size: int) -> bytes:
        if size <= self._reader.waiting:
            return self._reader.take(size)
        frames.set_timeout(self._connection, socket.SO_RCVTIMEO, self.left())
        data = self._reader.take(size)
        frames.set_timeout(self._connection, socket.SO_RCVTIMEO, 0)
        return data

    def go_on(self) -> None:
        """Have the client send its data."""
        frames.set_timeout(self._connection, socket.SO_RCVTIMEO, min(self.left(), STALL_SECONDS))
        self._connection.sendall(frames.REPLY.pack(frames.GO_ON, 0, 0, 0))

    def read_some(self, room: memoryview) -> int:
        """Read data into some memory, as much as one read gives."""
        self.left()
        return self._reader.take_some(room)

    def done_reading(self) -> None:
        """Wait for the next call as long as it takes."""
        frames.set_timeout(self._connection, socket.SO_RCVTIMEO, 0)


class _Data:
    """The data of one call, which the client sends when it has been told to."""

    def __init__(self, lane: DirectConnection, nbytes: int) -> None:
        self._lane = lane
        self._nbytes = nbytes
        self._missing = 0

    def begin(self, nbytes: int) -> None:
        """Have the data come.

        Raises:
            MalformedMessage: They are not as many bytes as the call needs.
        """
        if nbytes != self._nbytes:
            raise MalformedMessage(f"the call comes with {self._nbytes} bytes of data (expected: {nbytes})")
        self._missing = nbytes
        self._lane.go_on()

    def fill(self, incoming: Incoming) -> None:
        """Fill a tensor. A step is handed to the device when it is whole, or all that has come for now."""
        missing = incoming.nbytes
        while missing:
            room = incoming.space(min(missing, frames.STEP_BYTES))
            got = 0
            while got < room.nbytes:
                count = self._lane.read_some(room[got:])
                got += count
                self._missing -= count
            incoming.filled(got)
            missing -= got
        if not self._missing:
            self._lane.done_reading()

    def skip(self) -> None:
        """Read what still comes, so that the next call begins where it should."""
        room = memoryview(bytearray(min(self._missing, frames.STEP_BYTES)))
        while self._missing:
            self._missing -= self._lane.read_some(room[: min(self._missing, room.nbytes)])
        self._lane.done_reading()


def _names() -> dict[int, str]:
    # SynchronizeMoments is DIRECT_METHOD_SYNCHRONIZE_MOMENTS, and so on.
    service = service_pb2.DESCRIPTOR.services_by_name["BatchNormService"]
    by_constant = {"_".join(_WORD.findall(method.name)).upper(): method.name for method in service.methods}
    numbers = direct_pb2.DirectMethod.items()
    return {number: by_constant[constant.removeprefix(_CONSTANT)] for constant, number in numbers if number}


_WORD, _CONSTANT = re.compile("[A-Z][a-z]+"), "DIRECT_METHOD_"
METHODS = _names()
"""Names of the methods that direct connections have a number for."""
_TOGETHER = {frames.SYNCHRONIZE_MOMENTS, frames.SYNCHRONIZE_GRADIENTS}


def _refusal(method: int, error: Exception, seen: Seen) -> bytes:
    known = known_error(METHODS.get(method, str(method)), error)
    seen.failed(error_to_status(known)[0].name)
    detail = error_to_detail(known).SerializeToString()
    return frames.REPLY.pack(frames.ERROR, 0, len(detail), 0) + detail
