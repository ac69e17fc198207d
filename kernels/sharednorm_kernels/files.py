"""Where the kernels are: their sources, and the fatbin that `make kernels` makes of them."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

FOLDER = Path(__file__).parent
FATBIN = FOLDER / "sharednorm.fatbin"
MAIN_SOURCE = FOLDER / "sharednorm.cu"
CUDA_COMPILER = Path("/usr/local/cuda/bin/nvcc")

ELSEWHERE = "SHAREDNORM_FATBIN"
"""Environment variable: the path of compiled kernels that are used instead, for those who build them elsewhere."""


class FatbinMissing(RuntimeError):
    """The compiled kernels are not there; the message says what to run."""


def fatbin_path() -> Path:
    """Return where the compiled kernels are, or should be: where SHAREDNORM_FATBIN says, or in this package."""
    elsewhere = os.environ.get(ELSEWHERE)
    return Path(elsewhere) if elsewhere else FATBIN


def fatbin(path: Path | None = None) -> bytes:
    """Return the compiled kernels: machine code for compute capability 8.x and 9.0, and PTX for later ones.

    Raises:
        FatbinMissing: They have not been compiled, are not where SHAREDNORM_FATBIN says, or cannot be read; the message
            tells how to mend that.
    """
    elsewhere = path is None and bool(os.environ.get(ELSEWHERE))
    path = path or fatbin_path()
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise FatbinMissing(f"the CUDA kernels in {path} cannot be read: {error.strerror}") from error
    if elsewhere:
        raise FatbinMissing(f"{ELSEWHERE} names {path}, which is not a file (expected: what `make kernels` makes)")
    if nvcc() is not None:
        raise FatbinMissing(f"the CUDA kernels have not been compiled ({path} is not there): run `make kernels`")
    raise FatbinMissing(
        f"the CUDA kernels have not been compiled ({path} is not there) and there is no nvcc: install the CUDA "
        "toolkit and run `make kernels`, or install a wheel of sharednorm that has them"
    )


def nvcc() -> Path | None:
    """Return the path of CUDA's compiler, or None: from PATH, else from where the toolkit installs it."""
    found = shutil.which("nvcc") or shutil.which(CUDA_COMPILER)
    return Path(found) if found else None


def sources() -> list[Path]:
    """Return the kernels' source files, sorted; `MAIN_SOURCE` includes all the others."""
    return sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")])
