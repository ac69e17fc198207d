"""`sharednorm bench`: what it measures and prints, and that it leaves nothing behind."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharednorm
from sharednorm import Progress
from sharednorm_server.cli.bench import _Bar, _shape
from tests.support.processes import server


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server.in_process() as running:
        yield running.address


def test_a_table(address: str) -> None:
    result = server.run(["bench", "--server", address, "--sizes", "8KiB,2MiB", "--seconds", "0.05"])
    assert (result.returncode, result.stderr) == (0, "")  # no bar where nobody looks
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{address}, device cpu (")
    assert lines[0].endswith("tensors by direct")
    assert lines[2].split() == ["TENSOR", "MB", "CALL", "P50", "MS", "P90", "MS", "MB/S"]
    assert [line.split()[2] for line in lines[3:]] == ["train", "backward", "eval"] * 2
    assert all(float(cell) > 0 for line in lines[3:] for cell in line.split()[3:])
    with sharednorm.connect(address) as hub:
        assert hub.layers() == []


@pytest.mark.parametrize("transport", ["direct", "grpc"])
def test_json(address: str, transport: str) -> None:
    arguments = ("--sizes", "8KiB", "--seconds", "0.05", "--transport", transport, "--json")
    found = json.loads(server.run(["bench", "--server", address, *arguments]).stdout)
    assert (found["server"], found["transport"]) == (address, transport)
    assert [call["call"] for call in found["calls"]] == ["train", "backward", "eval"]
    for call in found["calls"]:
        assert (call["shape"], call["bytes"]) == ([2, 64, 4, 4], 8192)
        assert 0 < call["p50_ms"] <= call["p90_ms"]
        assert call["mb_per_s"] == pytest.approx(2 * 8192 / 1e3 / call["p50_ms"], rel=0.01)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot(address: str, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"bench.{suffix}"
    words = ["bench", "--server", address, "--sizes", "8KiB,1MiB", "--seconds", "0.05", "--plot", str(file)]
    result = server.run(words)
    assert (result.returncode, result.stderr) == (0, "")
    assert file.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])
    if suffix == "svg":
        for call in ("train", "backward", "eval"):
            assert f">{call}<" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sizes", "large"), "'large' is not a size"),
        (("--transport", "shm"), "shares no memory there"),
        (("--transport", "ftp"), "transport is 'ftp'"),
    ],
)
def test_what_cannot_be_measured(address: str, arguments: tuple[str, ...], words: str) -> None:
    result = server.run(["bench", "--server", address, *arguments])
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sharednorm_server.cli.bench._SOON_SECONDS", 0.0)
    bar = _Bar()
    bar._bar.mininterval = 0.0
    bar.begin("train 2x3")
    for done in (25, 50, 100):
        bar.tell(Progress("Forward", done, 100, 0, 100))
        bar.tell(Progress("Forward", 100, 100, done, 100))
    bar.close()
    shown = terminal.getvalue()
    assert "train 2x3:" in shown
    assert all(part in shown for part in ("12%", "50%|", "100/200"))
    assert shown.endswith("\r")  # and it is gone


@pytest.mark.parametrize("nbytes", [1, 8192, 1 << 20, 24 << 20, 1 << 30])
def test_tensors_of_about_that_size(nbytes: int) -> None:
    samples, maps, height, width = _shape(nbytes)
    size = 4 * samples * maps * height * width
    assert samples * height * width >= 2
    assert nbytes < 4096 or 0.7 * nbytes <= size <= 1.4 * nbytes
