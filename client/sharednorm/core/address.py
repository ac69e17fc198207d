"""Where a server listens, as users write it: "host:port", "[::1]:port" or "unix:path"."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sharednorm.errors import InvalidConfiguration

# sockaddr_un of Linux has 108 bytes, the last of which is zero.
MAX_SOCKET_PATH_BYTES = 107

_EXPECTED = 'expected: "host:port", "[::1]:port" or "unix:/path/of/socket"'
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9.])?", re.ASCII)
Found = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]
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


def parse_addresses(text: object) -> list[Address]:
    """Check an address, or several with commas between them.

    Raises:
        InvalidConfiguration: One has none of the forms, or comes twice.
    """
    if not isinstance(text, str) or "," not in text:
        return [parse_address(text)]
    found = [parse_address(part.strip()) for part in text.split(",")]
    if len({address.text for address in found}) < len(found):
        raise InvalidConfiguration(f"{ascii(text)[:120]} names an address twice (expected: each server once)")
    return found


def addresses_of(address: Address, seconds: float) -> list[Address]:
    """Return the addresses that a name has, if it has several of one kind: those of several servers; else itself.

    So also if nobody says what addresses it has within so many seconds: then gRPC finds that out, and says it.
    """
    host, port = address.host, address.text.rpartition(":")[2]
    found: list[Found] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            found.extend(socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM))

    asking = threading.Thread(target=ask, name="sharednorm-name", daemon=True)  # which nobody can interrupt
    asking.start()
    asking.join(seconds)
    for family in (socket.AF_INET, socket.AF_INET6):
        hosts = sorted({str(where[0]) for kind, _, _, _, where in list(found) if kind == family})
        if len(hosts) > 1:
            texts = [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]
            return [Address(each, f"dns:///{each}", local=False, host=host) for each in texts]
    return [address]


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


def is_number(host: str) -> bool:
    """Return whether a host is an address already, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        number = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    # Connecting to 0.0.0.0 or [::] means this machine, too.
    return number.is_loopback or number.is_unspecified
