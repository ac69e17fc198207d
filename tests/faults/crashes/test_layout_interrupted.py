"""A file that is brought to another layout by a process that is killed, or whose disk fails: it is the old or the new.

Every sync and every write is one of those moments, and so is each moment at which the power goes away.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sharednorm_server.store.sqlite.database import FILE_VERSION
from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore
from tests.support.processes import disk
from tests.support.processes.old_state import described, expected, write_sqlite

OLD, OLD_VERSION = "sqlite-2", 2
CUTS = int(os.environ.get("SHAREDNORM_CUTS", "60"))

_OPEN = """
import pathlib, sys
from sharednorm_server.errors import StartError
from sharednorm_server.store.sqlite.store import SqliteStore
try:
    SqliteStore(pathlib.Path(sys.argv[1])).close()
except StartError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk.build(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Give a file of layout 2."""
    path = tmp_path_factory.mktemp("old") / FILE_NAME
    write_sqlite(OLD, path)
    return path.read_bytes()


def opened(directory: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Open a state in another process, on another disk."""
    words = [sys.executable, "-c", _OPEN, str(directory)]
    return subprocess.run(words, env={**os.environ, **env}, text=True, capture_output=True, check=False, timeout=60)


def layout(path: Path) -> int:
    with closing(sqlite3.connect(path)) as database:
        (found,) = database.execute("PRAGMA quick_check").fetchone()
        assert found == "ok"
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def check(directory: Path, work: Path) -> int:
    """See that a state is whole, and so is each copy of it; return the layout that it had."""
    copies = sorted(directory.glob("sharednorm.layout-*.sqlite3"))
    shutil.copytree(directory, work / "looked at")  # where SQLite may bring the log into the file
    before = layout(work / "looked at" / FILE_NAME)
    shutil.rmtree(work / "looked at")
    assert before in {OLD_VERSION, FILE_VERSION}
    assert copies or before == OLD_VERSION
    for copy in copies:
        assert layout(copy) == OLD_VERSION
        (place := work / "copy").mkdir()
        shutil.copy(copy, place / FILE_NAME)
        same(place)
        shutil.rmtree(place)
    same(directory)
    return before


def same(directory: Path) -> None:
    store = SqliteStore(directory)
    assert described(store) == expected(OLD)
    store.close()
    assert layout(directory / FILE_NAME) == FILE_VERSION


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_is_killed_at_a_sync(tmp_path: Path, library: Path, old: bytes, when: str) -> None:
    found = []
    for number in range(1, 100):
        (state := tmp_path / f"{number}").mkdir()
        (state / FILE_NAME).write_bytes(old)
        done = opened(state, disk.watched(library, state, fault=f"kill-{when}-sync:{number}"))
        if done.returncode == 0:
            break
        assert done.returncode == -9, done.stderr
        found.append(check(state, tmp_path))
    assert found == sorted(found)
    assert set(found) == {OLD_VERSION, FILE_VERSION}


@pytest.mark.parametrize(("fault", "stride"), [("enospc-write", 4), ("eio-write", 4), ("eio-sync", 1)])
def test_a_disk_that_fails_at_any_moment(tmp_path: Path, library: Path, old: bytes, fault: str, stride: int) -> None:
    refused = 0
    for number in range(2, 1000, stride):
        (state := tmp_path / f"{number}").mkdir()
        (state / FILE_NAME).write_bytes(old)
        done = opened(state, disk.watched(library, state, fault=f"{fault}:{number}"))
        if done.returncode == 0:
            break
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert str(state) in done.stderr
        if "It is as it was" in done.stderr:
            refused += 1
            assert not list(state.glob("*layout*"))
            assert (state / FILE_NAME).read_bytes() == old
        check(state, tmp_path)
    assert refused


def test_the_power_goes_away(tmp_path: Path, library: Path, old: bytes) -> None:
    (state := tmp_path / "state").mkdir()
    (state / FILE_NAME).write_bytes(old)
    log = tmp_path / "log"
    log.touch()
    assert opened(state, disk.watched(library, state, log)).returncode == 0
    changes = disk.read(log)
    names = [change.name for change in changes]
    # The copy is on the disk, with its name, before the first change of the file.
    synced = [(change.name, change.kind) for change in changes].index((state.name, 3))
    assert f"{FILE_NAME}-wal" not in names[:synced]
    mine = [change for change in changes if change.name.startswith(FILE_NAME)]
    rng, found = random.Random(1), set()
    for number in range(CUTS):
        cut = rng.randrange(len(mine) + 1)
        files = disk.after_power_loss({FILE_NAME: old}, mine[:cut], rng, kept=rng.choice((0.0, 0.5, 0.9, 1.0)))
        (place := tmp_path / f"{number}").mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
        shutil.copytree(place, tmp_path / "looked at")
        found.add(layout(tmp_path / "looked at" / FILE_NAME))
        shutil.rmtree(tmp_path / "looked at")
        same(place)
    assert found == {OLD_VERSION, FILE_VERSION}
