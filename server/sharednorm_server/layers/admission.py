"""How many bytes of tensors may be on their way at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sharednorm.errors import LimitExceeded, ServerBusy

RETRY_SECONDS = 0.05
"""What a client is told to wait at least before it asks again."""
MOST_RETRY_SECONDS = 2.0
"""What it is told to wait at most."""
_WEIGHT = 0.2  # of the last call, in what is known of how long a byte takes


class ByteBudget:
    """Admits calls as long as their tensors fit into a number of bytes.

    Args:
        name: What the limit is called, for messages.
        nbytes: How many.
        clock: Tells the time in seconds.
    """

    def __init__(self, name: str, nbytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._nbytes, self._clock = name, nbytes, clock
        self._lock = threading.Lock()
        self._used = 0
        self._since = 0.0  # when a call has ended for the last time, or one has come to an empty budget
        self._pace = 0.0  # seconds a byte, of the last calls that have ended

    @property
    def used(self) -> int:
        """Bytes of what is admitted now."""
        return self._used

    @contextmanager
    def admitted(self, nbytes: int) -> Iterator[None]:
        """Admit a call for as long as the context lasts.

        Raises:
            LimitExceeded: It would not even fit alone.
            ServerBusy: It does not fit now; the metadata say when to try again.
        """
        self._take(nbytes)
        try:
            yield
        finally:
            with self._lock:
                self._used -= nbytes
                now = self._clock()
                last = (now - self._since) / max(1, nbytes)
                self._pace, self._since = self._pace + _WEIGHT * (last - self._pace), now

    def _take(self, nbytes: int) -> None:
        limit = {"limit": self._name, "value": str(self._nbytes)}
        if nbytes > self._nbytes:
            raise LimitExceeded(
                f"a call with {nbytes} bytes of tensors is too large (expected: at most {self._name} = {self._nbytes})",
                limit,
            )
        with self._lock:
            if self._used + nbytes > self._nbytes:
                # By then half of those that were before it are through: it comes neither in vain, nor too late.
                seconds = max(RETRY_SECONDS, min(MOST_RETRY_SECONDS, self._used * self._pace / 2))
                raise ServerBusy(
                    f"{self._used} bytes of tensors are on their way, and {nbytes} more do not fit ({self._name} = "
                    f"{self._nbytes}): try again in a moment",
                    {**limit, "retry_seconds": f"{seconds:.3g}"},
                )
            if not self._used:
                self._since = self._clock()
            self._used += nbytes
