"""Whether this machine can compile the kernels for the host, and the image that it then makes."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.emulation.build import build_file
from tests.emulation.process import active
from tests.emulation.pycuda_wheel import BuildError, toolkit

REFERENCE = Path(__file__).parents[2] / "kernels" / "reference.cu"
"""The kernels of the product, and the naive ones beside them."""

NEEDED = "they need g++ and the CUDA toolkit's headers"


def can_compile() -> bool:
    """Return whether this machine has what the compilation needs."""
    try:
        headers = toolkit() / "include"
    except BuildError:
        return False
    return shutil.which("g++") is not None and (headers / "cuda_fp16.h").is_file()


def compiled_image() -> Path:
    """Return the image for the host, compiled if it has not been, for the sanitizer of this process if there is one."""
    return build_file([REFERENCE], active())
