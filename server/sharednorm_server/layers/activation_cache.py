"""The inputs of training forwards, kept for their backwards as long as a byte budget allows."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sharednorm.core.state import Moments
from sharednorm.core.types import Vector
from sharednorm.errors import InputEvicted
from sharednorm_server.device.base import DeviceTensor
from sharednorm_server.layers.layer import Layer


@dataclass(frozen=True)
class SavedInput:
    """What a training forward computed with.

    Attributes:
        layer: Whose forward it was.
        x: The input, where the device computes.
        moments: Moments of the batch.
        scale: The scale that the forward used.
        keeper: Whose it is, if it must not outlive them; "" otherwise.
    """

    layer: Layer
    x: DeviceTensor
    moments: Moments
    scale: Vector
    keeper: str = ""


class ActivationCache:
    """Keeps inputs under names that cannot be guessed; the least recently used leave first.

    Args:
        budget: Most bytes of inputs that are kept at a time. 0 keeps none.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, SavedInput] = OrderedDict()
        self._nbytes = 0
        self.evictions = 0  # inputs that had to leave for others

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that are kept now."""
        return self._nbytes

    def __len__(self) -> int:
        """Return how many inputs are kept now."""
        return len(self._entries)

    def put(self, entry: SavedInput) -> str:
        """Keep an input and return its name; "" if it is larger than the budget and not kept."""
        if entry.x.nbytes > self._budget:
            return ""
        token = secrets.token_hex(16)
        with self._lock:
            self._entries[token] = entry
            self._nbytes += entry.x.nbytes
            while self._nbytes > self._budget:
                self._drop(next(iter(self._entries)))
                self.evictions += 1
        return token

    def get(self, token: str, layer: Layer) -> SavedInput:
        """Return an input of a layer, which becomes the most recently used one.

        Raises:
            InputEvicted: It is not kept any more, never was, or is another layer's.
        """
        with self._lock:
            entry = self._entries.get(token)
            if entry is None or entry.layer.parent is not layer.parent:
                raise InputEvicted(
                    "the server no longer keeps the input of that forward: "
                    "send the call again with saved_forward and the input"
                )
            self._entries.move_to_end(token)
            return entry

    def release(self, token: str, layer: Layer) -> None:
        """Drop an input of a layer that nobody will ask for; one that is not kept is no error."""
        with self._lock:
            entry = self._entries.get(token)
            if entry is not None and entry.layer.parent is layer.parent:
                self._drop(token)

    def release_if(self, condition: Callable[[SavedInput], bool]) -> None:
        """Drop all inputs that a condition holds for."""
        with self._lock:
            for token in [token for token, entry in self._entries.items() if condition(entry)]:
                self._drop(token)

    def _drop(self, token: str) -> None:
        self._nbytes -= self._entries.pop(token).x.nbytes
