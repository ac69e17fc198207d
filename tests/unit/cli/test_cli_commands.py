"""`sharednorm ls` and `sharednorm stats`: what they show of a server, and how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from tests.support import oracle
from tests.support.processes import server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Run a server with layers of three kinds."""
    with server.in_process() as running, sharednorm.connect(running.address) as hub:
        bn = hub.BatchNorm2D(3, name="stem/bn", sscale=0.0)
        for seed in range(4):
            bn(oracle.random_tensor(seed, (4, 3, 5, 2)))
        bn.inDomain("site\u202e"), bn.inDomain("A")
        hub.BatchNorm(12, name="head\u202ebn", empty=True)
        hub.BatchNorm3D(2, name="層", affine=False, nonfinite="allow")
        hub.set_train("層", False)
        with sharednorm.connect(running.address, namespace="other") as other:
            other.BatchNorm1D(1, name="alone")
        yield running.address


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = server.run(arguments, env={"PYTHONIOENCODING": "utf-8", **(env or {})})
    assert "Traceback" not in result.stdout + result.stderr
    return result


def test_ls(address: str) -> None:
    result = run("ls", "--server", address)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "NAME          KIND         MAPS  MODE   STEPS  NUMOFPROPS  DOMAINS",
        "head\\u202ebn  BatchNorm    12    empty  0      0           0",
        "stem/bn       BatchNorm2D  3     train  4      4           2",
        "層             BatchNorm3D  2     eval   0      0           0",
    ]


def test_ls_of_another_namespace(address: str) -> None:
    assert "alone  BatchNorm1D  1     train" in run("ls", "--server", address, "--namespace", "other").stdout


def test_ls_of_nothing(address: str) -> None:
    result = run("ls", "--server", address, "--namespace", "empty")
    assert result.stdout.splitlines() == ["NAME  KIND  MAPS  MODE  STEPS  NUMOFPROPS  DOMAINS"]


def test_ls_where_the_terminal_cannot_show_a_name(address: str) -> None:
    result = run("ls", "--server", address, env={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0
    assert "\\u5c64" in result.stdout


def test_stats(address: str) -> None:
    result = run("stats", "stem/bn", "--server", address, "--maps", "2")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"layer          stem/bn of namespace default on {address}"
    assert lines[1] == "domain         none: its own statistics (it has: A, site\\u202e)"
    assert "mode           train" in lines
    assert "steps          4, 4 of them in the running statistics (numOfProps)" in lines
    assert "averaging      standard, f = max(1 / n, 0.1)" in lines
    model = oracle.Model(3)
    for seed in range(4):
        model.train(oracle.random_tensor(seed, (4, 3, 5, 2)))
    mean = next(line for line in lines if line.startswith("mean ")).split()[1:]
    np.testing.assert_allclose(
        np.array(mean, float), [model.mean.min(), model.mean.mean(), model.mean.max()], rtol=1e-5
    )
    assert "MAP  SCALE  BIAS" in result.stdout
    first = next(line for line in lines if line.startswith("0 ")).split()
    np.testing.assert_allclose(np.array(first[3:], float), [model.mean[0], model.var[0]], rtol=1e-5)
    assert lines[-1] == "(1 more; --maps 3 shows all)"


def test_stats_of_a_domain(address: str) -> None:
    lines = run("stats", "stem/bn", "--server", address, "--domain", "A").stdout.splitlines()
    assert lines[1] == "domain         A (it has: A, site\\u202e)"
    assert "steps          4, 0 of them in the running statistics (numOfProps)" in lines
    result = run("stats", "stem/bn", "--server", address, "--domain", "B")
    assert result.returncode == 1
    assert "has no domain 'B'" in result.stderr


def test_stats_of_an_empty_layer_and_of_one_that_is_not_affine(address: str) -> None:
    assert "mode           empty: waits for its state" in run("stats", "head\u202ebn", "--server", address).stdout
    text = run("stats", "層", "--server", address, "--maps", "0").stdout
    assert "affine         no: scale 1 and bias 0, fixed" in text
    assert "NaN, infinity  allowed" in text
    assert "MAP" not in text


def test_an_unknown_layer(address: str) -> None:
    result = run("stats", "nobody", "--server", address)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("sharednorm: layer 'nobody' of namespace 'default' does not exist")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("ls",), ("stats", "a")])
def test_no_server(command: tuple[str, ...]) -> None:
    result = run(*command, "--server", "127.0.0.1:1", "--timeout", "5")
    assert (result.returncode, result.stdout) == (1, "")
    assert "sharednorm serve" in result.stderr


def test_a_bad_address() -> None:
    result = run("ls", "--server", "nonsense")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough(address: str, unbuffered: str) -> None:
    """As with `sharednorm ls | head`: the reader goes before the writer has written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sharednorm_server", "ls", "--server", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait(60) == 1


def test_snapshots_rollback_and_backup(tmp_path: Path) -> None:
    options = ("--state", f"sqlite://{tmp_path}/state", "--snapshot-interval", "0.001")
    with server.server_process(*options) as running, sharednorm.connect(running.address) as hub:
        bn = hub.BatchNorm2D(3, name="bn")
        for seed in range(3):
            bn(oracle.random_tensor(seed, (4, 3, 5, 2)))
            time.sleep(0.01)
        told = run("snapshots", "bn", "--server", running.address).stdout.splitlines()
        assert told[0].split() == ["VERSION", "NUMOFPROPS", "TAKEN"]
        assert [line.split()[:2] for line in told[1:]] == [["1", "1"], ["2", "2"], ["3", "3"]]
        assert told[1].endswith(" UTC")
        assert [info.version for info in hub.snapshots("bn")] == [1, 2, 3]
        assert abs((hub.snapshots("bn")[0].taken - datetime.now(timezone.utc)).total_seconds()) < 300
        result = run("rollback", "bn", "--to-version", "2", "--server", running.address)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == "bn is as it was at version 2; what it was is version 3\n"
        assert (bn.numOfProps, bn.version) == (2, 3)
        result = run("rollback", "bn", "--to-version", "9", "--server", running.address)
        assert result.returncode == 1
        assert "no snapshot of version 9 (expected: one of 1, 2, 3)" in result.stderr
        for wrong in (-1, 1.5, "2"):
            with pytest.raises(sharednorm.InvalidConfiguration, match="version is"):
                hub.rollback("bn", wrong)  # type: ignore[arg-type]
        path = Path(run("backup", "--server", running.address).stdout.strip())
        assert path.parent == tmp_path / "state" / "backups"
        assert path.stat().st_size > 0


def test_backup_of_a_server_that_keeps_nothing(address: str) -> None:
    result = run("backup", "--server", address)
    assert result.returncode == 1
    assert "the state is memory:, of which there is no copy" in result.stderr
