"""Changes that wait for a transaction of SQLite's, and who waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from sharednorm.errors import StoreFailed
from sharednorm_server.store.base import LayerKey

Works: TypeAlias = Sequence[tuple[Callable[[], bool] | None, Sequence[Callable[[], None]]]]
"""What a transaction is made of: for each change what may do it in one statement, and what does it else."""


class Change:
    """Something that waits for the next transaction, and for whom.

    Args:
        settle: Sees that it is done, if nobody else does.
        key: The layer.
        work: Does it.
        note: Done also where another put of the layer follows, so that the work need not be.
        at_once: Does both in one statement, if it can, and says whether it has.
        put: Whether it says all of the layer.
    """

    __slots__ = ("_settle", "at_once", "done", "failed", "key", "note", "put", "waiters", "work")

    def __init__(
        self,
        settle: Callable[[Change], None],
        key: LayerKey,
        work: Callable[[], None],
        note: Callable[[], None] | None = None,
        at_once: Callable[[], bool] | None = None,
        *,
        put: bool,
    ) -> None:
        self._settle = settle
        self.key, self.work, self.note, self.put = key, work, note, put
        self.at_once = at_once
        self.done = self.failed = False
        self.waiters: list[Waiter] = []

    def wait(self) -> None:
        """Return when the change is kept.

        Raises:
            StoreFailed: It is not known whether it is.
        """
        if not self.done:
            self._settle(self)
        if self.failed:
            raise failed()


class Waiter:
    """A thread that waits until a change is kept, or until it is to commit itself."""

    __slots__ = ("_signal", "leads")

    def __init__(self) -> None:
        self._signal = threading.Lock()
        self._signal.acquire()
        self.leads = False

    def wait(self) -> None:
        """Wait until it is woken."""
        self._signal.acquire()

    def wake(self) -> None:
        """Wake it, once."""
        self._signal.release()


def failed() -> StoreFailed:
    """Return the error of a store that has failed."""
    return StoreFailed(
        "the server cannot keep its state any more, and ends; whether it has kept this change is not known: read the "
        "layer when the server is back"
    )


def needed(batch: list[Change]) -> Works:
    """Return what is to be done: of records of one layer that follow each other the last one says it all."""
    works: list[tuple[Callable[[], bool] | None, Sequence[Callable[[], None]]]] = []
    behind: dict[LayerKey, bool] = {}
    for change in reversed(batch):
        noted = [] if change.note is None else [change.note]
        if not (change.put and behind.get(change.key)):
            works.append((change.at_once, [change.work, *noted]))
        elif noted:
            works.append((None, noted))
        behind[change.key] = change.put
    works.reverse()
    return works
