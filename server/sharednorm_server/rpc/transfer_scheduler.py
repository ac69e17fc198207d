"""Whose turn it is to move large tensors: many at a time share processors and caches, and all get less done than few.

A turn is for tensors that move as fast as this machine can move them. One that waits for its network uses little of the
machine, and does not keep others from their turns: it loses its own, and goes on without. What it moves then still
uses the machine, so that those that have a turn may be slower by as much. Otherwise calls that are slow only because
there are many would lose their turns to even more of them, for as long as any come.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sharednorm.errors import DeadlineExceeded
from sharednorm_server.layers.requests import Wanted
from sharednorm_server.observability.instrumentation import current

LEAST_RATE = 250e6
"""Bytes a second, in and out, below which a tensor waits for its network rather than for this machine."""
GRACE_SECONDS = 0.02
"""How long a turn lasts at least, and how long nothing has to move while the device computes."""
MOST_SECONDS = 1.0
"""How long it lasts at most when nothing moves any more, however fast it was: a client that stops holds nobody up."""
_ASK_SECONDS = 0.5  # how often a call that waits looks whether its client still does


class Turn:
    """One call's turn.

    Args:
        movers: Who has given it.
        due: When it is over unless something moves before.

    Attributes:
        due: The same, as it is now.
    """

    def __init__(self, movers: TransferScheduler, due: float) -> None:
        self._movers = movers
        self.due = due

    def moved(self, nbytes: int) -> None:
        """Say that so many more bytes have come, or go, in this turn or after it was lost."""
        self._movers.moved(self, nbytes)


class TransferScheduler:
    """Gives turns in the order in which they are asked for.

    Args:
        most: How many at a time.
        clock: Tells the time in seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()  # each is set when the one that waits should look
        self._moving: list[Turn] = []

    @contextmanager
    def turn(self, wanted: Wanted) -> Iterator[Turn]:
        """Wait for a turn, and have it as long as the context lasts and it is not overdue.

        Raises:
            DeadlineExceeded: None has come, and nobody waits for the call any more.
        """
        turn = self._wait(wanted)
        try:
            yield turn
        finally:
            with self._lock:
                if turn in self._moving:
                    self._moving.remove(turn)
                    self._call_first()

    def moved(self, turn: Turn, nbytes: int) -> None:
        """Give a turn the time for what it has moved, or, if it is lost, all others for what went beside them."""
        with self._lock:
            latest = self._clock() + MOST_SECONDS
            if turn in self._moving:
                turn.due = min(turn.due + nbytes / LEAST_RATE, latest)
                return
            for other in self._moving:
                other.due = min(other.due + nbytes / LEAST_RATE / self._most, latest)

    def _wait(self, wanted: Wanted) -> Turn:
        me, patience = threading.Event(), 0.0
        with self._lock:
            self._waiting.append(me)
        try:
            while True:
                with self._lock:
                    if self._waiting[0] is me and self._room():
                        turn = Turn(self, self._clock() + GRACE_SECONDS)
                        self._moving.append(turn)
                        break
                    me.clear()
                    patience = self._patience(me)
                me.wait(patience)
                if not wanted():
                    raise DeadlineExceeded("the server moved other tensors for as long as this call could wait")
        finally:
            with self._lock:
                self._waiting.remove(me)
                self._call_first()
        if patience:
            current().started()  # so far it has waited
        return turn

    def _call_first(self) -> None:
        if self._waiting:
            self._waiting[0].set()

    def _room(self) -> bool:
        now = self._clock()
        self._moving = [turn for turn in self._moving if turn.due > now]
        return len(self._moving) < self._most

    def _patience(self, me: threading.Event) -> float:
        if self._waiting[0] is not me or not self._moving:
            return _ASK_SECONDS
        due = min(turn.due for turn in self._moving) - self._clock()
        return max(1e-3, min(due, _ASK_SECONDS))
