"""`make gpu-check` where there is no GPU says so; and its steps are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.gpu import check


def test_without_a_gpu_nothing_is_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "gpus", lambda: 0)
    assert check.main([]) == check.NO_GPU
    assert "there is no GPU on this machine" in capsys.readouterr().err


def run_steps(monkeypatch: pytest.MonkeyPatch, *steps: tuple[str, str]) -> int:
    monkeypatch.setattr(check, "gpus", lambda: 1)
    monkeypatch.setattr(check, "steps", lambda *_: [(name, ["-c", program]) for name, program in steps])
    return check.main([])


def test_a_step_that_fails_fails_the_whole_and_the_next_is_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = ("one", "print('hello')"), ("two", "raise SystemExit(7)"), ("three", "raise SystemExit(8)")
    assert run_steps(monkeypatch, *steps, ("four", "print('good-bye')")) == 7
    captured = capfd.readouterr()
    assert "hello" in captured.out
    assert "good-bye" in captured.out
    assert "failed: two, three" in captured.out
    assert "two: failed" in captured.err


def test_without_kernels_nothing_more_is_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_steps(monkeypatch, ("kernels", "raise SystemExit(3)"), ("two", "print('hello')")) == 3
    assert "hello" not in capfd.readouterr().out


def test_a_step_that_does_not_end_fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "STEP_SECONDS", 2.0)
    steps = ("one", ""), ("two", "import time; time.sleep(60)"), ("three", "print('good-bye')")
    assert run_steps(monkeypatch, *steps) == check.TIMED_OUT
    captured = capfd.readouterr()
    assert "timed out after" in captured.err
    assert "good-bye" in captured.out


def test_what_the_steps_name_exists() -> None:
    for _, arguments in check.steps(Path("results"), quick=True):
        for each in arguments:
            if each.startswith("tests/"):
                assert (check.ROOT / each).exists(), each
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module) is not None
