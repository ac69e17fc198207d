"""Build the emulated driver, and images of kernels that it can run; both are kept by the hash of what they are made of.

A sanitizer is "address" (AddressSanitizer and UndefinedBehaviorSanitizer) or "thread" (ThreadSanitizer). An image that
was built with one runs only in a process that was started with its runtime: see tests.emulation.process.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sharednorm_kernels import sources as kernel_sources
from tests.emulation.pycuda_wheel import cache_directory, toolkit

Sanitizer = Literal["address", "thread"]
SANITIZERS: tuple[Sanitizer, ...] = ("address", "thread")

HERE = Path(__file__).parent
DRIVER = HERE / "driver"
COMMON = ("-std=c++17", "-fPIC", "-g", "-Wall", "-Wextra")
# -ffp-contract=off: what the kernels write is what is computed, on every machine.
KERNEL = ("-O1", "-Werror", "-DSHAREDNORM_EMULATED", "-ffp-contract=off", "-x", "c++")
INSTRUMENT: dict[Sanitizer, tuple[str, ...]] = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    "thread": ("-fsanitize=thread", "-fno-omit-frame-pointer", "-Wno-tsan"),
}
SCHEDULER: dict[Sanitizer, str] = {"address": "-DEMULATION_ADDRESS", "thread": "-DEMULATION_THREAD"}


class CompileError(Exception):
    """The compiler refused a source; its messages are the text."""


def driver() -> Path:
    """Return the path of the emulated libcuda.so.1, building it where it has not been built."""
    sources = sorted(DRIVER.glob("*.cpp"))
    flags = [*COMMON, "-O2", f"-I{toolkit() / 'include'}"]
    inputs = [*sources, *DRIVER.glob("*.h"), HERE / "image.h"]
    target = _directory("driver", _hash(inputs, flags)) / "libcuda.so.1"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            objects = [_compile(source, Path(scratch), flags) for source in sources]
            _link(objects, target, Path(scratch), ["-Wl,-soname,libcuda.so.1"])
    return target


def build(sources: Sequence[Path], sanitizer: Sanitizer | None = None) -> bytes:
    """Compile .cu files to one image for `pycuda.driver.module_from_buffer`; see `build_file`."""
    return build_file(sources, sanitizer).read_bytes()


def build_file(
    sources: Sequence[Path], sanitizer: Sanitizer | None = None, definitions: Sequence[str] = (), ucontext: bool = False
) -> Path:
    """Compile .cu files to one image for the emulated driver, and return its path.

    Args:
        sources: The .cu files; what they include is found beside them, in this directory and in the CUDA toolkit.
        sanitizer: What the kernels are instrumented with.
        definitions: Macros, as "NAME" or "NAME=VALUE".
        ucontext: Switch fibers by the portable functions.

    Raises:
        CompileError: A source does not compile; warnings are errors.
    """
    includes = [f"-I{HERE}", f"-isystem{toolkit() / 'include'}"]
    flags = [*COMMON, *KERNEL, *includes, *(f"-D{definition}" for definition in definitions)]
    scheduler = [*COMMON, "-O2", *includes, *(["-DEMULATION_UCONTEXT"] if ucontext else [])]
    link: list[str] = []
    if sanitizer is not None:
        flags += INSTRUMENT[sanitizer]
        link += INSTRUMENT[sanitizer]
        scheduler.append(SCHEDULER[sanitizer])
    headers = {header for source in sources for header in source.parent.glob("*.cuh")} | set(kernel_sources())
    inputs = [*headers.union(sources), *HERE.glob("*.h"), HERE / "scheduler.cpp"]
    target = _directory("images", _hash(inputs, [*flags, *scheduler])) / "image.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            objects = [_compile(source, Path(scratch), flags) for source in sources]
            objects.append(_compile(HERE / "scheduler.cpp", Path(scratch), scheduler))
            # Its own symbols before anybody else's: several images live in one process.
            _link(objects, target, Path(scratch), ["-Wl,-Bsymbolic", *link])
    return target


def runtimes(sanitizer: Sanitizer) -> str:
    """Return what LD_PRELOAD has to name for a process that runs images with this sanitizer."""
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
    # The C++ runtime too: a sanitizer looks for the functions of exceptions when it starts.
    return ":".join(_run(["g++", f"-print-file-name={name}"]).strip() for name in (*names, "libstdc++.so.6"))


def _directory(kind: str, digest: str) -> Path:
    directory = cache_directory() / kind / digest
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _hash(inputs: Sequence[Path], flags: Sequence[str]) -> str:
    digest = hashlib.sha256(_run(["g++", "-dumpfullversion"]).encode())
    for flag in flags:
        digest.update(flag.encode() + b"\0")
    for path in sorted(inputs):
        content = path.read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def _compile(source: Path, scratch: Path, flags: Sequence[str]) -> Path:
    target = scratch / f"{source.name}.o"
    _run(["g++", *flags, "-c", str(source), "-o", str(target)])
    return target


def _link(objects: Sequence[Path], target: Path, scratch: Path, flags: Sequence[str]) -> None:
    """Link to target in one step: another process sees all of it or nothing."""
    linked = scratch / target.name
    _run(["g++", "-shared", "-o", str(linked), *map(str, objects), *flags, "-ldl", "-lpthread"])
    linked.replace(target)


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode != 0:
        raise CompileError(done.stderr)
    return done.stdout


if __name__ == "__main__":
    sys.stdout.write(f"{driver()}\n")
