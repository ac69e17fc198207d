"""How a server is configured: every option once, with its default, its range, its help, and how text means it.

The command line, the environment, the file and the documentation are made from `ServerConfig`; see `settings`. Imports
nothing that has to be installed.
"""

# ruff: noqa: RUF009 - functions describe the fields

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from sharednorm.core.limits import MAX_SECONDS
from sharednorm.errors import InvalidConfiguration

DEFAULT_LISTEN = "127.0.0.1:50051"
MAX_WORKERS = 1024

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18})\s*([a-z]*)", re.IGNORECASE | re.ASCII)
_REDIS = ("redis://", "rediss://", "redis+unix://")
_CUDA = re.compile(r"cuda(?::([0-9]{1,4}))?", re.ASCII)


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


def parse_state(text: str) -> Path | str | None:
    """Return the directory that a `--state` names, None for "memory:", and the text itself if it names a Redis.

    Raises:
        InvalidConfiguration: It is none of them.
    """
    if text == "memory:":
        return None
    if text.startswith(_REDIS):
        return text
    scheme, _, rest = text.partition(":")
    path = unquote(rest.removeprefix("//"))
    if scheme != "sqlite" or not path or (rest.startswith("//") and not rest.startswith("///")) or "\0" in path:
        raise InvalidConfiguration(
            f"{ascii(without_secrets(text))[:120]} is no state (expected: memory:, sqlite:///DIRECTORY, or "
            "sqlite:DIRECTORY for one below the working directory; or redis://HOST:PORT for one of several servers)"
        )
    return Path(path).expanduser().absolute()


def without_secrets(state: str) -> str:
    """Return a `--state` as it may be shown: of a Redis, without user, password and the paths of secrets."""
    if not state.startswith(_REDIS):
        return re.sub("//[^/]*@", "//", state)
    parts = urlsplit(state)
    host = parts.netloc.rpartition("@")[2]
    query = urlencode([pair for pair in parse_qsl(parts.query) if pair[0] in {"db", "prefix", "timeout"}])
    return f"{parts.scheme}://{host}{parts.path}{query and f'?{query}'}"


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


