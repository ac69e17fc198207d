"""Which locks of the library are held while their thread waits for a disk, a network, or another thread.

Such a lock makes every thread that wants it wait as well, for something that it may have no need of. With
SHAREDNORM_LOCK_AUDIT=1, `tests/conftest.py` calls `install` before the library is imported. From then on locks that
modules of sharednorm and sharednorm_server create are recorded, and each wait of a thread that holds one is a finding:
a pair of a lock and a kind of wait. Findings fail the run, except those that `lock_audit_allowed.ALLOWED` has a reason
for. A wait for one of those locks is a wait of its own kind: a thread that holds another lock there waits just as long.

A server process of a test is started by `python -m tests.support.lock_audit sharednorm_server ...`; its findings come
back in a file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import linecache
import os
import re
import runpy
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import grpc
import pytest

from tests.support.lock_audit_allowed import ALLOWED, SIGNALS

SWITCH = "SHAREDNORM_LOCK_AUDIT"
_FILE = "SHAREDNORM_LOCK_AUDIT_FILE"  # where all processes of a run write their findings
_PACKAGES = ("sharednorm", "sharednorm_server")
_ROOT = Path(__file__).parents[2]
_LINES = 8

_real_lock, _real_rlock = threading.Lock, threading.RLock


@dataclass(frozen=True)
class Finding:
    """A lock that was held during a wait.

    Attributes:
        site: Where the lock was created: "module:Class.attribute".
        kind: What its thread waited for.
        stack: The innermost lines of the library and of the tests, the waiting one last.
        allowed: Whether there is a reason for it.
    """

    site: str
    kind: str
    stack: tuple[str, ...]
    allowed: bool


class _Held(threading.local):
    # The recorded locks that a thread holds; one that it has taken twice is there twice. And whether it starts another
    # thread now, which waits until the system has given one, as an allocation waits for memory: no finding.
    def __init__(self) -> None:
        self.locks: list[_Lock | _RLock] = []
        self.starts = False


_held = _Held()
_known: set[tuple[str, str, bool]] = set()
_descriptor = -1
_leads = False  # whether this is the run itself, and none of its workers and server processes


def enabled() -> bool:
    """Return whether the run is audited."""
    return os.environ.get(SWITCH) == "1"


def note(kind: str, but: object = None) -> None:
    """Record that this thread waits now, for every lock that it holds except one."""
    for lock in _held.locks:
        if lock is but or (lock.site, kind, False) in _known:
            continue
        functions, lines = _stack()
        if not lines or lines[0].startswith("tests/"):
            continue  # a test waits by itself, inside a double of a store perhaps, to hold up the library
        allowed = _is_allowed(lock.site, kind, functions)
        if (lock.site, kind, allowed) not in _known:
            _known.add((lock.site, kind, allowed))
            _write(Finding(lock.site, kind, tuple(reversed(lines[:_LINES])), allowed))


def _is_allowed(site: str, kind: str, functions: set[str]) -> bool:
    return any(
        kind in allowed.kinds and (not allowed.within or allowed.within in functions)
        for allowed in ALLOWED.get(site, ())
    )


def _write(finding: Finding) -> None:
    # All processes append to one file, each finding by one write: a process that is killed has said what it found.
    os.write(_descriptor, json.dumps(asdict(finding)).encode() + b"\n")


def findings() -> list[Finding]:
    """Return what was found so far by all processes of this run, each pair once, in order."""
    found: dict[tuple[bool, str, str], Finding] = {}
    for line in Path(os.environ[_FILE]).read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        finding = Finding(fields["site"], fields["kind"], tuple(fields["stack"]), fields["allowed"])
        found.setdefault((finding.allowed, finding.site, finding.kind), finding)
    return [found[pair] for pair in sorted(found, reverse=True)]


def _stack() -> tuple[set[str], list[str]]:
    # The functions and the lines of the library and of the tests that this thread is in, the innermost line first.
    functions: set[str] = set()
    lines: list[str] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, path = str(frame.f_globals.get("__name__")), frame.f_code.co_filename
        if path != __file__ and module.partition(".")[0] in {*_PACKAGES, "tests"}:
            functions.add(f"{module}.{frame.f_code.co_name}")
            lines.append(f"{os.path.relpath(path, _ROOT)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return functions, lines


# --- Locks ----------------------------------------------------------------------------------------------


class _Lock:
    # A `threading.Lock` that knows which thread holds it. Another thread may release it.
    def __init__(self, site: str) -> None:
        self.site = site
        self._lock = _real_lock()
        self._owner: list[_Lock | _RLock] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and _held.locks and self.site in ALLOWED:
            note(f"lock {self.site}")
        acquired = self._lock.acquire(blocking, timeout)
        if acquired:
            self._owner = _held.locks
            self._owner.append(self)
        return acquired

    def release(self) -> None:
        with contextlib.suppress(ValueError):  # not locked: the lock itself says so
            self._owner.remove(self)
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class _RLock:
    # A `threading.RLock`, also as the lock of a condition, which lets go of it while it waits.
    def __init__(self, site: str) -> None:
        self.site = site
        self._lock: Any = _real_rlock()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking and _held.locks and self.site in ALLOWED and self not in _held.locks:
            note(f"lock {self.site}")
        acquired = bool(self._lock.acquire(blocking, timeout))
        if acquired:
            _held.locks.append(self)
        return acquired

    def release(self) -> None:
        self._lock.release()
        _held.locks.remove(self)

    def locked(self) -> bool:
        """Return whether a thread holds it, as a condition of Python 3.14 asks; those before have no such method."""
        return bool(self._lock.locked())

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())

    def _release_save(self) -> Any:
        _held.locks[:] = [lock for lock in _held.locks if lock is not self]
        return self._lock._release_save()

    def _acquire_restore(self, state: Any) -> None:
        self._lock._acquire_restore(state)
        _held.locks.extend([self] * state[0])


def _site(frame: FrameType) -> str | None:
    # Where a lock is created, if a module of the library creates it, and if it is one that guards something.
    module = str(frame.f_globals.get("__name__"))
    if module.partition(".")[0] not in _PACKAGES:
        return None
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    found = re.match(r"\s*(?:self\.)?(\w+)[^=]*=\s*.*threading\.", line)
    name = found[1] if found else frame.f_code.co_name
    owner = frame.f_locals.get("self")
    site = f"{module}:{name}" if owner is None else f"{type(owner).__module__}:{type(owner).__name__}.{name}"
    return None if site in SIGNALS else site


def _new_lock() -> Any:
    site = _site(sys._getframe(1))
    return _real_lock() if site is None else _Lock(site)


def _new_rlock() -> Any:
    site = _site(sys._getframe(1))
    return _real_rlock() if site is None else _RLock(site)


_real_condition, _real_wait = threading.Condition.__init__, threading.Condition.wait


def _new_condition(self: threading.Condition, lock: Any = None) -> None:
    site = _site(sys._getframe(1)) if lock is None else None
    own: Any = lock if site is None else _RLock(site)
    _real_condition(self, own)


def _wait(self: threading.Condition, timeout: float | None = None) -> bool:
    # Also what `Event.wait`, `Future.result` and gRPC's streams wait by.
    if _held.locks and timeout != 0 and not _held.starts:
        note("wait", but=getattr(self, "_lock", None))
    return _real_wait(self, timeout)


_real_start = threading.Thread.start


def _start(self: threading.Thread) -> None:
    _held.starts = True
    try:
        _real_start(self)
    finally:
        _held.starts = False


# --- Waits ----------------------------------------------------------------------------------------------


def _wrap(owner: Any, name: str, kind: str) -> None:
    real = getattr(owner, name)

    @functools.wraps(real)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _held.locks:
            note(kind)
        return real(*args, **kwargs)

    setattr(owner, name, wrapper)


def _wrap_socket(name: str) -> None:
    real = getattr(socket.socket, name)

    @functools.wraps(real)
    def wrapper(self: socket.socket, *args: Any, **kwargs: Any) -> Any:
        if _held.locks and self.gettimeout() != 0:
            flags = args[1] if name in {"send", "recv"} and len(args) > 1 else 0
            if not flags & socket.MSG_DONTWAIT:
                note("socket")
        return real(self, *args, **kwargs)

    setattr(socket.socket, name, wrapper)


class _Connection(sqlite3.Connection):
    def execute(self, *args: Any, **kwargs: Any) -> sqlite3.Cursor:
        note("sqlite")
        return super().execute(*args, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> sqlite3.Cursor:
        note("sqlite")
        return super().executemany(*args, **kwargs)

    def executescript(self, *args: Any, **kwargs: Any) -> sqlite3.Cursor:
        note("sqlite")
        return super().executescript(*args, **kwargs)

    def commit(self) -> None:
        note("sqlite")
        super().commit()


def _heard(event: str, args: tuple[Any, ...]) -> None:
    # What is too low to be wrapped. The interpreter opens modules and compiled code, too, each once.
    if not _held.locks:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        if not os.fsdecode(args[0]).endswith((".py", ".pyc", ".so")):
            note("open file")
    elif event in {"subprocess.Popen", "socket.getaddrinfo"}:
        note(event)


def install() -> None:
    """Record locks that the library creates from now on, and waits.

    Raises:
        RuntimeError: The library has been imported, so that some of its locks may be there.
    """
    if any(name in sys.modules for name in _PACKAGES):
        raise RuntimeError("the library was imported before the audit of its locks was installed")
    global _descriptor, _leads  # noqa: PLW0603 - a process installs it once
    if _FILE not in os.environ:
        _leads = True
        descriptor, os.environ[_FILE] = tempfile.mkstemp(prefix="sharednorm-locks-")
        os.close(descriptor)
    _descriptor = os.open(os.environ[_FILE], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    patches: list[tuple[Any, str, object]] = [
        (threading, "Lock", _new_lock),
        (threading, "RLock", _new_rlock),
        (threading.Condition, "__init__", _new_condition),
        (threading.Condition, "wait", _wait),
        (threading.Thread, "start", _start),
        (sqlite3, "connect", functools.partial(sqlite3.connect, factory=_Connection)),
    ]
    for owner, name, new in patches:
        setattr(owner, name, new)
    for name in ("fsync", "fdatasync"):
        _wrap(os, name, "fsync")
    _wrap(time, "sleep", "sleep")
    _wrap(threading.Thread, "join", "wait")
    for name in ("send", "sendall", "sendmsg", "recv", "recv_into", "recvmsg", "connect", "accept"):
        _wrap_socket(name)
    calls = importlib.import_module("grpc._channel")
    for name in ("__call__", "with_call"):
        _wrap(calls._UnaryUnaryMultiCallable, name, "grpc")
        _wrap(calls._StreamUnaryMultiCallable, name, "grpc")
    _wrap(grpc, "channel_ready_future", "grpc")
    sys.addaudithook(_heard)
    _install_stores()


def _install_stores() -> None:
    # Whether a store waits depends on the moment, and on which one it is: memory stands for the others.
    from sharednorm_server.store.memory import MemoryStore, _AtOnce
    from sharednorm_server.store.redis.connection import RedisConnection
    from sharednorm_server.store.sqlite.group_commit import Change

    _wrap(Change, "wait", "commit")
    _wrap(_AtOnce, "wait", "commit")
    _wrap(RedisConnection, "ask_all", "redis")
    for name in ("get", "create", "delete", "page", "remembered", "snapshots", "snapshot"):
        _wrap(MemoryStore, name, "store")


def arguments(module: str) -> list[str]:
    """Return the arguments by which Python runs a module, under the audit if this process is."""
    return ["-m", "tests.support.lock_audit", module] if enabled() else ["-m", module]


class Report:
    """A plugin of pytest: ends an audited run with the findings, and fails it for those without a reason."""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that was good until now."""
        if session.exitstatus == pytest.ExitCode.OK and any(not finding.allowed for finding in findings()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was found."""
        terminalreporter.section("locks held across I/O")
        for finding in findings():
            if finding.allowed:
                terminalreporter.write_line(f"by design: {finding.site} during {finding.kind}")
                continue
            terminalreporter.write_line(f"FOUND: {finding.site} is held during {finding.kind}", red=True)
            for line in finding.stack:
                terminalreporter.write_line(f"    {line}")

    def pytest_unconfigure(self) -> None:
        """Leave no file behind."""
        if _leads:
            Path(os.environ[_FILE]).unlink()


if __name__ == "__main__":
    # This module is `__main__`, and the one that records has to be the one that others import.
    importlib.import_module("tests.support.lock_audit").install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
