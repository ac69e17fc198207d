"""How a call is made again while its server is away or busy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from sharednorm.errors import DeadlineExceeded, MalformedMessage, ServerBusy, ServerUnavailable
from sharednorm.transport.deadline import Deadline

# Pauses before a call is made again, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0

A = TypeVar("A")


class RetryPolicy:
    """Makes a call again for as long as the server is away or busy, until its deadline. Only of calls that bear it.

    Args:
        left: When the call has to be over.
        away: Whether to wait for a server that is away; else only for one that is busy.

    Attributes:
        left: The same.
        unknown: Whether an attempt has ended without an answer, so that the server may have done what it asks for.
    """

    def __init__(self, left: Deadline, *, away: bool = True) -> None:
        self.left = left
        self._away = away
        self.unknown = False

    def run(self, call: Callable[[], A], restart: Callable[[], object] = lambda: None) -> A:
        """Make a call.

        Args:
            call: Makes it once.
            restart: Called before it is made again.

        Raises:
            ServerUnavailable, ServerBusy: The server was so when there was time for one more attempt for the last time.
            SharedNormError: What the call raises.
        """
        pause, away = _FIRST_PAUSE, None
        while True:
            try:
                return call()
            except ServerBusy as busy:  # which has done nothing
                seconds = _spread(max(_told(busy), pause), 1.0, 1.5)
                if self.left.left() <= seconds:
                    raise
            except ServerUnavailable as error:
                self.unknown, away = True, error
                seconds = _spread(pause, 0.75, 1.25)
                if not self._away or self.left.left() <= seconds:
                    raise
            except DeadlineExceeded:
                self.unknown = True
                if away is not None:
                    raise away from None  # which says why nobody has answered
                raise
            time.sleep(seconds)
            pause = min(2 * pause, _LONGEST_PAUSE)
            restart()


def _spread(seconds: float, least: float, most: float) -> float:
    # So that those who were sent away at one moment do not come back at one.
    return seconds * random.uniform(least, most)  # noqa: S311 - no secret


def _told(busy: ServerBusy) -> float:
    try:
        return max(0.001, min(10.0, float(busy.metadata.get("retry_seconds", "0.05"))))
    except ValueError:
        raise MalformedMessage("the server is busy, and does not say for how long") from busy
