"""How far a call has come, for those who ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a call with tensors has come.

    Attributes:
        method: "Forward" or "Backward".
        sent: Bytes of tensors that have been handed to the network, or to the memory that is shared with the server.
        to_send: Bytes to send in all.
        received: Bytes of the answer's tensor that are here.
        to_receive: Bytes to receive in all.
    """

    method: str
    sent: int
    to_send: int
    received: int
    to_receive: int


ProgressCallback = Callable[[Progress], None]
"""Is told, in a thread that makes the call go on, and so should return soon. What it raises ends the call."""


class Meter:
    """Counts the bytes of one call and tells a callback, if there is one.

    Attributes:
        error: What the callback has raised, which ends the call and is nobody else's error.
    """

    def __init__(self, callback: ProgressCallback | None, method: str, to_send: int, to_receive: int) -> None:
        self.error: BaseException | None = None
        self._callback = callback
        self._method = method
        self._sent = self._received = 0
        self._to_send, self._to_receive = to_send, to_receive

    def sent(self, nbytes: int) -> None:
        """Count bytes that were sent."""
        self._sent += nbytes
        self._tell()

    def received(self, nbytes: int) -> None:
        """Count bytes that were received."""
        self._received += nbytes
        self._tell()

    def restart(self) -> None:
        """Begin again, for a call that is made once more."""
        self._sent = self._received = 0

    def _tell(self) -> None:
        if self._callback is None:
            return
        progress = Progress(self._method, self._sent, self._to_send, self._received, self._to_receive)
        try:
            self._callback(progress)
        except BaseException as error:
            self.error = error
            raise
