"""Errors that end a server or keep it from starting. Those that a client sees are in `sharednorm.errors`."""

from __future__ import annotations


class StartError(Exception):
    """The server cannot start. The message, one line, says why and what to do."""
