"""Whoever wants to know of calls, seen from the edges that run them."""

from __future__ import annotations

from typing import Protocol


class Seen(Protocol):
    """One call that is watched."""

    def started(self) -> None:
        """Say that it waits for no worker any more."""
        ...

    def moved(self, received: int, sent: int) -> None:
        """Say that so many more bytes have come, or gone."""
        ...

    def failed(self, code: str) -> None:
        """Say with which code it ends, if not with OK."""
        ...

    def ended(self) -> None:
        """Say that it is over."""
        ...


class Watcher(Protocol):
    """Whoever wants to know of calls."""

    def begin(self, method: str, way: str, arrived: float | None = None) -> Seen:
        """Say that a call has come: now, or at a time of `time.perf_counter`."""
        ...


class _Blind:
    """Watches nothing, and costs nothing."""

    def begin(self, method: str, way: str, arrived: float | None = None) -> Seen:
        del method, way, arrived
        return self

    def started(self) -> None: ...

    def moved(self, received: int, sent: int) -> None: ...

    def failed(self, code: str) -> None: ...

    def ended(self) -> None: ...


NOBODY: Watcher = _Blind()
