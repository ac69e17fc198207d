"""Who may do what: bearer tokens with rights in namespaces. Knows no transport.

Tokens are random, 32 bytes each, and the file has their SHA-256 alone; of a secret that nobody can guess, a slow hash
with a salt would protect no better. A call names its namespace beside its token, so that it is admitted or refused
before anything of its body is looked at, and what the body names has to be in that namespace then.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote, unquote

from sharednorm.core.limits import DEFAULT_NAMESPACE
from sharednorm.core.validation import check_namespace
from sharednorm.errors import InvalidConfiguration, InvalidName, PermissionDenied, Unauthenticated
from sharednorm_server.errors import StartError

AUTHORIZATION, NAMESPACE = "authorization", "sharednorm-namespace-bin"
_SCHEME = "Bearer "
_PREFIX = "sn_"
# How often the file is looked at for changes.
_LOOK_SECONDS = 1.0

_log = logging.getLogger(__name__)


class Right(enum.IntEnum):
    """What a token may be used for; each includes those before it."""

    READ = 1
    EVAL = 2
    TRAIN = 3
    ADMIN = 4


# The right that each method needs in its namespace. Forward needs TRAIN as well if it may train.
RIGHTS: Mapping[str, Right] = {
    **dict.fromkeys(
        ("GetServerInfo", "GetLayer", "ListLayers", "ListDomains", "GetStats", "BatchGetStats", "ListSnapshots",
         "GetRunningStatistics", "ListRunningStatistics"),
        Right.READ,
    ),
    **dict.fromkeys(("Forward", "ForwardStream"), Right.EVAL),
    **dict.fromkeys(
        (
            "OpenSession", "CreateLayer", "BatchCreateLayers", "CreateDomain", "Backward", "BackwardStream",
            "PushMoments", "BatchPushMoments", "PushGradients", "JoinGroup", "SynchronizeMoments",
            "SynchronizeGradients", "LeaveGroup", "SetState", "BatchSetState", "MergeStatistics", "UpdateParams",
            "CreateRunningStatistics", "PushRunningStatistics", "BatchPushRunningStatistics", "SetRunningStatistics",
            "FreezeRunningStatistics",
        ),
        Right.TRAIN,
    ),
    **dict.fromkeys(
        (
            "DeleteLayer", "DeleteLayers", "DeleteDomain", "DeleteRunningStatistics", "SetTrain", "UpdateLayer",
            "Rollback", "Backup",
        ),
        Right.ADMIN,
    ),
}  # fmt: skip
# What concerns all namespaces takes a token for all of them.
_EVERYWHERE = {"Backup"}


@dataclass(frozen=True)
class Token:
    """What is known of a token.

    Attributes:
        name: Whose it is, for people.
        right: What it may be used for.
        namespaces: Where: names, or patterns of the shell.
        expires: Until when, in seconds since the epoch; None: for ever.
        digest: SHA-256 of the token.
    """

    name: str
    right: Right
    namespaces: tuple[str, ...]
    expires: float | None
    digest: bytes

    def line(self) -> str:
        """Return it as a line of the file."""
        until = "never"
        if self.expires is not None:
            until = datetime.fromtimestamp(self.expires, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        where = ",".join(quote(name, safe="*?[]!/:.-_") for name in self.namespaces)
        return f"{quote(self.name)} {self.right.name.lower()} {where} {until} {self.digest.hex()}"

    @classmethod
    def parse(cls, line: str) -> Token:
        """Return the token of a line.

        Raises:
            ValueError: It is no such line.
        """
        name, right, where, until, digest = line.split()
        expires = None
        if until != "never":
            expires = datetime.strptime(until, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
        hashed = bytes.fromhex(digest)
        if len(hashed) != hashlib.sha256().digest_size:
            raise ValueError("the last word is no SHA-256")
        return cls(unquote(name), Right[right.upper()], tuple(map(unquote, where.split(","))), expires, hashed)


def new_token(name: str, right: Right, namespaces: tuple[str, ...], expires: float | None) -> tuple[str, Token]:
    """Return a new token, which is told once, and what is kept of it."""
    text = _PREFIX + secrets.token_urlsafe(32)
    return text, Token(name, right, namespaces, expires, _digest(text))


class Caller:
    """Whoever makes a call: what was admitted.

    Args:
        token: Theirs.
        namespace: In which the call was admitted.
    """

    def __init__(self, token: Token, namespace: str) -> None:
        self._token = token
        self._namespace = namespace

    def require_namespace(self, namespace: str) -> None:
        """Check that the body of the call is of the namespace that it was admitted in.

        Raises:
            PermissionDenied: It is of another.
        """
        if namespace != self._namespace:
            raise PermissionDenied(
                f"the call is of another namespace than the one that it names in {NAMESPACE} (expected: the same)"
            )

    def require(self, right: Right) -> None:
        """Check that the token has a right.

        Raises:
            PermissionDenied: It has a lesser one.
        """
        if self._token.right < right:
            raise PermissionDenied(
                f"this token is not for that here (expected: one with the right {right.name.lower()} in this "
                "namespace)",
                {"right": right.name.lower()},
            )


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def require_namespace(namespace: str) -> None:
    """Check that the call that runs may be about a namespace; without tokens every call may."""
    caller = _caller.get()
    if caller is not None:
        caller.require_namespace(namespace)


def require(right: Right) -> None:
    """Check that the call that runs has a right; without tokens every call has."""
    caller = _caller.get()
    if caller is not None:
        caller.require(right)


class TokenFile:
    """The tokens of a file, read anew when it changes. Any number of threads may use it.

    Args:
        path: The file. Lines are tokens, empty, or comments that begin with #.

    Raises:
        StartError: It cannot be read, others can, or a line is no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._stamp, self._tokens = self._read()

    def admit(self, method: str, metadata: Mapping[str, str | bytes]) -> Caller:
        """Return who makes a call, if they may.

        Args:
            method: Its name.
            metadata: Of the call.

        Raises:
            Unauthenticated: It has no token, an unknown one, or one that has expired.
            PermissionDenied: The token is not for that method in that namespace.
        """
        token = self._find(metadata.get(AUTHORIZATION))
        namespace = _namespace(metadata.get(NAMESPACE))
        # One that there is not is refused behind this by its name, whatever the right.
        needed = RIGHTS.get(method, Right.READ)
        return self._admitted(token, namespace, needed, everywhere=method in _EVERYWHERE)

    def admit_reader(self, authorization: str | None, namespace: str) -> None:
        """Check that somebody may read what a namespace has; raises what `admit` raises.

        Args:
            authorization: What they show: "Bearer " and a token.
            namespace: The namespace.
        """
        self._admitted(self._find(authorization), namespace, Right.READ, everywhere=False)

    def require_known(self, authorization: str | None) -> None:
        """Check that somebody has a token, for whatever.

        Raises:
            Unauthenticated: They have none, an unknown one, or one that has expired.
        """
        self._find(authorization)

    def _admitted(self, token: Token, namespace: str, needed: Right, *, everywhere: bool) -> Caller:
        caller = Caller(token, namespace)
        if (everywhere and "*" not in token.namespaces) or not any(
            fnmatchcase(namespace, pattern) for pattern in token.namespaces
        ):
            # As if it had no right there: what there is, and whether, is nobody else's business.
            raise PermissionDenied(
                f"this token is not for that here (expected: one with the right {needed.name.lower()} in "
                f"{'every namespace' if everywhere else 'this namespace'})",
                {"right": needed.name.lower()},
            )
        caller.require(needed)
        return caller

    @contextmanager
    def as_caller(self, method: str, metadata: Mapping[str, str | bytes]) -> Iterator[None]:
        """Run a call as whoever makes it; raises what `admit` raises."""
        before = _caller.set(self.admit(method, metadata))
        try:
            yield
        finally:
            _caller.reset(before)

    def _find(self, given: str | bytes | None) -> Token:
        if not isinstance(given, str) or not given.startswith(_SCHEME):
            raise Unauthenticated("this server asks for a token, and the call has none (pass token= to connect())")
        self._look()
        digest = _digest(given[len(_SCHEME) :])
        token = self._tokens.get(digest)
        if token is None or not hmac.compare_digest(token.digest, digest):
            raise Unauthenticated("the token is none of this server's (expected: one that is in its file of tokens)")
        if token.expires is not None and time.time() >= token.expires:
            raise Unauthenticated("the token has expired (expected: a new one)")
        return token

    def _look(self) -> None:
        if time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        if not self._lock.acquire(blocking=False):
            return  # another thread reads the file: this call goes on with the tokens that there are
        try:
            self._looked = time.monotonic()
            if _stamp(self._path) != self._stamp:
                self._stamp, self._tokens = self._read()
                _log.info("read %d tokens of %s", len(self._tokens), self._path)
        except (OSError, StartError) as error:
            _log.error("the tokens stay as they are: %s", error)
        finally:
            self._lock.release()

    def _read(self) -> tuple[tuple[int, int], dict[bytes, Token]]:
        try:
            stamp, text = _stamp(self._path), self._path.read_text(encoding="utf-8")
            mode = self._path.stat().st_mode
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(f"the tokens in {self._path} cannot be read: {error}") from error
        if mode & 0o022:
            raise StartError(f"others may write to {self._path}, who could give themselves tokens: chmod go-w it")
        tokens = {}
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                try:
                    token = Token.parse(line)
                except (ValueError, KeyError):
                    raise StartError(
                        f"line {number} of {self._path} is no token (expected: a line that `sharednorm token create` "
                        "has written)"
                    ) from None
                tokens[token.digest] = token
        return stamp, tokens


def parse_until(text: str, now: float) -> float | None:
    """Return when a token expires, which a text says: "never", or so many days, hours or minutes: "90d", "12h", "30m".

    Raises:
        InvalidConfiguration: It says none of that.
    """
    units = {"d": 86400, "h": 3600, "m": 60}
    if text == "never":
        return None
    if text[-1:] in units and text[:-1].isascii() and text[:-1].isdigit() and 1 <= int(text[:-1]) <= 100_000:
        return now + int(text[:-1]) * units[text[-1]]
    raise InvalidConfiguration(f"{ascii(text)[:60]} is no time (expected: never, or for example 90d, 12h or 30m)")


def append(path: Path, token: Token) -> None:
    """Write a token behind those of a file, which is made for this user alone if it is not there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{token.line()}\n".encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _namespace(given: str | bytes | None) -> str:
    try:
        text = given.decode() if isinstance(given, bytes) else given or DEFAULT_NAMESPACE
        return check_namespace(text)
    except (UnicodeDecodeError, InvalidName):
        raise PermissionDenied(f"{NAMESPACE} is no namespace (expected: the one of the call, in UTF-8)") from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_ino
