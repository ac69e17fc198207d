"""Every block size, group, row and cut that the kernels admit gives right results."""

from __future__ import annotations

import pytest

from tests.support.kernels.kernel_checks import batch_of, check, geometry, resident_launch
from tests.support.kernels.kernel_run import Kernels
from tests.support.oracle import DTYPES

GROUPS = [
    (threads, group)
    for threads in range(32, 513, 32)
    for group in range(32, threads + 1, 32)
    if threads % group == 0 and (group & (group - 1) == 0 or group == threads)
]
SHAPE = (5, 3, 7, 7)  # runs begin everywhere within a tile; 3 maps do not fill the last block


@pytest.mark.parametrize(("threads", "group"), GROUPS)
def test_every_block_size_and_group(kernels: Kernels, threads: int, group: int) -> None:
    name = DTYPES[threads // 32 % 3]
    split, resident = batch_of(SHAPE, name), batch_of(SHAPE, name)
    view, per_tile = split.view, 16 // split.x.itemsize
    split.split(kernels, geometry(view, per_tile, threads, group, (2, 1)), geometry(view, per_tile, threads, group))
    check(split)
    forward, backward = (resident_launch(view, per_tile, threads, group, tensors) for tensors in (1, 2))
    resident.fused(kernels, forward, backward)
    check(resident)


@pytest.mark.parametrize("lanes", [1, 2, 3, 13, 31, 32, 33, 63, 64])
@pytest.mark.parametrize("name", DTYPES)
def test_every_kind_of_row(kernels: Kernels, lanes: int, name: str) -> None:
    batch = batch_of(SHAPE, name)
    launch = geometry(batch.view, 16 // batch.x.itemsize, 128, 64, (1, 1), lanes)
    batch.split(kernels, launch, launch)
    check(batch)


@pytest.mark.parametrize("parts", [(1, 1), (5, 1), (7, 1), (1, 2), (1, 40), (3, 3), (2, 50), (40, 3)])
@pytest.mark.parametrize("name", DTYPES)
def test_every_kind_of_cut(kernels: Kernels, parts: tuple[int, int], name: str) -> None:
    # More parts than images or tiles: some are empty and must leave no trace in the merged moments.
    batch = batch_of((5, 2, 11, 13), name)
    launch = geometry(batch.view, 16 // batch.x.itemsize, 64, 32, parts)
    batch.split(kernels, launch, launch)
    check(batch)
