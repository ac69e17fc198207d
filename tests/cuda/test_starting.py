"""`sharednorm serve --device cuda`: several GPUs, and every way in which it cannot start, each in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import sharednorm
from sharednorm_server.device.base import Device
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import LayerKey
from tests.support import oracle
from tests.support.kernels import cuda
from tests.support.processes.server import run, server_process

EMULATED = pytest.mark.skipif(cuda.REAL, reason="the GPUs are the emulated driver's: they need PyCUDA on it")


@EMULATED
def test_layers_are_spread_over_several_gpus() -> None:
    env = {**cuda.environment(), "SHAREDNORM_EMULATED_DEVICES": "2"}
    with server_process("--device", "cuda:0,cuda:1", env=env) as server, sharednorm.connect(server.address) as hub:
        assert "device cuda:0 (Emulated H200), cuda:1 (Emulated H200), state" in server.banner
        x = oracle.random_tensor(1, (4, 3, 5, 5))
        _, mean, _ = oracle.batch_moments(x)
        layers = [hub.BatchNorm2D(3, name=f"bn/{number}") for number in range(12)]
        for bn in layers:
            out = bn(x)
            bn.backward(out)
            assert abs(bn.mean.ravel() - mean).max() < 1e-5
        assert server.stop() == 0, server.log()


@EMULATED
def test_the_second_gpu_alone() -> None:
    env = {**cuda.environment(), "SHAREDNORM_EMULATED_DEVICES": "2"}
    with server_process("--device", "cuda:1", env=env) as server:
        assert "device cuda:1 (Emulated H200), state" in server.banner
        assert server.stop() == 0, server.log()


def test_a_name_has_one_place() -> None:
    class Named:
        """Stands for a device: nothing of it is used but which it is."""

    devices: list[Device] = [Named(), Named(), Named()]  # type: ignore[list-item]
    one, other = Placement(*devices), Placement(*devices)
    keys = [LayerKey("default", f"layer/{number}") for number in range(300)]
    places = [one.of(key) for key in keys]
    assert places == [other.of(key) for key in keys]
    assert all(60 < places.count(device) < 140 for device in devices)
    assert one.of(LayerKey("default", "stem/bn")) is devices[1]  # 4170348916 % 3: also in another process


@EMULATED
@pytest.mark.parametrize(
    ("device", "settings", "message"),
    [
        ("cuda", {"SHAREDNORM_EMULATED_DEVICES": "0"}, "there is no GPU that can be used: "),
        ("cuda:1", {}, "there is no cuda:1 (available: cuda:0 (Emulated H200))"),
        ("cuda:0,cuda:1", {}, "there is no cuda:1 (available: cuda:0 (Emulated H200))"),
        (
            "cuda",
            {"SHAREDNORM_EMULATED_DEVICE": "capability=7.0"},
            "has compute capability 7.0 (expected: 8.0 or later): pass another --device",
        ),
        ("cuda", {"SHAREDNORM_FATBIN": "/nowhere"}, "SHAREDNORM_FATBIN names /nowhere, which is not a file"),
        ("cuda", {"SHAREDNORM_FATBIN": os.devnull}, "SHAREDNORM_FATBIN names /dev/null, which is not a file"),
        ("cuda", {"SHAREDNORM_FATBIN": __file__}, "cuda:0 (Emulated H200) cannot be used: "),
        ("cuda", {"SHAREDNORM_EMULATED_FAIL": "lost:1"}, "there is no GPU that can be used: "),
        ("cuda", {"SHAREDNORM_EMULATED_FAIL": "launch:1"}, "cuda:0 (Emulated H200) cannot be used: "),
        ("cuda", {"SHAREDNORM_EMULATED_FAIL": "fault:1"}, "cuda:0 (Emulated H200) cannot be used: "),
        ("cuda", {"SHAREDNORM_EMULATED_FAIL": "allocation:1+"}, "cuda:0 (Emulated H200) cannot be used: "),
    ],
)
def test_a_gpu_that_cannot_be_used(device: str, settings: dict[str, str], message: str) -> None:
    env = {**cuda.environment(), "SHAREDNORM_EMULATED_LEAKS": "ignore", **settings}
    done = run(["serve", "--listen", "127.0.0.1:0", "--device", device], env)
    assert (done.returncode, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sharednorm: "), done.stderr
    assert message in last


@EMULATED
def test_without_nvidias_driver() -> None:
    done = run(["serve", "--listen", "127.0.0.1:0", "--device", "cuda"])
    assert done.returncode == 2
    assert "sharednorm: --device cuda needs NVIDIA's driver: libcuda.so.1: cannot open shared object" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_pycuda(tmp_path: Path) -> None:
    # A module of that name that says it is not there is what Python finds where PyCUDA is not installed.
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pycuda'\", name='pycuda')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(["serve", "--listen", "127.0.0.1:0", "--device", "cuda"], {"PYTHONPATH": path})
    assert done.returncode == 2
    assert done.stderr == (
        "sharednorm: --device cuda needs PyCUDA: pip install 'sharednorm[cuda]', which needs the CUDA toolkit\n"
    )


def test_memory_that_is_set(device: Device) -> None:
    env = cuda.environment()
    with server_process("--device", "cuda", "--device-memory-bytes", "1MiB", env=env) as server:
        with sharednorm.connect(server.address) as hub:
            bn = hub.BatchNorm2D(3, name="bn")
            bn(oracle.random_tensor(1, (4, 3, 5, 5)))
            with pytest.raises(sharednorm.DeviceOutOfMemory):
                bn(oracle.random_tensor(1, (40, 3, 55, 55)))
            assert bn.numOfProps == 1
        assert server.stop() == 0, server.log()
