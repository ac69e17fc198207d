"""When a call has to be over."""

from __future__ import annotations

import time


class Deadline:
    """The moment at which a call, with all that it does on the way, has to be over.

    Args:
        timeout: Seconds from now.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self._end - time.monotonic())
