"""Direct connections: calls with tensors over sockets of our own, beside gRPC. `codec/frames.py` has the frames.

Here is who may connect, and for what: for calls, which `lane` does, or for memory to share. The calls are those of the
servicer, and fail with the same errors.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import stat
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

from sharednorm.codec import frames, wire
from sharednorm.codec.convert import error_to_detail
from sharednorm.errors import IncompatibleServer, MalformedMessage, SharedNormError
from sharednorm.v1 import direct_pb2, service_pb2
from sharednorm_server.direct.connection import STALL_SECONDS, DirectConnection, Turns
from sharednorm_server.direct.shared_memory import SharedMemory, SharedMemorySession
from sharednorm_server.errors import StartError
from sharednorm_server.observability.instrumentation import Watcher
from sharednorm_server.rpc import unserved
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.servicer import Servicer

_BACKLOG = 128
_CREDENTIALS = struct.Struct("@iII")  # struct ucred: process, user, group

# How protocol 2 began, and what it answered: magic, session, status, 0, 0.
_OLD_MAGIC, _OLD_HELLO_BYTES, _OLD_WELCOME = b"sharednorm lane1", 56, struct.Struct("<16s16sHHI")

_log = logging.getLogger(__name__)


class DirectServer:
    """Accepts direct connections.

    Args:
        servicer: What the calls are handed to.
        pool: Knows how many calls run, and whether the server is stopping.
        workers: Most calls that run at a time; others wait.
        memory: What clients on a unix socket may share; None: nothing.
        most: Connections at a time.
        handshake_timeout: Seconds that a new connection has to complete its handshake.
        watcher: Is told of the calls.
    """

    def __init__(
        self,
        servicer: Servicer,
        pool: CallPool,
        workers: int,
        memory: SharedMemory | None,
        most: int,
        handshake_timeout: float,
        watcher: Watcher,
    ) -> None:
        self._watcher = watcher
        self._handshake_timeout = handshake_timeout
        self._most = most
        self.memory = memory
        self.turns = Turns(pool, workers)
        self._servicer = servicer
        self.instance = secrets.token_bytes(16)
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False

    def listen_tcp(self, host: str, port: int) -> None:
        """Listen on a port of an address, and offer it to clients; 0 picks one.

        Raises:
            StartError: That is not possible.
        """
        name = host.strip("[]")
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
        except OSError as error:
            raise StartError(f"cannot listen on {host}:{port} for direct connections: {error.strerror}") from error
        self._start(listener)
        self._servicer.offer_direct(listener.getsockname()[1], "", self.instance, shared_memory=False)

    def listen_unix(self, path: Path) -> None:
        """Listen on a unix socket that only this user can connect to, and offer it; one that is left over is replaced.

        Raises:
            StartError: That is not possible.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            if os.path.lexists(path) and stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()  # gRPC's socket beside it is this server's, and so is this name
            listener.bind(os.fsencode(path))
        except OSError as error:
            raise StartError(f"cannot listen on unix:{path} for direct connections: {error.strerror}") from error
        finally:
            os.umask(mask)
        self._path = path
        self._start(listener)
        self._servicer.offer_direct(0, path.name, self.instance, shared_memory=self.memory is not None)

    @property
    def connections(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def peers(self) -> list[str]:
        """Return who has each of them: the number of a host, or of a process on this machine."""
        with self._lock:
            connections = list(self._connections)
        found = []
        for connection in connections:
            with suppress(OSError):  # it has ended a moment ago
                found.append(_peer_of(connection))
        return found

    def close(self) -> None:
        """Take no more connections, and end those that there are. Again: nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            connections = list(self._connections)
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, listener: socket.socket) -> None:
        listener.listen(_BACKLOG)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="direct-accept", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if self._closed:
                    return
                # No descriptors left, say: those that there are go on, and some will end.
                _log.warning("a direct connection could not be accepted: %s", error)
                time.sleep(0.1)
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="direct", daemon=True).start()
            except RuntimeError as error:  # the system gives no more threads
                connection.close()
                _log.warning("a direct connection could not be served: %s", error)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            with self._lock:
                if self._closed:
                    return
                full = len(self._connections) >= self._most
                if not full:
                    self._connections.add(connection)
            try:
                frames.tune(connection)
                frames.set_timeout(connection, socket.SO_RCVTIMEO, self._handshake_timeout)
                frames.set_timeout(connection, socket.SO_SNDTIMEO, STALL_SECONDS)
                reader = frames.Reader(connection)
                self._greet(connection, reader, full)
            except (OSError, EOFError) as error:
                _log.debug("a direct connection ended: %r", error)
            except Exception:  # noqa: BLE001 - this connection ends, and the others do not
                _log.exception("defect in a direct connection")
            finally:
                with self._lock:
                    self._connections.discard(connection)

    def _greet(self, connection: socket.socket, reader: frames.Reader, full: bool) -> None:
        magic, size, _ = frames.GREETING.unpack(reader.start(frames.GREETING.size))
        if magic == _OLD_MAGIC:
            reader.take(_OLD_HELLO_BYTES - frames.GREETING.size)
            _refuse_old(connection)
        if magic != frames.MAGIC or size > frames.MAX_GREETING_BYTES:
            return
        try:
            hello = unserved.parse(direct_pb2.Hello, reader.take(size))
            _require_right(hello)
        except SharedNormError as error:
            connection.sendall(_welcome(direct_pb2.WELCOME_STATUS_REFUSED, error=error_to_detail(error)))
            return
        sharing = hello.purpose == direct_pb2.CONNECTION_PURPOSE_MEMORY
        memory = self.memory if connection.family == socket.AF_UNIX else None
        session = memory.find(hello.session) if memory is not None and hello.session else None
        status = direct_pb2.WELCOME_STATUS_OK
        if hello.instance != self.instance:
            status = direct_pb2.WELCOME_STATUS_OTHER_SERVER
        elif full:
            status = direct_pb2.WELCOME_STATUS_FULL
        elif (hello.session and session is None) or (sharing and memory is None):
            status = direct_pb2.WELCOME_STATUS_NO_SESSION
        if status != direct_pb2.WELCOME_STATUS_OK:
            connection.sendall(_welcome(status))
        elif not sharing:
            connection.sendall(_welcome(status))
            frames.set_timeout(connection, socket.SO_RCVTIMEO, 0)
            peer = _peer_of(connection)
            DirectConnection(self._servicer, self.turns, connection, reader, session, peer, self._watcher).serve()
        elif memory is not None:
            _share(connection, reader, memory)


def _require_right(hello: direct_pb2.Hello) -> None:
    if hello.protocol != wire.PROTOCOL:
        raise IncompatibleServer(
            f"this server speaks protocol {wire.PROTOCOL}, and the client {hello.protocol}: install the same release "
            "on both sides"
        )
    if hello.purpose not in {direct_pb2.CONNECTION_PURPOSE_CALLS, direct_pb2.CONNECTION_PURPOSE_MEMORY}:
        raise MalformedMessage(f"a connection has purpose {int(hello.purpose)} (expected: 1, calls, or 2, memory)")


def _welcome(
    status: direct_pb2.WelcomeStatus.ValueType, session: bytes = b"", error: service_pb2.ErrorDetail | None = None
) -> bytes:
    return frames.greeting(direct_pb2.Welcome(protocol=wire.PROTOCOL, status=status, session=session, error=error))


def _refuse_old(connection: socket.socket) -> None:
    # In the words of protocol 2, whose welcome had a status and room for a size: an ErrorDetail is behind it.
    error = IncompatibleServer(
        f"this connection begins as protocol 2 does, and this server speaks protocol {wire.PROTOCOL}: install the same "
        "release on both sides"
    )
    detail = error_to_detail(error).SerializeToString()
    connection.sendall(_OLD_WELCOME.pack(_OLD_MAGIC, bytes(16), frames.ERROR, 0, len(detail)) + detail)


def _peer_of(connection: socket.socket) -> str:
    if connection.family == socket.AF_UNIX:
        process, _, _ = _CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        return f"process {process}"
    return str(connection.getpeername()[0])


def _share(connection: socket.socket, reader: frames.Reader, memory: SharedMemory) -> None:
    """Give and take back regions, until the client closes the connection; then all of them go."""
    session = memory.open()
    try:
        connection.sendall(_welcome(direct_pb2.WELCOME_STATUS_OK, session.id))
        frames.set_timeout(connection, socket.SO_RCVTIMEO, 0)
        while True:
            wish, _, _, value = frames.ALLOCATE.unpack(reader.start(frames.ALLOCATE.size))
            if wish == frames.FREE:
                session.free(value)
                connection.sendall(frames.REPLY.pack(frames.OK, 0, 0, 0))
            elif wish == frames.ASK:
                _allocate(connection, session, value)
            else:
                return
    finally:
        session.close()


def _allocate(connection: socket.socket, session: SharedMemorySession, nbytes: int) -> None:
    try:
        region, descriptor = session.allocate(nbytes)
    except SharedNormError as error:
        detail = error_to_detail(error).SerializeToString()
        connection.sendall(frames.REPLY.pack(frames.ERROR, 0, len(detail), 0) + detail)
        return
    try:
        number = frames.REGION.pack(region.number)
        reply = frames.REPLY.pack(frames.OK, 0, len(number), len(region.memory)) + number
        socket.send_fds(connection, [reply], [descriptor])
    finally:
        os.close(descriptor)
