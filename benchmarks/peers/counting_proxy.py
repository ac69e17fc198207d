"""Counts the bytes that clients and a server send each other: a proxy for its ports, at another loopback address."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple, final

HERE = "127.0.0.2"
"""Where it listens. A client finds the server's other port by the number, at the address that it has connected to."""
THERE = "127.0.0.1"


class Traffic(NamedTuple):
    """Bytes of the connections' contents, without the headers of TCP and below."""

    sent: int
    received: int


@final
class CountingProxy:
    """Passes on what comes, and counts it.

    Args:
        ports: Of the server.
    """

    def __init__(self, ports: tuple[int, ...]) -> None:
        self._counts = [0, 0]
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        for port in ports:
            listener = socket.create_server((HERE, port))
            self._sockets.append(listener)
            threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()

    def traffic(self) -> Traffic:
        """Return what has gone to the server and back until now."""
        with self._lock:
            return Traffic(*self._counts)

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self, listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):  # until it is closed
            while True:
                client, _ = listener.accept()
                server = socket.create_connection((THERE, port))
                with self._lock:
                    self._sockets += [client, server]
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pass_on, args=(client, server, 0), daemon=True).start()
                threading.Thread(target=self._pass_on, args=(server, client, 1), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, way: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:  # before it arrives, so that whoever has got an answer finds it counted
                    self._counts[way] += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def counting(*ports: int) -> Iterator[CountingProxy]:
    """Count what goes to a server at these ports, and back."""
    proxy = CountingProxy(ports)
    try:
        yield proxy
    finally:
        proxy.close()
