"""A network that breaks: a proxy of TCP connections that cuts them in the middle of whatever they carry."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

# Beside 127.0.0.1, where servers listen: there a proxy can have the very ports that a server has. Another one for each
# process of tests, or one's proxy may have the port that another's needs.
HOST = f"127.0.0.{2 + int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0')[2:])}"

_STEP = 1 << 16


@dataclass
class Faults:
    """What befalls connections.

    Attributes:
        random: Decides it.
        left: How many more connections are broken; the others are left alone.
        longest: Bytes in one direction within which a connection is broken.
        seconds: How long one that stalls does.
        happened: How often each has happened, by name.
    """

    random: random.Random
    left: int = 0
    longest: int = 4000
    seconds: float = 0.2
    happened: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> tuple[str, bool, int]:
        """Return what befalls the next connection, whether on the way to the server, and behind how many bytes."""
        with self._lock:
            if self.left <= 0:
                return "", False, 0
            self.left -= 1
            what = self.random.choice(("reset", "reset", "close", "half", "stall"))
            self.happened[what] = self.happened.get(what, 0) + 1
            # Small numbers often: the beginning of a message, and of its answer, are the interesting places.
            return what, self.random.random() < 0.5, int(self.longest * self.random.random() ** 2)


class Proxy:
    """Hands on what comes to a port of its own host to the same or another port of 127.0.0.1.

    Args:
        port: Where to.
        faults: What befalls the connections.
        own: Its own port; 0: any.
        others: More ports: connections go to all of them in turn, and to the next where nobody listens.

    Attributes:
        carried: Bytes that it has taken from both sides.
    """

    def __init__(self, port: int, faults: Faults, own: int = 0, others: Sequence[int] = ()) -> None:
        self._ports = deque([port, *others])
        self._faults = faults
        self._listener = socket.create_server((HOST, own))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.carried = 0
        self._closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Break all connections."""
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            _reset(sock)

    def close(self) -> None:
        """Break all connections, and take no more."""
        self._closed = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        self.cut()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = self._connect()
            if server is None:
                client.close()
                continue
            server.settimeout(None)
            for sock in (client, server):  # before a thread may close them
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._sockets |= {client, server}
            what, upwards, behind = self._faults.next()
            for source, sink, up in ((client, server, True), (server, client, False)):
                fault = what if up is upwards else ""
                threading.Thread(target=self._pump, args=(source, sink, fault, behind), daemon=True).start()

    def _connect(self) -> socket.socket | None:
        for _ in self._ports.copy():
            port = self._ports[0]
            self._ports.rotate(-1)
            with suppress(OSError):
                return socket.create_connection(("127.0.0.1", port), 10)
        return None

    def _pump(self, source: socket.socket, sink: socket.socket, fault: str, left: int) -> None:
        try:
            while True:
                data = source.recv(_STEP)
                with self._lock:
                    self.carried += len(data)
                if fault and len(data) >= left:
                    sink.sendall(data[:left])
                    self._break(source, sink, fault)
                    return
                left -= len(data)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
        except OSError:
            self._end(source, sink)

    def _break(self, source: socket.socket, sink: socket.socket, fault: str) -> None:
        if fault == "stall":
            time.sleep(self._faults.seconds)
        elif fault == "half":  # one side hears the end, the other one nothing for a while
            sink.shutdown(socket.SHUT_WR)
            time.sleep(self._faults.seconds)
        if fault == "close":
            self._end(source, sink)
        else:
            _reset(source)
            _reset(sink)

    def _end(self, *sockets: socket.socket) -> None:
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            with self._lock:
                self._sockets.discard(sock)
            sock.close()


def _reset(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


@contextmanager
def network(address: str, direct_port: int, faults: Faults) -> Iterator[tuple[str, Callable[[], None]]]:
    """Stand between a server on 127.0.0.1 and its clients; gives the address for them, and what cuts all connections.

    Args:
        address: Where the server listens.
        direct_port: Where it takes direct connections; 0 for nowhere.
        faults: What befalls the connections.
    """
    proxies = [Proxy(int(address.rpartition(":")[2]), faults)]
    try:
        if direct_port:
            proxies.append(Proxy(direct_port, faults, direct_port))

        def cut() -> None:
            for proxy in proxies:
                proxy.cut()

        yield f"{HOST}:{proxies[0].port}", cut
    finally:
        for proxy in proxies:
            proxy.close()
