"""What a benchmark is meant to show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One line of the table.

    Attributes:
        what: What is divided by what.
        most: The ratio that is to be reached, or less; None if `least` is there.
        least: The ratio that is to be reached, or more. If neither is there, any ratio will do.
    """

    what: str
    most: float | None = None
    least: float | None = None

    def met(self, ratio: float) -> bool:
        """Return whether a ratio reaches the goal."""
        return ratio <= self.most if self.most is not None else ratio >= (self.least or 0.0)

    def words(self) -> str:
        """Return the goal as it is printed."""
        if self.most is not None:
            return f"<= {self.most:g}"
        return "" if self.least is None else f">= {self.least:g}"
