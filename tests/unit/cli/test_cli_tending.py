"""`sharednorm watch`, `delete`, `completion`, `stats --plot`, and `--json` of the commands that print."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm_server.config.options import OPTIONS, ServerConfig
from sharednorm_server.server import RunningServer
from tests.support.oracle import random_tensor
from tests.support.processes.commands import done, refused
from tests.support.processes.server import in_process

SHAPE = (4, 3, 5, 2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with in_process(ServerConfig(state=f"sqlite://{tmp_path}/state")) as running:
        yield running


@pytest.fixture
def hub(server: RunningServer) -> Iterator[sharednorm.Hub]:
    with sharednorm.connect(server.address) as made:
        for name in ("a", "b"):
            made.BatchNorm2D(3, name=name)(random_tensor(1, SHAPE))
        yield made


def test_watching(server: RunningServer, hub: sharednorm.Hub) -> None:
    layer, stopping = hub.layer("b"), threading.Event()

    def train() -> None:
        while not stopping.is_set():
            layer(random_tensor(1, SHAPE))
            time.sleep(0.002)

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        text = done(server, "watch", "--interval", "0.5", "--count", "2")
        told = done(server, "watch", "--interval", "0.5", "--count", "2", "--json")
    finally:
        stopping.set()
        trainer.join()
    lines = text.splitlines()
    assert len(lines) == 8
    assert lines[0].split() == ["NAME", "KIND", "MAPS", "MODE", "STEPS", "NUMOFPROPS", "DOMAINS", "STEPS/S"]
    assert lines[3] == "2 layers, 0.0 steps a second"
    assert lines[5].startswith("b ")  # the busiest first
    assert float(lines[5].split()[-1]) > 1
    assert lines[6].split()[-1] == "0.0"
    assert "\x1b" not in text  # nobody's terminal
    first, second = map(json.loads, told.splitlines())
    assert [each["steps_per_second"] for each in first] == [None, None]
    found = {each["name"]: each for each in second}
    assert found["a"]["steps_per_second"] == 0.0
    assert found["b"]["steps_per_second"] > 1
    assert found["b"]["kind"] == "BatchNorm2D"


def test_watching_some_of_many(server: RunningServer, hub: sharednorm.Hub) -> None:
    assert "(1 not shown)" in done(server, "watch", "--rows", "1", "--count", "1")
    assert "expected: 0.1 to 3600 seconds" in refused(server, "watch", "--interval", "0", "--count", "1")


def test_deleting(server: RunningServer, hub: sharednorm.Hub) -> None:
    assert "there is no layer 'c' in 'default'; nothing has been deleted" in refused(
        server, "delete", "a", "c", "--yes"
    )
    assert "(expected: --yes)" in refused(server, "delete", "a")
    assert len(hub.layers()) == 2
    assert done(server, "delete", "a", "--yes") == "deleted: a\n"
    assert json.loads(done(server, "delete", "b", "--yes", "--json")) == {"deleted": ["b"]}
    assert hub.layers() == []


@pytest.mark.parametrize(("answer", "left"), [(b"y\n", 1), (b"n\n", 2), (b"\n", 2), (b"\x04", 2)])
def test_deleting_asks_first(server: RunningServer, hub: sharednorm.Hub, answer: bytes, left: int) -> None:
    ours, theirs = pty.openpty()
    try:
        words = [sys.executable, "-m", "sharednorm_server", "delete", "a", "--server", server.address]
        with subprocess.Popen(words, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as process:
            asked = b""
            while b"[y/N]" not in asked:
                assert select.select([ours], [], [], 30)[0], asked
                asked += os.read(ours, 1000)
            assert b"Delete a (1 steps), for everybody?" in asked
            os.write(ours, answer)
            assert process.wait(30) == (0 if left == 1 else 1)
        assert len(hub.layers()) == left
    finally:
        os.close(ours)
        os.close(theirs)


def test_json(server: RunningServer, hub: sharednorm.Hub) -> None:
    listed = json.loads(done(server, "ls", "--json"))
    assert listed[0] == {
        "name": "a", "kind": "BatchNorm2D", "maps": 3, "train": True, "initialized": True, "frozen": False,
        "version": 1, "numOfProps": 1, "domains": 0,
    }  # fmt: skip
    layer = hub.layer("a")
    stats = json.loads(done(server, "stats", "a", "--json"))
    for name in ("scale", "bias", "mean", "var"):
        np.testing.assert_array_equal(np.float32(stats[name]), getattr(layer, name).ravel())
    assert (stats["name"], stats["version"], stats["epsilon"]) == ("a", 1, 1e-5)
    (snapshot,) = json.loads(done(server, "snapshots", "a", "--json"))
    assert snapshot["version"] == 1
    assert json.loads(done(server, "rollback", "a", "--to-version", "1", "--json")) == {
        "name": "a", "version": 1, "before": 1
    }  # fmt: skip
    assert Path(json.loads(done(server, "backup", "--json"))["path"]).is_file()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_plot(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"plot.{suffix}"
    assert "MAP" in done(server, "stats", "a", "--plot", str(file))
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert file.read_bytes().startswith(begin)
    assert "is of no kind that can be drawn" in refused(server, "stats", "a", "--plot", str(tmp_path / "x.doc"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str) -> None:
    words = [sys.executable, "-m", "sharednorm_server", "completion", shell]
    script = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    for word in ("watch", "export", "rollback", "serve"):
        assert word in script
    if shell == "bash":
        for name in OPTIONS:
            assert f"--{name.replace('_', '-')}" in script
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
