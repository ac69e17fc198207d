"""Groups at work: threads that wait for each other, the clock, and what a complete step means for its layer.

`groups` says who waits for whom; here whoever completes a step merges its parts, in the order of their ranks, has the
service take it, once, and hands the result to all; what a future calls when it has its result, that thread calls. So a
step costs its members one call each, and no thread of its own.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sharednorm.errors import (
    InternalError,
    InvalidConfiguration,
    LimitExceeded,
    ServerUnavailable,
    SharedNormError,
    StaleGeneration,
    TooFewValues,
)
from sharednorm.normalization import merge, parameter_gradients
from sharednorm.state import Moments
from sharednorm_server.groups import Commit, Deliver, Done, Event, Failed, Group, GroupSettings, Joined, Membership
from sharednorm_server.requests import BackwardCall, LayerKey, LayerRecord
from sharednorm_server.service import LayerService

MAX_GROUPS = 1024
"""Of one server; one that nobody has used for an hour gives way to another."""
_IDLE_SECONDS = 3600.0

# A ticket says which group it is of, and is a secret.
_GROUP_BYTES, _TICKET_BYTES = 8, 24

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupKey:
    """The full name of a group."""

    namespace: str
    name: str


@dataclass(frozen=True)
class MomentsPart:
    """One member's batch. Two are the same if their bytes are."""

    content: bytes
    moments: Moments | None = field(compare=False)


@dataclass(frozen=True)
class GradientsPart:
    """One member's sums. Two are the same if their bytes are."""

    content: bytes
    sums: np.ndarray[Any, np.dtype[np.float64]] | None = field(compare=False)
    batch: Moments = field(compare=False)
    call: BackwardCall = field(compare=False)


Sums = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(eq=False)
class Stepped:
    """What a step gives: the moments of the union, and the layer after it. The edge keeps its answer in `told`."""

    moments: Moments
    record: LayerRecord
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
        self._alarm = threading.Condition()
        self._due: float | None = None
        self._timer: threading.Thread | None = None

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
            sums: Of `grad` and of `grad * (x - mean)`, float64 (2, C); None: the member's batch is empty.
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
            found = self._by_name.get(key)
            if found is not None and (found.group.settings == settings or not found.group.idle):
                found.used = self._clock()
                return found
            if found is not None:  # nobody is in it: it may begin anew with other settings
                self._drop(key, found)
            if len(self._by_name) >= MAX_GROUPS:
                self._make_room()
            prefix = secrets.token_bytes(_GROUP_BYTES)
            group: Group[_Part, _Result] = Group(
                key.name, settings, self._clock, lambda: prefix + secrets.token_bytes(_TICKET_BYTES - _GROUP_BYTES)
            )
            made = self._by_name[key] = self._by_prefix[prefix] = _Entry(group, prefix)
            made.used = self._clock()
            return made

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
        entry = self._by_prefix.get(ticket[:_GROUP_BYTES])
        if entry is None:
            raise StaleGeneration(
                "there is no group with such a member: the server has been started anew, or the group was not used for "
                "long; join again"
            )
        entry.used = self._clock()
        place = _Place(key, key.domain, backward)
        return self._act(entry, lambda future: entry.group.contribute(ticket, place, number, part, future))

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
            result = self._take(commit.place, commit.parts)
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

    def _take(self, place: _Place, parts: tuple[_Part, ...]) -> _Result:
        if place.backward:
            return self._backward(place.key, [part for part in parts if isinstance(part, GradientsPart)])
        batches = [part.moments for part in parts if isinstance(part, MomentsPart) and part.moments is not None]
        if not batches:
            raise TooFewValues("the batches of all members are empty (expected: two values a map, of all together)")
        union = merge(batches)
        return Stepped(union, self._service.push_moments(place.key, True, union).record)

    def _backward(self, key: LayerKey, parts: list[GradientsPart]) -> Summed:
        first = parts[0]
        for part in parts:
            if part.call != first.call or _bytes(part.batch.mean, part.batch.m2) != _bytes(
                first.batch.mean, first.batch.m2
            ):
                raise InvalidConfiguration(
                    "the members of the group differ in the forward, or in updParamGrads, scale or momentum, of one "
                    "backward (expected: the same of all)"
                )
        config = self._service.get_layer(key).config
        total = np.zeros((2, config.maps))
        for part in parts:
            if part.sums is not None:
                total += part.sums
        if first.call.param_grads:
            scale_grad, bias_grad = parameter_gradients(first.batch, config.epsilon, total[0], total[1])
            self._service.push_gradients(first.call, scale_grad, bias_grad)
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
