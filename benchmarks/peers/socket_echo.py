"""The floor under any way of sending bytes from Python: a socket, a length, the bytes, and back.

`python -m benchmarks.peers.socket_echo LISTEN` prints the address that it listens on and serves until it is killed.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading

UNIX = "unix:"
LENGTH = struct.Struct("<Q")


class SocketClient:
    """Sends bytes and gets them back into memory that it keeps.

    Args:
        address: "host:port" or "unix:path".
        nbytes: The length of what will be sent.
    """

    def __init__(self, address: str, nbytes: int) -> None:
        if address.startswith(UNIX):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address.removeprefix(UNIX))
        else:
            host, _, port = address.rpartition(":")
            self._socket = socket.create_connection((host, int(port)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answer = bytearray(nbytes)

    def whole(self, data: bytes) -> int:
        """Send the bytes, and return how many came back when the other side had all of them."""
        self._socket.sendall(LENGTH.pack(len(data)), socket.MSG_MORE)
        self._socket.sendall(data)
        return fill(self._socket, memoryview(self._answer))


def fill(connection: socket.socket, memory: memoryview) -> int:
    """Read until the memory is full or the other side has closed; return how many bytes were read."""
    done = 0
    while done < len(memory) and (count := connection.recv_into(memory[done:])):
        done += count
    return done


def _echo(connection: socket.socket) -> None:
    head, data = bytearray(LENGTH.size), bytearray()
    with connection:
        while fill(connection, memoryview(head)) == len(head):
            (length,) = LENGTH.unpack(head)
            if len(data) != length:
                data = bytearray(length)
            fill(connection, memoryview(data))
            connection.sendall(data)


def _serve(listen: str) -> None:
    if listen.startswith(UNIX):
        server = socket.socket(socket.AF_UNIX)
        server.bind(listen.removeprefix(UNIX))
        address = listen
    else:
        server = socket.create_server((listen.rpartition(":")[0], int(listen.rpartition(":")[2])))
        address = "{}:{}".format(*server.getsockname())
    server.listen()
    print(address, flush=True)
    while True:
        connection, _ = server.accept()
        if not listen.startswith(UNIX):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    _serve(sys.argv[1])
