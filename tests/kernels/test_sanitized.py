"""The kernels under AddressSanitizer with UBSan, and under ThreadSanitizer, each in a process of its own: a selection.

All of tests/kernels runs under both too, for those who wait: `python -m tests.emulation.process thread -m pytest
tests/kernels`.
"""

from __future__ import annotations

import pytest

from tests.emulation.build import Sanitizer
from tests.emulation.process import run
from tests.support.kernels import cuda
from tests.support.kernels.kernel_image import NEEDED, can_compile

# Naive, split, resident and cluster kernels on odd sizes, then ticketed ones: every element type at least once.
SELECTION = (
    "(3x2x127 and (float32 or bfloat16)) or (9x3x31 and 4 and float16)"
    " or (test_every_cut and 3x5x127 and (float32 or float16))"
)
FILES = ("tests/kernels/test_results.py", "tests/kernels/test_ticketed.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(cuda.REAL, reason="sanitizers see the host's kernels: they need PyCUDA's emulated driver")
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_nothing_is_reported(sanitizer: Sanitizer) -> None:
    if not can_compile():
        pytest.skip(NEEDED)
    # The first test compiles the kernels, which with AddressSanitizer takes minutes on a machine that is busy.
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "550", *FILES, "-k", SELECTION]
    # Several blocks at a time, so that the ticketed ones really wait for each other.
    settings = {"SHAREDNORM_LEFT_OUT": "nothing", "PYTEST_ADDOPTS": "", "SHAREDNORM_EMULATED_RESIDENT": "5"}
    done = run(arguments, sanitizer, settings, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
    assert "Sanitizer" not in done.stderr