def format_size(size: int) -> str:
    """Return the text of a number of bytes that `parse_size` means: "1GiB", "1000"."""
    for unit, of in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size and size % of == 0:
            return f"{size // of}{unit}"
    return str(size)


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its default.

    Attributes:
        help: What it is, for people.
        metavar: What stands for its value; empty: it is one of `choices`, or a flag.
        parse: Makes its value of a text.
        show: Makes a text of its value.
        fine: Whether a value that is not None is in range.
        expected: The range, in words.
        choices: All values there are, where they are few.
        unset: What None means, if it may be None.
    """

    help: str
    metavar: str
    parse: Callable[[str], Any]
    show: Callable[[Any], str]
    fine: Callable[[Any], bool]
    expected: str
    choices: tuple[str, ...] = ()
    unset: str = ""

    @property
    def flag(self) -> bool:
        """Whether it is on or off, and needs no value."""
        return not (self.metavar or self.choices)

    def read(self, name: str, text: str) -> Any:
        """Return the value that a text means.

        Raises:
            InvalidConfiguration: It means none, or one that is out of range.
        """
        try:
            value = self.parse(text)
        except InvalidConfiguration:
            raise
        except ValueError:
            self._refuse(name, ascii(text)[:60])
        self.check(name, value)
        return value

    def check(self, name: str, value: Any) -> None:
        """Check that a value is in range.

        Raises:
            InvalidConfiguration: It is not.
        """
        if not (value is None and self.unset) and not self.fine(value):
            self._refuse(name, value)

    def _refuse(self, name: str, value: object) -> None:
        raise InvalidConfiguration(f"{name.replace('_', '-')} is {value} (expected: {self.expected})")


def _option(default: Any, help_: str, metavar: str, parse: Callable[[str], Any] = str, **about: Any) -> Any:
    known = {"show": str, "fine": lambda _: True, "expected": "a text", **about}
    return field(default=default, metadata={"option": Option(help_, metavar, parse, **known)})


def _number(default: int | None, help_: str, least: int = 1, most: int | None = None, unset: str = "") -> Any:
    words = f"a whole number, at least {least}" if most is None else f"a whole number, {least} to {most}"

    def fine(value: int) -> bool:
        return least <= value and (most is None or value <= most)

    return _option(default, help_, "N", int, fine=fine, expected=words, unset=unset)


def _seconds(default: float, help_: str, least: float = 0.0) -> Any:
    words = f"a number of seconds, {least:g} to {MAX_SECONDS:g}"

    def fine(value: float) -> bool:
        return math.isfinite(value) and least <= value <= MAX_SECONDS

    return _option(default, help_, "SECONDS", float, show="{:.15g}".format, fine=fine, expected=words)


def _size(default: int | None, help_: str, least: int = 0, unset: str = "") -> Any:
    about = {"fine": lambda value: value >= least, "expected": f"a size, at least {least}", "unset": unset}
    return _option(default, help_, "SIZE", parse_size, show=format_size, **about)


def _file(help_: str, unset: str) -> Any:
    return _option(None, help_, "FILE", _path, unset=unset)


def _one_of(default: str, choices: tuple[str, ...], help_: str) -> Any:
    words = ", ".join(choices[:-1]) + f" or {choices[-1]}"
    return _option(default, help_, "", fine=lambda value: value in choices, expected=words, choices=choices)


def _flag(help_: str) -> Any:
    show: Callable[[Any], str] = lambda value: str(value).lower()  # noqa: E731 - as the functions beside it are
    fine: Callable[[Any], bool] = lambda value: isinstance(value, bool)  # noqa: E731
    return _option(False, help_, "", _truth, show=show, fine=fine, expected="true, false, 1 or 0")


def _truth(text: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _path(text: str) -> Path:
    return Path(text).expanduser()


@dataclass(frozen=True)
class ServerConfig:
    """What a server is started with. What each option is stands with it, in `Option.help`; so does its range.

    Raises:
        InvalidConfiguration: A value is out of its range, or contradicts another.
    """

    listen: str = _option(
        DEFAULT_LISTEN, "where clients reach it: HOST:PORT (port 0: any that is free) or unix:PATH", "ADDRESS"
    )
    device: str = _option(
        "cpu", "what computes: cpu, cuda, cuda:1, or cuda:0,cuda:1 for layers spread over several", "DEVICE"
    )
    state: str = _option(
        "memory:",
        "what remembers: sqlite:///DIRECTORY; redis://HOST:PORT for layers that several servers share; or memory:, "
        "until the server ends",
        "STATE",
        show=without_secrets,
    )
    max_staleness: float = _seconds(
        1.0,
        "longest time that evaluation uses a server's copy of a layer in a shared store, until another server "
        "announces a change; 0: the server always asks the store",
    )
    durability: str = _one_of(
        "os",
        ("os", "fsync"),
        "what an answered change survives: os, the end of the process, kill -9 included; fsync, loss of power",
    )
    snapshot_interval: float = _seconds(
        600.0, "shortest time between two snapshots of a layer; 0: the server takes none"
    )
    snapshot_retain: int = _number(48, "snapshots that the server retains of a layer")
    snapshot_max_age: float = _seconds(
        30 * 86400.0, "age at which the server deletes a snapshot; it always retains a layer's newest one"
    )
    max_idempotency_sessions: int = _number(
        1024, "idempotency sessions that each layer remembers, so that it applies a repeated change once"
    )
    max_layers: int = _number(10_000, "layers of a namespace")
    max_concurrent_rpcs: int = _number(
        4096, "gRPC calls that run or wait at a time; the server answers others with SERVER_BUSY"
    )
    max_connections: int = _number(4096, "connections by gRPC at a time, one a client; those beyond are closed at once")
    max_direct_connections: int = _number(1024, "direct connections at a time; who gets none uses gRPC")
    handshake_timeout: float = _seconds(20.0, "time that a new connection has to complete its handshake", 0.1)
    compute_threads: int | None = _number(
        None, "threads of one computation on the CPU", unset="one per CPU that the process may use"
    )
    workers: int = _number(
        32, "calls that run at a time by gRPC, and as many on direct connections; others wait", most=MAX_WORKERS
    )
    max_tensor_bytes: int = _size(8 << 30, "largest tensor", 1)
    activation_cache_bytes: int = _size(1 << 30, "cache of forward inputs for later backwards, of all layers; 0: none")
    device_memory_bytes: int | None = _size(
        None, "most of a GPU's memory to use", 1, "nine tenths of what is free at the start"
    )
    max_inflight_bytes: int = _size(
        8 << 30,
        "bytes of large tensors in transfer at a time, of all calls; the server answers others with SERVER_BUSY",
        1,
    )
    direct_port: int | None = _option(
        0,
        "TCP port for tensors, beside gRPC's; 0: any that is free, off: none",
        "PORT",
        parse_port,
        show=lambda port: "off" if port is None else str(port),
        fine=lambda port: port is None or 0 <= port <= 65535,
        expected="0 to 65535, or off",
    )
    shared_memory_bytes: int = _size(
        8 << 30, "memory shared with clients on this machine, over a unix socket, in all; 0: none"
    )
    shared_memory_bytes_per_client: int = _size(4 << 30, "memory shared with one client")
    shutdown_grace: float = _seconds(60.0, "time that running calls have to finish when the server stops")
    insecure: bool = _flag("listen without encryption where other machines can reach it")
    tokens: Path | None = _file("tokens that clients have to show, as `sharednorm token create` writes them", "none")
    tls_cert: Path | None = _file("the server's certificate, PEM", "nothing is encrypted")
    tls_key: Path | None = _file("the private key of the certificate, PEM", "none")
    tls_client_ca: Path | None = _file("authorities of certificates that clients have to show, PEM", "they need none")
    http_listen: str | None = _option(
        None, "where it serves its page, /metrics, /healthz and /readyz: HOST:PORT", "ADDRESS", unset="nowhere"
    )
    log_level: str = _one_of("info", ("debug", "info", "warning", "error"), "what the log tells, and what is above it")
    log_format: str = _one_of("human", ("human", "json"), "whether the log is for people, or lines of JSON")

    def __post_init__(self) -> None:
        """Check every range once, where the object is made."""
        for name, option in OPTIONS.items():
            option.check(name, getattr(self, name))
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InvalidConfiguration("tls-cert or tls-key is missing (expected: both, or none)")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidConfiguration(
                "tls-client-ca needs an own certificate (expected: tls-cert and tls-key beside it)"
            )


OPTIONS: dict[str, Option] = {each.name: each.metadata["option"] for each in fields(ServerConfig)}
"""Every option of a server, by the name of its attribute."""

DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(ServerConfig)}
"""What each is if nobody says anything; but a server that is started by the command line keeps its state in a file."""
