"""The ranges of protobuf and grpcio are those of the generated code, and nothing warns within them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.packaging.lowest import lowest
from tests.support.processes.distributions import ROOT, run

GENERATED = ROOT / "client" / "sharednorm" / "v1"

# PyTorch and PyCUDA cannot be imported here: not every environment has them, and they may warn of things of their own.
IMPORT = """
import importlib, pkgutil, sys
import sharednorm, sharednorm_kernels, sharednorm_server

OPTIONAL = ("torch", "pycuda")
sys.modules.update(dict.fromkeys(OPTIONAL))
imported = 0
for package in (sharednorm, sharednorm_kernels, sharednorm_server):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if module.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(module.name)
            imported += 1
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in OPTIONAL:
                raise
print(imported)
"""


def _padded(version: str) -> tuple[int, ...]:
    return tuple(map(int, f"{version}.0.0".split(".")[:3]))


@pytest.mark.parametrize("code", sorted(GENERATED.glob("*_pb2.py")), ids=lambda path: str(path.name))
def test_the_oldest_protobuf_is_the_one_that_generated_the_code(code: Path) -> None:
    found = re.search(r"^# Protobuf Python Version: ([\d.]+)$", code.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    assert found[1] == lowest()["protobuf"]


def test_the_oldest_grpcio_is_the_one_that_generated_the_code() -> None:
    code = (GENERATED / "service_pb2_grpc.py").read_text(encoding="utf-8")
    found = re.search(r"^GRPC_GENERATED_VERSION = '([\d.]+)'$", code, re.MULTILINE)
    assert found is not None
    oldest = lowest()
    for name in ("grpcio", "grpcio-health-checking", "grpcio-reflection"):
        assert _padded(oldest[name]) == _padded(found[1]), name


def test_importing_any_module_warns_of_nothing(tmp_path: Path) -> None:
    result = run([sys.executable, "-W", "error", "-c", IMPORT], cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) > 100
