"""`sharednorm doctor` with a driver: the emulated one, and drivers that break in ways of their own."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from sharednorm_server.doctor import gpus
from sharednorm_server.doctor.checks import MISSING, OK
from sharednorm_server.doctor.probe import LEAST_CAPABILITY
from tests.emulation.build import driver
from tests.emulation.load import load
from tests.support.kernels.kernel_image import NEEDED, can_compile, compiled_image
from tests.support.processes import server

pytestmark = pytest.mark.skipif(not can_compile(), reason=NEEDED)

READY = "serve --device cuda: ready"


def environment(folder: Path | None = None, **settings: str) -> dict[str, str]:
    """Return what a process needs to find the driver of a folder, the emulated one by default, and kernels for it."""
    paths = [str(folder or driver().parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(paths),
        "SHAREDNORM_FATBIN": str(compiled_image()),
        "SHAREDNORM_EMULATED_LEAKS": "fail",
        "SHAREDNORM_ARITHMETIC": "numpy",
        **settings,
    }


def doctor(env: dict[str, str]) -> tuple[int, dict[str, tuple[str, str]], list[str]]:
    """Run `sharednorm doctor --device cuda`; return its code, the checks, and the verdicts about GPUs."""
    result = server.run(["doctor", "--device", "cuda"], env=env)
    assert (result.stderr, "serve --device cpu: ready" in result.stdout) == ("", True)
    table, _, verdicts = result.stdout.partition("\n\n")
    cells = [line.split(None, 2) for line in table.splitlines()[1:]]
    return result.returncode, {name: (state, text) for name, state, text in cells}, verdicts.splitlines()[1:]


def test_a_gpu_that_is_ready() -> None:
    code, found, verdicts = doctor(environment(SHAREDNORM_EMULATED_DEVICE=f"memory={3 << 30}"))
    assert (code, verdicts) == (0, [READY])
    assert found["driver"] == (OK, "supports CUDA 13.0, 1 GPU")
    assert found["pycuda"][0] == OK
    assert found["kernels"][1].startswith(f"{compiled_image()}, ")
    assert found["cuda:0"] == (
        OK,
        "Emulated H200, compute capability 9.0, 3 GiB, 3 GiB free, has loaded the kernels (machine code for sm_90)",
    )


@pytest.mark.parametrize(("capability", "code"), [("8.0", "sm_80"), ("8.9", "sm_80"), ("12.0", "PTX")])
def test_gpus_of_other_capabilities(capability: str, code: str) -> None:
    exit_code, found, _ = doctor(environment(SHAREDNORM_EMULATED_DEVICE=f"capability={capability}"))
    assert (exit_code, found["cuda:0"][0]) == (0, OK)
    assert f"compute capability {capability}, " in found["cuda:0"][1]
    assert code in found["cuda:0"][1]


def test_a_gpu_that_is_too_old() -> None:
    code, found, verdicts = doctor(environment(SHAREDNORM_EMULATED_DEVICE="capability=7.0"))
    assert (code, found["cuda:0"][0], found["driver"][0]) == (1, MISSING, OK)
    assert "the kernels need 8.0 or later" in found["cuda:0"][1]
    assert verdicts[0].startswith("serve --device cuda: not possible: cuda:0: Emulated device of capability 7.0")


def test_several_gpus_have_a_verdict_each() -> None:
    code, found, verdicts = doctor(environment(SHAREDNORM_EMULATED_DEVICES="3"))
    assert (code, found["driver"][1]) == (0, "supports CUDA 13.0, 3 GPUs")
    assert verdicts == [READY, "serve --device cuda:1: ready", "serve --device cuda:2: ready"]


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    code, found, verdicts = doctor(environment(SHAREDNORM_EMULATED_DEVICES="0", CUDA_VISIBLE_DEVICES=""))
    assert (code, found["driver"][0], "cuda:0" in found) == (1, MISSING, False)
    assert "CUDA_ERROR_NO_DEVICE" in found["driver"][1]
    assert "`unset CUDA_VISIBLE_DEVICES`" in found["driver"][1]
    assert verdicts[0].startswith("serve --device cuda: not possible: driver: ")
    for name, value in environment(SHAREDNORM_EMULATED_DEVICES="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for inside, words in ((True, "--gpus all"), (False, "put an NVIDIA GPU in this machine")):
        monkeypatch.setattr(gpus, "_in_container", lambda inside=inside: inside)
        assert words in gpus.examine().common[0].mend


def test_without_kernels_a_gpu_is_not_ready(tmp_path: Path) -> None:
    code, found, verdicts = doctor(environment(SHAREDNORM_FATBIN=str(tmp_path / "none")))
    assert (code, found["kernels"][0], found["cuda:0"][0]) == (1, MISSING, OK)
    assert "would run machine code for sm_90" in found["cuda:0"][1]
    assert verdicts[0].startswith("serve --device cuda: not possible: kernels: SHAREDNORM_FATBIN names ")


def test_kernels_that_the_gpu_does_not_take(tmp_path: Path) -> None:
    (tmp_path / "other.fatbin").write_bytes(b"\x50\xed\x55\xba" + bytes(60))
    code, found, verdicts = doctor(environment(SHAREDNORM_FATBIN=str(tmp_path / "other.fatbin")))
    assert (code, found["kernels"][0], found["cuda:0"][0]) == (1, OK, MISSING)
    assert (
        "the kernels cannot be loaded (cuModuleLoadData: error 209, CUDA_ERROR_NO_BINARY_FOR_GPU" in found["cuda:0"][1]
    )
    assert "make kernels" in found["cuda:0"][1]
    assert "not possible: cuda:0: " in verdicts[0]


def test_a_gpu_that_is_lost_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    missing = []
    for call in range(1, 40):
        monkeypatch.setenv("SHAREDNORM_EMULATED_FAIL", f"lost:{call}")
        found = gpus.examine()
        missing.append([check.name for check in (*found.common, *found.each) if check.state == MISSING])
        if not missing[-1]:
            break
    # Each call was the one from which on the GPU was lost, until there were no more calls.
    assert [names for names in missing if names not in (["driver"], ["cuda:0"])] == [[]]
    assert missing[-1] == []
    assert missing.index(["cuda:0"]) > 3
    assert missing.count(["cuda:0"]) >= 5


def test_pycuda_that_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").write_text("raise ImportError('of another NumPy')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, found, verdicts = doctor(environment(PYTHONPATH=paths))
    assert (code, found["driver"][0], found["cuda:0"][0], found["pycuda"][0]) == (1, OK, OK, MISSING)
    assert "pip install --force-reinstall" in found["pycuda"][1]
    assert verdicts[0].startswith("serve --device cuda: not possible: pycuda: ")
    assert "of another NumPy" in verdicts[0]


@pytest.mark.parametrize(
    ("settings", "device", "expected"),
    [
        pytest.param({}, "cuda", True, id="ready"),
        pytest.param({"SHAREDNORM_EMULATED_DEVICES": "2"}, "cuda:1", True, id="the second"),
        pytest.param({"SHAREDNORM_EMULATED_DEVICE": "capability=7.0"}, "cuda", False, id="too old"),
        pytest.param({"SHAREDNORM_EMULATED_DEVICES": "0"}, "cuda", False, id="no GPU"),
        pytest.param({"SHAREDNORM_FATBIN": "/nowhere"}, "cuda", False, id="no kernels"),
        pytest.param({"SHAREDNORM_FATBIN": __file__}, "cuda", False, id="other kernels"),
        pytest.param({"SHAREDNORM_EMULATED_FAIL": "lost:1"}, "cuda", False, id="a GPU that fails"),
    ],
)
def test_a_verdict_is_what_a_server_then_does(settings: dict[str, str], device: str, expected: bool) -> None:
    env = {**environment(), **settings}
    assert (f"serve --device {device}: ready" in doctor(env)[2]) == expected
    if expected:
        with server.server_process("--device", device, env=env) as process:
            assert server.run(["doctor", "--server", process.address], env=env).returncode == 0
            assert process.stop() == 0
    else:
        result = server.run(["serve", "--device", device, "--listen", "127.0.0.1:0"], env=env)
        assert (result.returncode, result.stdout) == (2, "")


def test_the_oldest_gpu_is_the_same_for_the_server() -> None:
    load()
    from sharednorm_server.device.cuda import device

    assert device.LEAST_CAPABILITY == LEAST_CAPABILITY


# --- Drivers that break ---------------------------------------------------------------------------------


def broken(folder: Path, init: str, version: int = 13000) -> dict[str, str]:
    """Compile a driver that tells its version, and then does what its cuInit does; return what a process needs."""
    source = folder / "driver.cpp"
    source.write_text(
        "#include <unistd.h>\n#include <cstdlib>\n"
        f'extern "C" int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n'
        f'extern "C" int cuInit(unsigned) {{ {init} }}\n'
        'extern "C" int cuGetErrorName(int, const char **name) { *name = "CUDA_ERROR_OF_A_KIND"; return 0; }\n'
        'extern "C" int cuGetErrorString(int, const char **) { return 1; }\n'
    )
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True, timeout=60)
    return environment(folder)


@pytest.mark.parametrize(
    ("init", "text"),
    [
        pytest.param("abort();", "does not list the GPUs (it crashed (SIGABRT))", id="crashes"),
        pytest.param("_exit(7);", "does not list the GPUs (it ended with status 7)", id="exits"),
        pytest.param("return 803;", "cuInit: error 803, CUDA_ERROR_OF_A_KIND: the driver was updated", id="updated"),
        pytest.param("return 34;", "take its folder `stubs` out of LD_LIBRARY_PATH", id="the toolkit's stub"),
        pytest.param("return 999;", "see whether `nvidia-smi` works", id="unknown"),
        pytest.param("return 0;", "the driver has no cuDeviceGetCount", id="lacks a function"),
    ],
)
def test_a_driver_that_breaks(init: str, text: str, tmp_path: Path) -> None:
    code, found, verdicts = doctor(broken(tmp_path, init))
    assert (code, found["driver"][0]) == (1, MISSING)
    assert found["driver"][1].startswith("supports CUDA 13.0, but ")
    assert text in found["driver"][1]
    assert verdicts[0].startswith("serve --device cuda: not possible: driver: supports CUDA 13.0, but ")


def test_a_driver_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in broken(tmp_path, "for (;;) pause();", version=12040).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpus, "SECONDS", 2.0)
    began = time.monotonic()
    check = gpus.examine().common[0]
    assert time.monotonic() - began < 10
    assert check.state == MISSING
    assert check.text == "supports CUDA 12.4, but does not list the GPUs (it took too long, and was ended)"
