"""What a run left out is listed at its end, and fails the run where that is asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
NO_TORCH = "def test_one():\n    sys.modules['torch'] = None\n    pytest.importorskip('torch')\n"
NO_CUDA = "def test_three():\n    pytest.skip('they need PyCUDA, which make test CUDA=1 builds')\n"
NO_PROGRAM = "def test_four():\n    pytest.skip('needs a program that is not installed: chromium')\n"
OTHER = "def test_two():\n    pytest.skip('no such machine')\n"


def _run(tmp_path: Path, allowed: str | None, *tests: str) -> tuple[int, str]:
    shutil.copy(CONFTEST, tmp_path / "conftest.py")
    (tmp_path / "test_some.py").write_text("import sys, pytest\n\ndef test_good():\n    pass\n\n" + "\n".join(tests))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SHAREDNORM_"))}
    if allowed is not None:
        environment["SHAREDNORM_LEFT_OUT"] = allowed
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("allowed", [None, "anything", "torch"])
def test_a_comparison_with_torch_is_listed_with_its_command(tmp_path: Path, allowed: str | None) -> None:
    code, output = _run(tmp_path, allowed, NO_TORCH)
    assert code == 0
    assert "left out: 1 test that compares with PyTorch; to add: make test TORCH=1" in output


@pytest.mark.parametrize("allowed", [None, "anything", "cuda", "torch,cuda"])
def test_what_needs_pycuda_is_listed_with_its_command(tmp_path: Path, allowed: str | None) -> None:
    code, output = _run(tmp_path, allowed, NO_CUDA)
    assert code == 0
    assert "left out: 1 test that runs on PyCUDA; to add: make test CUDA=1" in output


@pytest.mark.parametrize("allowed", [None, "anything", "programs", "torch,programs"])
def test_what_needs_another_program_is_listed_with_its_command(tmp_path: Path, allowed: str | None) -> None:
    code, output = _run(tmp_path, allowed, NO_PROGRAM)
    assert code == 0
    assert "left out: 1 test that needs other programs; to add: apt-get install redis-server prometheus" in output


def test_another_reason_is_listed_as_it_is(tmp_path: Path) -> None:
    code, output = _run(tmp_path, None, OTHER)
    assert code == 0
    assert "left out: 1 test: no such machine" in output


@pytest.mark.parametrize(
    ("allowed", "test"),
    [
        ("nothing", NO_TORCH),
        ("nothing", OTHER),
        ("torch", OTHER),
        ("torch", NO_CUDA),
        ("cuda", NO_TORCH),
        ("torch,cuda", OTHER),
        ("torch,cuda", NO_PROGRAM),
    ],
)
def test_what_is_left_out_against_the_rule_fails_the_run(tmp_path: Path, allowed: str, test: str) -> None:
    code, output = _run(tmp_path, allowed, test)
    assert code == 1
    assert f"SHAREDNORM_LEFT_OUT={allowed}: what is left out fails this run" in output


@pytest.mark.parametrize("allowed", ["nothing", "torch", "anything"])
def test_a_complete_run_passes_and_lists_nothing(tmp_path: Path, allowed: str) -> None:
    code, output = _run(tmp_path, allowed)
    assert (code, "left out" in output) == (0, False)


def test_a_word_that_is_no_rule_is_refused(tmp_path: Path) -> None:
    code, output = _run(tmp_path, "everything")
    assert code != 0
    assert "expected: anything, nothing, or torch,cuda,programs or some of them" in output
