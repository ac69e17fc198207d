"""float16 and bfloat16: every bit pattern in, every rounding out, with and without the processor's help."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from tests.support import oracle

HALF_TYPES = ("float16", "bfloat16")
# Exact, inexact, into the subnormal values, to zero, beyond the largest value.
FACTORS = np.array([1, -1, 1 / 3, 1.0009765, 6e-5, 3e-8, 2.0**-24, 65504, 1e30, 3e38], np.float32)


@pytest.fixture(params=["numpy", "numba"])
def compute(request: pytest.FixtureRequest) -> Arithmetic:
    return arithmetic(request.param)


def every_value(name: str, *, columns: bool) -> oracle.Array:
    """Return all 65536 bit patterns in each of ten channels, as a matrix or as long rows."""
    values = np.arange(1 << 16, dtype=np.uint16).view(oracle.dtype(name))
    ten = np.broadcast_to(values, (1, 10, 1 << 16))
    return np.ascontiguousarray(ten[0].T if columns else ten)


def check(compute: Arithmetic, name: str, *, columns: bool) -> None:
    """Multiply every value by each factor and compare with the conversions of NumPy and ml_dtypes."""
    x = every_value(name, columns=columns)
    zeros, ones = np.zeros(10), np.ones(10)
    found = compute.normalize(x, zeros, ones, FACTORS, zeros.astype(np.float32), 1e-300)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32) * oracle.per_channel(FACTORS, x.ndim).astype(np.float32) + np.float32(0)
        wanted = wide.astype(oracle.dtype(name))
    is_nan = np.isnan(wide)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(found.view(np.uint16)[~is_nan], wanted.view(np.uint16)[~is_nan])


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("name", HALF_TYPES)
def test_every_value(compute: Arithmetic, name: str, columns: bool) -> None:
    check(compute, name, columns=columns)


@pytest.mark.parametrize("name", HALF_TYPES)
def test_statistics_are_wide(compute: Arithmetic, name: str) -> None:
    # In a half type the mean itself would be off by up to 0.5, and the sum would overflow.
    x = (1000 + np.random.default_rng(1).integers(0, 5, (64, 2, 40, 40))).astype(oracle.dtype(name))
    batch = compute.moments(x)
    count, mean, m2 = oracle.batch_moments(x)
    np.testing.assert_allclose(batch.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(batch.m2, m2, rtol=1e-10)
    assert batch.count == count


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="only x86 has processors without F16C")
def test_every_value_on_a_processor_without_float16(tmp_path: Path) -> None:
    code = """
from sharednorm.arithmetic.select import arithmetic
from tests.unit.arithmetic import test_normalization_half as this
from sharednorm.arithmetic.numba import forward as forward_kernels
for name in this.HALF_TYPES:
    for columns in (True, False):
        this.check(arithmetic("numba"), name, columns=columns)
print("vcvtph2ps" in "".join(forward_kernels.forward.inspect_asm().values()))
"""
    environment = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
