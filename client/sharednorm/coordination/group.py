"""A process's membership in a group, whose members' batches are normalized as one."""

from __future__ import annotations

import contextlib
import secrets
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar, final

from google.protobuf.message import Message

from sharednorm.codec import convert, frames
from sharednorm.core.limits import MAX_GROUP_MEMBERS, MAX_GROUP_SECONDS
from sharednorm.core.state import Moments
from sharednorm.core.types import Wide
from sharednorm.core.validation import check_group_name, is_finite
from sharednorm.errors import (
    GENERATION_GONE,
    STEP_OVER,
    GroupAborted,
    InvalidConfiguration,
    SharedNormError,
    StaleGeneration,
)
from sharednorm.transport.base import Transport
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.retry import RetryPolicy
from sharednorm.v1 import layer_pb2, service_pb2

# How long `Hub.close` may wait to say goodbye.
_GOODBYE_SECONDS = 1.0

A = TypeVar("A", bound=Message)
S = TypeVar("S", service_pb2.SynchronizeMomentsResponse, service_pb2.SynchronizeGradientsResponse)
Request = service_pb2.SynchronizeMomentsRequest | service_pb2.SynchronizeGradientsRequest


@dataclass(frozen=True)
class _Place:
    # Where members meet: a layer, and the direction.
    uid: str
    backward: bool


@dataclass
class _Membership:
    # What a member is in one generation.
    ticket: bytes
    generation: int
    rank: int
    members: int
    steps: dict[_Place, int] = field(default_factory=dict)  # the number of the last one at each place
    ranks: tuple[int, ...] = ()  # whose batches were in the last one
    waiting: int = 0  # and how many waited to join then


@dataclass(frozen=True)
class _Home:
    # Where a group is: the server of the group's own, the hub's connections, and a namespace.
    exchange: Transport
    hub: Transport
    namespace: str


