"""What handles need of a server: the calls that go there, whether it is one, or one of several that share layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from google.protobuf.message import Message

from sharednorm.core.types import Array
from sharednorm.errors import HubClosed
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.methods import R, T, TensorMethod
from sharednorm.transport.retry import RetryPolicy

A = TypeVar("A", bound=Message)
I = TypeVar("I")  # noqa: E741 - an item


@dataclass(frozen=True)
class ServerInfo:
    """What a server is and what it accepts.

    Attributes:
        version: Its release, for example "0.1.0".
        protocol: Version of the contract that it speaks.
        device: What computes, for example "cpu (numba, 8 threads)".
        store: What remembers, for example "memory:".
        max_unary_bytes: Largest tensor that it takes in one message; larger ones travel in chunks.
        max_tensor_bytes: Largest tensor that it takes.
        chunk_bytes: Size of a chunk that it likes best.
        signals_chunks: Whether it says when the chunks of a stream may come.
    """

    version: str
    protocol: int
    device: str
    store: str
    max_unary_bytes: int
    max_tensor_bytes: int
    chunk_bytes: int
    signals_chunks: bool


@dataclass
class Answer(Generic[T]):
    """What a call has brought.

    Attributes:
        message: The answer, without its data.
        tensor: Its data; None if it brings none.
        held: What the server may still read: for as long as it keeps the call's input, nobody may write there.
    """

    message: T
    tensor: Array | None
    held: tuple[Array, ...] = ()


class RpcClient(Protocol):
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

    def handshake(self) -> ServerInfo:
        """Ask the server anew what it is."""
        ...

    def deadline(self) -> Deadline:
        """Return a deadline that begins now."""
        ...

    def retrying(self) -> RetryPolicy:
        """Return what makes a call again while the server is away, as long as a call may take from now on."""
        ...

    def call(self, method: str, request: Message, answer: type[A], attempts: RetryPolicy | None = None) -> A:
        """Make a call without a tensor and return its answer."""
        ...

    def require_open(self) -> None:
        """Raise HubClosed if no call can be made any more."""
        ...

    def was_closed(self) -> HubClosed:
        """Return the error of a call that `close` has cut off."""
        ...


class Transport(Protocol):
    """Makes calls, with tensors and without. See `ServerClient` for what the methods do."""

    @property
    def connection(self) -> RpcClient:
        """Makes those that only gRPC takes."""
        ...

    @property
    def requested_transport(self) -> str:
        """The way that was asked for."""
        ...

    @property
    def transport(self) -> str:
        """The way that calls go now."""
        ...

    def of(self, kind: str, name: str) -> Transport:
        """Return the one for a thing, "layer" or "group", which stays with one server as long as that is there."""
        ...

    def partition(self, items: Sequence[I], layer_of: Callable[[I], str]) -> Sequence[tuple[Transport, list[int]]]:
        """Return which of some items go together, by the layers that they are of: their places, in order."""
        ...

    def rebalance(self) -> bool:
        """Go to the server that a group belongs to, if it has been with another one; return whether that is so."""
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
        attempts: RetryPolicy,
    ) -> Answer[T]:
        """Make a call with tensors."""
        ...

    def plain(self, method: str, number: int, request: Message, answer: type[A], attempts: RetryPolicy) -> A:
        """Make a call without a tensor that a direct connection takes, too."""
        ...
