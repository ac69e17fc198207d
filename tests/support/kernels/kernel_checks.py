"""Batches for the kernels, launches of every kind, and the comparison with float64 NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm_kernels import DeviceLimits, Fused, Geometry, View
from sharednorm_kernels.launch_config import RESERVED_BYTES, TILE_BYTES, lanes_for, tiles_of_run
from tests.support.kernels.kernel_run import Batch, Kernels
from tests.support.oracle import batch_moments, gradients, normalized, random_tensor, rounding

Array = npt.NDArray[Any]

H200 = DeviceLimits(132, 232_448, 233_472, (9, 0))
A100 = DeviceLimits(108, 166_912, 167_936, (8, 0))
SMALL = DeviceLimits(2, 49_152, 65_536, (9, 0))


def batch_of(shape: tuple[int, ...], name: str, seed: int = 1) -> Batch:
    """Return a random batch of a layer with random parameters."""
    random = np.random.default_rng(seed)
    x, grad = random_tensor(seed, shape, name), random_tensor(seed + 1, shape, name)
    scale, bias = random.normal(1, 0.5, (2, shape[1])).astype(np.float32)
    return Batch(x, grad, name, scale, bias)


def geometry(
    view: View, per_tile: int, threads: int, group: int, parts: tuple[int, int] = (1, 1), lanes: int | None = None
) -> Geometry:
    """Return a launch of a split kernel with the numbers asked for."""
    rows = lanes or lanes_for(tiles_of_run(view, parts[1], per_tile), view.images, group)
    blocks = -(-view.maps * parts[0] * parts[1] // (threads // group))
    return Geometry(blocks, threads, RESERVED_BYTES, *parts, group, rows)


def resident_launch(
    view: View, per_tile: int, threads: int, group: int, tensors: int, parts: tuple[int, int] = (1, 1)
) -> Fused:
    """Return a launch of a resident kernel: of one block a map, or of a cluster of as many blocks as there are parts.

    Shared memory is as much as its busiest thread needs, counted here tile by tile.
    """
    base = geometry(view, per_tile, threads, group, parts)
    most = max(tiles_of_threads(view, per_tile, base))
    blocks = parts[0] * parts[1]
    shared = RESERVED_BYTES + most * threads * TILE_BYTES * tensors
    made = Geometry(base.blocks, threads, shared, *parts, group, base.lanes)
    return Fused("resident" if blocks == 1 else f"cluster{blocks}", made)


VERSIONS = ("split", "resident", "cluster")


def run_version(batch: Batch, kernels: Kernels, version: str) -> None:
    """Compute a small batch with one version of the kernels, cut so that several groups and parts have to agree."""
    per_tile = 16 // batch.x.itemsize
    if version == "split":
        launch = geometry(batch.view, per_tile, 128, 64, (3, 2))
        batch.split(kernels, launch, launch)
    else:
        parts = (1, 1) if version == "resident" else (4, 1)
        forward, backward = (resident_launch(batch.view, per_tile, 64, 64, tensors, parts) for tensors in (1, 2))
        batch.fused(kernels, forward, backward)


def tiles_of_threads(view: View, per_tile: int, launch: Geometry) -> list[int]:
    """Return how many tiles each thread of each group has, counted one by one from the description in tile_walk.cuh."""
    counts = []
    run_tiles = -(-view.area // per_tile)
    for channel in range(view.maps):
        for image_part in range(launch.image_parts):
            first, last = (view.images * (image_part + i) // launch.image_parts for i in (0, 1))
            for area_part in range(launch.area_parts):
                low, high = (
                    min(run_tiles * (area_part + i) // launch.area_parts * per_tile, view.area) for i in (0, 1)
                )
                mine = [0] * launch.group
                for image in range(first, last if high > low else first):
                    begin = (image * view.maps + channel) * view.area + low
                    tiles = (begin + high - low - 1) // per_tile - begin // per_tile + 1
                    row = (image - first) % (launch.group // launch.lanes)
                    for tile in range(tiles):
                        mine[row * launch.lanes + tile % launch.lanes] += 1
                counts += mine
    return counts


def check(batch: Batch, *, statistics: bool = True) -> None:
    """Compare everything that the kernels wrote with float64 NumPy, to one rounding of the element type."""
    count, mean, m2 = batch_moments(batch.x)
    spread = np.sqrt(m2 / count)
    np.testing.assert_allclose(batch.moments.values[0], mean, rtol=1e-13, atol=1e-13 * (spread.max() + 1e-300))
    np.testing.assert_allclose(batch.moments.values[1], m2, rtol=2e-9, atol=1e-300)
    rtol = rounding(batch.name)
    y = normalized(batch.x, mean, m2 / count, batch.scale, batch.bias, batch.epsilon)
    np.testing.assert_allclose(batch.outputs.values.astype(np.float64), y, rtol=rtol, atol=2e-6)
    dx, scale_grad, bias_grad = gradients(batch.x, batch.grad, batch.scale.astype(np.float64), batch.epsilon)
    atol = 2e-6 * max(float(np.abs(dx).max()), _slope_scale(batch, spread))
    np.testing.assert_allclose(batch.input_grads.values.astype(np.float64), dx, rtol=rtol, atol=atol)
    size = np.sqrt(count) * np.abs(batch.grad.astype(np.float64)).max()
    np.testing.assert_allclose(batch.bias_grad.values, bias_grad, rtol=2e-7, atol=1e-9 * size)
    np.testing.assert_allclose(batch.scale_grad.values, scale_grad, rtol=2e-7, atol=3e-7 * size)
    if statistics:
        check_statistics(batch, count, mean, m2)


def check_statistics(batch: Batch, count: int, mean: Array, m2: Array) -> None:
    """Compare the new running statistics, rounded once from float64."""
    for new, old, value in (
        (batch.new_mean, batch.old_mean, mean),
        (batch.new_var, batch.old_var, m2 / (count - 1)),
    ):
        expected = (1 - batch.weight) * old.values.astype(np.float64) + batch.weight * value
        np.testing.assert_allclose(new.values, expected, rtol=1.3e-7, atol=1e-12)


def _slope_scale(batch: Batch, spread: Array) -> float:
    """Return the size of the terms of dx, which may cancel: grad * scale / sigma."""
    factor = np.abs(batch.scale) / np.sqrt(spread**2 + batch.epsilon)
    return float(np.abs(batch.grad.astype(np.float64)).max() * factor.max())
