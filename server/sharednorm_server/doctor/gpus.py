"""What this machine has for `serve --device cuda`: the driver, PyCUDA, the compiled kernels, and the GPUs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharednorm_kernels.files import FatbinMissing, fatbin, fatbin_path, nvcc
from sharednorm_server.doctor.checks import MISSING, NOTE, OK, Check, size
from sharednorm_server.doctor.probe import LEAST_CAPABILITY
from sharednorm_server.doctor.subprocesses import Child, Outcome

SECONDS = 60.0
"""How long the driver may take to answer all questions. A GPU that nobody uses may need seconds to wake up."""

KERNELS_CUDA = 13000
"""The first CUDA with which `make kernels` compiles; 13000 is 13.0."""

NO_DEVICE, STUB, MISMATCH = 100, 34, 803  # CUresult

IN_CONTAINER = (
    "start the container with its GPUs, `docker run --gpus all` or in compose `deploy: {resources: {reservations: "
    "{devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}`, on a host with NVIDIA's driver and the package "
    "nvidia-container-toolkit"
)
ON_HOST = "install NVIDIA's driver, `apt-get install nvidia-driver` on Debian, `ubuntu-drivers install` on Ubuntu"
LOOK = "see whether `nvidia-smi` works; if not, install NVIDIA's driver again and restart the machine"


@dataclass(frozen=True)
class Gpus:
    """What was found.

    Attributes:
        common: What every GPU needs: driver, PyCUDA, kernels.
        each: One for each GPU, in the order of their numbers.
    """

    common: tuple[Check, ...]
    each: tuple[Check, ...]


def examine() -> Gpus:
    """Look for GPUs and what they need, for at most `SECONDS` and a moment."""
    end = time.monotonic() + SECONDS
    kernels = _kernels()
    image = str(fatbin_path().absolute()) if kernels.state == OK else ""
    asking = Child(f"gpus({image!r})")
    importing = Child("package('pycuda.driver', 'pycuda')") if importlib.util.find_spec("pycuda") else None
    asked = asking.outcome(end)
    driver = _driver(asked)
    pycuda = _pycuda(importing.outcome(end) if importing else None, asked)
    found = [facts for facts in asked.facts if "name" in facts]
    return Gpus((driver, pycuda, kernels), tuple(_gpu(facts, asked, bool(image)) for facts in found))


# --- The driver -----------------------------------------------------------------------------------------


def _driver(asked: Outcome) -> Check:
    no_library, version = asked.fact("no_library"), asked.fact("version")
    if no_library is not None:
        return Check(
            "driver",
            MISSING,
            f"libcuda.so.1 cannot be loaded ({no_library.removeprefix('libcuda.so.1: ')})",
            _install(),
        )
    if version is None:
        return Check("driver", MISSING, f"libcuda.so.1 does not say its version ({asked.failure or 'no answer'})", LOOK)
    text = f"supports CUDA {_cuda(version)}"
    problem = next((facts for facts in asked.facts if "problem" in facts and "gpu" not in facts), None)
    if problem is not None:
        return Check("driver", MISSING, f"{text}, but {problem['problem']}", _advice(problem["code"]))
    count = asked.fact("count")
    if count is None:
        return Check("driver", MISSING, f"{text}, but does not list the GPUs ({asked.failure or 'no answer'})", LOOK)
    if count == 0:
        return Check("driver", MISSING, f"{text}, but there is no GPU", _advice(NO_DEVICE))
    return Check("driver", OK, f"{text}, {count} GPU{'' if count == 1 else 's'}")


def _advice(code: int) -> str:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if code == NO_DEVICE and hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}: `unset CUDA_VISIBLE_DEVICES`, or name a GPU that is there"
    if code == NO_DEVICE and _in_container():
        return IN_CONTAINER
    if code == NO_DEVICE:
        return "put an NVIDIA GPU in this machine, or if it has one (`lspci | grep -i nvidia`), " + ON_HOST
    if code == STUB:
        return (
            "this is the CUDA toolkit's stub, which is for linkers only: take its folder `stubs` out of LD_LIBRARY_PATH"
        )
    if code == MISMATCH:
        return "the driver was updated while it was loaded: restart the machine"
    return LOOK


def _install() -> str:
    return IN_CONTAINER if _in_container() else ON_HOST


def _in_container() -> bool:
    return any(os.path.lexists(mark) for mark in ("/.dockerenv", "/run/.containerenv"))


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


# --- PyCUDA ---------------------------------------------------------------------------------------------


def _pycuda(imported: Outcome | None, asked: Outcome) -> Check:
    if imported is None:
        return Check("pycuda", MISSING, "not installed", _install_pycuda("pip install 'sharednorm[cuda]'"))
    if not imported.failure:
        return Check("pycuda", OK, str(imported.fact("version")))
    if asked.fact("no_library") is not None:
        return Check("pycuda", NOTE, f"installed, and cannot be imported without the driver ({imported.failure})")
    again = "pip install --force-reinstall --no-deps --no-cache-dir pycuda"
    return Check("pycuda", MISSING, f"installed, and cannot be imported ({imported.failure})", _install_pycuda(again))


def _install_pycuda(command: str) -> str:
    first = _build_needs()
    return f"`{command}`, which compiles it" + (f"; for that, first {', and '.join(first)}" if first else "")


def _build_needs() -> list[str]:
    """Return what PyCUDA's build needs and this machine lacks, each with its command."""
    needs = []
    compiler = nvcc()
    if compiler is None:
        needs.append(
            "the CUDA toolkit, 13.0 or later, with nvcc (`apt-get install cuda-toolkit-13-0` from NVIDIA's repository)"
        )
    elif not any(os.access(root / "include" / "cuda.h", os.R_OK, effective_ids=True) for root in _toolkits(compiler)):
        needs.append("the CUDA toolkit's headers (`apt-get install cuda-toolkit-13-0` from NVIDIA's repository)")
    if shutil.which("g++") is None:
        needs.append("g++ (`apt-get install g++`)")
    return needs


