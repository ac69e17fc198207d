"""Ten thousand seeded schedules of a group: members that come, go, crash and come back, and a network that delays,
reorders and doubles. Whatever happens, no step is half committed and nobody waits for ever."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from sharednorm.errors import STEP_OVER, GroupAborted, NonFiniteInput, StaleGeneration
from sharednorm_server.groups.state_machine import Commit, Deliver, Done, Event, Failed, Group, GroupSettings, Joined

SCHEDULES, CHUNKS = 10_000, 8
PLACES = ("first", "second", "first, backward")
TIMEOUT = 10.0

Outcome = Joined | Done[str] | Failed


@dataclass
class Member:
    """A member's process: it joins, then takes step after step at each place in turn, and joins anew when told to."""

    name: str
    incarnation: int = 0
    ticket: bytes | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    next_place: int = 0
    waits_for: tuple[object, ...] | None = None
    left: bool = False

    def crash(self) -> None:
        self.incarnation += 1
        self.ticket, self.waits_for, self.numbers, self.next_place = None, None, {}, 0

    def took(self, outcome: Outcome) -> None:
        self.waits_for = None
        if isinstance(outcome, Joined):
            self.ticket, self.numbers, self.next_place = outcome.membership.ticket, {}, 0
        elif isinstance(outcome, Done) or STEP_OVER in outcome.error.metadata:
            self.numbers[PLACES[self.next_place]] = self.numbers.get(PLACES[self.next_place], 0) + 1
            self.next_place = (self.next_place + 1) % len(PLACES)
        else:
            assert isinstance(outcome.error, (GroupAborted, StaleGeneration)), outcome.error
            self.ticket = None