@final
class Group:
    """One member of a group: `size` processes whose batches of a step are normalized by their union.

    Each process makes its own, with the same name and settings, and passes it to the layers that it shares:

        group = sharednorm.Group("run-7", size=4)
        bn = hub.BatchNorm2D(64, name="stem/bn", compute="client", group=group)

    A forward in train mode then waits for the same forward of all members, and so does a backward. All call the group's
    layers in the same order. The first step joins the group, which all `size` processes have to do; a generation is a
    set of members that have. When one is missing for longer than `timeout`, the step is taken for nobody, and each
    other member gets GroupAborted; its next step joins the group again. With `min_members` below `size`, so many go on
    with the step instead, without those that are missing; these come back when all that go on call `join` between two
    steps, say once an epoch.

    Any number of threads may use it. A process that the object is pickled to becomes another member.

    Args:
        name: The group's: 1 to 256 characters. It belongs to the hub's namespace.
        size: How many members a whole generation has, 1 to 1024.
        min_members: So many may go on when others are missing; None: as many as `size`.
        timeout: Seconds that whoever is first waits for the last, when they join and in each step; > 0, at most 86400.
        rank: This member's place in the order in which batches are merged, 0 to `size` - 1; None: any.
        member: This member's own name in the group; one that comes back under it after a crash takes its old place at
            once. None: "rank N" if a rank is given, else a random one.

    Raises:
        InvalidName: The group or the member could not have that name.
        InvalidConfiguration: One of the others is out of its range.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        min_members: int | None = None,
        timeout: float = 30.0,
        rank: int | None = None,
        member: str | None = None,
    ) -> None:
        self._name = check_group_name("group", name)
        self._size = _whole("size", size, 1, MAX_GROUP_MEMBERS)
        self._min_members = self._size if min_members is None else _whole("min_members", min_members, 1, self._size)
        if not (is_finite(timeout) and 0 < timeout <= MAX_GROUP_SECONDS):
            raise InvalidConfiguration(
                f"timeout is {ascii(timeout)[:60]} (expected: a finite number of seconds > 0, at most "
                f"{MAX_GROUP_SECONDS:g})"
            )
        self._timeout = float(timeout)
        self._wish = None if rank is None else _whole("rank", rank, 0, self._size - 1)
        self._given = None if member is None else check_group_name("member", member)
        self._member = self._given or (f"rank {rank}" if rank is not None else secrets.token_hex(8))
        self._lock = threading.Lock()  # of the attributes; never held during a call
        self._joining = threading.Lock()  # held during the call that joins, since all threads need its answer
        self._home: _Home | None = None
        self._membership: _Membership | None = None
        self._turns: dict[_Place, threading.Lock] = {}

    def __repr__(self) -> str:
        """Name the group, and this member if it has joined."""
        membership = self._membership
        if membership is None:
            return f"<Group {self._name!r}, size {self._size}, not joined>"
        return (
            f"<Group {self._name!r}, size {self._size}, rank {membership.rank} of {membership.members}, "
            f"generation {membership.generation}>"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Copy what the group is; whoever gets the copy is a member of its own."""
        settings = self._name, self._size, self._min_members, self._timeout, self._wish, self._given
        return _again, settings

    def __copy__(self) -> Group:
        """Return the group itself: within a process, the copy of a layer's handle is the same member."""
        return self

    def __deepcopy__(self, memo: object) -> Group:
        """Return the group itself, as `copy.copy` does."""
        return self

    def __enter__(self) -> Group:
        """Return the group itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the group in order; after an exception don't, so that the others hear that somebody is missing."""
        if kind is None:
            self.leave()

    @property
    def name(self) -> str:
        """The group's name."""
        return self._name

    @property
    def size(self) -> int:
        """How many members a whole generation has."""
        return self._size

    @property
    def min_members(self) -> int:
        """How many may go on when others are missing."""
        return self._min_members

    @property
    def timeout(self) -> float:
        """Seconds that whoever is first waits for the last."""
        return self._timeout

    @property
    def member(self) -> str:
        """This member's own name in the group."""
        return self._member

    @property
    def rank(self) -> int | None:
        """This member's rank in the generation; None if it has not joined."""
        return None if self._membership is None else self._membership.rank

    @property
    def generation(self) -> int | None:
        """Number of the generation, from 1; None if this member has not joined."""
        return None if self._membership is None else self._membership.generation

    @property
    def members(self) -> int | None:
        """Members that the generation began with; None if this one has not joined."""
        return None if self._membership is None else self._membership.members

    @property
    def participants(self) -> tuple[int, ...]:
        """Ranks of the members that the last step was made of; () before the first one."""
        return () if self._membership is None else self._membership.ranks

    def join(self) -> None:
        """Join the group now, and wait for the other members.

        A member that has joined lets in those who wait, if there were any at its last step; all members hear of the
        same ones, and form a new generation with them. If there are none, nothing happens. Without this call, the first
        step of a layer joins.

        Raises:
            InvalidConfiguration: No layer has been made with the group, so that it is on no server yet.
            GroupMismatch: The other members have given other settings, or there are `size` others already.
            GroupAborted: The others have not come in time.
            ServerUnavailable: There was no server all the time.
        """
        membership = self._membership
        home = self._where()
        if membership is not None and (membership.waiting or home.exchange.rebalance()):
            self._forget(membership)
        self._joined(self._begin(home))

    def leave(self) -> None:
        """Leave the group in order: the others go on without this member. Does nothing if it has not joined.

        A member whose data ends before that of the others leaves, and they need not wait for it. The next step joins
        again, which needs all members.

        Raises:
            ServerUnavailable: The server is not there; the others hear after `timeout` that this member is missing.
        """
        self._leave(None)

    # --- For layers and hubs of this library ----------------------------------------------------------------

    def settle(self, exchange: Transport, namespace: str) -> None:
        """Be on a server, for good.

        Raises:
            InvalidConfiguration: The group is on another one, or in another namespace.
        """
        with self._lock:
            if self._home is None:
                self._home = _Home(exchange.of("group", f"{namespace}\0{self._name}"), exchange, namespace)
            elif self._home.hub is not exchange or self._home.namespace != namespace:
                raise InvalidConfiguration(
                    f"the group {self._name!r} is used with another hub already (expected: one hub; make a Group for "
                    "each)"
                )

    def moments(self, ref: layer_pb2.LayerRef, batch: Moments | None) -> service_pb2.SynchronizeMomentsResponse:
        """Take a step together with the others.

        Args:
            ref: The layer.
            batch: This member's; None if it is empty.
        """
        request = service_pb2.SynchronizeMomentsRequest(
            ref=ref, moments=None if batch is None else convert.moments_to_proto(batch)
        )
        return self._synchronize(
            _Place(ref.uid, backward=False),
            ("SynchronizeMoments", frames.SYNCHRONIZE_MOMENTS),
            request,
            service_pb2.SynchronizeMomentsResponse,
        )

    def gradients(
        self,
        ref: layer_pb2.LayerRef,
        sums: Wide | None,
        union: Moments,
        *,
        param_grads: bool,
        scale: float,
        momentum: float,
    ) -> service_pb2.SynchronizeGradientsResponse:
        """Add up the sums of a backward together with the others.

        Args:
            ref: The layer.
            sums: This member's, float64 (2, C); None if its batch is empty.
            union: Moments of the forward's union.
            param_grads: Whether to accumulate the gradients of scale and bias in the layer.
            scale: Multiplier of the new ones.
            momentum: Multiplier of the old ones.
        """
        request = service_pb2.SynchronizeGradientsRequest(
            ref=ref,
            sums=None if sums is None else convert.sums_to_proto(sums),
            moments=convert.moments_to_proto(union),
            update_param_grads=param_grads,
            scale=scale,
            momentum=momentum,
        )
        return self._synchronize(
            _Place(ref.uid, backward=True),
            ("SynchronizeGradients", frames.SYNCHRONIZE_GRADIENTS),
            request,
            service_pb2.SynchronizeGradientsResponse,
        )

    def say_goodbye(self) -> None:
        """Leave, if the server hears it; a hub that closes can do no more."""
        # If it doesn't, the others find out after their timeout, as after any crash.
        with contextlib.suppress(SharedNormError):
            self._leave(_GOODBYE_SECONDS)

    # --- Inside ---------------------------------------------------------------------------------------------

    def _where(self) -> _Home:
        home = self._home
        if home is None:
            raise InvalidConfiguration(
                f"the group {self._name!r} is on no server yet (expected: a layer made with group=...)"
            )
        return home

    def _begin(self, home: _Home) -> Deadline:
        # The server gives up a wait, and those who go on without others may wait for each of them.
        rounds = 1 + self._size - self._min_members
        return Deadline(rounds * self._timeout + home.exchange.connection.timeout)

    def _turn(self, place: _Place) -> threading.Lock:
        with self._lock:
            return self._turns.setdefault(place, threading.Lock())

    def _joined(self, left: Deadline) -> _Membership:
        with self._joining:
            membership = self._membership
            if membership is not None:
                return membership
            home = self._where()
            request = service_pb2.JoinGroupRequest(
                namespace=home.namespace,
                group=self._name,
                member=self._member,
                size=self._size,
                min_members=self._min_members,
                timeout=self._timeout,
                rank=self._wish,
            )
            attempts = RetryPolicy(left)
            try:
                answer = home.exchange.connection.call("JoinGroup", request, service_pb2.JoinGroupResponse, attempts)
            except GroupAborted:
                home.exchange.rebalance()  # the others may be with another server, and come back as well
                raise
            membership = _Membership(answer.ticket, answer.generation, answer.rank, answer.members)
            with self._lock:
                self._membership = membership
            return membership

    def _forget(self, membership: _Membership) -> None:
        with self._lock:  # not the one of joining: a step that has failed does not wait for another thread's join
            if self._membership is membership:
                self._membership = None

    def _leave(self, timeout: float | None) -> None:
        # A thread that joins is a member in a moment, and leaves then; but a hub that closes waits for so long only.
        if not self._joining.acquire(timeout=-1 if timeout is None else timeout):
            return
        try:
            with self._lock:
                membership, self._membership = self._membership, None
        finally:
            self._joining.release()
        if membership is not None:
            request = service_pb2.LeaveGroupRequest(ticket=membership.ticket)
            connection = self._where().exchange.connection
            attempts = None if timeout is None else RetryPolicy(Deadline(timeout), away=False)
            connection.call("LeaveGroup", request, service_pb2.LeaveGroupResponse, attempts)

    def _synchronize(self, place: _Place, method: tuple[str, int], request: Request, answer: type[S]) -> S:
        home = self._where()
        with self._turn(place):
            left = self._begin(home)
            while True:
                try:
                    return self._once(home, place, method, request, answer, left)
                except StaleGeneration as error:  # noqa: PERF203 - the loop is one try, and seldom a second
                    # Gone for all, with the server that it was on: all join again, and repeat the step that was not
                    # taken. Those who had been answered are at the next one.
                    if GENERATION_GONE not in error.metadata or left.left() <= 0:
                        raise

    def _once(
        self, home: _Home, place: _Place, method: tuple[str, int], request: Request, answer: type[S], left: Deadline
    ) -> S:
        membership = self._joined(left)
        request.ticket = membership.ticket
        request.step = membership.steps.get(place, 0) + 1
        try:
            found = home.exchange.plain(*method, request, answer, RetryPolicy(left))
        except BaseException as error:
            # A step that is over for all has used up its number. After anything else it can't be known what this
            # member has brought to it, and the others must not be normalized by that.
            if isinstance(error, SharedNormError) and error.metadata.get(STEP_OVER) == str(request.step):
                membership.steps[place] = request.step
            else:
                self._forget(membership)
                if isinstance(error, GroupAborted) and not isinstance(error, StaleGeneration):
                    home.exchange.rebalance()
            raise
        membership.steps[place] = request.step
        membership.ranks, membership.waiting = tuple(found.ranks), found.waiting
        return found


def _again(name: str, size: int, min_members: int, timeout: float, rank: int | None, member: str | None) -> Group:
    return Group(name, size, min_members=min_members, timeout=timeout, rank=rank, member=member)


def _whole(what: str, value: object, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidConfiguration(f"{what} is {ascii(value)[:60]} (expected: an integer, {least} to {most})")
    return value
