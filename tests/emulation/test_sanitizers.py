"""The tests of the tests: what a sanitizer has to find in the planted kernels, and what it must leave alone."""

from __future__ import annotations

import pytest

from tests.emulation.build import Sanitizer
from tests.emulation.process import run


def launch(sanitizer: Sanitizer, kernel: str, *options: str) -> tuple[int, str]:
    done = run(["-m", "tests.emulation.launch", kernel, *options], sanitizer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("kernel", ["with_barrier", "with_fence", "cluster_with_barrier", "arrivals", "own_array"])
@pytest.mark.parametrize("options", [[], ["--ucontext"]])
def test_a_right_kernel_passes(sanitizer: Sanitizer, kernel: str, options: list[str]) -> None:
    status, said = launch(sanitizer, kernel, *options)
    assert status == 0, said
    assert "Sanitizer" not in said


@pytest.mark.parametrize("kernel", ["missing_barrier", "racing_blocks", "missing_fence", "cluster_missing_barrier"])
def test_a_planted_race(kernel: str) -> None:
    status, said = launch("thread", kernel)
    assert status == 66, said
    assert "ThreadSanitizer: data race" in said
    assert "defects.cu" in said


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("write_behind", "use-after-poison"),
        ("write_before", "use-after-poison"),
        ("read_behind", "use-after-poison"),
        ("shared_behind", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_a_planted_access_out_of_bounds(kernel: str, problem: str) -> None:
    status, said = launch("address", kernel)
    assert status != 0, said
    assert problem in said
    assert "defects.cu" in said


def test_memory_that_has_been_freed() -> None:
    status, said = launch("address", "with_barrier", "--freed")
    assert status != 0
    assert "heap-use-after-free" in said


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_divergent_barrier(sanitizer: Sanitizer) -> None:
    status, said = launch(sanitizer, "early_return")
    assert status != 0
    assert "divergent barrier" in said
