"""The example in C++, built from the contract alone, against a real server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import sharednorm
from tests.support.processes.make import make
from tests.support.processes.programs import program
from tests.support.processes.server import server_process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for each in ("protoc", "grpc_cpp_plugin", "pkg-config", "g++"):
        program(each)
    build = tmp_path_factory.mktemp("cpp")
    made = make("-C", "examples/cpp", "-j2", f"BUILD={build}", seconds=300)
    assert made.returncode == 0, made.stderr
    return build / "client"


def run(client: Path, address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([client, address], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_the_example_prints_what_the_document_says(client: Path) -> None:
    with server_process("--compute-threads", "2") as server:
        done = run(client, server.address)
        assert (done.returncode, done.stderr) == (0, "")
        shown = re.search(r"of the first time,\n\n```\n(.*?)```", (ROOT / "docs/protocol.md").read_text(), re.DOTALL)
        assert shown is not None
        rounding = re.compile(r"at most \S+ from")  # of the machine
        assert rounding.sub("at most ~ from", done.stdout) == rounding.sub("at most ~ from", shown[1])
        again = run(client, server.address)
        assert again.returncode == 0
        assert "the step made version 2 of the layer" in again.stdout
        with sharednorm.connect(server.address) as hub:
            assert hub.layer("example/cpp").numOfProps == 2


@pytest.mark.slow
def test_the_example_tells_the_reason_of_an_error(client: Path) -> None:
    with server_process() as server:
        with sharednorm.connect(server.address) as hub:
            hub.BatchNorm2D(4, name="example/cpp")
        failed = run(client, server.address)
        assert failed.returncode == 1
        assert failed.stderr.startswith("CreateLayer: CONFIGURATION_MISMATCH ")