class World:
    """A group, its members, and what is on its way between them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        size = self.random.randint(1, 4)
        self.settings = GroupSettings(size, self.random.randint(1, size), TIMEOUT)
        self.now = 0.0
        self.tickets = 0
        self.group: Group[str, str] = Group("run", self.settings, lambda: self.now, self.new_ticket)
        self.members = [Member(f"member {number}") for number in range(size)]
        self.on_the_way: list[tuple[object, ...]] = []  # calls that the group has not got yet
        self.committing: list[Commit[str]] = []
        self.asked: set[object] = set()
        self.answered: dict[object, Outcome] = {}
        self.tokens = 0
        self.results: dict[tuple[int, object, int], tuple[str, tuple[int, ...]]] = {}
        self.refused: set[tuple[int, object, int]] = set()
        self.generation_of: dict[bytes, int] = {}
        self.ranks_of: dict[int, set[int]] = {}

    def new_ticket(self, _: int) -> bytes:
        self.tickets += 1
        return f"ticket {self.tickets}".encode()

    def token(self, member: Member, kind: str) -> tuple[object, ...]:
        self.tokens += 1
        return self.tokens, member.name, member.incarnation, kind

    # --- What a schedule is made of ---

    def step(self, *, calm: bool = False) -> None:
        choices = [self.act] * 6 + [self.deliver] * 8 + [self.commit] * 4 + [self.pass_time] * (4 if calm else 1)
        if not calm:
            choices += [self.crash, self.leave, self.ask_again, self.double]
        self.random.choice(choices)()

    def act(self) -> None:
        idle = [each for each in self.members if each.waits_for is None and not each.left]
        if not idle:
            return
        member = self.random.choice(idle)
        if member.ticket is None:
            member.waits_for = self.token(member, "join")
            self.on_the_way.append(("join", member.name, member.waits_for))
        else:
            place = PLACES[member.next_place]
            number = member.numbers.get(place, 0) + 1
            member.waits_for = self.token(member, "step")
            part = f"{member.ticket.decode()} {place} {number};"
            self.on_the_way.append(("step", member.ticket, place, number, part, member.waits_for))

    def deliver(self) -> None:
        if not self.on_the_way:
            return
        kind, *rest = self.on_the_way.pop(self.random.randrange(len(self.on_the_way)))
        self.asked.add(rest[-1])
        if kind == "join":
            name, token = rest
            self.follow(self.group.join(str(name), None, self.settings, token))
        elif kind == "leave":
            ticket, token = rest
            assert isinstance(ticket, bytes)
            self.asked.discard(token)
            self.follow(self.group.leave(ticket))
        else:
            ticket, place, number, part, token = rest
            assert isinstance(ticket, bytes)
            assert isinstance(number, int)
            self.follow(self.group.contribute(ticket, place, number, str(part), token))

    def double(self) -> None:
        """A call arrives twice; nobody waits for the second answer."""
        steps = [each for each in self.on_the_way if each[0] == "step"]
        if steps:
            *call, token = self.random.choice(steps)
            self.on_the_way.append((*call, ("nobody", token, self.tokens)))
            self.tokens += 1

    def ask_again(self) -> None:
        """A member has lost its connection, and asks for the same step again."""
        waiting = [each for each in self.members if each.waits_for and each.waits_for[-1] == "step" and each.ticket]
        if not waiting:
            return
        member = self.random.choice(waiting)
        assert member.ticket is not None
        place = PLACES[member.next_place]
        number = member.numbers.get(place, 0) + 1
        member.waits_for = self.token(member, "step")
        part = f"{member.ticket.decode()} {place} {number};"
        self.on_the_way.append(("step", member.ticket, place, number, part, member.waits_for))

    def commit(self) -> None:
        if not self.committing:
            return
        commit = self.committing.pop(self.random.randrange(len(self.committing)))
        key = self.key_of(commit)
        if self.random.random() < 0.1:
            self.refused.add(key)
            self.follow(self.group.refused(commit.place, NonFiniteInput("not finite")))
        else:
            result = "".join(commit.parts)
            self.results[key] = result, tuple(range(len(commit.parts)))
            self.follow(self.group.committed(commit.place, result))

    def crash(self) -> None:
        if self.random.random() < 0.3:
            self.random.choice(self.members).crash()

    def leave(self) -> None:
        members = [each for each in self.members if each.ticket and each.waits_for is None and not each.left]
        if members and self.random.random() < 0.1:
            member = self.random.choice(members)
            member.left = True
            self.on_the_way.append(("leave", member.ticket, ("leave", member.name)))

    def pass_time(self) -> None:
        self.now += self.random.choice((0.1, 1.0, 4.0, 11.0))
        self.follow(self.group.expire())
        due = self.group.next_deadline()
        assert due is None or due > self.now, "a deadline has passed and nothing has come of it"

    # --- What has to hold ---

    def key_of(self, commit: Commit[str]) -> tuple[int, object, int]:
        # The part names the ticket, and the ticket its generation.
        generations = {
            self.generation_of[part.split(" first")[0].split(" second")[0].encode()] for part in commit.parts
        }
        assert len(generations) == 1, "parts of two generations in one step"
        return generations.pop(), commit.place, commit.number

    def follow(self, events: list[Event[str, str]]) -> None:
        for event in events:
            if isinstance(event, Commit):
                key = self.key_of(event)
                assert key not in self.results, "committed twice"
                assert key not in self.refused, "committed twice"
                generation, place, number = key
                assert number == 1 or {(generation, place, number - 1)} & (self.results.keys() | self.refused)
                assert all(f" {event.place} {event.number};" in part for part in event.parts)
                if self.settings.min_members == self.settings.size and not any(each.left for each in self.members):
                    assert len(event.parts) == self.settings.size, "committed without a member"
                self.committing.append(event)
            else:
                self.outcome(event)

    def outcome(self, event: Deliver[str]) -> None:
        token, outcome = event.token, event.outcome
        assert token not in self.answered, "answered twice"
        self.answered[token] = outcome
        if isinstance(outcome, Joined):
            membership = outcome.membership
            self.generation_of[membership.ticket] = membership.generation
            ranks = self.ranks_of.setdefault(membership.generation, set())
            assert membership.rank not in ranks, "two members with one rank"
            ranks.add(membership.rank)
        elif isinstance(outcome, Done):
            assert any(outcome.result == result for result, _ in self.results.values()), "done, and never committed"
            assert len(outcome.ranks) == outcome.result.count(";")
            assert list(outcome.ranks) == sorted(set(outcome.ranks))
        for member in self.members:
            if member.waits_for is token:
                member.took(outcome)

    def end(self) -> None:
        """Nothing new happens but time: then nobody waits any longer."""
        for _ in range(200):
            while self.on_the_way:
                self.deliver()
            while self.committing:
                self.commit()
            self.now += TIMEOUT + 1
            self.follow(self.group.expire())
            if not (self.on_the_way or self.committing):
                break
        open_questions = self.asked - self.answered.keys()
        assert not open_questions, f"they wait for ever: {open_questions}"
        assert self.group.next_deadline() is None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_schedules(chunk: int) -> None:
    committed = refused = 0
    for seed in range(chunk, SCHEDULES, CHUNKS):
        world = World(seed)
        for _ in range(world.random.randint(20, 120)):
            world.step()
        world.end()
        committed += len(world.results)
        refused += len(world.refused)
    assert committed > 1000
    assert refused > 100


def test_after_any_trouble_the_group_works_again() -> None:
    for seed in range(500):
        world = World(seed)
        for _ in range(60):
            world.step()
        world.end()
        for member in world.members:
            member.crash()
            member.left = False
        before = len(world.results)
        for _ in range(400):
            world.step(calm=True)
        assert len(world.results) > before, seed


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_order_of_arrival_leaves_no_trace(size: int) -> None:
    def run(seed: int) -> list[tuple[object, int, tuple[str, ...]]]:
        order, seen, given = random.Random(seed), [], iter(tickets)
        group: Group[str, str] = Group("run", GroupSettings(size, size, TIMEOUT), lambda: 0.0, lambda _: next(given))
        names = [f"m{number}" for number in range(size)]
        order.shuffle(names)
        found: dict[object, Outcome] = {}

        def follow(events: list[Event[str, str]]) -> None:
            for event in events:
                if isinstance(event, Commit):
                    seen.append((event.place, event.number, event.parts))
                    follow(group.committed(event.place, "".join(event.parts)))
                else:
                    found[event.token] = event.outcome

        for name in names:
            follow(group.join(name, None, group.settings, name))
        for number in range(1, 6):
            for place in PLACES:
                order.shuffle(names)
                for name in names:
                    joined = found[name]
                    assert isinstance(joined, Joined)
                    follow(group.contribute(joined.membership.ticket, place, number, f"{name} {number}", object()))
        return seen

    tickets = [f"ticket {number}".encode() for number in range(size)]
    first = run(0)
    assert len(first) == 5 * len(PLACES)
    assert all(run(seed) == first for seed in range(1, 20))
