"""What travels on a direct connection: calls with tensors as frames of our own, beside gRPC.

gRPC's Python runtime copies a large message several times, and a small call goes through half a dozen of its threads.
A direct connection is one socket, one call at a time: a fixed header, the same protobuf message that gRPC would carry,
without its data, and then the data as it is. Both sides know all sizes before they come, and put the bytes where they
belong. `docs/protocol.md` describes it for other languages.
"""

from __future__ import annotations

import socket
import struct
import sys
from typing import Final

from google.protobuf.message import Message

from sharednorm.v1 import direct_pb2

MAGIC: Final = b"sharednorm conn3"

GREETING: Final = struct.Struct("<16sII")
"""Each side, once, and client first: magic, bytes of the message, 0. The message is a Hello, or the Welcome to it."""
REQUEST: Final = struct.Struct("<HHIQQ")
"""Client: method, flags, bytes of the message, bytes of the data, microseconds that the call may take."""
PLACES: Final = struct.Struct("<6Q")
"""Client, behind a request with SHARED: region and offset of up to two inputs, then of the output; region 0 is none."""
TRACE: Final = struct.Struct("<16s8sB")
"""Client, behind a request with TRACED and its places, if it has any: trace, span and flags of W3C's trace context."""
REPLY: Final = struct.Struct("<HHIQ")
"""Server: status, 0, bytes of the message, bytes of the data."""
ALLOCATE: Final = struct.Struct("<HHIQ")
"""Client, on a connection for memory: ASK or FREE, 0, 0, bytes or region. The answer is a REPLY and, to ASK, a file
descriptor; its bytes of data are those of the region, whose number is the message."""
REGION: Final = struct.Struct("<Q")

# Statuses of a reply.
OK: Final = 0
ERROR: Final = 1
"""The message is an ErrorDetail."""
GO_ON: Final = 2
"""The call can be done, and its data may come."""
NO_SESSION: Final = 5
"""The session of the call's places has ended, and nothing was done."""

# Methods of a request, which are numbers of DirectMethod, and its flags.
FORWARD: Final = int(direct_pb2.DIRECT_METHOD_FORWARD)
BACKWARD: Final = int(direct_pb2.DIRECT_METHOD_BACKWARD)
PUSH_MOMENTS: Final = int(direct_pb2.DIRECT_METHOD_PUSH_MOMENTS)
PUSH_GRADIENTS: Final = int(direct_pb2.DIRECT_METHOD_PUSH_GRADIENTS)
SYNCHRONIZE_MOMENTS: Final = int(direct_pb2.DIRECT_METHOD_SYNCHRONIZE_MOMENTS)
SYNCHRONIZE_GRADIENTS: Final = int(direct_pb2.DIRECT_METHOD_SYNCHRONIZE_GRADIENTS)
BATCH_PUSH_MOMENTS: Final = int(direct_pb2.DIRECT_METHOD_BATCH_PUSH_MOMENTS)
BATCH_GET_STATS: Final = int(direct_pb2.DIRECT_METHOD_BATCH_GET_STATS)
SHARED: Final = 1
TRACED: Final = 2

ASK: Final = 1
FREE: Final = 2

SESSION_BYTES: Final = 16
MAX_GREETING_BYTES: Final = 1 << 14
"""Largest Hello or Welcome."""

WAIT_BYTES: Final = 1 << 20
"""With more data than this, a client waits for GO_ON before it sends them."""
MAX_MESSAGE_BYTES: Final = 8 << 20
"""Largest message without its data, request or reply."""
STEP_BYTES: Final = 1 << 19
"""Data are sent and received in steps of this size, between which deadlines are looked at and progress is told."""
FIRST_BYTES: Final = 1 << 16
"""What a first read of a frame takes in, so that a small one is there after one read."""


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Bound how long each read (SO_RCVTIMEO) or write (SO_SNDTIMEO) of a blocking socket may take; 0: not at all.

    Unlike `settimeout`, which asks the system before each of them whether it could be done.
    """
    micros = max(1, int(seconds * 1e6)) if seconds else 0
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", micros // 1_000_000, micros % 1_000_000))


def tune(sock: socket.socket) -> None:
    """Send small frames at once, and find out that the other machine has vanished."""
    if sock.family == getattr(socket, "AF_UNIX", None):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000)


def send(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send some parts, all of them."""
    total = sum(part.nbytes if isinstance(part, memoryview) else len(part) for part in parts)
    sent = sock.sendmsg(parts)
    if sent == total:
        return
    for part in parts:
        size = part.nbytes if isinstance(part, memoryview) else len(part)
        if sent < size:
            sock.sendall(memoryview(part)[sent:])
        sent = max(0, sent - size)


def greeting(message: Message) -> bytes:
    """Return a Hello or a Welcome as it travels."""
    data = message.SerializeToString()
    return GREETING.pack(MAGIC, len(data), 0) + data


class Reader:
    """Reads frames from a socket: what the first read has brought along, then the rest where it belongs.

    Args:
        sock: A blocking socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._room = memoryview(bytearray(FIRST_BYTES))
        self._begin = self._end = 0

    @property
    def waiting(self) -> int:
        """Bytes that have been read and not been taken."""
        return self._end - self._begin

    def start(self, size: int) -> memoryview:
        """Return the fixed part of the next frame, which is valid until the next read.

        Raises:
            EOFError: The other side has closed the connection.
        """
        if not self.waiting:
            self._begin = self._end = 0
        while self.waiting < size:
            got = self._sock.recv_into(self._room[self._end :])
            if not got:
                raise EOFError
            self._end += got
        self._begin += size
        return self._room[self._begin - size : self._begin]

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        if size <= self.waiting:
            self._begin += size
            return self._room[self._begin - size : self._begin].tobytes()
        whole = bytearray(size)
        self.take_into(memoryview(whole))
        return bytes(whole)

    def take_into(self, target: memoryview) -> None:
        """Write the next bytes to some memory, all of it."""
        done = 0
        while done < target.nbytes:
            done += self.take_some(target[done:])

    def take_some(self, target: memoryview) -> int:
        """Write next bytes to some memory, as many as one read gives; return how many."""
        if self.waiting:
            size = min(self.waiting, target.nbytes)
            target[:size] = self._room[self._begin : self._begin + size]
            self._begin += size
            return size
        got = self._sock.recv_into(target)
        if not got:
            raise EOFError
        return got
