"""The same input gives the same bits, whichever thread or block goes first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.kernel_checks import batch_of, check, geometry, resident_launch
from tests.support.kernel_run import Batch, Kernels
from tests.support.oracle import DTYPES

SHAPE = (9, 5, 11, 13)
SCHEDULES = ("forward", "reverse", "random:1", "random:2", "random:3")


def _split(batch: Batch, kernels: Kernels) -> None:
    launch = geometry(batch.view, 16 // batch.x.itemsize, 128, 64, (3, 2))
    batch.split(kernels, launch, launch)


def _resident(batch: Batch, kernels: Kernels) -> None:
    per_tile = 16 // batch.x.itemsize
    forward, backward = (resident_launch(batch.view, per_tile, 128, 64, tensors) for tensors in (1, 2))
    batch.resident(kernels, forward, backward)


def _cluster(batch: Batch, kernels: Kernels) -> None:
    per_tile = 16 // batch.x.itemsize
    forward, backward = (resident_launch(batch.view, per_tile, 64, 64, tensors, (4, 1)) for tensors in (1, 2))
    batch.resident(kernels, forward, backward)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("version", [_split, _resident, _cluster])
def test_bits_do_not_depend_on_the_schedule(
    kernels: Kernels, version: Callable[[Batch, Kernels], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("SHAREDNORM_EMULATED_SCHEDULE", schedule)
        monkeypatch.setenv("SHAREDNORM_EMULATED_RESIDENT", "3")  # blocks that are on the device together
        batch = batch_of(SHAPE, name)
        version(batch, kernels)
        check(batch)
        results.append(batch.results())
    assert all(result == results[0] for result in results)
