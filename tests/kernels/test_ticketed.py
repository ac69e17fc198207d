"""The ticketed kernels: right for every cut, lag and number of blocks; the same bits in whatever order blocks come."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from sharednorm_kernels import Fused, plan
from sharednorm_kernels.launch_config import RESERVED_BYTES
from tests.emulation.process import run
from tests.support.kernels import cuda
from tests.support.kernels.kernel_checks import H200, batch_of, check, geometry
from tests.support.kernels.kernel_run import Batch, Kernels
from tests.support.oracle import DTYPES

SHAPES = [(3, 5, 127), (4, 7, 16, 16), (1, 3, 1025), (31, 2, 7), (2, 9, 1)]


def ticketed(batch: Batch, parts: tuple[int, int], lag: int, blocks: int, threads: int = 64) -> Fused:
    """Return a ticketed launch with the numbers asked for."""
    made = geometry(batch.view, 16 // batch.x.itemsize, threads, threads, parts)
    return Fused("ticketed", replace(made, blocks=blocks, shared_bytes=RESERVED_BYTES), lag)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("parts", "lag", "blocks"), [((1, 1), 1, 1), ((2, 2), 1, 3), ((3, 1), 2, 5), ((1, 7), 2, 64)])
def test_every_cut(
    kernels: Kernels, shape: tuple[int, ...], name: str, parts: tuple[int, int], lag: int, blocks: int
) -> None:
    batch = batch_of(shape, name)
    launch = ticketed(batch, parts, min(lag, shape[1]), blocks)
    batch.fused(kernels, launch, launch)
    check(batch)


@pytest.mark.parametrize("threads", [32, 64, 128, 256])
def test_every_block_size(kernels: Kernels, threads: int) -> None:
    batch = batch_of((6, 3, 33, 5), "float32")
    launch = ticketed(batch, (2, 2), 1, 4, threads)
    batch.fused(kernels, launch, launch)
    check(batch)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5])
def test_every_lag_up_to_all_maps(kernels: Kernels, lag: int) -> None:
    batch = batch_of((2, 5, 37), "float16")
    launch = ticketed(batch, (1, 2), lag, 3)
    batch.fused(kernels, launch, launch)
    check(batch)


def test_the_same_bits_as_split_kernels_of_the_same_cut(kernels: Kernels) -> None:
    split, fused = batch_of((4, 6, 130), "float32"), batch_of((4, 6, 130), "float32")
    launch = ticketed(fused, (2, 2), 1, 7)
    each = geometry(split.view, 4, 64, 64, (2, 2))
    split.split(kernels, each, each)
    fused.fused(kernels, launch, launch)
    assert split.results() == fused.results()


def test_as_planned(kernels: Kernels) -> None:
    # Limits under which small maps are too large for shared memory.
    limits = replace(H200, shared_bytes=4096, shared_bytes_per_multiprocessor=10_240, multiprocessors=2)
    batch = batch_of((8, 12, 64, 64), "float32")
    planned = plan(batch.x.shape, 4, limits)
    assert planned.forward is not None
    assert planned.backward is not None
    assert planned.forward.kind == planned.backward.kind == "ticketed"
    batch.fused(kernels, planned.forward, planned.backward)
    check(batch)


ORDERS = """
import sys, hashlib
from pathlib import Path
from tests.kernels.test_ticketed import ticketed
from tests.support.kernels.kernel_checks import batch_of, check
from tests.support.kernels.kernel_image import compiled_image
from tests.support.kernels.kernel_run import Kernels
batch = batch_of((4, 5, 130), "float32")
launch = ticketed(batch, (2, 2), 1, 6)
batch.fused(Kernels(compiled_image()), launch, launch)
check(batch)
print(hashlib.sha256(b"".join(batch.results())).hexdigest())
"""


@pytest.mark.skipif(cuda.REAL, reason="the order is the emulated scheduler's: they need PyCUDA on it")
def test_no_bit_depends_on_the_order_of_the_blocks(kernels: Kernels) -> None:
    printed = set()
    for schedule, blocks in (("forward", 1), ("forward", 6), ("reverse", 6), ("random:1", 3), ("random:2", 6)):
        settings = {"SHAREDNORM_EMULATED_SCHEDULE": schedule, "SHAREDNORM_EMULATED_RESIDENT": str(blocks)}
        done = run(["-c", ORDERS], settings={**settings, "PYTHONPATH": os.environ.get("PYTHONPATH", "")})
        assert done.returncode == 0, (schedule, blocks, done.stderr)
        printed.add(done.stdout)
    assert len(printed) == 1
