"""How many bytes of tensors may be on their way at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sharednorm.errors import LimitExceeded, ServerBusy

RETRY_SECONDS = 0.05
"""What a client is told to wait at least before it asks again."""


class ByteBudget:
    """Admits calls as long as their tensors fit into a number of bytes.

    Args:
        name: What the limit is called, for messages.
        nbytes: How many.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        self._name, self._nbytes = name, nbytes
        self._lock = threading.Lock()
        self._used = 0

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

    def _take(self, nbytes: int) -> None:
        limit = {"limit": self._name, "value": str(self._nbytes)}
        if nbytes > self._nbytes:
            raise LimitExceeded(
                f"a call with {nbytes} bytes of tensors is too large (expected: at most {self._name} = {self._nbytes})",
                limit,
            )
        with self._lock:
            if self._used + nbytes > self._nbytes:
                raise ServerBusy(
                    f"{self._used} bytes of tensors are on their way, and {nbytes} more do not fit ({self._name} = "
                    f"{self._nbytes}): try again in a moment",
                    {**limit, "retry_seconds": f"{RETRY_SECONDS:g}"},
                )
            self._used += nbytes
