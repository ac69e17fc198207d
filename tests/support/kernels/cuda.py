"""Where the tests of the CUDA device run: the emulated driver, or, with SHAREDNORM_TEST_GPU=1, a real GPU."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path

from sharednorm_kernels.build import build
from tests.emulation.build import driver
from tests.emulation.load import count, fail, load
from tests.support.kernels.kernel_image import REFERENCE, can_compile, compiled_image

NEEDS_PYCUDA = "they need PyCUDA, which make test CUDA=1 builds"
REAL = os.environ.get("SHAREDNORM_TEST_GPU") == "1"


def available() -> bool:
    """Return whether this machine can run the CUDA device, emulated or not."""
    return importlib.util.find_spec("pycuda") is not None and (REAL or can_compile())


@cache
def prepare() -> None:
    """Let PyCUDA in this process find the emulated driver, and the device the kernels for it. Before PyCUDA's import.

    With a real GPU there is nothing to do.
    """
    if not REAL:
        # A GPU that a test loses keeps what it has; what other tests leave behind they find themselves, by `held`.
        os.environ.update({"SHAREDNORM_EMULATED_LEAKS": "ignore", **_kernels()})
        load()


@cache
def reference_kernels() -> bytes:
    """Return the kernels of the product with the naive ones, compiled for the emulated driver, or by nvcc for a GPU."""
    if not REAL:
        return compiled_image().read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        fatbin = Path(scratch) / "reference.fatbin"
        build(fatbin, REFERENCE)
        return fatbin.read_bytes()


def mend() -> None:
    """End the failures that a test has asked the emulated driver for."""
    if not REAL:
        fail()


def held() -> list[int]:
    """Return how many of the driver's things this process has; nothing with a real GPU, whose driver does not say."""
    kinds = ("allocations", "pinned", "streams", "events", "modules", "contexts")
    return [] if REAL else [count(kind) for kind in kinds]


@cache
def environment() -> dict[str, str]:
    """Return what a process needs in its environment to find both."""
    if REAL:
        return {}
    beside = os.environ.get("LD_LIBRARY_PATH")
    path = f"{driver().parent}:{beside}" if beside else str(driver().parent)
    return {"LD_LIBRARY_PATH": path, "SHAREDNORM_EMULATED_LEAKS": "fail", **_kernels()}


def _kernels() -> dict[str, str]:
    return {"SHAREDNORM_FATBIN": str(compiled_image())}
