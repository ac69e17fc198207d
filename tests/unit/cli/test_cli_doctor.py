"""`sharednorm doctor` about this machine: what it finds is so, and what it misses keeps a server from starting."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import sharednorm
from sharednorm_kernels import files
from sharednorm_server.doctor import gpus, machine, report
from sharednorm_server.doctor.checks import MISSING, NOTE, OK, Check, size
from sharednorm_server.doctor.subprocesses import Child
from tests.support.processes import server

NUMPY = {"SHAREDNORM_ARITHMETIC": "numpy"}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = server.run(["doctor", *arguments], env=env)
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr == ""
    return result


def rows(result: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Return the state and the detail of each check of the table."""
    table = result.stdout.partition("\n\n")[0].splitlines()
    assert table[0].split() == ["CHECK", "STATE", "DETAIL"]
    cells = [line.split(None, 2) for line in table[1:]]
    return {name: (state, detail) for name, state, detail in cells}


def verdicts(result: subprocess.CompletedProcess[str]) -> list[str]:
    return result.stdout.partition("\n\n")[2].splitlines()


@pytest.fixture
def no_driver(tmp_path: Path) -> dict[str, str]:
    """What a process needs to find no driver, also on a machine that has one: the first that it finds is none."""
    folder = tmp_path / "no driver"
    folder.mkdir()
    (folder / "libcuda.so.1").write_bytes(b"")
    return {"LD_LIBRARY_PATH": str(folder)}


@pytest.fixture
def shadow(tmp_path: Path) -> Any:
    """Return what a process needs to import something else instead of a package: a module with this code."""

    def environment(package: str, code: str) -> dict[str, str]:
        folder = tmp_path / "shadow"
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(code)
        return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}

    return environment


