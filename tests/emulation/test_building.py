"""What the tests build, and what they say where they cannot."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.emulation import build as building
from tests.emulation.build import CompileError, build, build_file, driver
from tests.emulation.process import ACTIVE, active, run
from tests.emulation.pycuda_wheel import BuildError, cached_wheel, toolkit, toolkit_version

SOURCE = '#include "emulated_cuda.h"\nextern "C" __global__ void nothing(float *y) {{ y[0] = {value}; }}\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sharednorm"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "nothing.cu"
    path.write_text(SOURCE.format(value=1))
    return path


def test_an_image_is_built_once_for_each_content(cache: Path, source: Path) -> None:
    first = build_file([source])
    changed = first.stat().st_mtime_ns
    assert build_file([source]).stat().st_mtime_ns == changed
    assert build([source]) == first.read_bytes()
    assert first.is_relative_to(cache)
    source.write_text(SOURCE.format(value=2))
    assert build_file([source]) != first
    assert build_file([source], definitions=["OTHER=1"]) not in {first, build_file([source])}


def test_what_a_source_includes_counts_too(cache: Path, source: Path) -> None:
    header = source.with_suffix(".cuh")
    header.write_text("#define VALUE 1\n")
    source.write_text('#include "nothing.cuh"\n' + SOURCE.format(value="VALUE"))
    first = build_file([source])
    header.write_text("#define VALUE 2\n")
    assert build_file([source]) != first


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("undeclared", "was not declared"),
        ("0; int unused", "unused variable"),
        ("0; __shared__ float s", "dynamic here"),
    ],
)
def test_a_source_that_does_not_compile(cache: Path, source: Path, value: str, problem: str) -> None:
    source.write_text(SOURCE.format(value=value))
    with pytest.raises(CompileError, match=problem):
        build([source])
    assert list(cache.rglob("image.so")) == []


def test_the_driver_stays_where_it_was_built() -> None:
    path = driver()
    before = path.stat().st_mtime_ns
    assert driver() == path
    assert path.stat().st_mtime_ns == before
    assert path.name == "libcuda.so.1"


def test_the_wheel_is_there_once_it_was_built() -> None:
    wheel = cached_wheel()
    assert cached_wheel() == wheel
    with zipfile.ZipFile(wheel) as archive:
        assert any(name.startswith("pycuda/_driver.") for name in archive.namelist())


def test_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toolkit()
    assert toolkit_version(root) >= 12000
    monkeypatch.setenv("CUDA_ROOT", str(tmp_path))
    assert toolkit() != tmp_path
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda.h").write_text("#define CUDA_VERSION 12080\n")
    assert toolkit() == tmp_path
    assert toolkit_version(tmp_path) == 12080
    (tmp_path / "include" / "cuda.h").write_text("")
    with pytest.raises(BuildError, match="does not say its version"):
        toolkit_version(tmp_path)


def test_an_unknown_sanitizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACTIVE, "memory")
    with pytest.raises(ValueError, match="'memory' is no sanitizer"):
        active()
    usage = run(["-m", "tests.emulation.process", "memory", "-c", "pass"])
    assert (usage.returncode, "usage" in usage.stderr) == (2, True)


@pytest.mark.parametrize("sanitizer", building.SANITIZERS)
def test_a_process_with_a_sanitizer_from_the_command_line(sanitizer: building.Sanitizer) -> None:
    code = (
        "import sys; from tests.emulation.process import active; sys.exit(40 + ('address', 'thread').index(active()))"
    )
    done = run(["-m", "tests.emulation.process", sanitizer, "-c", code])
    assert done.returncode == 40 + building.SANITIZERS.index(sanitizer), done.stderr
