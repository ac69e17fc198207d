"""`make gpu-check` where there is no GPU says so; and its steps are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks import gpu_check


def test_without_a_gpu_nothing_is_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "gpus", lambda: 0)
    assert gpu_check.main([]) == gpu_check.NO_GPU
    assert "there is no GPU on this machine" in capsys.readouterr().err


def test_a_step_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "gpus", lambda: 1)
    failing = [("one", ["-c", "print('hello')"]), ("two", ["-c", "raise SystemExit(7)"]), ("three", ["-c", "print(3)"])]
    monkeypatch.setattr(gpu_check, "steps", lambda *_: failing)
    assert gpu_check.main([]) == 7
    captured = capfd.readouterr()
    assert "hello" in captured.out
    assert "three" not in captured.out
    assert "two: failed" in captured.err


def test_what_the_steps_name_exists() -> None:
    for _, arguments in gpu_check.steps(Path("results"), quick=True):
        for each in arguments:
            if each.startswith("tests/"):
                assert (gpu_check.ROOT / each).exists(), each
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None
