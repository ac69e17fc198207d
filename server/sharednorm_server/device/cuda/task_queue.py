"""What other threads hand to the one that owns a GPU."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class TaskQueue(Generic[T]):
    """A queue that any thread puts into and one gets from, with waits as short as one likes.

    Not `queue.SimpleQueue`: until Python 3.13 its `get(timeout=...)` waits for ever if the time is up before the wait
    begins, as it is when a busy system takes the processor from the thread in between. Not `queue.Queue`, whose lock a
    finalizer could ask for that has interrupted who holds it: `put` here may be interrupted by another one anywhere.
    """

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._wake = threading.Lock()  # free while something may have come since it was looked last
        self._wake.acquire()

    def put(self, item: T) -> None:
        """Append an item."""
        self._items.append(item)
        with suppress(RuntimeError):  # it is free already: whoever gets looks again before the next wait
            self._wake.release()

    def get(self, seconds: float | None = None) -> T | None:
        """Take the first item; return None if none comes within so many seconds. None of them: as long as it takes."""
        while not self._items:
            if not self._wake.acquire(timeout=-1 if seconds is None else seconds):
                return None
        return self._items.popleft()
