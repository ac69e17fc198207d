"""What a check of this machine says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, MISSING, NOTE = "ok", "missing", "note"

_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was looked at.
        state: "ok", "missing", or "note" for what works without it, or does not matter by itself.
        text: What was found.
        mend: What to do about it, with the command; "" if nothing has to be done.
    """

    name: str
    state: str
    text: str
    mend: str = ""

    @property
    def detail(self) -> str:
        """The text and what to do, in one line."""
        return " ".join((f"{self.text}: {self.mend}" if self.mend else self.text).split())


def reason(checks: Iterable[Check]) -> str:
    """Return which of these is missing first, in a line; "" if none is."""
    return next((f"{check.name}: {check.text}" for check in checks if check.state == MISSING), "")


def size(number: int) -> str:
    """Return a number of bytes for people: "8 GiB", "139.8 GiB", "17 bytes"."""
    for unit, factor in _UNITS:
        if number >= factor:
            return f"{number / factor:.4g} {unit}"
    return f"{number} bytes"
