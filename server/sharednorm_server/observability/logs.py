"""What the log looks like: a line for people, or an object of JSON; and which call a record belongs to."""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone

_RUN = secrets.token_hex(4)
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Call:
    """The call that a thread works on.

    Attributes:
        method: Of the contract.
        id: What names it among all that servers have ever done.
    """

    method: str
    id: str


_call: ContextVar[Call | None] = ContextVar("call", default=None)


def new_call(method: str) -> Call:
    """Return a call that has just come."""
    return Call(method, f"{_RUN}-{next(_numbers):x}")


@contextmanager
def in_call(call: Call) -> Iterator[None]:
    """Have whatever this thread logs belong to a call."""
    before = _call.set(call)
    try:
        yield
    finally:
        _call.reset(before)


def configure(level: str, form: str) -> None:
    """Have this process log to stderr.

    Args:
        level: "debug", "info", "warning" or "error".
        form: "human" or "json".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Human())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class _Human(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        text, call = super().format(record), _call.get()
        if call is None:
            return text
        first, mark, rest = text.partition("\n")
        return f"{first} [{call.method} {call.id}]{mark}{rest}"


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = _call.get()
        if call is not None:
            found |= {"method": call.method, "request_id": call.id}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False)
