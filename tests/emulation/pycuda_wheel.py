"""Build PyCUDA for this interpreter, once per machine, and install it: `python -m tests.emulation.pycuda_wheel`.

PyCUDA comes as source. It is built against the CUDA toolkit, which needs no GPU and no driver: a library of the
driver's name with one function satisfies the linker, and at run time the real driver is loaded, or the emulated one.
The wheel is kept under ${XDG_CACHE_HOME:-~/.cache}/sharednorm, by the versions of everything that it depends on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

VERSION = "2026.1"
BUILD = 2  # how it is built here; another way is another wheel
BUILD_NEEDS = ("setuptools>=77", "wheel", "mako", "pytools", "platformdirs")

SITECONF = """\
USE_SHIPPED_BOOST = True
CUDA_TRACE = False
CUDA_ENABLE_GL = False
CUDA_ENABLE_CURAND = False
CUDA_ROOT = {root!r}
CUDADRV_LIB_DIR = [{stub!r}]
CUDADRV_LIBNAME = ["cuda"]
CUDART_LIB_DIR = [{lib!r}, {lib64!r}]
CUDART_LIBNAME = ["cudart"]
CXXFLAGS = ["-g0"]
LDFLAGS = []
"""


class BuildError(Exception):
    """PyCUDA cannot be built here; the message says what is missing."""


def cache_directory() -> Path:
    """Return the directory that keeps what the tests build."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sharednorm"


def toolkit() -> Path:
    """Return the root of the CUDA toolkit: $CUDA_ROOT, where nvcc of the PATH stands, or /usr/local/cuda.

    Raises:
        BuildError: There is none.
    """
    candidates = [os.environ.get("CUDA_ROOT", "")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates.append("/usr/local/cuda")
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "cuda.h").is_file():
            return Path(candidate)
    raise BuildError("no CUDA toolkit: set CUDA_ROOT to the directory that holds include/cuda.h")


def toolkit_version(root: Path) -> int:
    """Return the toolkit's version as cuda.h writes it: 13000 is 13.0."""
    for line in (root / "include" / "cuda.h").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("#define CUDA_VERSION"):
            return int(line.split()[2])
    raise BuildError(f"{root}/include/cuda.h does not say its version")


def cached_wheel() -> Path:
    """Return the wheel for this interpreter and its numpy, building it where it has not been built.

    Raises:
        BuildError: No toolkit, no compiler, no numpy, or the build failed; the log's end is in the message.
    """
    root = toolkit()
    try:
        numpy = importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        raise BuildError(f"{sys.executable} has no numpy, which PyCUDA is built against") from None
    tag = f"{sys.implementation.cache_tag}-numpy{numpy}-cuda{toolkit_version(root)}-{BUILD}"
    directory = cache_directory() / f"pycuda-{VERSION}-{tag}"
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix="building-") as scratch:
            built = _build(Path(scratch), root, numpy)
            try:
                built.rename(directory)
            except OSError:  # another process has just put its own there
                if not directory.is_dir():
                    raise
    (wheel,) = directory.glob("pycuda-*.whl")
    return wheel


def _build(scratch: Path, root: Path, numpy: str) -> Path:
    """Build the wheel, and return the directory in scratch that holds nothing else."""
    stub = scratch / "stub"
    stub.mkdir()
    # One function that PyCUDA calls: a linker that drops libraries that nobody needs would drop this one.
    (stub / "stub.c").write_text("int cuInit(unsigned flags) { return 100 + (flags & 0u); }\n")
    _run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(stub / "libcuda.so"), str(stub / "stub.c")])

    venv.create(scratch / "venv", with_pip=True)
    pip = [str(scratch / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    _run([*pip, "install", f"numpy=={numpy}", *BUILD_NEEDS])
    source = _source(scratch, pip)
    lib, lib64 = str(root / "lib"), str(root / "lib64")
    siteconf = SITECONF.format(root=str(root), stub=str(stub), lib=lib, lib64=lib64)
    (source / "siteconf.py").write_text(siteconf, encoding="utf-8")
    out = scratch / "out"
    include = {"CUDA_INC_DIR": str(root / "include")}
    _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)], include)
    return out


def _source(scratch: Path, pip: list[str]) -> Path:
    """Fetch and unpack the source distribution."""
    download = ["download", "--no-deps", "--no-build-isolation", "--no-binary", "pycuda", f"pycuda=={VERSION}"]
    _run([*pip, *download, "--dest", str(scratch / "sdist")])
    (archive,) = (scratch / "sdist").iterdir()
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):  # Python 3.10.12 and newer
            tar.extractall(scratch / "source", filter="data")
        else:
            tar.extractall(scratch / "source")
    (source,) = (scratch / "source").iterdir()
    return source


def _run(command: list[str], environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(  # a build takes about a minute, and ends
            command,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=1800,
        )
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed") from None
    if done.returncode != 0:
        end = done.stdout.decode(errors="replace")[-4000:]
        raise BuildError(f"{json.dumps(command)} ended with status {done.returncode}:\n{end}")


def install() -> None:
    """Install the wheel into the environment of this interpreter."""
    # Its version says nothing about how it was built.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    _run([*pip, str(cached_wheel())])
    _run([*pip, "--force-reinstall", "--no-deps", str(cached_wheel())])


def main() -> int:
    """Build and install, or with --print only build and say where the wheel is."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulation.pycuda_wheel", description=__doc__)
    parser.add_argument("--print", action="store_true", help="do not install: print the path of the wheel")
    arguments = parser.parse_args()
    try:
        if arguments.print:
            print(cached_wheel())  # noqa: T201 - this is the command's answer
        else:
            install()
    except BuildError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
