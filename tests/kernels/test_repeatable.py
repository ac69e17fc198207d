"""The same input gives the same bits, whichever thread or block goes first."""

from __future__ import annotations

import pytest

from tests.support.kernels.kernel_checks import VERSIONS, batch_of, check, run_version
from tests.support.kernels.kernel_run import Kernels
from tests.support.oracle import DTYPES

SHAPE = (9, 5, 11, 13)
SCHEDULES = ("forward", "reverse", "random:1", "random:2", "random:3")


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("version", VERSIONS)
def test_bits_do_not_depend_on_the_schedule(
    kernels: Kernels, version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("SHAREDNORM_EMULATED_SCHEDULE", schedule)
        monkeypatch.setenv("SHAREDNORM_EMULATED_RESIDENT", "3")  # blocks that are on the device together
        batch = batch_of(SHAPE, name)
        run_version(batch, kernels, version)
        check(batch)
        results.append(batch.results())
    assert all(result == results[0] for result in results)
