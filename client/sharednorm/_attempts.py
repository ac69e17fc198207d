"""How a call is made again while its server is away."""

from __future__ import annotations

import random
import time

from sharednorm._deadline import Deadline
from sharednorm.errors import ServerUnavailable

# Pauses before a call is made again, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class Attempts:
    """Makes a call again for as long as the server is away, until its deadline. Only of calls that bear it.

    Args:
        left: When the call has to be over.

    Attributes:
        left: The same.
        unknown: Whether an attempt has ended without an answer, so that the server may have done what it asks for.
    """

    def __init__(self, left: Deadline) -> None:
        self.left = left
        self.unknown = False
        self._pause = _FIRST_PAUSE

    def failed(self, error: ServerUnavailable) -> None:
        """Wait until the call may be made again; raise what it has ended with if there is no time for that."""
        self.unknown = True
        pause = self._pause * random.uniform(0.75, 1.25)  # noqa: S311 - no secret: it spreads those who wait
        if self.left.left() <= pause:
            raise error
        time.sleep(pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
