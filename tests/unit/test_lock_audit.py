"""No lock is held across I/O without a reason: a part of the contract under the audit, and the audit itself."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.lock_audit_allowed import ALLOWED, SIGNALS

ROOT = Path(__file__).parents[2]

# A module of the library, for all that the audit can see. What it does under its lock is put in.
_MODULE = """
import threading, time

class Thing:
    def __init__(self):
        self._lock = threading.Lock()
        self._changed = threading.Condition()

    def use(self):
        {body}

Thing().use()
"""
_PROGRAM = """
import sys
from tests.support import lock_audit
lock_audit.install()
namespace = {"__name__": "sharednorm.thing"}
exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), namespace)
for finding in lock_audit.findings():
    print(finding.site.rpartition(".")[2], "during", finding.kind)
"""


def run(*arguments: str, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SHAREDNORM_LOCK_AUDIT": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment.pop("SHAREDNORM_LOCK_AUDIT_FILE", None)  # of a run that is audited itself
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("with self._lock: time.sleep(0)", "_lock during sleep"),
        ("with self._lock: open('/dev/null').close()", "_lock during open file"),
        ("with self._lock: threading.Event().wait(0.001)", "_lock during wait"),
        ("with self._lock, self._changed: self._changed.wait(0.001)", "_lock during wait"),
        ("with self._changed: self._changed.wait(0.001)", ""),
        ("self._lock.acquire(); self._lock.release(); time.sleep(0)", ""),
        ("with self._lock: threading.Thread(target=int).start()", ""),
    ],
)
def test_a_wait_under_a_lock_is_found(tmp_path: Path, body: str, found: str) -> None:
    path = tmp_path / "thing.py"
    path.write_text(_MODULE.format(body=body), encoding="utf-8")
    done = run("-c", _PROGRAM, str(path))
    assert (done.returncode, done.stdout.strip()) == (0, found), done.stderr


@pytest.mark.parametrize("site", [*ALLOWED, *sorted(SIGNALS)])
def test_a_reason_is_for_a_lock_that_there_is(site: str) -> None:
    module, _, name = site.partition(":")
    owner, _, attribute = name.partition(".")
    found = getattr(importlib.import_module(module), owner)
    if inspect.isclass(found):
        makers = [vars(each).get("__init__") for each in inspect.getmro(found)]
        files = {maker.__code__.co_filename for maker in makers if inspect.isfunction(maker)}
        # A lock that is made in an expression has the name of the function.
        pattern = rf"self\.{attribute}\b[^=\n]*= threading\.|def {attribute}\("
    else:  # a lock of the module
        files = {str(importlib.import_module(module).__file__)}
        pattern = rf"(?m)^{owner}\b[^=\n]*= threading\."
    source = "\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    assert re.search(pattern, source), "renamed, or gone?"
    for allowed in ALLOWED.get(site, ()):
        within, _, function = allowed.within.rpartition(".")
        assert not within or f"def {function}(" in inspect.getsource(importlib.import_module(within))


@pytest.mark.slow
def test_the_contract_holds_no_lock_across_io() -> None:
    done = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("tests/contract/test_modes.py", "tests/contract/groups/test_together.py"),
        *("tests/contract/client_compute/test_async_push.py", "tests/contract/wire/test_shared_memory_waits.py"),
        *("-k", "not local- and not cuda"),
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "by design: sharednorm_server.store.sqlite.store:SqliteStore._committing" in done.stdout  # by a process
