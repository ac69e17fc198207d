"""The wheel and the sdist hold all that they should, and nothing else."""

from __future__ import annotations

import email
import hashlib
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.processes.distributions import ROOT, Distributions, build

FOLDERS = ("benchmarks", "client", "docs", "docker", "examples", "kernels", "proto", "server", "tests")
FILES = (".dockerignore", "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "buf.yaml", "mkdocs.yml",
         "pyproject.toml")  # fmt: skip
FATBIN = "sharednorm_kernels/sharednorm.fatbin"


def _sources(*folders: str) -> set[str]:
    """Paths of the files in some folders, without what running them or `make kernels` leaves behind."""
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in {".pyc", ".fatbin"}
    }


def _contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if name != FATBIN and not name.endswith("/RECORD")  # there after `make kernels`, and listed in RECORD
        }


def test_the_wheel_has_every_file_of_the_three_packages_and_no_other(distributions: Distributions) -> None:
    expected = {path.partition("/")[2] for path in _sources("client", "server", "kernels")}
    found = {name for name in _contents(distributions.wheel) if ".dist-info/" not in name}
    assert found == expected


@pytest.mark.parametrize(
    "name",
    [
        "sharednorm/py.typed",
        "sharednorm_server/py.typed",
        "sharednorm_kernels/py.typed",
        "sharednorm_kernels/sharednorm.cu",
        "sharednorm_kernels/platform.cuh",
        "sharednorm/v1/service_pb2.py",
        "sharednorm/v1/service_pb2.pyi",
        "sharednorm/v1/service_pb2_grpc.py",
        "sharednorm/v1/service_pb2_grpc.pyi",
    ],
)
def test_the_wheel_is_typed_and_has_the_generated_code(distributions: Distributions, name: str) -> None:
    assert name in _contents(distributions.wheel)


def test_the_metadata_names_the_command_the_license_and_three_dependencies(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        commands = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert "sharednorm = sharednorm_server.cli.main:main" in commands
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.10")
    required = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert sorted(text.partition(">")[0].partition("<")[0] for text in required) == ["grpcio", "numpy", "protobuf"]
    assert {"server", "fast", "bfloat16", "hdf5", "safetensors", "demo"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_sdist_has_the_contract_the_tests_and_the_documents(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    assert {*_sources(*FOLDERS), *FILES} - found == set()
    assert "proto/sharednorm/v1/service.proto" in found


def test_the_sdist_has_nothing_that_a_run_leaves_behind(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    roots = {name.partition("/")[0] for name in names}
    assert roots <= {*FOLDERS, *FILES, "PKG-INFO", ".gitignore"}
    assert [name for name in names if name.endswith((".pyc", ".so", ".fatbin")) or "__pycache__" in name] == []


def test_the_sdist_and_the_checkout_make_the_same_wheel(distributions: Distributions, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "--wheel")
    (wheel,) = tmp_path.glob("*.whl")
    assert _contents(wheel) == _contents(distributions.wheel)


def test_a_wheel_built_after_make_kernels_has_the_fatbin(distributions: Distributions, tmp_path: Path) -> None:
    with tarfile.open(distributions.sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (source / "kernels" / FATBIN).write_bytes(b"compiled")
    build(source, tmp_path / "out", "--wheel")
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(FATBIN) == b"compiled"
