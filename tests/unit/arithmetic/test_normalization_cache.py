"""Compiled kernels are kept on disk, found again, and not found again after a change."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.arithmetic.numba import backward as backward_kernels
from sharednorm.arithmetic.numba import forward as forward_kernels
from sharednorm.arithmetic.select import arithmetic
from tests.support import oracle

# What the two files of kernels are made of, besides themselves.
PARTS = ("half.py", "moments.py", "simd.py", "tile_access.py", "tiling.py")

USE = """
import numpy as np
from sharednorm.arithmetic.numba import backward as backward_kernels, forward as forward_kernels
from sharednorm.arithmetic.select import arithmetic
ones = np.ones(3, np.float32)
x = np.random.default_rng(1).normal(size=(4, 3, 5)).astype(np.float32)
y, batch = arithmetic("numba").forward(x, ones, ones, 1e-5)
arithmetic("numba").backward(x, x, batch, ones, 1e-5)
for kernel in ({kernels}):
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def use(cache: Path) -> list[str]:
    """Run the kernels in a new process, and return the hits and misses of the cache for each."""
    code = USE.format(kernels="forward_kernels.forward, backward_kernels.backward")
    return run(code, NUMBA_CACHE_DIR=str(cache)).stdout.splitlines()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    assert use(tmp_path) == ["0 1", "0 1"]
    assert use(tmp_path) == ["1 0", "1 0"]


@pytest.mark.slow
def test_where_nothing_can_be_written_they_are_compiled_each_time(tmp_path: Path) -> None:
    # A file stands where each folder would be, so that nobody can write there, root neither.
    shutil.copytree(
        Path(sharednorm.__file__).parent, tmp_path / "sharednorm", ignore=shutil.ignore_patterns("__pycache__")
    )
    for blocked in (tmp_path / "sharednorm" / "arithmetic" / "numba" / "__pycache__", tmp_path / "home"):
        blocked.write_text("")
    places = {name: str(tmp_path / "home" / name) for name in ("HOME", "XDG_CACHE_HOME", "IPYTHONDIR")} | {
        "NUMBA_CACHE_DIR": ""
    }
    found = run(USE.format(kernels="forward_kernels.forward,"), PYTHONPATH=str(tmp_path), **places)
    assert found.stdout.splitlines() == ["0 1"]
    assert "set NUMBA_CACHE_DIR to a folder that can be written" in found.stderr


def test_the_kernels_files_name_what_they_are_made_of() -> None:
    # numba looks at the file that holds a kernel alone; so a change of another one must change that file too.
    package = Path(forward_kernels.__file__).parent
    found = hashlib.sha256(b"".join((package / part).read_bytes() for part in PARTS)).hexdigest()[:16]
    for module in (forward_kernels, backward_kernels):
        assert found == module.MADE_OF, f'{module.__name__}: the line must be MADE_OF = "{found}"'


def test_one_specialization_for_each_element_type() -> None:
    compute = arithmetic("numba")
    frozen = np.linspace(1, 2, 10).astype(np.float32)
    frozen.setflags(write=False)
    for name in oracle.DTYPES:
        for x in (oracle.random_tensor(1, (3, 10, 7), name), oracle.random_tensor(1, (7, 10), name).T.copy().T):
            y, batch = compute.forward(x, frozen, frozen[::-1][::-1], 1)
            compute.normalize(x, frozen, frozen, frozen[::-1], frozen, 1e-5)  # type: ignore[arg-type]
            compute.moments(x)
            compute.backward(x, y, batch, frozen[::-1], 1e-5)
            compute.backward(x, y, batch, frozen, np.float64(1e-5), input_grad=False)
    assert len(forward_kernels.forward.signatures) == 3
    assert len(backward_kernels.backward.signatures) == 3
