"""The budget of bytes in flight."""

from __future__ import annotations

import pytest

from sharednorm.errors import LimitExceeded, ServerBusy
from sharednorm_server.layers.admission import ByteBudget


def test_what_fits_is_admitted_and_counted_until_it_is_over() -> None:
    budget = ByteBudget("max_inflight_bytes", 100)
    with budget.admitted(60):
        with budget.admitted(40):
            assert budget.used == 100
        assert budget.used == 60
    assert budget.used == 0


def test_what_does_not_fit_now_is_told_to_come_again() -> None:
    budget = ByteBudget("max_inflight_bytes", 100)
    with budget.admitted(60), pytest.raises(ServerBusy, match=r"60 bytes .* and 41 more do not fit") as caught:
        budget.admitted(41).__enter__()
    assert caught.value.metadata == {"limit": "max_inflight_bytes", "value": "100", "retry_seconds": "0.05"}
    with budget.admitted(41):
        pass


def test_what_never_fits_is_told_so() -> None:
    budget = ByteBudget("max_inflight_bytes", 100)
    with pytest.raises(LimitExceeded, match="at most max_inflight_bytes = 100"):
        budget.admitted(101).__enter__()
    assert budget.used == 0


def test_an_error_gives_the_bytes_back() -> None:
    budget = ByteBudget("max_inflight_bytes", 100)
    with pytest.raises(ValueError, match="x"), budget.admitted(60):
        raise ValueError("x")
    assert budget.used == 0


def test_who_is_told_to_come_again_is_told_when_about_half_are_through() -> None:
    now = [0.0]
    budget = ByteBudget("max_inflight_bytes", 100, lambda: now[0])

    def told() -> float:
        with budget.admitted(100), pytest.raises(ServerBusy) as caught:
            budget.admitted(1).__enter__()
        return float(caught.value.metadata["retry_seconds"])

    assert told() == 0.05
    for _ in range(30):  # calls that take 10 ms a byte
        with budget.admitted(100):
            now[0] += 1.0
    with budget.admitted(100), pytest.raises(ServerBusy) as caught:
        budget.admitted(1).__enter__()
    assert float(caught.value.metadata["retry_seconds"]) == pytest.approx(0.5, rel=0.01)
    for _ in range(30):
        with budget.admitted(100):
            now[0] += 1000.0
    assert told() == 2.0
    now[0] += 1e6  # a pause says nothing
    with budget.admitted(100):
        now[0] += 1000.0
    assert told() == 2.0
