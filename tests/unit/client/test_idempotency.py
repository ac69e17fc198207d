"""The keys of a handle's changes, and a session that the layer has forgotten."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from sharednorm.coordination.idempotency import IdempotencySession, Keys
from sharednorm.errors import DeadlineExceeded, SessionExpired
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.retry import RetryPolicy
from sharednorm.v1 import service_pb2


class Numbers:
    """A connection that gives sessions numbers."""

    def call(self, method: str, _request: object, _answer: object, attempts: RetryPolicy) -> Any:
        """Open a session."""
        del attempts
        assert method == "OpenSession"
        return service_pb2.OpenSessionResponse(session=os.urandom(8))


def once(keys: Keys, send: Callable[[RetryPolicy], str]) -> str:
    return keys.once(service_pb2.SetTrainRequest(), Deadline(5.0), send)


def answers(*outcomes: str | Exception) -> Callable[[RetryPolicy], str]:
    left = list(outcomes)

    def send(attempts: RetryPolicy) -> str:
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            if isinstance(outcome, DeadlineExceeded):
                attempts.unknown = True
            raise outcome
        return outcome

    return send


@pytest.fixture
def keys() -> Keys:
    return Keys(IdempotencySession(Numbers()))  # type: ignore[arg-type]


def test_a_first_change_of_a_forgotten_session_gets_a_new_one(keys: Keys) -> None:
    assert once(keys, answers(SessionExpired("forgotten"), "made")) == "made"


def test_a_change_behind_one_in_doubt_is_not_made_under_another_key(keys: Keys) -> None:
    # Whether the first was made, only the forgotten session knew; a repetition may be the same change.
    with pytest.raises(DeadlineExceeded):
        once(keys, answers(DeadlineExceeded("no answer")))
    with pytest.raises(SessionExpired):
        once(keys, answers(SessionExpired("forgotten"), "made twice, perhaps"))
    assert once(keys, answers("made")) == "made"  # what follows has keys of its own
