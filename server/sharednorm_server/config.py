"""How a server is configured, and what its words mean. Imports nothing that has to be installed."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from sharednorm.config import MAX_SECONDS
from sharednorm.errors import InvalidConfiguration

DEFAULT_LISTEN = "127.0.0.1:50051"
MAX_WORKERS = 1024

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18})\s*([a-z]*)", re.IGNORECASE | re.ASCII)


_CUDA = re.compile(r"cuda(?::([0-9]{1,4}))?", re.ASCII)


class StartError(Exception):
    """The server cannot start. The message, one line, says why and what to do."""


@dataclass(frozen=True)
class ServerConfig:
    """What a server is started with.

    Attributes:
        listen: "HOST:PORT", where port 0 picks a free one, or "unix:PATH".
        device: What computes: "cpu", "cuda" for the first GPU, "cuda:1", or "cuda:0,cuda:1" for layers spread over
            several by their names.
        state: What remembers: "memory:", or "sqlite:///DIRECTORY", which other processes do not use meanwhile.
        durability: What an answered change survives in a file: "os", the end of the process, whichever way; "fsync",
            that of the machine.
        snapshot_every: Seconds between two snapshots of a layer that changes; 0: none are taken.
        snapshot_count: How many of a layer are kept, at least 1.
        snapshot_age: Seconds for which one is kept at the longest; but the newest always is.
        max_sessions: Sessions whose last changes each layer remembers, at least 1, so that a call that comes twice is
            one change.
        max_layers: Layers of a namespace, at least 1.
        max_calls: Calls by gRPC that run or wait at a time, at least 1; others are told to try again.
        max_connections: Direct connections at a time, at least 1; who gets none uses gRPC.
        threads: Threads of one computation; None for one a CPU that the process may use.
        workers: Most calls that run at a time by gRPC, and as many on direct connections; others wait. 1 to 1024.
        max_tensor_bytes: Largest tensor that is accepted, at least 1.
        saved_input_bytes: Most bytes of inputs that are kept for backwards; 0 keeps none.
        device_memory_bytes: Most bytes of a GPU's memory that are used, at least 1; None for nine tenths of what is
            free on each when the server starts.
        in_flight_bytes: Most bytes of large tensors that are on their way at a time, at least 1; calls beyond are told
            to try again.
        direct_port: TCP port for direct connections, 0 for any that is free; None: none are taken, not on a unix
            socket either.
        shared_memory_bytes: Most bytes of memory that are shared with clients on this machine; 0 shares none.
        session_memory_bytes: Most bytes of it that one client gets, at least 0.
        grace: Seconds that running calls are given to end when the server stops, 0 to 1e8.
        insecure: Whether it may listen without encryption where other machines can reach it.
        tokens: The file of the tokens that clients have to show; None: they need none.
        tls_cert: File of the server's certificate, PEM; None: nothing is encrypted.
        tls_key: File of its private key, PEM; there if the certificate is.
        tls_client_ca: File of the authorities of certificates that clients have to show, PEM; None: they need none.

    Raises:
        InvalidConfiguration: A number is out of its range.
    """

    listen: str = DEFAULT_LISTEN
    device: str = "cpu"
    state: str = "memory:"
    durability: str = "os"
    snapshot_every: float = 600.0
    snapshot_count: int = 48
    snapshot_age: float = 30 * 86400.0
    max_sessions: int = 1024
    max_layers: int = 10_000
    max_calls: int = 4096
    max_connections: int = 1024
    threads: int | None = None
    workers: int = 32
    max_tensor_bytes: int = 8 << 30
    saved_input_bytes: int = 1 << 30
    device_memory_bytes: int | None = None
    in_flight_bytes: int = 8 << 30
    direct_port: int | None = 0
    shared_memory_bytes: int = 8 << 30
    session_memory_bytes: int = 4 << 30
    grace: float = 60.0
    insecure: bool = False
    tokens: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Check every range once, where the object is made."""
        _check(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1")
        _check(self.durability in {"os", "fsync"}, "durability", self.durability, "os or fsync")
        for name in ("snapshot_every", "snapshot_age"):
            seconds = getattr(self, name)
            words = f"a number of seconds, 0 to {MAX_SECONDS:g}"
            _check(0 <= seconds <= MAX_SECONDS, name.replace("_", "-"), seconds, words)
        _check(self.snapshot_count >= 1, "snapshot-count", self.snapshot_count, "at least 1")
        for name in ("max_sessions", "max_layers", "max_calls", "max_connections"):
            _check(getattr(self, name) >= 1, name.replace("_", "-"), getattr(self, name), "at least 1")
        _check(1 <= self.workers <= MAX_WORKERS, "workers", self.workers, f"1 to {MAX_WORKERS}")
        _check(self.max_tensor_bytes >= 1, "max-tensor-bytes", self.max_tensor_bytes, "at least 1")
        _check(self.saved_input_bytes >= 0, "saved-input-bytes", self.saved_input_bytes, "at least 0")
        room = self.device_memory_bytes
        _check(room is None or room >= 1, "device-memory-bytes", room, "at least 1")
        _check(self.in_flight_bytes >= 1, "in-flight-bytes", self.in_flight_bytes, "at least 1")
        port = self.direct_port
        _check(port is None or 0 <= port <= 65535, "direct-port", port, "0 to 65535")
        _check(self.shared_memory_bytes >= 0, "shared-memory-bytes", self.shared_memory_bytes, "at least 0")
        _check(self.session_memory_bytes >= 0, "session-memory-bytes", self.session_memory_bytes, "at least 0")
        both = (self.tls_cert is None) == (self.tls_key is None)
        _check(both, "tls-cert or tls-key", "missing", "both, or none")
        asks = self.tls_client_ca is None or self.tls_cert is not None
        _check(asks, "tls-client-ca", self.tls_client_ca, "tls-cert and tls-key beside it")
        _check(0 <= self.grace <= MAX_SECONDS, "grace", self.grace, f"a number of seconds, 0 to {MAX_SECONDS:g}")


def parse_size(text: str) -> int:
    """Return the bytes that a text means: "1000", "64MiB", "2 GiB".

    Raises:
        InvalidConfiguration: It is not a whole number with a unit of KiB, MiB, GiB, TiB or none.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = match[2].upper() if match else "?"
    if match is None or unit not in _UNITS:
        raise InvalidConfiguration(f"{ascii(text)[:60]} is not a size (expected: for example 1000, 64MiB or 2GiB)")
    return int(match[1]) * _UNITS[unit]


def parse_devices(text: str) -> tuple[int, ...]:
    """Return the numbers of the GPUs that a `--device` names; none for "cpu".

    Raises:
        InvalidConfiguration: It is neither "cpu" nor a list of GPUs, or it names one twice.
    """
    if text == "cpu":
        return ()
    matches = [_CUDA.fullmatch(word.strip()) for word in text.split(",")]
    found = [int(match[1] or 0) for match in matches if match is not None]
    if len(found) < len(matches) or len(set(found)) < len(found):
        raise InvalidConfiguration(
            f"{ascii(text)[:60]} is no device (expected: cpu, cuda, cuda:1, or several GPUs as cuda:0,cuda:1)"
        )
    return tuple(found)


def parse_state(text: str) -> Path | None:
    """Return the directory that a `--state` names, and None for "memory:".

    Raises:
        InvalidConfiguration: It is neither.
    """
    if text == "memory:":
        return None
    scheme, _, rest = text.partition(":")
    path = unquote(rest.removeprefix("//"))
    if scheme != "sqlite" or not path or (rest.startswith("//") and not rest.startswith("///")) or "\0" in path:
        raise InvalidConfiguration(
            f"{ascii(text)[:120]} is no state (expected: memory:, sqlite:///DIRECTORY, or sqlite:DIRECTORY for one "
            "below the working directory)"
        )
    return Path(path).expanduser().absolute()


def default_state() -> str:
    """Return the state of a server that is told of none: where this system keeps such things, of systemd or of XDG."""
    given = os.environ.get("STATE_DIRECTORY", "").split(":")[0]  # of systemd: the service's own
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return f"sqlite:{quote(given or f'{home}/sharednorm')}"


def parse_port(text: str) -> int | None:
    """Return the port that a text means, and None for "off".

    Raises:
        InvalidConfiguration: It is neither.
    """
    if text == "off":
        return None
    if not re.fullmatch("[0-9]{1,5}", text, re.ASCII) or int(text) > 65535:
        raise InvalidConfiguration(f"{ascii(text)[:60]} is not a port (expected: 0 to 65535, or off)")
    return int(text)


def _check(fine: bool, name: str, value: object, expected: str) -> None:
    if not fine:
        raise InvalidConfiguration(f"{name} is {value} (expected: {expected})")
