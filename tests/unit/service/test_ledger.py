"""Which changes of a layer have been made, as its ledger has it."""

from __future__ import annotations

import numpy as np
import pytest

from sharednorm.core.state import Moments
from sharednorm.errors import KeyReused, SessionExpired, StepOutOfOrder
from sharednorm_server.layers.idempotency import IdempotencyTable, digest, same_step
from sharednorm_server.store.idempotency import SessionNumbers
from sharednorm_server.store.records import CallKey, LastChange, Remembered, TakenStep

CONTENT = digest("a change")


def session(numbers: SessionNumbers, lane: bytes = b"lane 001") -> bytes:
    return numbers.open().to_bytes(8, "big") + lane


def make(ledger: IdempotencyTable, key: CallKey, content: bytes = CONTENT) -> None:
    """Make a change, as a layer does."""
    assert ledger.find(key, content) is None
    ledger.remember(ledger.note(key, LastChange(key.seq, content, key.seq, key.seq)))


@pytest.fixture
def numbers() -> SessionNumbers:
    return SessionNumbers(1)


def test_a_change_is_known_again_until_the_next_one(numbers: SessionNumbers) -> None:
    ledger, mine = IdempotencyTable(4, numbers.given), session(numbers)
    for seq in (1, 2, 3):
        make(ledger, CallKey(mine, seq))
        found = ledger.find(CallKey(mine, seq), CONTENT)
        assert found is not None
        assert found.seq == seq
    for wrong in (1, 2, 5, 99):
        with pytest.raises(StepOutOfOrder, match=r"whose last one of this layer was 3 \(expected: 4; or 3"):
            ledger.find(CallKey(mine, wrong), CONTENT)


def test_another_content_under_a_key_that_was_used(numbers: SessionNumbers) -> None:
    ledger, mine = IdempotencyTable(4, numbers.given), session(numbers)
    make(ledger, CallKey(mine, 1))
    with pytest.raises(KeyReused, match="this one was not"):
        ledger.find(CallKey(mine, 1), digest("another change"))
    make(ledger, CallKey(mine, 2), digest("another change"))


def test_a_note_that_is_not_kept_changes_nothing(numbers: SessionNumbers) -> None:
    ledger, mine = IdempotencyTable(1, numbers.given), session(numbers)
    ledger.note(CallKey(mine, 1), LastChange(1, CONTENT, 1, 1))
    assert ledger.find(CallKey(mine, 1), CONTENT) is None


def test_sessions_do_not_see_each_other(numbers: SessionNumbers) -> None:
    ledger = IdempotencyTable(4, numbers.given)
    number = numbers.open().to_bytes(8, "big")
    one, other = number + b"lane 001", number + b"lane 002"
    make(ledger, CallKey(one, 1))
    make(ledger, CallKey(other, 1))
    make(ledger, CallKey(one, 2))
    assert ledger.find(CallKey(other, 1), CONTENT) is not None


def test_the_least_recent_session_is_forgotten_and_never_taken_for_a_new_one(numbers: SessionNumbers) -> None:
    ledger = IdempotencyTable(2, numbers.given)
    first, second, third, unused, later = (session(numbers) for _ in range(5))
    make(ledger, CallKey(first, 1))
    make(ledger, CallKey(second, 1))
    make(ledger, CallKey(first, 2))  # so that the second is the least recent
    make(ledger, CallKey(third, 1))
    assert ledger.find(CallKey(first, 2), CONTENT) is not None
    for seq in (1, 2):
        with pytest.raises(SessionExpired, match="does not remember this session any more"):
            ledger.find(CallKey(second, seq), CONTENT)
    assert ledger.find(CallKey(unused, 1), CONTENT) is None  # opened later than any that was forgotten
    make(ledger, CallKey(later, 1))
    with pytest.raises(SessionExpired):
        ledger.find(CallKey(first, 2), CONTENT)


def test_a_session_that_was_opened_before_one_that_is_forgotten_has_to_be_renewed(numbers: SessionNumbers) -> None:
    ledger = IdempotencyTable(1, numbers.given)
    idle, busy, next_one = (session(numbers) for _ in range(3))
    make(ledger, CallKey(busy, 1))
    make(ledger, CallKey(next_one, 1))
    with pytest.raises(SessionExpired):
        ledger.find(CallKey(idle, 1), CONTENT)
    make(ledger, CallKey(session(numbers), 1))


def test_a_change_of_an_unknown_session_that_is_not_its_first(numbers: SessionNumbers) -> None:
    with pytest.raises(SessionExpired):
        IdempotencyTable(4, numbers.given).find(CallKey(session(numbers), 2), CONTENT)


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1, (1 << 32) + 1, (2 << 32), (1 << 32) + 5])
def test_a_number_that_was_not_given_is_no_session(numbers: SessionNumbers, number: int) -> None:
    numbers.open()
    with pytest.raises(SessionExpired):
        IdempotencyTable(4, numbers.given).find(CallKey(number.to_bytes(8, "big") + b"lane 001", 1), CONTENT)


def test_numbers_grow_also_from_run_to_run() -> None:
    runs = [SessionNumbers(run) for run in (1, 2, 3)]
    given = [numbers.open() for numbers in runs for _ in range(3)]
    assert given == sorted(set(given))
    assert all(runs[-1].given(number) for number in given)
    assert not runs[0].given(given[3])


def test_what_was_remembered_by_another_ledger_is_known() -> None:
    numbers = SessionNumbers(2)
    old = (1 << 32).to_bytes(8, "big")
    known = {old + bytes([lane]) * 8: LastChange(7, CONTENT, 9, 8) for lane in range(3)}
    ledger = IdempotencyTable(3, numbers.given, Remembered(known, floor=(1 << 32) - 5))
    assert ledger.find(CallKey(old + b"\1" * 8, 7), CONTENT) is known[old + b"\1" * 8]
    make(ledger, CallKey(session(numbers), 1))
    with pytest.raises(SessionExpired):  # the first of them, which was the least recent
        ledger.find(CallKey(old + b"\0" * 8, 7), CONTENT)


def test_steps_are_told_apart_by_their_moments() -> None:
    mean, m2 = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    taken = TakenStep(Moments(5, mean, m2), np.ones(2, np.float32), np.zeros(2, np.float32))
    change = LastChange(1, CONTENT, 1, 1, taken)
    assert same_step(change, Moments(5, mean.copy(), m2.copy())) is taken
    for other in (Moments(6, mean, m2), Moments(5, np.nextafter(mean, 2), m2), Moments(5, mean, m2 * 2)):
        with pytest.raises(KeyReused):
            same_step(change, other)
    with pytest.raises(KeyReused):
        same_step(LastChange(1, CONTENT, 1, 1), taken.moments)


def test_digests_tell_contents_apart() -> None:
    contents = [
        (), (None,), ("",), ("a",), (b"a", "b"), ("ab",), (("a",), "b"), (("a", "b"),), (1.0,), (2.0,), (True, 0.5),
        (np.zeros(2),), (np.zeros(3),), (None, None), (0.0, -0.0), (-0.0, 0.0),
    ]  # fmt: skip
    assert len({digest(*content) for content in contents}) == len(contents)
    assert digest("a", 1.0, np.ones(3)) == digest("a", 1.0, np.ones(3))
