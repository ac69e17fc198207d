"""What every suite shares: tests that a machine cannot run are left out, listed at the end, and refused where asked.

The environment variable SHAREDNORM_LEFT_OUT says what may be left out: "anything" (the default), "nothing", or, with a
comma between them, "torch" (comparisons with PyTorch), "cuda" (what runs on PyCUDA) and "programs" (what needs
Prometheus, Chromium or Redis); what is left out against it fails the run.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.processes.redis import RedisProcess

AUDITED = os.environ.get("SHAREDNORM_LOCK_AUDIT") == "1"
if AUDITED:  # before any other module imports the library
    from tests.support import lock_audit

    lock_audit.install()

# A machine that is busy with something else is slow; that is no defect.
settings.register_profile("sharednorm", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("sharednorm")

LEFT_OUT = "SHAREDNORM_LEFT_OUT"
NEEDS_PROGRAM = "needs a program that is not installed"
NEEDS_TORCH = "compares with PyTorch, which is not installed"
_MANY = {"test": ("test", "tests"), "file of tests": ("file", "files")}
KINDS = {"torch": ("that compare{s} with PyTorch", "make test TORCH=1"),
         "cuda": ("that run{s} on PyCUDA", "make test CUDA=1"),
         "programs": ("that need{s} other programs",
                      ("apt-get install redis-server prometheus chromium libgrpc++-dev "
                       "protobuf-compiler-grpc"))}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Report what an audited run finds."""
    if AUDITED:
        config.pluginmanager.register(lock_audit.Report(), "lock-audit")


@pytest.fixture(scope="session", autouse=True)
def _state_home() -> Iterator[None]:
    """Have servers that are told of no state keep it where nobody else's is."""
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", home)
        patch.delenv("STATE_DIRECTORY", raising=False)
        yield


@pytest.fixture(scope="session")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """Give a Redis that many tests use, each with a prefix of its own."""
    from tests.support.processes.redis import redis_server

    with redis_server(tmp_path_factory.mktemp("redis")) as process:
        yield process


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave a comparison with PyTorch out where there is none."""
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip(NEEDS_TORCH)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a complete run that left something out against SHAREDNORM_LEFT_OUT."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.exitstatus != pytest.ExitCode.OK:
        return
    if _refused(_left_out(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was left out, with the command that adds it."""
    left_out = _left_out(terminalreporter)
    for (what, reason), number in sorted(left_out.items()):
        things = f"{number} {what if number == 1 else what.replace(*_MANY[what])}"
        kind = _kind(reason)
        if kind:
            that, command = KINDS[kind]
            which = that.format(s="" if number > 1 else "s")
            terminalreporter.write_line(f"left out: {things} {which}; to add: {command}", yellow=True)
        else:
            terminalreporter.write_line(f"left out: {things}: {reason}", yellow=True)
    if _refused(left_out):
        allowed = os.environ[LEFT_OUT]
        terminalreporter.write_line(f"{LEFT_OUT}={allowed}: what is left out fails this run", red=True)


def _left_out(reporter: pytest.TerminalReporter) -> Counter[tuple[str, str]]:
    """Count the skips by what was skipped, a test or a whole file, and why."""
    skipped: Counter[tuple[str, str]] = Counter()
    for report in reporter.stats.get("skipped", []):
        what = "file of tests" if isinstance(report, pytest.CollectReport) else "test"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped[what, reason.removeprefix("Skipped: ")] += 1
    return skipped


def _kind(reason: str) -> str:
    if reason == NEEDS_TORCH or "'torch'" in reason:
        return "torch"
    if reason.startswith(NEEDS_PROGRAM):
        return "programs"
    return "cuda" if "PyCUDA" in reason else ""


def _refused(left_out: Counter[tuple[str, str]]) -> bool:
    allowed = os.environ.get(LEFT_OUT, "anything")
    words = set(allowed.split(","))
    if words not in ({"anything"}, {"nothing"}) and not words <= KINDS.keys():
        raise pytest.UsageError(
            f"{LEFT_OUT} is {allowed!r} (expected: anything, nothing, or torch,cuda,programs or some of them)"
        )
    return any(_kind(reason) not in words for _, reason in left_out) and words != {"anything"}
