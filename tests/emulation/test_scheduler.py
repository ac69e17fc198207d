"""The scheduler: barriers, shuffles, clusters and schedules, and the kernels that break a rule."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tests.emulation.process import run


def launch(kernel: str, *options: str, status: int = 0, **settings: str) -> tuple[list[float], str]:
    """Launch a planted kernel in a process of its own; return its values, if any, and what was said."""
    named = {f"SHAREDNORM_EMULATED_{name.upper()}": value for name, value in settings.items()}
    done = run(["-m", "tests.emulation.launch", kernel, *options], settings=named)
    assert done.returncode == status, done.stderr
    return (json.loads(done.stdout) if status == 0 else []), done.stderr


SCHEDULES = ["forward", "reverse", "random:1", "random:2"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", [[], ["--ucontext"]])
def test_a_barrier_holds_under_every_schedule(schedule: str, options: list[str]) -> None:
    values, _ = launch("with_barrier", "--threads", "100", *options, schedule=schedule)
    assert values[:400] == [(i + 1) % 100 for i in range(100)] * 4


def test_shuffles() -> None:
    values = np.reshape(launch("shuffles", "--blocks", "3", "--threads", "32")[0], (4, 32))
    lanes = np.arange(32)
    np.testing.assert_array_equal(values[0], 3)
    np.testing.assert_array_equal(values[1], lanes ^ 5)
    np.testing.assert_array_equal(values[2], np.where(lanes + 4 < 32, lanes + 4, lanes))
    np.testing.assert_array_equal(values[3], np.where(lanes >= 4, lanes - 4, lanes))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_clusters(schedule: str) -> None:
    values = np.reshape(launch("cluster_with_barrier", "--blocks", "8", schedule=schedule)[0], (9, 64))
    np.testing.assert_array_equal(values[:8], np.tile([1, 2, 3, 0], 2)[:, None] * np.ones(64))


def test_a_grid_that_clusters_do_not_divide() -> None:
    _, said = launch("cluster_with_barrier", "--blocks", "6", status=-6)  # PyCUDA aborts: its context is still current
    assert "clusters of 4 blocks in a grid of 6" in said


def test_schedules_differ_and_seeds_repeat() -> None:
    orders = {schedule: launch("arrivals", schedule=schedule)[0][:256] for schedule in SCHEDULES}
    assert orders["forward"] == list(range(256))
    assert orders["reverse"] == list(range(255, -1, -1))
    assert all(sorted(order) == orders["forward"] for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    assert launch("arrivals", schedule="random:1")[0][:256] == orders["random:1"]


def test_a_missing_barrier_shows_in_some_schedule() -> None:
    assert any(math.isnan(value) for value in launch("missing_barrier")[0])


def test_shared_memory_begins_full_of_nan() -> None:
    assert all(math.isnan(value) for value in launch("uninitialized_shared")[0][:64])


def test_blocks_that_wait_for_each_other_need_to_be_resident() -> None:
    _, said = launch("wait_for_another", "--blocks", "2", status=-6)
    assert "kernel wait_for_another" in said
    assert "waits for something that never comes" in said
    for schedule in SCHEDULES:
        launch("wait_for_another", "--blocks", "2", resident="2", schedule=schedule)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("early_return", "thread (5,0,0) has ended"),
        ("two_barriers", "divergent barrier: it waits at"),
        ("barrier_and_shuffle", "waits at a shuffle or __syncwarp"),
        ("half_a_warp", "with a mask that is not full"),
        ("write_behind", "a write out of bounds, behind an allocation of 1280 bytes"),
        ("write_before", "a write out of bounds, before an allocation of 1280 bytes"),
        ("shared_behind", "a write behind the end of shared memory"),
    ],
)
@pytest.mark.parametrize("schedule", ["forward", "reverse", "random:3"])
def test_a_broken_rule_aborts(kernel: str, said: str, schedule: str) -> None:
    _, messages = launch(kernel, status=-6, schedule=schedule)
    assert f"emulated CUDA: kernel {kernel}" in messages
    assert said in messages


def test_a_full_mask_needs_full_warps() -> None:
    _, said = launch("shuffles", "--threads", "48", status=-6)
    assert "a full mask in a block of 48 threads" in said
