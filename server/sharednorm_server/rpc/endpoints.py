"""Where a server listens: a TCP port or a unix socket, checked before gRPC is asked to bind it."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.errors import StartError

# sockaddr_un of Linux has 108 bytes, the last of which is zero.
MAX_SOCKET_PATH_BYTES = 107

# Read and write for the owner: who may connect is who may write to the socket.
_PRIVATE = 0o177

_TCP = re.compile(r"(?P<host>\[[0-9a-f:.%a-z]+\]|[0-9a-z][0-9a-z._-]*):(?P<port>[0-9]{1,5})", re.IGNORECASE | re.ASCII)

Bind = Callable[[str], int]
"""Binds a gRPC target and returns its port."""


@dataclass(frozen=True)
class TcpEndpoint:
    """A TCP port of one address of this machine; port 0 picks a free one."""

    host: str
    port: int

    @property
    def private(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False  # another name: whatever it means today

    def bind(self, bind: Bind) -> str:
        """Listen, and return the address with the port that it became.

        Raises:
            StartError: The port is taken, or the address is not one of this machine.
        """
        text = f"{self.host}:{self.port}"
        self._require_free(text)
        port = _bound(bind, text, text)
        return f"{self.host}:{port}"

    def _require_free(self, text: str) -> None:
        # gRPC reports every reason for which it cannot bind in the same words, so that the reason is found here.
        try:
            found = socket.getaddrinfo(self.host.strip("[]"), self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise StartError(f"cannot listen on {text}: {error.strerror}") from error
        except UnicodeError as error:  # Python's own, of a part between two dots that is empty or too long
            raise StartError(f"cannot listen on {text}: no host can have that name") from error
        tried = (_try_bind(family, kind, protocol, where) for family, kind, protocol, _, where in found)
        errors = [error for error in tried if error is not None]
        taken = [error for error in errors if error.errno == errno.EADDRINUSE]
        if taken:
            raise StartError(f"cannot listen on {text}: another program does already (choose another port, or 0)")
        if len(errors) == len(found):
            raise StartError(f"cannot listen on {text}: {errors[0].strerror}") from errors[0]


@dataclass(frozen=True)
class UnixEndpoint:
    """A socket in the file system, for the user who runs the server."""

    path: Path

    @property
    def private(self) -> bool:
        """Whether only this machine can reach it."""
        return True

    def bind(self, bind: Bind) -> str:
        """Listen, replacing a socket on which nobody does any more, and return the address.

        The socket's directory is made for this user alone if it is not there; the one that it is in has to be.

        Raises:
            StartError: Another server listens there, or the path cannot be a socket.
        """
        text = f"unix:{self.path}"
        try:
            self._require_free(text)
        except OSError as error:
            raise StartError(f"cannot listen on {text}: {error.strerror}") from error
        # The mask holds for the whole process, so for no longer than it takes; nobody can connect before a chmod.
        mask = os.umask(_PRIVATE)
        try:
            _bound(bind, f"unix:{quote(os.fsencode(self.path))}", text)
        finally:
            os.umask(mask)
        return text

    def _require_free(self, text: str) -> None:
        directory = self.path.parent
        # Not `is_dir()`: since Python 3.14 it is also False where a permission lacks, which is told as it is.
        try:
            above = directory.parent.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            above = 0
        if not stat.S_ISDIR(above):
            raise StartError(f"cannot listen on {text}: there is no directory {directory.parent}")
        # The last one alone, and for this user; one that is there keeps its mode.
        directory.mkdir(mode=0o700, exist_ok=True)
        if os.path.lexists(self.path):
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise StartError(f"cannot listen on {text}: the path exists and is not a socket")
            if not self._is_stale():
                raise StartError(f"cannot listen on {text}: another server does already")
            self.path.unlink()
        # As with TCP: gRPC would not say why it cannot bind.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.bind(os.fsencode(self.path))
        self.path.unlink()

    def _is_stale(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                return True
            except (TimeoutError, BlockingIOError):
                return False  # a server that is too busy to accept is a server
        return False


Endpoint = TcpEndpoint | UnixEndpoint


def parse_endpoint(text: str) -> Endpoint:
    """Return where to listen.

    Raises:
        InvalidConfiguration: It is neither "HOST:PORT" nor "unix:PATH".
    """
    if text.startswith("unix:"):
        return _unix(text.removeprefix("unix:"))
    match = _TCP.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise InvalidConfiguration(
            f"{ascii(text)[:120]} is not an address to listen on (expected: HOST:PORT, [IPV6]:PORT or unix:PATH, "
            "for example 127.0.0.1:50051)"
        )
    return TcpEndpoint(match["host"], int(match["port"]))


def _unix(path: str) -> UnixEndpoint:
    if not path or "\0" in path:
        raise InvalidConfiguration("unix: needs the path of a socket (expected: for example unix:/run/sharednorm.sock)")
    absolute = Path(path).absolute()
    size = len(os.fsencode(absolute))
    if size > MAX_SOCKET_PATH_BYTES:
        raise InvalidConfiguration(
            f"the socket's path has {size} bytes (expected: at most {MAX_SOCKET_PATH_BYTES}): {absolute}"
        )
    return UnixEndpoint(absolute)


def _try_bind(family: int, kind: int, protocol: int, address: object) -> OSError | None:
    try:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)  # type: ignore[arg-type]  # what getaddrinfo gave for this family
    except OSError as error:
        return error
    return None


def _bound(bind: Bind, target: str, text: str) -> int:
    try:
        port = bind(target)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {text}: {error}") from error
    if not port:
        raise StartError(f"cannot listen on {text}")
    return port
