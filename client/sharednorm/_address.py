"""Where a server listens, as users write it: "host:port", "[::1]:port" or "unix:path"."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sharednorm.errors import InvalidConfiguration

# sockaddr_un of Linux has 108 bytes, the last of which is zero.
MAX_SOCKET_PATH_BYTES = 107

_EXPECTED = 'expected: "host:port", "[::1]:port" or "unix:/path/of/socket"'
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?", re.ASCII)
_PORT = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class Address:
    """A checked address.

    Attributes:
        text: As the user wrote it, for messages.
        target: As gRPC wants it.
        local: Whether it is on this machine: a unix socket or a loopback address.
        host: Name or number of the host, "" for a unix socket.
        path: Absolute path of a unix socket, "" otherwise.
    """

    text: str
    target: str
    local: bool
    host: str = ""
    path: str = ""


def parse_address(text: object) -> Address:
    """Check an address.

    Raises:
        InvalidConfiguration: It has none of the three forms, or its socket path is too long.
    """
    if not isinstance(text, str):
        raise InvalidConfiguration(f"the address is {ascii(text)[:120]} ({_EXPECTED})")
    if text.startswith("unix:"):
        return _unix(text)
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise InvalidConfiguration(f"the address {ascii(text)[:120]} has no port from 1 to 65535 ({_EXPECTED})")
    if not _is_host(host):
        raise InvalidConfiguration(f"the address {ascii(text)[:120]} has no host that could be one ({_EXPECTED})")
    # The scheme stands there because a host may be called "unix" or "dns".
    return Address(text, f"dns:///{text}", _is_loopback(host), host.strip("[]"))


def _unix(text: str) -> Address:
    path = text.removeprefix("unix:")
    if not path or "\0" in path:
        raise InvalidConfiguration(f"the address {ascii(text)[:120]} has no socket path ({_EXPECTED})")
    # Absolute, so that a later chdir does not lead a reconnecting channel astray.
    absolute = str(Path(path).absolute())
    size = len(os.fsencode(absolute))
    if size > MAX_SOCKET_PATH_BYTES:
        raise InvalidConfiguration(
            f"the socket path has {size} bytes (expected: at most {MAX_SOCKET_PATH_BYTES}, which is the "
            f"operating system's limit): {ascii(absolute)[:160]}"
        )
    # gRPC reads the target as a URI, in which a percent sign would start an escape.
    return Address(text, f"unix:{quote(os.fsencode(absolute))}", local=True, path=absolute)


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            return False
        return True
    return len(host) <= 253 and _HOST.fullmatch(host) is not None


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        number = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    # Connecting to 0.0.0.0 or [::] means this machine, too.
    return number.is_loopback or number.is_unspecified
