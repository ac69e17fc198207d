"""Several servers that share layers, as one: who serves what, and who instead when a server is away.

Each layer has an order of the servers, by a hash of its name and of their addresses, which all clients have alike
(rendezvous hashing: the highest random weight of https://www.rfc-editor.org/rfc/rfc2991). Its calls go to the first
that is there, so that one server has the layer's newest state at hand and steps of several clients do not race through
several servers. When that is away, they go to the next, under the same keys; and come back later. With n servers, one
that comes or goes moves a 1/n of the layers.

A thread for each server asks once a second whether it is there; one that does not answer is given up, calls on their
way to it included, which are made again elsewhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import Message

from sharednorm.core.address import Address
from sharednorm.core.arrays import results
from sharednorm.core.types import Array
from sharednorm.errors import (
    DeadlineExceeded,
    HubClosed,
    IncompatibleServer,
    ServerUnavailable,
    SharedNormError,
    StoreUnavailable,
)
from sharednorm.transport.base import A, Answer, I, ServerInfo, Transport
from sharednorm.transport.client import ServerClient
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.methods import R, T, TensorMethod
from sharednorm.transport.retry import RetryPolicy

_LOOK_SECONDS = 1.0
"""How often a server is asked whether it is there."""
_SILENCE_SECONDS = 3.0
"""After so long without an answer it is not."""
_NAME_SECONDS = 15.0
"""How often it is asked which addresses a name has."""

B = TypeVar("B")
Open = Callable[[Address, Deadline], ServerClient]

_log = logging.getLogger("sharednorm")


class _Member:
    # One server, which a connection is made to when it is needed.
    def __init__(self, address: Address, make: Open) -> None:
        self.address = address
        self.away = ""  # why, if it is not there
        self._make = make
        self._lock = threading.Lock()
        self._exchange: ServerClient | None = None
        self.ended = threading.Event()  # that it is none of them any more

    @property
    def known(self) -> ServerClient | None:
        return self._exchange

    def exchange(self, left: Deadline) -> ServerClient:
        exchange = self._exchange
        if exchange is not None:
            return exchange
        with self._lock:
            if self.ended.is_set():
                raise ServerUnavailable(f"the server at {self.address.text} is none of this hub's any more")
            if self._exchange is None:
                try:
                    self._exchange = self._make(self.address, Deadline(min(_SILENCE_SECONDS, left.left())))
                except DeadlineExceeded as error:  # which was not the call's
                    raise ServerUnavailable(error.message, error.metadata) from error
                if self.ended.is_set():  # while it connected
                    made, self._exchange = self._exchange, None
                    made.connection.close()
                    made.close()
                    raise ServerUnavailable(f"the server at {self.address.text} is none of this hub's any more")
            return self._exchange

    def mark_down(self, why: str) -> None:
        # Calls that are on their way to it end.
        if not self.away:
            _log.warning("the server at %s is away: %s", self.address.text, why)
        self.away = why
        with self._lock:
            exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.connection.close()
            exchange.close()

    def look(self) -> None:
        """See whether the server is there."""
        left = Deadline(_SILENCE_SECONDS)
        try:
            why = self.exchange(left).connection.health(left)
        except SharedNormError as error:
            self.mark_down(error.message)
            return
        if why:
            if not self.away:
                _log.info("the server at %s says that it %s", self.address.text, why)
            self.away = why  # what is on its way there comes back
        elif self.away:
            _log.warning("the server at %s is there again", self.address.text)
            self.away = ""


class Cluster:
    """The servers of a hub.

    Args:
        text: As the user wrote it.
        addresses: Where they are.
        timeout: Seconds that a call may take.
        make: Connects to one, and greets it.
        requested_transport: The way that calls go.
        find: Returns where they are now, if that can change.

    Raises:
        SharedNormError: None of them can be reached; that is what the last one raises.
        IncompatibleServer: Two of them have layers of their own.
    """

    def __init__(
        self,
        text: str,
        addresses: Sequence[Address],
        timeout: float,
        make: Open,
        requested_transport: str,
        find: Callable[[], Sequence[Address]] | None,
    ) -> None:
        self.text, self.timeout, self.requested_transport = text, timeout, requested_transport
        self._make, self._find = make, find
        self._process = os.getpid()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._members: tuple[_Member, ...] = ()
        self._state = ""  # which state their layers are in
        self._join(addresses)
        try:
            self._connect(Deadline(timeout))
        except BaseException:
            self.close()
            raise
        if find is not None:
            _watch(self, Cluster._look_up, _NAME_SECONDS, self._closed)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed.is_set()

    @property
    def members(self) -> tuple[_Member, ...]:
        """The servers."""
        return self._members

    def close(self) -> None:
        """Let go of all."""
        self._closed.set()
        for member in self._members:
            member.ended.set()
            exchange = member.known
            if exchange is not None and os.getpid() == self._process:
                exchange.connection.close()
                exchange.close()

    def order(self, kind: str, name: str) -> list[_Member]:
        """Return the servers in the order in which something goes to them."""
        return sorted(self._members, key=lambda member: _weight(member.address.text, kind, name), reverse=True)

    def pick(self, order: Sequence[_Member]) -> _Member:
        """Return the first that is there; if none is, the first."""
        return next((member for member in order if not member.away), order[0])

    def run(
        self, member: Callable[[], _Member], attempts: RetryPolicy, act: Callable[[ServerClient, RetryPolicy], B]
    ) -> B:
        """Make a call, by whichever server is there, as long as the attempts allow.

        Args:
            member: Says which one.
            attempts: How long, and whether it may be made again.
            act: Makes it once.
        """

        def once() -> B:
            self.require_open()
            chosen = member()
            try:
                return act(chosen.exchange(attempts.left), RetryPolicy(attempts.left, away=False))
            except StoreUnavailable:
                raise  # theirs is the others', too
            except HubClosed as error:
                if self.closed:
                    raise
                raise ServerUnavailable(f"the server at {chosen.address.text} was given up: {chosen.away}") from error
            except ServerUnavailable as error:
                chosen.away = chosen.away or error.message
                raise

        return attempts.run(once)

    def require_open(self) -> None:
        """Raise HubClosed if no call can be made any more."""
        if os.getpid() != self._process:
            raise HubClosed(
                f"the hub of {self.text} belongs to the process that this one was forked from, and its connections did "
                'not survive that: use the start method "spawn", or fork before the first connect()'
            )
        if self.closed:
            raise HubClosed(f"the hub of {self.text} was closed: connect again")

    def _join(self, addresses: Sequence[Address]) -> None:
        known = {member.address.text: member for member in self._members}
        found = [known.pop(address.text) if address.text in known else self._new(address) for address in addresses]
        self._members = tuple(found)
        for member in known.values():
            member.ended.set()
            member.mark_down("its name has no such address any more")

    def _new(self, address: Address) -> _Member:
        member = _Member(address, self._opened)
        _watch(member, _Member.look, _LOOK_SECONDS, member.ended)
        return member

    def _opened(self, address: Address, left: Deadline) -> ServerClient:
        exchange = self._make(address, left)
        with self._lock:
            self._state = self._state or exchange.connection.state
            if exchange.connection.state == self._state:
                return exchange
        exchange.connection.close()
        exchange.close()
        raise IncompatibleServer(
            f"the server at {address.text} does not share the layers of the others of {self.text} (expected: servers "
            "with the same --state redis://...; a hub that is connected anew if all of them have another one now)"
        )

    def _connect(self, left: Deadline) -> None:
        failed: dict[_Member, SharedNormError] = {}

        def connect(member: _Member) -> None:
            try:
                member.exchange(left)
            except SharedNormError as error:
                member.away, failed[member] = error.message, error

        with ThreadPoolExecutor(len(self._members), thread_name_prefix="sharednorm-connect") as threads:
            list(threads.map(connect, self._members))
        errors = list(failed.values())
        apart = next((error for error in errors if isinstance(error, IncompatibleServer)), None)
        if apart is not None or len(errors) == len(self._members):
            raise apart or errors[0]

    def _look_up(self) -> None:
        find = self._find
        if find is None:
            return
        found = find()
        # Of a name that has no address now, or one, nothing is known: the servers that there were are asked themselves.
        if len(found) > 1 and not self.closed:
            self._join(found)


class ClusterClient:
    """An `RpcClient` by whichever server of a cluster serves a thing.

    Args:
        fleet: The servers.
        kind: What it is: "layer", "group", or "" for what is of no layer.
        name: What it is called.
    """

    def __init__(self, fleet: Cluster, kind: str, name: str) -> None:
        self._fleet = fleet
        self._kind, self._name = kind, name
        self._members: tuple[_Member, ...] = ()  # of which this is the order
        self._order: list[_Member] = []
        self._with: _Member | None = None  # of a group: where it is

    @property
    def text(self) -> str:
        """Where the servers listen, as `connect` was told."""
        return self._fleet.text

    @property
    def timeout(self) -> float:
        """Seconds that a call may take."""
        return self._fleet.timeout

    @property
    def info(self) -> ServerInfo | None:
        """What the server that is called now has said it is."""
        exchange = self.member().known
        return None if exchange is None else exchange.connection.info

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fleet.closed

    def close(self) -> None:
        """Let go of all servers."""
        self._fleet.close()

    def handshake(self) -> ServerInfo:
        """Ask the server anew what it is."""
        attempts = RetryPolicy(self.deadline(), away=False)
        return self.run(attempts, lambda exchange, once: exchange.connection.handshake(once.left))

    def deadline(self) -> Deadline:
        """Return a deadline that begins now."""
        return Deadline(self.timeout)

    def retrying(self) -> RetryPolicy:
        """Return what makes a call again while no server is there, as long as a call may take from now on."""
        return RetryPolicy(self.deadline())

    def call(self, method: str, request: Message, answer: type[A], attempts: RetryPolicy | None = None) -> A:
        """Make a call without a tensor and return its answer."""
        attempts = attempts or RetryPolicy(self.deadline(), away=False)
        return self.run(attempts, lambda exchange, once: exchange.connection.call(method, request, answer, once))

    def require_open(self) -> None:
        """Raise HubClosed if no call can be made any more."""
        self._fleet.require_open()

    def was_closed(self) -> HubClosed:
        """Return the error of a call that `close` has cut off."""
        return HubClosed(f"the hub of {self.text} was closed during the call: connect again")

    def member(self) -> _Member:
        """Return the server that is called now."""
        members = self._fleet.members
        if self._members is not members:
            self._members, self._order = members, self._fleet.order(self._kind, self._name)
        order = self._order
        if self._kind != "group":
            return self._fleet.pick(order)
        # All members of a group have to be with one server; so they stay there when another one comes back.
        if self._with not in order or (self._with is not None and self._with.away):
            self._with = None
        self._with = self._with or self._fleet.pick(order)
        return self._with

    def rebalance(self) -> bool:
        """Go to the first server that is there; return whether that is another one than before."""
        before, self._with = self._with, None
        return before is not None and self.member() is not before

    def run(self, attempts: RetryPolicy, act: Callable[[ServerClient, RetryPolicy], B]) -> B:
        """Have an exchange with the server that is called now, and with others when it is away."""
        return self._fleet.run(self.member, attempts, act)


class ClusterTransport:
    """A `Transport` by whichever server of a cluster serves a thing.

    Args:
        fleet: The servers.
        kind: What it is; see `ClusterClient`.
        name: What it is called.
    """

    def __init__(self, fleet: Cluster, kind: str = "", name: str = "") -> None:
        self._fleet = fleet
        self._calls = ClusterClient(fleet, kind, name)

    @property
    def connection(self) -> ClusterClient:
        """Makes the calls that only gRPC takes."""
        return self._calls

    @property
    def requested_transport(self) -> str:
        """The way that was asked for."""
        return self._fleet.requested_transport

    @property
    def transport(self) -> str:
        """The way that calls go now."""
        exchange = self._calls.member().known
        return "grpc" if exchange is None else exchange.transport

    def of(self, kind: str, name: str) -> ClusterTransport:
        """Return the one for a thing."""
        return ClusterTransport(self._fleet, kind, name)

    def partition(self, items: Sequence[I], layer_of: Callable[[I], str]) -> list[tuple[Transport, list[int]]]:
        """Return which of some items go to one server: their places, in order."""
        found: dict[int, tuple[Transport, list[int]]] = {}
        for place, item in enumerate(items):
            mine = self.of("layer", layer_of(item))
            found.setdefault(id(mine.connection.member()), (mine, []))[1].append(place)
        return list(found.values())

    def rebalance(self) -> bool:
        """Go to the server that a group belongs to, if it has been with another one."""
        return self._calls.rebalance()

    def close(self) -> None:
        """End what runs."""
        self._fleet.close()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return an array for a tensor that will be sent, to whichever server."""
        self._fleet.require_open()
        return results.empty(shape, dtype)

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
        return self._calls.run(
            attempts, lambda exchange, once: exchange.call(method, request, tensors, like, out, once)
        )

    def plain(self, method: str, number: int, request: Message, answer: type[A], attempts: RetryPolicy) -> A:
        """Make a call without a tensor that a direct connection takes, too."""
        return self._calls.run(attempts, lambda exchange, once: exchange.plain(method, number, request, answer, once))


def _weight(address: str, kind: str, name: str) -> bytes:
    return hashlib.blake2b("\0".join((address, kind, name)).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _watch(what: B, look: Callable[[B], None], seconds: float, ended: threading.Event) -> None:
    """Look at something again and again, in a thread, as long as somebody else holds it."""
    held = weakref.ref(what)

    def run() -> None:
        while not ended.wait(seconds):
            alive = held()
            if alive is None:
                return
            try:
                look(alive)
            except Exception:  # noqa: BLE001 - the thread has to live, or the server is away for ever
                _log.exception("a server could not be looked after")  # which is done again in a moment
            del alive

    threading.Thread(target=run, name="sharednorm-fleet", daemon=True).start()
