"""The numbers of sessions: later ones are higher, also after the state was opened anew."""

from __future__ import annotations

import threading

# Sessions that one run of a server opens; the run is above them, so that a number fits SQLite's integers.
_COUNT_BITS = 32


class SessionNumbers:
    """Gives sessions their numbers, in a store that one process uses at a time. Any thread may use it.

    Args:
        run: How often the state was opened, this time included: numbers of a later run are higher.
    """

    def __init__(self, run: int) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._given = 0

    def open(self) -> int:
        """Return the number of a new session."""
        with self._lock:
            number = self._given
            self._given += 1
        return self._run << _COUNT_BITS | number

    @property
    def highest(self) -> int:
        """A number that no session before has a higher one than."""
        return (self._run << _COUNT_BITS) + max(self._given - 1, 0)

    @staticmethod
    def run_behind(number: int) -> int:
        """Return the first run whose numbers are all higher."""
        return (number >> _COUNT_BITS) + 1

    def given(self, number: int) -> bool:
        """Return whether a session may have a number."""
        run = number >> _COUNT_BITS
        return run < self._run or (run == self._run and number - (run << _COUNT_BITS) < self._given)
