"""Groups at work: threads that wait for each other, the clock, and what a complete step means for its layer.

`groups` says who waits for whom; here whoever completes a step merges its parts, in the order of their ranks, has the
service take it, once, and hands the result to all; what a future calls when it has its result, that thread calls. So a
step costs its members one call each, and no thread of its own.
"""

from __future__ import annotations

import logging
import secrets
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharednorm.arithmetic.formulas import merge, parameter_gradients
from sharednorm.core.state import Moments
from sharednorm.core.types import Vector
from sharednorm.errors import (
    GENERATION_GONE,
    GroupAborted,
    InternalError,
    InvalidConfiguration,
    LimitExceeded,
    ServerUnavailable,
    SharedNormError,
    StaleGeneration,
    TooFewValues,
)
from sharednorm_server.groups.state_machine import (
    Commit,
    Deliver,
    Done,
    Event,
    Failed,
    Group,
    GroupSettings,
    Joined,
    Membership,
)
from sharednorm_server.layers.idempotency import digest
from sharednorm_server.layers.requests import BackwardCall, CallKey, LastChange, LayerKey, Sums, TakenStep, Together
from sharednorm_server.layers.service import LayerService
from sharednorm_server.layers.training_service import GROUP_ENDED

MAX_GROUPS = 1024
"""Of one server; one that nobody has used for an hour gives way to another."""
_IDLE_SECONDS = 3600.0

_STEP_OF_GROUP = b"group"  # as long as GROUP_ENDED, which may stand in its place

# A ticket says which group and which generation it is of, so that also another server knows, and is a secret.
_GROUP_BYTES, _GENERATION_BYTES, _SECRET_BYTES = 8, 8, 24

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupKey:
    """The full name of a group."""

    namespace: str
    name: str


@dataclass(frozen=True)
class GroupFacts:
    """What there is to know of a group.

    Attributes:
        key: Its name.
        size: Members that it is made for.
        ranks: Of those that are in.
        joining: How many wait to be.
        generation: How often it was formed.
    """

    key: GroupKey
    size: int
    ranks: tuple[int, ...]
    joining: int
    generation: int


@dataclass(frozen=True)
class MomentsPart:
    """One member's batch. Two are the same if their bytes are."""

    content: bytes
    moments: Moments | None = field(compare=False)


@dataclass(frozen=True)
class GradientsPart:
    """One member's sums. Two are the same if their bytes are."""

    content: bytes
    sums: Sums | None = field(compare=False)
    batch: Moments = field(compare=False)
    call: BackwardCall = field(compare=False)


@dataclass(eq=False)
class Stepped:
    """What a step gives: the moments of the union, and what each member normalizes with.

    Attributes:
        moments: Of the union.
        version: Of the layer after the step.
        num_of_props: At that version.
        scale: That the step uses.
        bias: That the step uses.
        told: The answer, which the edge keeps here.
    """

    moments: Moments
    version: int
    num_of_props: int
    scale: Vector
    bias: Vector
    told: bytes | None = None


@dataclass(eq=False)
class Summed:
    """What the backward of a step gives: the sums over the union. The edge keeps its answer in `told`."""

    sums: Sums
    told: bytes | None = None


_Part = MomentsPart | GradientsPart
_Result = Stepped | Summed


@dataclass(frozen=True)
class _Place:
    key: LayerKey
    domain: str  # which keys that are equal may differ in
    backward: bool


class _Entry:
    # A group, its lock, and when it was last used.
    def __init__(self, group: Group[_Part, _Result], prefix: bytes) -> None:
        self.group = group
        self.prefix = prefix
        self.lock = threading.Lock()
        self.used = 0.0


