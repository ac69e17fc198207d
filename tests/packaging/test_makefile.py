"""The make targets: they are listed, and a machine that cannot run them is told why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes.make import make

TARGETS = ("demo", "demo-torch", "test", "test-all", "soak", "serve", "check", "docs", "bench", "gpu-check", "kernels",
           "proto", "resolve", "images", "up", "down", "image-check", "clean")  # fmt: skip


def _python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


def test_make_alone_lists_every_target() -> None:
    result = make()
    assert result.returncode == 0
    listed = [line.split()[0] for line in result.stdout.splitlines()]
    assert listed == ["help", *TARGETS]


def test_an_old_python_is_refused_with_the_command_that_chooses_another(tmp_path: Path) -> None:
    result = make("test", _python(tmp_path / "python", "exit 1"), f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "needs Python 3.10 or newer" in result.stderr
    assert "PYTHON=" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path) -> None:
    python = _python(tmp_path / "python", 'case "$2" in *venv*) exit 1 ;; esac')
    result = make("test", python, f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert "python3-venv" in result.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_planned(tmp_path: Path, target: str) -> None:
    result = make("--dry-run", target, f"VENV={tmp_path / 'venv'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_serve_passes_its_options_on(tmp_path: Path) -> None:
    result = make("--dry-run", "soak", "serve", "LISTEN=unix:/tmp/a b.sock", "DEVICE=cuda", f"VENV={tmp_path / 'venv'}")
    assert "serve --listen 'unix:/tmp/a b.sock' --device 'cuda'" in result.stdout