def _toolkits(compiler: Path) -> list[Path]:
    root = os.environ.get("CUDA_ROOT")
    return [*([Path(root)] if root else []), compiler.resolve().parent.parent, Path("/usr/local/cuda")]


# --- Kernels and GPUs -----------------------------------------------------------------------------------


def _kernels() -> Check:
    try:
        number = len(fatbin())
    except FatbinMissing as error:
        return Check("kernels", MISSING, str(error))
    except OSError as error:
        return Check("kernels", MISSING, f"{fatbin_path()} cannot be read ({error.strerror})", "run `make kernels`")
    return Check("kernels", OK, f"{fatbin_path()}, {size(number)}")


def code_for(major: int) -> str:
    """Return which code in the fatbin a GPU of a compute capability runs; "" for none."""
    if major < LEAST_CAPABILITY[0]:
        return ""
    return {8: "machine code for sm_80", 9: "machine code for sm_90"}.get(major, "PTX, which the driver compiles")


def _gpu(facts: dict[str, Any], asked: Outcome, with_kernels: bool) -> Check:
    name, (major, minor) = f"cuda:{facts['gpu']}", facts["capability"]
    text = f"{facts['name']}, compute capability {major}.{minor}, {size(facts['memory'])}"
    code = code_for(major)
    if not code:
        return Check(
            name, MISSING, text, f"the kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or later: another GPU"
        )
    said = {key: value for each in asked.facts if each.get("gpu") == facts["gpu"] for key, value in each.items()}
    if "free" in said:
        text += f", {size(said['free'])} free"
    if "problem" in said:
        what = "the kernels cannot be loaded" if "free" in said else "it cannot be used"
        return Check(name, MISSING, f"{text}, but {what} ({said['problem']})", _mend_gpu(asked, "free" in said))
    if "free" not in said or (with_kernels and "loaded" not in said):
        what = "loading the kernels" if "free" in said else "using it"
        return Check(name, MISSING, f"{text}, but {what} failed ({asked.failure or 'no answer'})", LOOK)
    return Check(name, OK, f"{text}, " + (f"has loaded the kernels ({code})" if with_kernels else f"would run {code}"))


def _mend_gpu(asked: Outcome, loading: bool) -> str:
    if loading and int(asked.fact("version")) < KERNELS_CUDA:
        return f"install a driver that supports CUDA {_cuda(KERNELS_CUDA)}, 580 or later"
    if loading:
        return "compile them again with `make kernels`"
    return "see with `nvidia-smi` whether another program has it for itself, or has all of its memory"