class Synchronizer:
    """The groups of a server. Every method may be called from many threads at once.

    What waits comes back as a future: of a `Membership`, or of a `Done`. It raises what `groups` says, and what the
    service says of the step, then for all its members.

    Args:
        service: Takes the steps.
        clock: Seconds that only grow.
    """

    def __init__(self, service: LayerService, clock: Callable[[], float] = time.monotonic) -> None:
        self._service = service
        self._clock = clock
        self._lock = threading.Lock()
        self._by_name: dict[GroupKey, _Entry] = {}
        self._by_prefix: dict[bytes, _Entry] = {}
        self._open: set[Future[Any]] = set()
        self._closed = False
        self.aborted = 0  # calls of members that ended so
        self._alarm = threading.Condition()
        self._due: float | None = None
        self._timer: threading.Thread | None = None

    def groups(self) -> list[GroupFacts]:
        """Return what is known of the groups, in the order of their names."""
        with self._lock:
            entries = list(self._by_name.items())
        facts = []
        for key, entry in entries:
            with entry.lock:
                group = entry.group
                facts.append(GroupFacts(key, group.settings.size, group.ranks, group.joining, group.generation))
        return sorted(facts, key=lambda each: (each.key.namespace, each.key.name))

    @property
    def waiting(self) -> int:
        """How many calls of members wait for others."""
        return len(self._open)

    def join(self, key: GroupKey, member: str, rank: int | None, settings: GroupSettings) -> Future[Membership]:
        """Join a group's next generation; it is made when its first member joins.

        Raises:
            LimitExceeded: There are too many groups.
        """
        entry = self._entry(key, settings)
        return self._act(entry, lambda future: entry.group.join(member, rank, settings, future))

    def leave(self, ticket: bytes) -> None:
        """Leave in order; with a ticket that is not valid any more, do nothing."""
        entry = self._by_prefix.get(ticket[:_GROUP_BYTES])
        if entry is not None:
            with entry.lock:
                events = entry.group.leave(ticket)
            self._follow(entry, events)

    def moments(self, key: LayerKey, ticket: bytes, number: int, batch: Moments | None) -> Future[Done[Stepped]]:
        """Bring a member's batch to a step of a layer; None: it is empty."""
        content = b"" if batch is None else batch.count.to_bytes(8, "little") + _bytes(batch.mean, batch.m2)
        return self._contribute(key, ticket, number, MomentsPart(content, batch), backward=False)

    def gradients(
        self, call: BackwardCall, ticket: bytes, number: int, sums: Sums | None, batch: Moments
    ) -> Future[Done[Summed]]:
        """Bring a member's sums to the backward of a step of a layer.

        Args:
            call: The layer, and what to do with the gradients of its parameters.
            ticket: The member's.
            number: Of the backward.
            sums: Of the member's part; None: its batch is empty.
            batch: Moments of the union.
        """
        options = repr((call.param_grads, call.scale, call.momentum)).encode()
        content = b"".join([options, _bytes(batch.mean, batch.m2), b"" if sums is None else sums.tobytes()])
        return self._contribute(call.key, ticket, number, GradientsPart(content, sums, batch, call), backward=True)

    def close(self) -> None:
        """Send away everybody who waits. Again: nothing."""
        with self._lock:
            self._closed = True
            waiting = list(self._open)
        for future in waiting:
            _set(future, ServerUnavailable("the server is stopping: join the group again when it is back"))
        with self._alarm:
            self._alarm.notify_all()

    # --- Calls ----------------------------------------------------------------------------------------------

    def _entry(self, key: GroupKey, settings: GroupSettings) -> _Entry:
        with self._lock:
            found = self._usable(key, settings)
        if found is not None:
            return found
        # The store may be on another machine. Calls of other groups need the lock, and do not wait for the store.
        prefix = self._service.open_session()
        with self._lock:
            found = self._usable(key, settings)  # another member may have made it meanwhile
            if found is not None:
                return found
            old = self._by_name.get(key)
            if old is not None:  # it has no members: it may begin anew with other settings
                self._drop(key, old)
            if len(self._by_name) >= MAX_GROUPS:
                self._make_room()

            def ticket(generation: int) -> bytes:
                return prefix + generation.to_bytes(_GENERATION_BYTES, "big") + secrets.token_bytes(_SECRET_BYTES)

            group: Group[_Part, _Result] = Group(key.name, settings, self._clock, ticket)
            made = self._by_name[key] = self._by_prefix[prefix] = _Entry(group, prefix)
            made.used = self._clock()
            return made

    def _usable(self, key: GroupKey, settings: GroupSettings) -> _Entry | None:
        found = self._by_name.get(key)
        if found is None or (found.group.settings != settings and found.group.idle):
            return None
        found.used = self._clock()
        return found

    def _make_room(self) -> None:
        old = [(key, each) for key, each in self._by_name.items() if self._clock() - each.used > _IDLE_SECONDS]
        old += [(key, each) for key, each in self._by_name.items() if each.group.idle]
        for key, each in dict(old).items():
            self._drop(key, each)
        if len(self._by_name) >= MAX_GROUPS:
            raise LimitExceeded(
                f"the server has {len(self._by_name)} groups (expected: at most {MAX_GROUPS})",
                {"limit": "groups", "value": str(MAX_GROUPS)},
            )

    def _drop(self, key: GroupKey, entry: _Entry) -> None:
        del self._by_name[key], self._by_prefix[entry.prefix]

    def _contribute(self, key: LayerKey, ticket: bytes, number: int, part: _Part, *, backward: bool) -> Future[Any]:
        place = _Place(key, key.domain, backward)
        entry = self._by_prefix.get(ticket[:_GROUP_BYTES])
        if entry is None:
            return self._remembered(place, ticket, number)
        entry.used = self._clock()
        return self._act(entry, lambda future: entry.group.contribute(ticket, place, number, part, future))

    def _remembered(self, place: _Place, ticket: bytes, number: int) -> Future[Any]:
        """Answer for a generation that is gone with the server that it was on, if its step had been taken there."""
        last = self._service.end_together(place.key, _session(ticket, place))
        told = None if last is None else _step_of(last.content)
        future: Future[Any] = Future()
        if last is None or told is None or told[0] != number:
            raise StaleGeneration(
                "there is no group with such a member: the server has been started anew, or the group was not used for "
                "long, and this step was not taken; join again",
                {GENERATION_GONE: str(number)},
            )
        if last.sums is not None:
            future.set_result(Done(Summed(last.sums), told[1], replayed=True))
        elif last.step is not None:
            future.set_result(Done(_stepped(last, last.step), told[1], replayed=True))
        return future

    def _act(self, entry: _Entry, act: Callable[[Future[Any]], list[Event[_Result, _Part]]]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise ServerUnavailable("the server is stopping: join the group again when it is back")
            self._open.add(future)
        future.add_done_callback(self._open.discard)
        with entry.lock:
            events = act(future)
        self._follow(entry, events)
        return future

    # --- Events ---------------------------------------------------------------------------------------------

    def _follow(self, entry: _Entry, events: list[Event[_Result, _Part]]) -> None:
        """Do what a group says, until it says no more."""
        while events:
            commits = []
            for event in events:
                if isinstance(event, Deliver):
                    self.aborted += isinstance(event.outcome, Failed) and isinstance(event.outcome.error, GroupAborted)
                    _deliver(event)
                else:
                    commits.append(event)
            events = []
            for commit in commits:
                events += self._commit(entry, commit)
        self._set_alarm(entry)

    def _commit(self, entry: _Entry, commit: Commit[_Part]) -> list[Event[_Result, _Part]]:
        assert isinstance(commit.place, _Place)
        refusal: SharedNormError
        try:
            result = self._take(entry, commit)
        except SharedNormError as error:
            refusal = error
        except Exception:  # noqa: BLE001 - the members get it
            # All members have to hear of it, or they wait for what never comes.
            _log.exception("defect in a step of the group %r", entry.group.name)
            refusal = InternalError("the server failed in a step of the group; its log has the details")
        else:
            with entry.lock:
                return entry.group.committed(commit.place, result)
        with entry.lock:
            return entry.group.refused(commit.place, refusal)

    def _take(self, entry: _Entry, commit: Commit[_Part]) -> _Result:
        place, parts = commit.place, commit.parts
        assert isinstance(place, _Place)
        generation = entry.group.generation.to_bytes(_GENERATION_BYTES, "big")
        session = _session(entry.prefix + generation, place)
        together = Together(CallKey(session, commit.number), _content(commit.number, commit.ranks))
        return (self._backward if place.backward else self._step)(place.key, parts, together)

    def _step(self, key: LayerKey, parts: tuple[_Part, ...], together: Together) -> Stepped:
        batches = [part.moments for part in parts if isinstance(part, MomentsPart) and part.moments is not None]
        if not batches:
            raise TooFewValues("the batches of all members are empty (expected: two values a map, of all together)")
        union = merge(batches)
        state = self._service.step_together(key, union, together).state
        return Stepped(union, state.version, state.num_of_props, state.scale, state.bias)

    def _backward(self, key: LayerKey, every: tuple[_Part, ...], together: Together) -> Summed:
        parts = [part for part in every if isinstance(part, GradientsPart)]
        first = parts[0]
        for part in parts:
            if part.call != first.call or _bytes(part.batch.mean, part.batch.m2) != _bytes(
                first.batch.mean, first.batch.m2
            ):
                raise InvalidConfiguration(
                    "the members of the group differ in the forward, or in updParamGrads, scale or momentum, of one "
                    "backward (expected: the same of all)"
                )
        config = self._service.layer_config(key)
        total = np.zeros((2, config.maps))
        for part in parts:
            if part.sums is not None:
                total += part.sums
        adds = first.call.param_grads
        gradients = parameter_gradients(first.batch, config.epsilon, total[0], total[1]) if adds else None
        self._service.backward_together(first.call, total, gradients, together)
        return Summed(total)

    # --- The clock ------------------------------------------------------------------------------------------

    def _set_alarm(self, entry: _Entry) -> None:
        with entry.lock:
            due = entry.group.next_deadline()
        if due is None:
            return
        with self._alarm:
            if self._timer is None:
                self._timer = threading.Thread(target=self._watch, name="groups", daemon=True)
                self._timer.start()
            if self._due is None or due < self._due:
                self._due = due
                self._alarm.notify_all()

    def _watch(self) -> None:
        while True:
            with self._alarm:
                while not self._closed and (self._due is None or self._due > self._clock()):
                    self._alarm.wait(None if self._due is None else max(0.0, self._due - self._clock()))
                if self._closed:
                    return
                self._due = None
            with self._lock:
                entries = list(self._by_name.values())
            for entry in entries:
                with entry.lock:
                    events = entry.group.expire()
                self._follow(entry, events)


def _deliver(event: Deliver[_Result]) -> None:
    assert isinstance(event.token, Future)
    outcome = event.outcome
    if isinstance(outcome, Failed):
        # One for each, since each is raised in a thread of its own.
        _set(event.token, type(outcome.error)(outcome.error.message, outcome.error.metadata))
    else:
        _set(event.token, outcome.membership if isinstance(outcome, Joined) else outcome)


def _set(future: Future[Any], outcome: object) -> None:
    try:
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        _log.debug("whoever waited has been sent away, since the server is stopping")


def _bytes(*arrays: np.ndarray[Any, np.dtype[np.float64]]) -> bytes:
    return b"".join(array.tobytes() for array in arrays)


def _session(ticket: bytes, place: _Place) -> bytes:
    """Return what a generation's changes at a place are known by: the group's number, and 8 bytes of all else."""
    generation = ticket[_GROUP_BYTES : _GROUP_BYTES + _GENERATION_BYTES]
    return ticket[:_GROUP_BYTES] + digest(generation, place.domain, place.backward)[:8]


def _content(number: int, ranks: tuple[int, ...]) -> bytes:
    return struct.pack(f"<5sQ{len(ranks)}H", _STEP_OF_GROUP, number, *ranks)


def _step_of(content: bytes) -> tuple[int, tuple[int, ...]] | None:
    # The number of a step, and the ranks of those whose parts are in it.
    head = struct.calcsize("<5sQ")
    if len(content) < head or not content.startswith((_STEP_OF_GROUP, GROUP_ENDED)):
        return None
    _, number, *ranks = struct.unpack(f"<5sQ{(len(content) - head) // 2}H", content)
    return number, tuple(ranks)


def _stepped(change: LastChange, step: TakenStep) -> Stepped:
    return Stepped(step.moments, change.version, change.num_of_props, step.scale, step.bias)
