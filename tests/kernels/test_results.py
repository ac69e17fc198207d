"""Every kernel, every element type, awkward sizes: the results are those of float64 NumPy."""

from __future__ import annotations

import pytest

from sharednorm_kernels import Fused, plan
from tests.support.kernels.kernel_checks import H200, SMALL, batch_of, check, resident_launch
from tests.support.kernels.kernel_run import Batch, Kernels
from tests.support.oracle import DTYPES

ODD = (1, 2, 7, 31, 127, 1025)
SHAPES = [
    *((3, 2, area) for area in ODD),
    *((images, 2, 3) for images in (2, 7, 31, 127)),
    *((2, maps, 5) for maps in (1, 7, 31, 127)),
    (5, 9),  # a matrix
    (3, 5, 7, 7),
    (2, 3, 4, 4, 4),
    (4, 3, 16, 16),
    (1, 2, 33, 31),
    (2, 1),
]


def _named(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=_named)
def test_naive(kernels: Kernels, shape: tuple[int, ...], name: str) -> None:
    batch = batch_of(shape, name)
    batch.naive(kernels)
    check(batch, statistics=False)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=_named)
def test_split_as_planned(kernels: Kernels, shape: tuple[int, ...], name: str) -> None:
    batch = batch_of(shape, name)
    planned = plan(shape, batch.x.itemsize, H200)
    batch.split(kernels, planned.reduce, planned.apply)
    check(batch)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=_named)
def test_resident_as_planned(kernels: Kernels, shape: tuple[int, ...], name: str) -> None:
    batch = batch_of(shape, name)
    planned = plan(shape, batch.x.itemsize, SMALL)
    assert planned.forward is not None
    assert planned.backward is not None
    batch.fused(kernels, planned.forward, planned.backward)
    check(batch)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("blocks", [2, 4, 8])
@pytest.mark.parametrize("shape", [(9, 3, 31), (8, 2, 7, 7), (1, 2, 1025), (16, 2, 4), (3, 1, 257)], ids=_named)
def test_clusters(kernels: Kernels, shape: tuple[int, ...], name: str, blocks: int) -> None:
    # Cut along the images where there are enough, else along the area, and both ways; some parts get nothing.
    for parts in {(blocks, 1), (1, blocks), (2, blocks // 2)}:
        batch = batch_of(shape, name)
        batch.fused(kernels, *_launches(batch, parts, threads=64))
        check(batch)


def _launches(batch: Batch, parts: tuple[int, int], threads: int) -> tuple[Fused, Fused]:
    per_tile = 16 // batch.x.itemsize
    forward, backward = (resident_launch(batch.view, per_tile, threads, threads, tensors, parts) for tensors in (1, 2))
    return forward, backward
