"""A client of direct connections that speaks nothing but what docs/protocol.md says, and says also what it must not."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sharednorm.v1 import direct_pb2, layer_pb2, service_pb2
from tests.support.stock import SECONDS, Floats, StockClient, ref, spec

MAGIC = b"sharednorm conn3"
CALLS, MEMORY = 1, 2
FORWARD, BACKWARD = 1, 2
OK, ERROR, GO_ON = 0, 1, 2
WAIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Reply:
    """What the server has answered."""

    status: int
    message: bytes
    data_bytes: int

    @property
    def reason(self) -> str:
        """The reason of an error."""
        assert self.status == ERROR, self.status
        return service_pb2.ErrorDetail.FromString(self.message).reason


@dataclass(frozen=True)
class RawLane:
    """A connection."""

    sock: socket.socket

    def request(
        self, method: int, message: bytes, data_bytes: int, *, seconds: float = SECONDS, flags: int = 0
    ) -> None:
        """Send what stands in front of the data."""
        head = struct.pack("<HHIQQ", method, flags, len(message), data_bytes, int(seconds * 1e6))
        self.sock.sendall(head + message)

    def reply(self) -> Reply:
        """Read an answer, without its data."""
        status, _, size, data_bytes = struct.unpack("<HHIQ", self.read(16))
        return Reply(status, self.read(size), data_bytes)

    def welcome(self) -> direct_pb2.Welcome:
        """Read what the server says first."""
        magic, size, zero = struct.unpack("<16sII", self.read(24))
        assert (magic, zero) == (MAGIC, 0)
        return direct_pb2.Welcome.FromString(self.read(size))

    def read(self, size: int) -> bytes:
        """Read so many bytes."""
        data = b""
        while len(data) < size:
            more = self.sock.recv(min(1 << 20, size - len(data)))
            if not more:
                raise EOFError
            data += more
        return data

    def ended(self) -> bool:
        """Return whether the server has closed the connection, as it should."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


def offer(client: StockClient) -> service_pb2.DirectEndpoint:
    """Ask a server where it takes direct connections."""
    return client.stub.GetServerInfo(service_pb2.GetServerInfoRequest(), timeout=SECONDS).direct


def hello(instance: bytes, session: bytes = b"", purpose: int = CALLS, **fields: Any) -> bytes:
    """Return what a client says first."""
    message = direct_pb2.Hello(**{"protocol": 3, "instance": instance, "session": session, **fields})
    message.purpose = purpose  # type: ignore[assignment]  # also numbers that no purpose has
    data = message.SerializeToString()
    return struct.pack("<16sII", MAGIC, len(data), 0) + data


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """Connect, and say nothing yet."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        yield sock


@contextmanager
def lane_to(client: StockClient) -> Iterator[RawLane]:
    """Connect, and say what has to be said."""
    where = offer(client)
    with connected(where.port) as sock:
        lane = RawLane(sock)
        sock.sendall(hello(where.instance))
        assert lane.welcome() == direct_pb2.Welcome(protocol=3, status=direct_pb2.WELCOME_STATUS_OK)
        yield lane


def forward(name: str, shape: tuple[int, ...], *, keep: bool = False) -> bytes:
    """Return the message of a training forward."""
    return service_pb2.ForwardRequest(
        ref=ref(name), mode=layer_pb2.MODE_TRAIN, input=spec(shape), keep_input=keep
    ).SerializeToString()


def train(lane: RawLane, name: str, x: Floats) -> tuple[service_pb2.ForwardResponse, bytes]:
    """Take a step as any client would."""
    data = x.tobytes()
    lane.request(FORWARD, forward(name, x.shape), len(data))
    if len(data) > WAIT_BYTES:
        assert lane.reply().status == GO_ON
    lane.sock.sendall(data)
    reply = lane.reply()
    assert reply.status == OK, reply.message
    return service_pb2.ForwardResponse.FromString(reply.message), lane.read(reply.data_bytes)
