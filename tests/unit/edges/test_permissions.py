"""A permission that lacks is told as such, and not as a file that is not there.

`Path.exists`, `is_file`, `is_dir` and their kin raise PermissionError until Python 3.13, and answer False since 3.14.
Each test runs with both, and the last one keeps such questions out.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import sharednorm
from sharednorm_kernels import FatbinMissing, fatbin
from sharednorm_kernels import files as kernel_files
from sharednorm_server.cli.main import main
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.doctor import gpus
from sharednorm_server.errors import StartError
from sharednorm_server.server import RunningServer, start
from tests.support.oracle import random_tensor
from tests.support.processes.rights import modes_obeyed
from tests.support.processes.server import in_process

SOURCES = [
    path for folder in ("client", "server", "kernels") for path in (Path(__file__).parents[3] / folder).rglob("*.py")
]
QUESTIONS = {"exists", "is_file", "is_dir", "is_socket", "is_fifo", "is_symlink", "is_mount", "is_block_device",
             "is_char_device", "isfile", "isdir"}  # fmt: skip


@pytest.fixture(params=["3.13", "3.14"], autouse=True)
def pathlib_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have pathlib's questions answered as one release or the other answers them."""

    def raising(question: str) -> None:
        ask = getattr(os.path, question)

        def answer(self: Path) -> bool:
            if request.param == "3.13":
                try:
                    self.stat()
                except (FileNotFoundError, NotADirectoryError):
                    return False
            found: bool = ask(self)
            return found

        monkeypatch.setattr(Path, question if question == "exists" else question.replace("is", "is_"), answer)

    for question in ("exists", "isfile", "isdir"):
        raising(question)
    name: str = request.param
    return name


@pytest.fixture
def server() -> Iterator[RunningServer]:
    """Give a server with a layer."""
    with in_process() as running:
        with sharednorm.connect(running.address) as hub:
            hub.BatchNorm2D(3, name="plain")(random_tensor(1, (4, 3, 5, 2)))
        yield running


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """Give a directory that is closed, once something has been put into it."""
    directory = tmp_path / "closed"
    directory.mkdir()
    with modes_obeyed():
        yield directory
        directory.chmod(0o700)


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 1) -> str:
    assert main(list(words)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sharednorm: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_socket_below_a_closed_directory(closed: Path) -> None:
    (closed / "inner").mkdir()
    closed.chmod(0)
    for path in (closed / "s", closed / "inner" / "s", closed / "inner" / "made" / "s"):
        with pytest.raises(StartError, match=r"Permission denied$"):
            start(ServerConfig(listen=f"unix:{path}"))


def test_an_export_into_a_closed_directory(
    server: RunningServer, closed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed.chmod(0)
    assert "Permission denied" in refused(capsys, "export", str(closed), "--server", server.address)
    assert "Permission denied" in refused(capsys, "export", str(closed / "inner"), "--server", server.address)


@pytest.mark.parametrize("part", ["", "layers.json"])
def test_an_import_of_what_may_not_be_read(
    server: RunningServer, closed: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    assert main(["export", str(closed), "--server", server.address]) == 0
    capsys.readouterr()
    (closed / part).chmod(0)
    assert refused(capsys, "import", str(closed), "--server", server.address).endswith(": Permission denied\n")


def test_an_import_of_a_file_that_leads_where_one_may_not_look(
    server: RunningServer, closed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path / "made"), "--server", server.address]) == 0
    capsys.readouterr()
    (file,) = (tmp_path / "made").glob("*.npz")
    file.replace(closed / file.name)
    file.symlink_to(closed / file.name)
    closed.chmod(0)
    assert refused(capsys, "import", str(tmp_path / "made"), "--server", server.address).endswith(
        ": Permission denied\n"
    )


@pytest.mark.torch
def test_an_import_of_a_state_dict_that_may_not_be_read(
    server: RunningServer, closed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (closed / "network.pt").write_bytes(b"")
    (closed / "network.pt").chmod(0)
    assert refused(capsys, "import", str(closed / "network.pt"), "--server", server.address).endswith(
        ": Permission denied\n"
    )


def test_certificates_in_a_closed_directory(closed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed.chmod(0)
    said = refused(capsys, "certs", "create", "--directory", str(closed), "--host", "localhost")
    assert "Permission denied" in said


def test_a_state_in_a_closed_directory(closed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed.chmod(0)
    said = refused(capsys, "migrate", f"sqlite://{closed}", code=2)
    assert said.endswith(f"the state in {closed} cannot be read: Permission denied\n")


@pytest.mark.parametrize("part", ["", "made.fatbin"])
def test_kernels_that_may_not_be_read(closed: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    (closed / "made.fatbin").write_bytes(b"compiled")
    (closed / part).chmod(0)
    with pytest.raises(FatbinMissing, match=r"made\.fatbin cannot be read: Permission denied$"):
        fatbin(closed / "made.fatbin")
    monkeypatch.setenv(kernel_files.ELSEWHERE, str(closed / "made.fatbin"))
    with pytest.raises(FatbinMissing, match=r"made\.fatbin cannot be read: Permission denied$"):
        fatbin()


def test_a_compiler_that_may_not_be_run_is_none(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernel_files, "CUDA_COMPILER", closed / "nvcc")
    (closed / "nvcc").touch(mode=0o755)
    assert kernel_files.nvcc() == closed / "nvcc"
    closed.chmod(0)
    assert kernel_files.nvcc() is None


def test_the_doctor_where_headers_may_not_be_looked_at(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (closed / "include").mkdir()
    (closed / "include" / "cuda.h").touch()
    monkeypatch.setattr(gpus, "nvcc", lambda: closed / "bin" / "nvcc")
    monkeypatch.setattr(gpus, "_toolkits", lambda _: [closed])
    assert not any("headers" in need for need in gpus._build_needs())
    closed.chmod(0)
    assert any("headers" in need for need in gpus._build_needs())


def test_no_module_asks_pathlib_whether_something_is_there() -> None:
    """`stat` says why it cannot answer; `os.path.lexists` and `os.access` answer alike on every Python."""
    asked = [
        f"{path}:{node.lineno}: {node.func.attr}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in QUESTIONS
    ]
    assert SOURCES
    assert asked == []
