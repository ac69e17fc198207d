"""Whoever wants to know of calls, seen from the edges that run them and the rooms that spend their time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

DEVICE, STORE = "device", "store"
"""Where a call's time goes that it does not spend here."""


@dataclass(frozen=True)
class Origin:
    """Where a call comes from.

    Attributes:
        peer: Whoever made it, as the transport names them; "" for nobody who can be named.
        parent: The span that it belongs to, as a `traceparent` of W3C; "" for none.
        state: What goes with that, a `tracestate`.
    """

    peer: str = ""
    parent: str = ""
    state: str = ""


class Seen(Protocol):
    """One call that is watched."""

    def started(self) -> None:
        """Say that it waits for no worker any more."""
        ...

    def moved(self, received: int, sent: int) -> None:
        """Say that so many more bytes have come, or gone."""
        ...

    def spent(self, where: str, what: str, began: float, seconds: float) -> None:
        """Say where time has gone.

        Args:
            where: DEVICE or STORE.
            what: What was done there; "" for a piece of something larger.
            began: When, by `time.perf_counter`.
            seconds: How long.
        """
        ...

    def failed(self, code: str) -> None:
        """Say with which code it ends, if not with OK."""
        ...

    def ended(self) -> None:
        """Say that it is over."""
        ...


class Watcher(Protocol):
    """Whoever wants to know of calls."""

    def begin(self, method: str, transport: str, id: str, origin: Callable[[], Origin], arrived: float) -> Seen:  # noqa: A002
        """Say that a call has come.

        Args:
            method: Of the contract.
            transport: How the call came: "grpc", "direct" or "shm".
            id: What the log calls it.
            origin: Says where it comes from; asked while `begin` runs, or never.
            arrived: When it came, by `time.perf_counter`.
        """
        ...


class _Blind:
    """Watches nothing, and costs nothing."""

    def begin(self, method: str, transport: str, id: str, origin: Callable[[], Origin], arrived: float) -> Seen:  # noqa: A002
        del method, transport, id, origin, arrived
        return self

    def started(self) -> None: ...

    def moved(self, received: int, sent: int) -> None: ...

    def spent(self, where: str, what: str, began: float, seconds: float) -> None: ...

    def failed(self, code: str) -> None: ...

    def ended(self) -> None: ...


_BLIND = _Blind()
NOBODY: Watcher = _BLIND


class Watchers:
    """Several that watch the same calls.

    Args:
        watchers: Which.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def begin(self, method: str, transport: str, id: str, origin: Callable[[], Origin], arrived: float) -> Seen:  # noqa: A002
        """Say that a call has come."""
        return _SeenByAll([watcher.begin(method, transport, id, origin, arrived) for watcher in self._watchers])


class _SeenByAll:
    __slots__ = ("_all",)

    def __init__(self, seen: list[Seen]) -> None:
        self._all = seen

    def started(self) -> None:
        for seen in self._all:
            seen.started()

    def moved(self, received: int, sent: int) -> None:
        for seen in self._all:
            seen.moved(received, sent)

    def spent(self, where: str, what: str, began: float, seconds: float) -> None:
        for seen in self._all:
            seen.spent(where, what, began, seconds)

    def failed(self, code: str) -> None:
        for seen in self._all:
            seen.failed(code)

    def ended(self) -> None:
        for seen in self._all:
            seen.ended()


_current: ContextVar[Seen] = ContextVar("seen", default=_BLIND)


def current() -> Seen:
    """Return the call that this thread works on."""
    return _current.get()


@contextmanager
def working_on(seen: Seen) -> Iterator[None]:
    """Have what this thread spends be a call's."""
    before = _current.set(seen)
    try:
        yield
    finally:
        _current.reset(before)


@contextmanager
def spending(where: str, what: str, seen: Seen | None = None) -> Iterator[None]:
    """Count the time of something to a call; None: the one that this thread works on."""
    seen = _current.get() if seen is None else seen
    if seen is _BLIND:
        yield
        return
    began = time.perf_counter()
    try:
        yield
    finally:
        seen.spent(where, what, began, time.perf_counter() - began)