def test_what_is_there_has_its_version() -> None:
    result = run("--device", "cpu", env={"SHAREDNORM_NUM_THREADS": "3"})
    assert result.returncode == 0
    found = rows(result)
    assert found["python"] == (OK, f"{platform.python_version()} ({sys.executable})")
    assert found["sharednorm"] == (OK, sharednorm.__version__)
    for name, distribution in {
        "numpy": "numpy",
        "grpc": "grpcio",
        "protobuf": "protobuf",
        "grpc_health": "grpcio-health-checking",
        "grpc_reflection": "grpcio-reflection",
        "numba": "numba",
        "ml_dtypes": "ml_dtypes",
    }.items():
        assert found[name] == (OK, version(distribution))
    assert found["processors"] == (OK, f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used")
    assert found["arithmetic"] == (OK, "cpu (numba, 3 threads)")
    assert verdicts(result) == ["serve --device cpu: ready"]
    assert "driver" not in found
    assert result.stdout.isascii()


def test_without_a_driver_the_cpu_is_ready_and_the_exit_code_is_about_what_was_asked(no_driver: dict[str, str]) -> None:
    for arguments, code in (((), 0), (("--device", "cpu"), 0), (("--device", "cuda"), 1)):
        result = run(*arguments, env={**no_driver, **NUMPY})
        assert result.returncode == code
        assert "serve --device cpu: ready" in verdicts(result)
    state, detail = rows(result)["driver"]
    assert state == MISSING
    assert "libcuda.so.1 cannot be loaded" in detail
    assert "NVIDIA's driver" in detail
    assert verdicts(result)[1].startswith("serve --device cuda: not possible: driver: libcuda.so.1 cannot be loaded")


def test_json_says_the_same(no_driver: dict[str, str]) -> None:
    found = json.loads(run("--json", env={**no_driver, **NUMPY}).stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["numpy"] == {"name": "numpy", "state": "ok", "text": version("numpy"), "mend": ""}
    assert (checks["driver"]["state"], "NVIDIA's driver" in checks["driver"]["mend"]) == ("missing", True)
    assert found["devices"]["cpu"] == {"ready": True, "reason": ""}
    assert found["devices"]["cuda"]["ready"] is False
    assert found["devices"]["cuda"]["reason"].startswith("driver: ")


BROKEN = [
    pytest.param("numba", "raise ImportError('Numba needs NumPy 1.0')", {}, "arithmetic", "Numba needs NumPy 1.0",
                 id="numba"),
    pytest.param("numba", "import os; os.abort()", {}, "arithmetic", "it crashed (SIGABRT)", id="numba that crashes"),
    pytest.param("grpc_health", "raise ImportError('of another age')", NUMPY, "grpc_health", "of another age",
                 id="health"),
    pytest.param("grpc_reflection", "", NUMPY, "grpc_reflection", "v1alpha", id="reflection"),
]  # fmt: skip


@pytest.mark.parametrize(("package", "code", "env", "check", "why"), BROKEN)
def test_a_package_that_is_there_and_broken(
    package: str, code: str, env: dict[str, str], check: str, why: str, shadow: Any
) -> None:
    environment = {**shadow(package, code), **env}
    result = run("--device", "cpu", env=environment)
    assert result.returncode == 1
    state, detail = rows(result)[check]
    assert (state, why in detail) == (MISSING, True)
    assert rows(result)[package][0] == MISSING
    assert "pip install --force-reinstall" in rows(result)[package][1]
    assert verdicts(result)[0].startswith(f"serve --device cpu: not possible: {check}: ")
    with pytest.raises(AssertionError, match="the server did not start"), server.server_process(env=environment):
        pass


def test_numba_is_not_needed_by_who_computes_with_numpy(shadow: Any) -> None:
    environment = {**shadow("numba", "raise ImportError('broken')"), **NUMPY}
    result = run("--device", "cpu", env=environment)
    assert (result.returncode, rows(result)["numba"][0]) == (0, MISSING)
    assert rows(result)["arithmetic"][1].startswith("cpu (numpy, ")
    with server.server_process(env=environment) as process:
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("variable", "value"), [("SHAREDNORM_ARITHMETIC", "abacus"), ("SHAREDNORM_NUM_THREADS", "none")]
)
def test_settings_that_a_server_would_refuse(variable: str, value: str) -> None:
    result = run("--device", "cpu", env={variable: value})
    state, detail = rows(result)["arithmetic"]
    assert (result.returncode, state, repr(value) in detail) == (1, MISSING, True)


@pytest.mark.parametrize(
    ("package", "state", "command", "ready"),
    [
        ("grpc_health", MISSING, "pip install 'sharednorm[server]'", False),
        ("grpc_reflection", MISSING, "pip install 'sharednorm[server]'", False),
        ("numba", NOTE, "pip install 'sharednorm[fast]'", True),
        ("ml_dtypes", NOTE, "pip install 'sharednorm[bfloat16]'", True),
    ],
)
def test_a_package_that_is_not_installed(
    package: str, state: str, command: str, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHAREDNORM_ARITHMETIC", "numpy")
    monkeypatch.setitem(sys.modules, package, None)
    found = report.examine(cuda=False)
    check = next(check for check in found.checks if check.name == package)
    assert (check.state, check.mend) == (state, command)
    assert (found.verdicts["cpu"] == "") == ready


def test_pycuda_that_is_not_installed_and_what_its_build_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_driver: dict[str, str]
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", no_driver["LD_LIBRARY_PATH"])
    monkeypatch.setitem(sys.modules, "pycuda", None)
    for compiler, there in ((None, ["nvcc", "g++"]), (tmp_path / "bin" / "nvcc", ["g++"])):
        monkeypatch.setattr(gpus, "nvcc", lambda found=compiler: found)
        monkeypatch.setenv("PATH", str(tmp_path))
        (tmp_path / "include").mkdir(exist_ok=True)
        (tmp_path / "include" / "cuda.h").write_text("")
        check = next(check for check in gpus.examine().common if check.name == "pycuda")
        assert check.state == MISSING
        assert check.mend.startswith("`pip install 'sharednorm[cuda]'`, which compiles it; for that, first ")
        assert [word for word in ("nvcc", "g++") if word in check.mend] == there


@pytest.mark.parametrize(
    ("inside", "words"), [(True, "nvidia-container-toolkit"), (False, "apt-get install nvidia-driver")]
)
def test_a_missing_driver_in_a_container_and_outside(
    inside: bool, words: str, monkeypatch: pytest.MonkeyPatch, no_driver: dict[str, str]
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", no_driver["LD_LIBRARY_PATH"])
    monkeypatch.setattr(gpus, "_in_container", lambda: inside)
    driver = gpus.examine().common[0]
    assert (driver.name, driver.state, words in driver.mend) == ("driver", MISSING, True)


def test_the_fatbin(tmp_path: Path, no_driver: dict[str, str]) -> None:
    path = tmp_path / "层.fatbin"
    environment = {**no_driver, **NUMPY, files.ELSEWHERE: str(path), "PYTHONIOENCODING": "utf-8"}
    state, detail = rows(run(env=environment))["kernels"]
    assert (state, f"{path}, which is not a file" in detail, "make kernels" in detail) == (MISSING, True, True)
    path.write_bytes(bytes(3 << 20))
    assert rows(run(env=environment))["kernels"] == (OK, f"{path}, 3 MiB")


@pytest.mark.parametrize(
    ("major", "code"),
    [(5, ""), (7, ""), (8, "machine code for sm_80"), (9, "machine code for sm_90"),
     (10, "PTX, which the driver compiles"), (12, "PTX, which the driver compiles")],
)  # fmt: skip
def test_which_code_a_gpu_runs(major: int, code: str) -> None:
    assert gpus.code_for(major) == code


def test_server_and_device_do_not_go_together() -> None:
    result = server.run(["doctor", "--server", "127.0.0.1:1", "--device", "cuda"])
    assert (result.returncode, result.stdout) == (1, "")
    assert "expected: one of the two" in result.stderr
    assert server.run(["doctor", "--device", "tpu"]).returncode == 2


# --- Processes of their own -----------------------------------------------------------------------------


def soon() -> float:
    return time.monotonic() + 30.0


def test_a_child_imports_what_this_process_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "numpy.py").write_text("raise RuntimeError('from the working directory')")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Child("package('numpy', 'numpy')").outcome(soon()).fact("version") == version("numpy")
    (tmp_path / "only_there.py").write_text("print('noise')")
    outcome = Child("package('only_there', 'only-there')").outcome(soon())
    assert (outcome.failure, outcome.fact("version"), outcome.fact("else")) == ("", "of unknown version", None)


def test_a_child_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "crashes.py").write_text(
        "import os; print('{\"version\": \"1\"}'); print('{\"half', end='', flush=True); os.kill(os.getpid(), 11)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome = Child("package('crashes', 'crashes')").outcome(soon())
    assert (outcome.failure, outcome.facts) == ("it crashed (SIGSEGV)", ({"version": "1"},))


def test_a_child_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hangs.py").write_text(
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: 0); time.sleep(99)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    began = time.monotonic()
    assert "took too long" in Child("package('hangs', 'hangs')").outcome(began + 0.5).failure
    assert time.monotonic() - began < 5


def test_all_imports_together_take_no_longer_than_they_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba.py").write_text("import time; time.sleep(99)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(machine, "SECONDS", 4.0)
    began = time.monotonic()
    found = {check.name: check for check in machine.examine().checks}
    assert time.monotonic() - began < 20
    assert "took too long" in found["numba"].text
    assert (found["arithmetic"].state, "took too long" in found["arithmetic"].text) == (MISSING, True)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (150_110_011_392, "139.8 GiB")]
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


def test_a_check_is_one_line() -> None:
    assert Check("a", MISSING, "first\nsecond", "do\tit").detail == "first second: do it"
