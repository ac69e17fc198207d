"""What handles need of a server: the calls that go there, whether it is one, or one of several that share layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from google.protobuf.message import Message

from sharednorm._attempts import Attempts
from sharednorm._calls import R, ServerInfo, T, TensorMethod
from sharednorm._deadline import Deadline
from sharednorm._exchange import Answer
from sharednorm._once import Session
from sharednorm._queue import CallQueue
from sharednorm.config import Array
from sharednorm.errors import HubClosed

A = TypeVar("A", bound=Message)
I = TypeVar("I")  # noqa: E741 - an item


class Caller(Protocol):
    """Makes calls without tensors."""

    @property
    def text(self) -> str:
        """Where the server listens, as `connect` was told."""
        ...

    @property
    def timeout(self) -> float:
        """Seconds that a call may take."""
        ...

    @property
    def info(self) -> ServerInfo | None:
        """What the server has said it is."""
        ...

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        ...

    def close(self) -> None:
        """Cut off running calls, and let go of what there is. Again: nothing."""
        ...

    def greet(self) -> ServerInfo:
        """Ask the server anew what it is."""
        ...

    def deadline(self) -> Deadline:
        """Return a deadline that begins now."""
        ...

    def patience(self) -> Attempts:
        """Return what makes a call again while the server is away, as long as a call may take from now on."""
        ...

    def call(self, method: str, request: Message, answer: type[A], attempts: Attempts | None = None) -> A:
        """Make a call without a tensor and return its answer."""
        ...

    def require_open(self) -> None:
        """Raise HubClosed if no call can be made any more."""
        ...

    def was_closed(self) -> HubClosed:
        """Return the error of a call that `close` has cut off."""
        ...


class Exchanger(Protocol):
    """Makes calls, with tensors and without. See `Exchange` for what the methods do."""

    @property
    def connection(self) -> Caller:
        """Makes those that only gRPC takes."""
        ...

    @property
    def session(self) -> Session:
        """What changes are known by."""
        ...

    @property
    def wanted(self) -> str:
        """The way that was asked for."""
        ...

    @property
    def transport(self) -> str:
        """The way that calls go now."""
        ...

    @property
    def whole(self) -> Exchanger:
        """The same, for whatever layer: that of the hub."""
        ...

    def of(self, kind: str, name: str) -> Exchanger:
        """Return the one for a thing, "layer" or "group", which stays with one server as long as that is there."""
        ...

    def divided(self, items: Sequence[I], layer_of: Callable[[I], str]) -> Sequence[tuple[Exchanger, list[int]]]:
        """Return which of some items go together, by the layers that they are of: their places, in order."""
        ...

    def settle_anew(self) -> bool:
        """Go to the server that a group belongs to, if it has been with another one; return whether that is so."""
        ...

    def queue(self, uid: str) -> CallQueue:
        """Return the queue of a layer's calls."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array for a tensor that will be sent."""
        ...

    def call(
        self,
        method: TensorMethod[R, T],
        request: R,
        tensors: Sequence[Array],
        like: Array | None,
        out: Array | None,
        attempts: Attempts,
    ) -> Answer[T]:
        """Make a call with tensors."""
        ...

    def plain(self, method: str, number: int, request: Message, answer: type[A], attempts: Attempts) -> A:
        """Make a call without a tensor that a direct connection takes, too."""
        ...
