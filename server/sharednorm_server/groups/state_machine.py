"""One group: who is in, and which step waits for whom. A pure state machine, without threads, transport or a clock.

Members whose batches are normalized as one meet at steps: each brings its part, and when all have, the parts are
committed together, once, and each member gets the result. Whoever drives a group calls its methods one at a time, and
does what the returned events say: hands outcomes to those who wait, and commits what is complete, which it then reports
by `committed` or `refused`. `next_deadline` says when `expire` is to be called.

**Generations.** A generation is a set of members with ranks. It forms when all have joined, and ends when one of them
is missing: nobody's step commits then, and who still wants to be in joins again. A member knows its generation by a
ticket, which no other member and no other generation has; so whatever comes late, from members that were given up or
from before a restart of the server, is told that it is stale, and harms nothing.

**Steps.** A step is a place and a number: the places (a layer's forward or backward, say) have steps of their own, and
each member takes those of a place in order, 1, 2, 3, and so on. A member can only be one step ahead of another,
so the last result of each place is all that is kept: who asks again, since it has not got the answer, gets it again.

**Missing members.** A step waits for its members at most `timeout` seconds from its first part. Then the generation
ends for all, or, where `min_members` allows it and so many are there, goes on without those who are missing. The same
where a member joins anew while others are at a step: it is done with this generation, or has forgotten it. Who leaves
in order never stops the others.

Who has missed a step comes back by joining, and waits there: those who go on hear of it with each step, and end their
generation by joining anew, all at the same moment, which only they know a good one of.

**Order.** Parts are merged in the order of ranks, which are fixed when a generation forms: by the ranks that the
members ask for, else by their names. So the order of arrival leaves no trace in a result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from sharednorm.errors import (
    STEP_OVER,
    GroupAborted,
    GroupMismatch,
    LimitExceeded,
    SharedNormError,
    StaleGeneration,
    StepOutOfOrder,
)

Part = TypeVar("Part")
"""What a member brings to a step."""
Result = TypeVar("Result")
"""What a step gives to each member."""

Ticket = bytes
Place = Hashable
Token = object
"""Somebody who waits for an outcome; whatever the caller says."""


@dataclass(frozen=True)
class GroupSettings:
    """What all members of a group have to agree on.

    Attributes:
        size: Members of a whole generation, at least 1.
        min_members: So many may go on when others are missing; `size`: none may be missing.
        timeout: Seconds that the first at a meeting waits for the last.
    """

    size: int
    min_members: int
    timeout: float


@dataclass(frozen=True)
class Membership:
    """A member's place in a generation.

    Attributes:
        ticket: What the member's calls carry.
        generation: Its number, from 1.
        rank: The member's, from 0, below `members`.
        members: Their number.
    """

    ticket: Ticket
    generation: int
    rank: int
    members: int


@dataclass(frozen=True)
class Joined:
    """A generation has formed: the outcome of a join."""

    membership: Membership


@dataclass(frozen=True)
class Done(Generic[Result]):
    """A step has committed: the outcome of a contribution.

    Attributes:
        result: What the step gave.
        ranks: Whose parts are in it, in ascending order.
        waiting: How many waited to join when it committed; the members of the step let them in by joining anew.
        replayed: Whether it had committed before this was asked for.
    """

    result: Result
    ranks: tuple[int, ...]
    waiting: int = 0
    replayed: bool = False


@dataclass(frozen=True)
class Failed:
    """Nothing was changed: the outcome of a join or a contribution."""

    error: SharedNormError


@dataclass(frozen=True)
class Deliver(Generic[Result]):
    """Hand an outcome to somebody who waits."""

    token: Token
    outcome: Joined | Done[Result] | Failed


@dataclass(frozen=True)
class Commit(Generic[Part]):
    """Commit a step, then say `committed` or `refused`. Nothing else of its place happens in between.

    Attributes:
        place: Where.
        number: Which step.
        parts: In the order of ranks.
        ranks: Whose they are.
    """

    place: Place
    number: int
    parts: tuple[Part, ...]
    ranks: tuple[int, ...] = ()


Event = Deliver[Result] | Commit[Part]


@dataclass
class _Member:
    name: str
    wish: int | None  # the rank that it asks for
    token: Token


@dataclass
class _Live:
    """A member of the generation."""

    name: str
    rank: int
    ticket: Ticket


@dataclass
class _Step(Generic[Part]):
    number: int
    deadline: float
    parts: dict[int, Part] = field(default_factory=dict)  # by rank
    tokens: dict[int, Token] = field(default_factory=dict)
    committing: tuple[int, ...] = ()  # whose parts are being committed


@dataclass
class _PlaceState(Generic[Part, Result]):
    last: int = 0  # number of the last step that is over
    outcome: Done[Result] | Failed | None = None  # of that step
    given: dict[int, Part] = field(default_factory=dict)  # its parts
    step: _Step[Part] | None = None  # the one that waits


class Group(Generic[Part, Result]):
    """One group.

    Args:
        name: For messages.
        settings: What the members have to agree on.
        clock: Seconds that only grow.
        new_ticket: Makes a name that nobody can guess, of a generation.
        most_places: Most places of a generation.
    """

    def __init__(
        self,
        name: str,
        settings: GroupSettings,
        clock: Callable[[], float],
        new_ticket: Callable[[int], Ticket],
        most_places: int = 10_000,
    ) -> None:
        self.name, self.settings = name, settings
        self._clock = clock
        self._new_ticket = new_ticket
        self._most_places = most_places
        self.generation = 0
        self._live: dict[Ticket, _Live] = {}
        self._excused = 0  # members of this generation that have left in order
        self._joining: dict[str, _Member] = {}
        self._join_deadline = 0.0
        self._places: dict[Place, _PlaceState[Part, Result]] = {}
        self._why_stale = "it has never been in this group, or the server has been started anew"

    # --- What is known --------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nobody is in, and nobody waits to be."""
        return not (self._live or self._joining)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of the members."""
        return tuple(sorted(each.rank for each in self._live.values()))

    @property
    def joining(self) -> int:
        """How many wait to be in the next generation."""
        return len(self._joining)

    def next_deadline(self) -> float | None:
        """Return when `expire` is to be called at the latest; None while nobody waits."""
        waiting = [step.deadline for step in self._waiting()]
        if self._joining and not self._committing():
            waiting.append(self._join_deadline)
        return min(waiting, default=None)

    # --- Coming and going -----------------------------------------------------------------------------------

    def join(self, name: str, rank: int | None, settings: GroupSettings, token: Token) -> list[Event[Result, Part]]:
        """Join the next generation, which forms when all have.

        A member of this generation that joins is ready for a new one. One whose process has been started anew joins
        under its old name: what it was before is gone, and nobody waits for that any longer.

        Args:
            name: The member's own name in the group. It stays the same when the member comes back.
            rank: The rank that it asks for, or None.
            settings: What it takes the group's settings for.
            token: Whom the outcome is delivered to.
        """
        error = self._refusal(name, rank, settings)
        if error is not None:
            return [Deliver(token, Failed(error))]
        events: list[Event[Result, Part]] = []
        before = self._joining.get(name)
        if before is not None:
            events.append(Deliver(before.token, Failed(GroupAborted(f"{name!r} has joined {self.name!r} again"))))
        if not self._joining:
            self._join_deadline = self._clock() + self.settings.timeout
        self._joining[name] = _Member(name, rank, token)
        live = next((each for each in self._live.values() if each.name == name), None)
        if live is not None:
            del self._live[live.ticket]
            events += self._without(f"the member {name!r} has joined anew")
        return events + self._form_if_ready()

    def leave(self, ticket: Ticket) -> list[Event[Result, Part]]:
        """Leave in order. The others go on without this member; what it brought to a step that waits, counts."""
        if self._live.pop(ticket, None) is None:
            return []
        self._excused += 1
        return self._without("members have left") + self._form_if_ready()

    def expire(self) -> list[Event[Result, Part]]:
        """Give up what has waited too long."""
        now = self._clock()
        events: list[Event[Result, Part]] = []
        late = [step for step in self._waiting() if step.deadline <= now]
        if late:
            events += self._give_up(late)
        if self._joining and self._join_deadline <= now and not self._committing():
            events += self._end_of_joining()
        return events

    # --- Steps ----------------------------------------------------------------------------------------------

    def contribute(
        self, ticket: Ticket, place: Place, number: int, part: Part, token: Token
    ) -> list[Event[Result, Part]]:
        """Bring a member's part to a step.

        Args:
            ticket: The member's.
            place: Where.
            number: Which step of that place: one more than the member's last one there.
            part: What it brings. Brought again, it has to be equal.
            token: Whom the outcome is delivered to.
        """
        live = self._live.get(ticket)
        if live is None:
            return [Deliver(token, Failed(self._stale()))]
        state = self._places.get(place)
        if state is None:
            if len(self._places) >= self._most_places:
                error = LimitExceeded(
                    f"the group {self.name!r} has steps at {len(self._places)} places (expected: at most "
                    f"{self._most_places})",
                    {"limit": "group_places", "value": str(self._most_places)},
                )
                return [Deliver(token, Failed(error))]
            state = self._places[place] = _PlaceState()
        if number == state.last and number > 0:
            return [Deliver(token, self._again(state, live.rank, part))]
        if number != state.last + 1:
            return [Deliver(token, Failed(_out_of_order(self.name, number, state.last + 1)))]
        step = state.step
        if step is None:
            step = state.step = _Step(number, self._clock() + self.settings.timeout)
        events: list[Event[Result, Part]] = []
        if live.rank in step.parts:
            if step.parts[live.rank] != part:
                return [Deliver(token, Failed(_other_content(number)))]
            waiting = step.tokens.get(live.rank)
            if waiting is not None:
                events.append(Deliver(waiting, Failed(GroupAborted("this step was asked for again by its member"))))
        step.parts[live.rank] = part
        step.tokens[live.rank] = token
        return events + self._without("members have joined anew, and this one goes on")

    def committed(self, place: Place, result: Result) -> list[Event[Result, Part]]:
        """Say that a step has been committed."""
        step = self._taken(place)
        return self._over(place, Done(result, step.committing, len(self._joining)))

    def refused(self, place: Place, error: SharedNormError) -> list[Event[Result, Part]]:
        """Say that a step could not be committed, and that nothing was changed.

        All its members are told why, and that the step is over: the next one has the next number.
        """
        number = self._taken(place).number
        return self._over(place, Failed(type(error)(error.message, {**error.metadata, STEP_OVER: str(number)})))

    # --- Inside ---------------------------------------------------------------------------------------------

    def _refusal(self, name: str, rank: int | None, settings: GroupSettings) -> SharedNormError | None:
        if settings != self.settings:
            return GroupMismatch(
                f"the group {self.name!r} has {_described(self.settings)} (this member expects: "
                f"{_described(settings)}): give all members the same values"
            )
        if rank is not None and not 0 <= rank < self.settings.size:
            return GroupMismatch(f"rank {rank} of {self.settings.size} (expected: 0 to {self.settings.size - 1})")
        others = [each for each in self._joining.values() if each.name != name]
        if rank is not None and any(each.wish == rank for each in others):
            return GroupMismatch(f"two members of the group {self.name!r} ask for rank {rank}")
        taken = ({each.name for each in self._live.values()} | {each.name for each in others}) - {name}
        if len(taken) >= self.settings.size:
            return GroupMismatch(
                f"the group {self.name!r} has its {self.settings.size} members already: wait until one has left, or "
                "give all of them a larger size"
            )
        return None

    def _waiting(self) -> list[_Step[Part]]:
        return [state.step for state in self._places.values() if state.step and not state.step.committing]

    def _committing(self) -> bool:
        """Whether a step is being committed; the next generation cannot form before that is over."""
        return any(state.step is not None and state.step.committing for state in self._places.values())

    def _stale(self) -> StaleGeneration:
        return StaleGeneration(
            f"this member is not in generation {self.generation} of the group {self.name!r}: {self._why_stale}; join "
            "again"
        )

    def _again(self, state: _PlaceState[Part, Result], rank: int, part: Part) -> Done[Result] | Failed:
        outcome = state.outcome
        if rank not in state.given or outcome is None:
            return Failed(_out_of_order(self.name, state.last, state.last + 1))
        if state.given[rank] != part:
            return Failed(_other_content(state.last))
        return outcome if isinstance(outcome, Failed) else replace(outcome, replayed=True)

    def _commit_if_complete(self, place: Place, state: _PlaceState[Part, Result]) -> list[Event[Result, Part]]:
        step = state.step
        if step is None or step.committing or not all(rank in step.parts for rank in self.ranks):
            return []
        ranks = step.committing = tuple(sorted(step.parts))
        return [Commit(place, step.number, tuple(step.parts[rank] for rank in ranks), ranks)]

    def _taken(self, place: Place) -> _Step[Part]:
        step = self._places[place].step
        if step is None or not step.committing:
            raise ValueError(f"no step is being committed at {place!r}")
        return step

    def _over(self, place: Place, outcome: Done[Result] | Failed) -> list[Event[Result, Part]]:
        state = self._places[place]
        step = self._taken(place)
        state.last, state.outcome, state.given, state.step = step.number, outcome, step.parts, None
        return [*(Deliver(token, outcome) for _, token in sorted(step.tokens.items())), *self._form_if_ready()]

    def _without(self, why: str) -> list[Event[Result, Part]]:
        """Go on with those who are left: commit what waits for nobody else, or end the generation for them too."""
        if self._waiting() and (not self._live or len(self._live) + self._excused < self.settings.min_members):
            return self._end(why)
        events: list[Event[Result, Part]] = []
        for place, state in self._places.items():
            events += self._commit_if_complete(place, state)
        return events

    def _give_up(self, late: list[_Step[Part]]) -> list[Event[Result, Part]]:
        """Go on without those for whom a step has waited too long, or end the generation.

        Who waits at another step is not one of them: it is there, and waits itself for somebody else.
        """
        there = {rank for step in self._waiting() for rank in step.tokens}
        missing = sorted({rank for step in late for rank in self.ranks if rank not in there})
        if not missing:
            return self._end(
                "its members wait for each other at different layers (expected: all call the layers in one order)"
            )
        self._live = {ticket: each for ticket, each in self._live.items() if each.rank not in missing}
        self._why_stale = "the others have waited too long for it"
        for step in late:
            step.deadline = self._clock() + self.settings.timeout  # for those who have been held up themselves
        named = ", ".join(map(str, missing))
        return self._without(f"a step has waited {self.settings.timeout:g} s for rank {named}") + self._form_if_ready()

    def _end(self, why: str) -> list[Event[Result, Part]]:
        """End the generation. What is being committed is left to its end; nobody else's step commits."""
        error = GroupAborted(
            f"generation {self.generation} of the group {self.name!r} has ended: {why}; no member's step was applied: "
            "join again, and repeat the step",
            {"generation": str(self.generation)},
        )
        events: list[Event[Result, Part]] = []
        for place, state in list(self._places.items()):
            step = state.step
            if step is not None and step.committing:
                continue
            if step is not None:
                events += [Deliver(token, Failed(error)) for _, token in sorted(step.tokens.items())]
            del self._places[place]
        self._live = {}
        self._why_stale = why
        return events

    def _form_if_ready(self) -> list[Event[Result, Part]]:
        """Form a generation when nobody is left in the old one that has not joined, and all places are taken."""
        if len(self._joining) < self.settings.size or self._live or self._committing():
            return []
        return self._form()

    def _end_of_joining(self) -> list[Event[Result, Part]]:
        if len(self._joining) >= self.settings.min_members and not self._live:
            return self._form()
        others = (
            f", and {len(self._live)} go on in generation {self.generation}, which let others in when they call "
            "group.join() between two steps"
            if self._live
            else ""
        )
        error = GroupAborted(
            f"{len(self._joining)} of {self.settings.size} members have joined the group {self.name!r} within "
            f"{self.settings.timeout:g} s{others}: start the others, and join again"
        )
        tokens = [each.token for each in self._joining.values()]
        self._joining = {}
        return [Deliver(token, Failed(error)) for token in tokens]

    def _form(self) -> list[Event[Result, Part]]:
        joining = sorted(self._joining.values(), key=lambda each: each.name)
        count = len(joining)
        taken = {each.wish for each in joining if each.wish is not None and each.wish < count}
        free = iter(rank for rank in range(count) if rank not in taken)
        self.generation += 1
        self._live, self._joining, self._places, self._excused = {}, {}, {}, 0
        self._why_stale = "that generation is over"
        events: list[Event[Result, Part]] = []
        for each in joining:
            rank = each.wish if each.wish in taken and each.wish is not None else next(free)
            live = _Live(each.name, rank, self._new_ticket(self.generation))
            self._live[live.ticket] = live
            events.append(Deliver(each.token, Joined(Membership(live.ticket, self.generation, rank, count))))
        return events


def _described(settings: GroupSettings) -> str:
    return f"size={settings.size}, min_members={settings.min_members}, timeout={settings.timeout:g}"


def _out_of_order(name: str, number: int, expected: int) -> StepOutOfOrder:
    return StepOutOfOrder(
        f"step {number} of a member of the group {name!r} (expected: {expected}): a member's calls of one layer have "
        "to come one after the other"
    )


def _other_content(number: int) -> StepOutOfOrder:
    return StepOutOfOrder(f"step {number} was brought again with another content: a repeated step has to be the same")
