"""What a user has after `pip install sharednorm`, with numpy, grpcio and protobuf and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.processes.distributions import BACKEND, CLIENT_DEPENDENCIES, ROOT, Distributions, Environment, run

# PuzzleLib's own example, from its documentation.
EXAMPLE = """
import json
import numpy as np
from sharednorm import BatchNorm2D

data = np.arange(5 * 3 * 10 * 10, dtype=np.float32).reshape(5, 3, 10, 10)
bn = BatchNorm2D(3)
out = bn(data)
print(json.dumps([out.shape, float(bn.mean[0, 1, 0, 0]), float(bn.var[0, 1, 0, 0])]))
"""

USER = """
import numpy as np
import sharednorm
from sharednorm import BatchNorm2D

bn = BatchNorm2D(3)
reveal_type(bn(np.ones((2, 3, 4, 4), np.float32)))
reveal_type(bn.mean)
hub = sharednorm.connect("localhost:50051")
reveal_type(hub.BatchNorm2D(3, name="stem/bn").train)
bn.menas
BatchNorm2D("three")
"""


@pytest.fixture
def installed(tmp_path: Path, distributions: Distributions) -> Environment:
    """A clean environment with the wheel."""
    environment = Environment.create(tmp_path / "environment")
    environment.install(distributions.wheel)
    return environment


def test_importing_the_client_loads_no_extra_and_no_server(installed: Environment) -> None:
    result = installed.python("import json, sys, sharednorm; print(json.dumps(sorted(sys.modules)))")
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert loaded & {"numba", "llvmlite", "h5py", "ml_dtypes", "safetensors", "torch", "sharednorm_server"} == set()
    assert "sharednorm" in loaded


def test_importing_the_client_loads_no_extra_that_is_installed(tmp_path: Path, distributions: Distributions) -> None:
    everything = (*CLIENT_DEPENDENCIES, "numba", "llvmlite", "h5py", "ml_dtypes", "safetensors")
    environment = Environment.create(tmp_path / "environment", everything)
    environment.install(distributions.wheel)
    result = environment.python("import json, sys, sharednorm; print(json.dumps(sorted(sys.modules)))")
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert loaded & {"numba", "llvmlite", "h5py", "ml_dtypes", "safetensors", "sharednorm_server"} == set()


def test_a_local_layer_works_with_numpy_alone(installed: Environment) -> None:
    result = installed.python(EXAMPLE)
    assert (result.returncode, result.stderr) == (0, "")
    shape, mean, var = json.loads(result.stdout)
    # Map 1 holds 100 to 199, 400 to 499, ..., 1300 to 1399.
    values = [300 * n + 100 + i for n in range(5) for i in range(100)]
    expected = sum(values) / 500
    assert shape == [5, 3, 10, 10]
    assert mean == pytest.approx(expected, rel=1e-6)
    assert var == pytest.approx(sum((v - expected) ** 2 for v in values) / 499, rel=1e-6)


def test_the_remote_client_says_that_no_server_is_there(installed: Environment) -> None:
    code = (
        "import sharednorm\n"
        "try:\n    sharednorm.connect('unix:/nonexistent/sharednorm.sock', timeout=5)"
        ".BatchNorm2D(3, name='a')\n"
        "except sharednorm.ServerUnavailable as error:\n    print(error)"
    )
    result = installed.python(code)
    assert result.returncode == 0, result.stderr
    assert "sharednorm serve" in result.stdout


@pytest.mark.parametrize("arguments", [["serve"], ["serve", "--listen", "127.0.0.1:0"]])
def test_serving_without_the_extra_says_what_to_install(installed: Environment, arguments: list[str]) -> None:
    result = run([installed.bin / "sharednorm", *arguments], cwd=installed.home)
    assert result.returncode not in {0, None}
    assert "pip install 'sharednorm[server]'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from sharednorm.arithmetic.select import arithmetic; arithmetic('numba')", "fast"),
        ("from sharednorm import BatchNorm2D; BatchNorm2D(3, name='a').save('layer.hdf')", "hdf5"),
        ("from sharednorm import BatchNorm2D; BatchNorm2D(3, name='a').save('layer.safetensors')", "safetensors"),
    ],
)
def test_a_missing_extra_is_named_with_its_command(installed: Environment, code: str, extra: str) -> None:
    result = installed.python(code)
    assert result.returncode == 1
    assert f"pip install 'sharednorm[{extra}]'" in result.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_mypy_resolves_what_a_user_writes(tmp_path: Path, distributions: Distributions, editable: bool) -> None:
    backend = (*BACKEND, *(["tomli"] if sys.version_info < (3, 11) else [])) if editable else ()
    environment = Environment.create(tmp_path / "environment", (*CLIENT_DEPENDENCIES, *backend))
    environment.install(*(["--no-build-isolation", "--editable", ROOT] if editable else [distributions.wheel]))
    (tmp_path / "user.py").write_text(USER)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(environment.bin / "python")]
    result = run([*mypy, "--config-file", "", "--cache-dir", tmp_path / "cache", "user.py"], cwd=tmp_path)
    lines = [line.partition(": ")[2] for line in result.stdout.splitlines()]
    revealed = [line for line in lines if "Revealed type" in line]
    assert len(revealed) == 3, result.stdout + result.stderr
    assert "ndarray" in revealed[0]
    assert "floating" in revealed[1]  # which the releases of NumPy spell in different ways
    assert "bool" in revealed[2]
    assert len([line for line in lines if '"menas"' in line or '"three"' in line or "arg-type" in line]) == 2
    assert len([line for line in lines if line.startswith("error")]) == 2, result.stdout
