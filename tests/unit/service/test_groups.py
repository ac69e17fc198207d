"""The state machine of a group: generations, steps, and what becomes of those who wait."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from sharednorm.errors import (
    STEP_OVER,
    GroupAborted,
    GroupMismatch,
    LimitExceeded,
    NonFiniteInput,
    SharedNormError,
    StaleGeneration,
    StepOutOfOrder,
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

Events = list[Event[str, str]]
LAYER = "bn"


def given(*tickets: bytes) -> Callable[[int], bytes]:
    """Give these tickets, whatever the generation is."""
    left = iter(tickets)
    return lambda _: next(left)


class Driver:
    """A group whose driver commits at once: the result of a step is its parts, one behind the other."""

    def __init__(
        self, size: int, min_members: int | None = None, timeout: float = 10.0, most_places: int = 100
    ) -> None:
        self.now = 0.0
        self.settings = GroupSettings(size, min_members or size, timeout)
        tickets = (f"ticket {number}".encode() for number in itertools.count())
        self.group: Group[str, str] = Group(
            "run", self.settings, lambda: self.now, lambda _: next(tickets), most_places
        )
        self.outcomes: dict[object, Joined | Done[str] | Failed] = {}
        self.commits: list[Commit[str]] = []
        self.refuse: SharedNormError | None = None

    def follow(self, events: Events) -> None:
        for event in events:
            if isinstance(event, Deliver):
                assert event.token not in self.outcomes, "delivered twice"
                self.outcomes[event.token] = event.outcome
            else:
                self.commits.append(event)
                if self.refuse is not None:
                    self.follow(self.group.refused(event.place, self.refuse))
                else:
                    self.follow(self.group.committed(event.place, "".join(event.parts)))

    def join(
        self, name: str, rank: int | None = None, token: object = None, settings: GroupSettings | None = None
    ) -> None:
        self.follow(self.group.join(name, rank, settings or self.settings, token or name))

    def joined(self, *names: str) -> list[Membership]:
        for name in names:
            self.join(name)
        return [self.membership(self.outcomes.pop(name)) for name in names]

    @staticmethod
    def membership(outcome: object) -> Membership:
        assert isinstance(outcome, Joined)
        return outcome.membership

    def bring(self, member: Membership, number: int, part: str, token: object, place: str = LAYER) -> None:
        self.follow(self.group.contribute(member.ticket, place, number, part, token))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.follow(self.group.expire())

    def error(self, token: object) -> SharedNormError:
        outcome = self.outcomes[token]
        assert isinstance(outcome, Failed)
        return outcome.error


def test_a_generation_forms_when_all_have_joined() -> None:
    driver = Driver(3)
    driver.join("c")
    driver.join("a")
    assert driver.outcomes == {}
    driver.join("b")
    members = [driver.membership(driver.outcomes[name]) for name in "abc"]
    assert [(each.generation, each.rank, each.members) for each in members] == [(1, 0, 3), (1, 1, 3), (1, 2, 3)]
    assert len({each.ticket for each in members}) == 3
    assert driver.group.next_deadline() is None


def test_ranks_are_those_that_are_asked_for() -> None:
    driver = Driver(3)
    driver.join("a", rank=2)
    driver.join("b")
    driver.join("c", rank=0)
    assert [driver.membership(driver.outcomes[name]).rank for name in "abc"] == [2, 1, 0]


def test_a_step_commits_once_in_the_order_of_ranks_whoever_comes_first() -> None:
    for order in itertools.permutations(range(3)):
        driver = Driver(3)
        members = driver.joined("a", "b", "c")
        for rank in order:
            assert driver.commits == []
            driver.bring(members[rank], 1, "xyz"[rank], rank)
        assert [commit.parts for commit in driver.commits] == [("x", "y", "z")]
        assert driver.outcomes == dict.fromkeys(range(3), Done("xyz", (0, 1, 2)))


def test_places_do_not_wait_for_each_other() -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "1", "a1", place="one")
    driver.bring(b, 1, "2", "b1", place="two")
    driver.bring(a, 1, "3", "a2", place="two")
    assert driver.outcomes == dict.fromkeys(("a2", "b1"), Done("32", (0, 1)))


def test_who_has_not_got_the_answer_gets_it_again() -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "x", "lost")
    driver.bring(b, 1, "y", "b1")
    driver.bring(b, 2, "Y", "b2")  # b is a step ahead
    driver.bring(a, 1, "x", "again")
    assert driver.outcomes["again"] == Done("xy", (0, 1), replayed=True)
    driver.bring(a, 2, "X", "a2")
    assert driver.outcomes["b2"] == Done("XY", (0, 1))
    assert len(driver.commits) == 2


def test_a_part_that_is_brought_again_while_the_step_waits_counts_once() -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "x", "first")
    driver.bring(a, 1, "x", "second")
    assert isinstance(driver.error("first"), GroupAborted)
    driver.bring(b, 1, "y", "b1")
    assert driver.outcomes["second"] == Done("xy", (0, 1))


@pytest.mark.parametrize("over", [False, True])
def test_a_repeated_part_with_another_content_is_refused(over: bool) -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "x", "first")
    if over:
        driver.bring(b, 1, "y", "b1")
    driver.bring(a, 1, "z", "second")
    assert isinstance(driver.error("second"), StepOutOfOrder)
    if not over:
        driver.bring(b, 1, "y", "b1")
    assert driver.outcomes["first"] == Done("xy", (0, 1))


@pytest.mark.parametrize("number", [0, 2, 3, -1])
def test_steps_come_one_after_the_other(number: int) -> None:
    driver = Driver(2)
    a, _ = driver.joined("a", "b")
    driver.bring(a, number, "x", "a1")
    assert isinstance(driver.error("a1"), StepOutOfOrder)


def test_a_step_that_cannot_be_committed_is_over_for_all() -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.refuse = NonFiniteInput("not finite", {"channel": "3"})
    driver.bring(a, 1, "x", "a1")
    driver.bring(b, 1, "y", "b1")
    for token in ("a1", "b1"):
        assert isinstance(driver.error(token), NonFiniteInput)
        assert driver.error(token).metadata == {"channel": "3", STEP_OVER: "1"}
    driver.bring(a, 1, "x", "asked again")
    assert isinstance(driver.error("asked again"), NonFiniteInput)
    driver.refuse = None
    driver.bring(a, 2, "X", "a2")
    driver.bring(b, 2, "Y", "b2")
    assert driver.outcomes["a2"] == Done("XY", (0, 1))


# --- Missing members -------------------------------------------------------------------------------------------------


def test_a_step_that_waits_too_long_ends_the_generation() -> None:
    driver = Driver(3)
    a, b, c = driver.joined("a", "b", "c")
    driver.bring(a, 1, "x", "a1")
    driver.now += 5
    driver.bring(b, 1, "y", "b1")
    assert driver.group.next_deadline() == 10.0
    driver.wait(4.9)
    assert driver.outcomes == {}
    driver.wait(0.2)
    for token in ("a1", "b1"):
        assert isinstance(driver.error(token), GroupAborted)
        assert "rank 2" in str(driver.error(token))
    driver.bring(c, 1, "z", "c1")
    assert isinstance(driver.error("c1"), StaleGeneration)
    assert driver.commits == []
    assert driver.group.idle


def test_who_was_given_up_joins_again_and_nothing_of_before_counts() -> None:
    driver = Driver(2)
    old, _ = driver.joined("a", "b")
    driver.bring(old, 1, "x", "a1")
    driver.wait(11)
    a, b = driver.joined("a", "b")
    assert (a.generation, b.generation) == (2, 2)
    driver.bring(old, 1, "x", "late")
    assert isinstance(driver.error("late"), StaleGeneration)
    driver.bring(a, 1, "X", "a2")
    driver.bring(b, 1, "Y", "b2")
    assert driver.outcomes["a2"] == Done("XY", (0, 1))


def test_survivors_go_on_where_that_is_allowed() -> None:
    driver = Driver(3, min_members=2)
    a, b, c = driver.joined("a", "b", "c")
    driver.bring(a, 1, "x", "a1")
    driver.bring(c, 1, "z", "c1")
    driver.bring(a, 1, "x", "a1 elsewhere", place="other")
    driver.wait(11)
    assert driver.outcomes["a1"] == driver.outcomes["c1"] == Done("xz", (0, 2))
    assert "a1 elsewhere" not in driver.outcomes  # it still waits for c, which is there
    driver.bring(c, 1, "z", "c1 elsewhere", place="other")
    assert driver.outcomes["a1 elsewhere"] == Done("xz", (0, 2))
    driver.bring(b, 1, "y", "b1")
    assert isinstance(driver.error("b1"), StaleGeneration)


def test_members_that_wait_for_each_other_at_different_layers() -> None:
    driver = Driver(2, min_members=1)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "x", "a1", place="one")
    driver.bring(b, 1, "y", "b1", place="two")
    driver.wait(11)
    for token in ("a1", "b1"):
        assert "wait for each other at different layers" in str(driver.error(token))


def test_who_was_held_up_by_a_missing_member_gets_the_time_to_come() -> None:
    driver = Driver(3, min_members=2)
    a, b, _ = driver.joined("a", "b", "c")
    driver.bring(a, 1, "x", "a1", place="one")
    driver.bring(a, 1, "X", "a2", place="two")
    driver.bring(b, 1, "y", "b1", place="one")
    driver.wait(11)
    assert driver.outcomes["b1"] == Done("xy", (0, 1))
    driver.wait(1)  # b is on its way to the second
    driver.bring(b, 1, "Y", "b2", place="two")
    assert driver.outcomes["a2"] == Done("XY", (0, 1))


def test_too_few_survivors_do_not_go_on() -> None:
    driver = Driver(3, min_members=2)
    a, *_ = driver.joined("a", "b", "c")
    driver.bring(a, 1, "x", "a1")
    driver.wait(11)
    assert isinstance(driver.error("a1"), GroupAborted)


def test_who_leaves_in_order_stops_nobody() -> None:
    driver = Driver(3)
    a, b, c = driver.joined("a", "b", "c")
    driver.bring(a, 1, "x", "a1")
    driver.bring(b, 1, "y", "b1")
    driver.follow(driver.group.leave(c.ticket))
    assert driver.outcomes["a1"] == Done("xy", (0, 1))
    driver.follow(driver.group.leave(a.ticket))
    driver.bring(b, 2, "y", "b2")
    assert driver.outcomes["b2"] == Done("y", (1,))
    driver.follow(driver.group.leave(b.ticket))
    driver.follow(driver.group.leave(b.ticket))
    assert driver.group.idle


def test_what_a_member_has_brought_before_it_left_counts() -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "x", "a1")
    driver.follow(driver.group.leave(a.ticket))
    driver.bring(b, 1, "y", "b1")
    assert driver.outcomes["b1"] == Done("xy", (0, 1))


def test_a_member_that_comes_back_ends_what_waits_for_what_it_was() -> None:
    driver = Driver(2)
    a, b = driver.joined("a", "b")
    driver.bring(a, 1, "x", "a1")
    driver.join("b", token="b anew")
    assert isinstance(driver.error("a1"), GroupAborted)
    driver.join("a", token="a anew")
    assert driver.membership(driver.outcomes["b anew"]).generation == 2
    driver.bring(b, 1, "y", "b late")
    assert isinstance(driver.error("b late"), StaleGeneration)


def test_who_goes_on_while_another_has_joined_anew_is_told_at_once() -> None:
    driver = Driver(2)
    a, _ = driver.joined("a", "b")
    driver.join("b", token="b anew")
    driver.bring(a, 1, "x", "a1")
    assert isinstance(driver.error("a1"), GroupAborted)


def test_all_may_join_anew_between_steps() -> None:
    driver = Driver(2)
    for generation in (1, 2, 3):
        a, b = driver.joined("a", "b")
        assert a.generation == generation
        driver.bring(a, 1, "x", ("a", generation))
        driver.bring(b, 1, "y", ("b", generation))
    assert len(driver.commits) == 3


def test_a_join_that_waits_too_long() -> None:
    driver = Driver(3)
    driver.join("a")
    driver.now = 8.0
    driver.join("b")
    driver.wait(2.5)
    for token in ("a", "b"):
        assert "2 of 3 members have joined" in str(driver.error(token))
    assert driver.group.idle


def test_a_generation_without_those_who_did_not_come_in_time() -> None:
    driver = Driver(3, min_members=2)
    driver.join("a")
    driver.join("c", rank=2)  # of two there is no rank 2
    driver.wait(11)
    assert [driver.membership(driver.outcomes[name]).rank for name in "ac"] == [0, 1]
    assert driver.membership(driver.outcomes["a"]).members == 2


def test_who_comes_late_waits_until_the_others_join_too() -> None:
    driver = Driver(2, min_members=1)
    driver.join("a")
    driver.wait(11)
    a = driver.membership(driver.outcomes.pop("a"))
    driver.join("b")
    driver.bring(a, 1, "x", "a1")
    assert driver.outcomes["a1"] == Done("x", (0,), waiting=1)  # and lets it in
    driver.join("a")
    assert driver.membership(driver.outcomes["b"]).generation == 2


def test_a_member_that_joins_twice_is_one() -> None:
    driver = Driver(2)
    driver.join("a", token="first")
    driver.join("a", token="second")
    assert isinstance(driver.error("first"), GroupAborted)
    driver.join("b")
    assert isinstance(driver.outcomes["second"], Joined)


# --- Misuse ----------------------------------------------------------------------------------------------------------


def test_members_have_to_agree() -> None:
    driver = Driver(2)
    driver.join("a", settings=GroupSettings(3, 3, 10.0))
    assert "size=2, min_members=2, timeout=10 (this member expects: size=3" in str(driver.error("a"))


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_there_is_not(rank: int) -> None:
    driver = Driver(2)
    driver.join("a", rank=rank)
    assert isinstance(driver.error("a"), GroupMismatch)


def test_two_members_cannot_have_one_rank() -> None:
    driver = Driver(2)
    driver.join("a", rank=1)
    driver.join("b", rank=1)
    assert isinstance(driver.error("b"), GroupMismatch)


def test_one_member_too_many() -> None:
    driver = Driver(2)
    driver.joined("a", "b")
    driver.join("c")
    assert "has its 2 members already" in str(driver.error("c"))


def test_too_many_places() -> None:
    driver = Driver(1, most_places=2)
    (a,) = driver.joined("a")
    for number in range(3):
        driver.bring(a, 1, "x", number, place=str(number))
    error = driver.error(2)
    assert isinstance(error, LimitExceeded)
    assert error.metadata == {"limit": "group_places", "value": "2"}


def test_nothing_can_be_committed_that_is_not_complete() -> None:
    driver = Driver(2)
    a, _ = driver.joined("a", "b")
    driver.bring(a, 1, "x", "a1")
    with pytest.raises(ValueError, match="no step is being committed"):
        driver.group.committed(LAYER, "x")


# --- While a step is being committed ---------------------------------------------------------------------------------


def test_a_step_that_is_being_committed_is_committed_whatever_happens() -> None:
    group: Group[str, str] = Group("run", GroupSettings(2, 2, 10.0), lambda: now[0], given(b"a", b"b", b"c", b"d"))
    now = [0.0]
    for name in ("a", "b"):
        events = group.join(name, None, group.settings, name)
    assert len(events) == 2
    assert group.contribute(b"a", LAYER, 1, "x", "a1") == []
    (commit,) = group.contribute(b"b", LAYER, 1, "y", "b1")
    assert commit == Commit(LAYER, 1, ("x", "y"), (0, 1))
    now[0] = 100.0
    assert group.next_deadline() is None
    assert group.expire() == []
    assert group.join("a", None, group.settings, "a anew") == []
    assert group.join("b", None, group.settings, "b anew") == []  # the old generation is not over yet
    outcomes = {event.token: event.outcome for event in group.committed(LAYER, "xy") if isinstance(event, Deliver)}
    assert outcomes["a1"] == outcomes["b1"] == Done("xy", (0, 1), waiting=2)
    assert isinstance(outcomes["a anew"], Joined)


def test_a_generation_that_ends_leaves_what_is_being_committed_to_its_end() -> None:
    now = [0.0]
    group: Group[str, str] = Group("run", GroupSettings(2, 2, 10.0), lambda: now[0], given(b"a", b"b"))
    for name in ("a", "b"):
        group.join(name, None, group.settings, name)
    group.contribute(b"a", "one", 1, "x", "a1")
    (commit,) = group.contribute(b"b", "one", 1, "y", "b1")
    assert commit == Commit("one", 1, ("x", "y"), (0, 1))
    group.contribute(b"a", "two", 1, "x", "a2")
    now[0] = 11.0
    (ended,) = group.expire()
    assert isinstance(ended, Deliver)
    assert ended.token == "a2"
    outcomes = {event.token: event.outcome for event in group.committed("one", "xy") if isinstance(event, Deliver)}
    assert outcomes == dict.fromkeys(("a1", "b1"), Done("xy", (0, 1)))
