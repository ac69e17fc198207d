"""Turns of those who move large tensors."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest

from sharednorm.errors import DeadlineExceeded
from sharednorm_server.layers.requests import always
from sharednorm_server.rpc.transfer_scheduler import GRACE_SECONDS, LEAST_RATE, MOST_SECONDS, TransferScheduler


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def until(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.001)


class Call(threading.Thread):
    """A call that takes a turn, and ends when it is told to."""

    def __init__(self, movers: TransferScheduler, order: list[int], number: int) -> None:
        super().__init__(daemon=True)
        self._movers, self._order, self._number = movers, order, number
        self.may_end = threading.Event()

    def run(self) -> None:
        with self._movers.turn(always):
            self._order.append(self._number)
            self.may_end.wait(10)


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_at_a_time_in_the_order_in_which_they_came(most: int) -> None:
    movers, order = TransferScheduler(most, Clock()), list[int]()
    calls = [Call(movers, order, number) for number in range(8)]
    for number, call in enumerate(calls):
        call.start()
        until(lambda number=number: len(order) + len(movers._waiting) == number + 1)
    until(lambda: len(order) == most)
    for number, call in enumerate(calls):
        assert order == list(range(min(8, number + most)))
        call.may_end.set()
        until(lambda number=number: len(order) == min(8, number + 1 + most))
        call.join(10)
    assert not movers._moving
    assert not movers._waiting


def test_one_that_is_slow_loses_its_turn_and_one_that_is_fast_does_not() -> None:
    clock = Clock()
    movers, order = TransferScheduler(1, clock), list[int]()
    with ExitStack() as stack:
        turn = stack.enter_context(movers.turn(always))
        other = Call(movers, order, 1)
        other.start()
        for _ in range(100):  # for a second, just as fast as it has to be
            clock.now += 0.01
            turn.moved(int(LEAST_RATE * 0.01))
        time.sleep(0.1)
        assert order == []
        clock.now += GRACE_SECONDS * 1.01
        until(lambda: order == [1])
        turn.moved(1 << 30)  # it goes on, without a turn
    third = Call(movers, order, 3)
    third.start()
    time.sleep(0.1)
    assert order == [1]  # the end of the slow one has freed nothing
    other.may_end.set()
    until(lambda: order == [1, 3])
    third.may_end.set()
    for call in (other, third):
        call.join(10)
    assert not movers._moving


@pytest.mark.parametrize("most", [1, 2])
def test_what_moves_without_a_turn_slows_nobody_out_of_one(most: int) -> None:
    clock = Clock()
    movers, order = TransferScheduler(most, clock), list[int]()
    with ExitStack() as stack:
        slow = stack.enter_context(movers.turn(always))
        clock.now += GRACE_SECONDS * 1.01
        for _ in range(most):
            stack.enter_context(movers.turn(always))  # the first of them finds the slow one overdue
        waiting = Call(movers, order, 1)
        waiting.start()
        for _ in range(100):  # for a second, what uses the whole machine
            clock.now += 0.01
            slow.moved(int(most * LEAST_RATE * 0.01))
        time.sleep(0.1)
        assert order == []
        for _ in range(100):  # for another one, half of it
            clock.now += 0.01
            slow.moved(int(most * LEAST_RATE * 0.005))
        until(lambda: order == [1])
    waiting.may_end.set()
    waiting.join(10)
    assert not movers._moving


def test_calls_that_lost_their_turns_do_not_cost_others_theirs() -> None:
    # A moment in which nothing moved has made two calls of one. Together they are as fast as one, each is too slow.
    clock, machine = Clock(), 1.2 * LEAST_RATE
    movers, order = TransferScheduler(1, clock), list[int]()
    calls = [Call(movers, order, number) for number in range(6)]
    with ExitStack() as stack:
        moving = [stack.enter_context(movers.turn(always))]
        clock.now += GRACE_SECONDS * 1.01
        moving.append(stack.enter_context(movers.turn(always)))
        for number, call in enumerate(calls):
            call.start()
            until(lambda number=number: len(movers._waiting) == number + 1)
        for _ in range(100):
            clock.now += 0.01
            for turn in moving:
                turn.moved(int(machine * 0.01 / len(moving)))
        time.sleep(0.1)
        assert order == []
    for number, call in enumerate(calls):
        until(lambda number=number: order == list(range(number + 1)))
        call.may_end.set()
        call.join(10)
    assert not movers._moving


def test_one_that_was_fast_and_stops_holds_the_others_up_for_a_moment_only() -> None:
    clock = Clock()
    movers, order = TransferScheduler(1, clock), list[int]()
    with movers.turn(always) as turn:
        turn.moved(2 << 30)  # all at once
        other = Call(movers, order, 1)
        other.start()
        clock.now += MOST_SECONDS * 0.99
        time.sleep(0.05)
        assert order == []
        clock.now += MOST_SECONDS * 0.02
        until(lambda: order == [1])
    other.may_end.set()
    other.join(10)


def test_one_that_is_given_up_waits_no_longer_and_holds_nobody_up() -> None:
    movers, order = TransferScheduler(1, Clock()), list[int]()
    first = Call(movers, order, 1)
    first.start()
    until(lambda: order == [1])
    with pytest.raises(DeadlineExceeded, match="moved other tensors for as long"), movers.turn(lambda: False):
        pass
    last = Call(movers, order, 2)
    last.start()
    first.may_end.set()
    until(lambda: order == [1, 2])
    last.may_end.set()
    for call in (first, last):
        call.join(10)


def test_an_error_ends_a_turn() -> None:
    movers = TransferScheduler(1, Clock())
    with pytest.raises(ValueError, match="x"), movers.turn(always):
        raise ValueError("x")
    with movers.turn(always):
        assert len(movers._moving) == 1
