"""A file of SQLite that an earlier release wrote: it is copied, brought to this layout bit for bit, and goes on."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections import namedtuple
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import StoreFailed
from sharednorm_server.cli.migrate import migrate
from sharednorm_server.errors import StartError
from sharednorm_server.store.sqlite.database import FILE_VERSION
from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore
from tests.support.processes.old_state import KEY, check_that_training_goes_on, described, expected, write_sqlite
from tests.support.processes.server import run, server_process

OLD = "sqlite-2"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of layout 2."""
    made = tmp_path / "state" / FILE_NAME
    write_sqlite(OLD, made)
    return made


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as database:
        marks = [database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")]
        return [*map(str, marks), *database.iterdump()]


def copies(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir() if "layout" in each.name)


def test_it_is_copied_and_every_bit_is_there(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = dump(path)
    for _ in range(2):
        store = SqliteStore(path.parent)
        assert described(store) == expected(OLD)
        assert store.earlier == path.parent / "sharednorm.layout-2.sqlite3"
        store.close()
    words = f"state migrated from layout 2 to {FILE_VERSION}; backup: {store.earlier}"
    assert [record.getMessage() for record in caplog.records] == [words]
    assert copies(path) == ["sharednorm.layout-2.sqlite3"]
    assert store.earlier is not None
    assert dump(store.earlier) == before


def test_training_goes_on_and_what_comes_again_is_known(path: Path) -> None:
    check_that_training_goes_on(SqliteStore(path.parent), 1 << 32)


def test_a_file_that_is_there_is_never_overwritten(path: Path) -> None:
    for name in ("sharednorm.layout-2.sqlite3", "sharednorm.layout-2.part"):
        path.with_name(name).write_text("of another program")
    store = SqliteStore(path.parent)
    assert described(store) == expected(OLD)
    store.close()
    assert copies(path) == ["sharednorm.layout-2-1.sqlite3", "sharednorm.layout-2.sqlite3"]
    assert path.with_name("sharednorm.layout-2.sqlite3").read_text() == "of another program"
    assert store.earlier is not None
    assert store.earlier.name == "sharednorm.layout-2-1.sqlite3"


def test_what_is_in_the_log_of_a_killed_server_is_in_the_copy_and_in_the_file(path: Path, tmp_path: Path) -> None:
    (state := tmp_path / "killed").mkdir()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE layers SET version = 77 WHERE id = 1")
        for each in (path, path.with_name(f"{FILE_NAME}-wal")):  # before the log is brought into the file
            shutil.copy(each, state)
    known = expected(OLD)
    known["layers"][0]["version"] = 77
    store = SqliteStore(state)
    assert described(store) == known
    store.close()
    assert store.earlier is not None
    with closing(sqlite3.connect(store.earlier)) as database:
        assert database.execute("SELECT version FROM layers WHERE id = 1").fetchone() == (77,)


def test_without_room_for_the_copy_nothing_is_changed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "free")  # noqa: PYI024 - a stand-in for shutil's
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(4 * len(before) - 1))
        with pytest.raises(StartError, match=r"is of layout 2, .*: 1 MiB have to be free for that, and 0 are"):
            SqliteStore(path.parent)
    assert (path.read_bytes(), copies(path)) == (before, [])
    SqliteStore(path.parent).close()


def test_a_change_that_fails_leaves_the_file_as_it_was(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE statistics SET var = x'0102030405' WHERE layer = 4")  # which is no vector
    before = dump(path)
    with pytest.raises(StartError, match="is of layout 2, and could not be brought to the one of this release"):
        SqliteStore(path.parent)
    assert (dump(path), copies(path)) == (before, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (f"PRAGMA user_version = {FILE_VERSION + 1}", rf"file version {FILE_VERSION + 1}, and this release knows"),
        ("UPDATE server SET features = 'pooled wide'", "uses pooled, wide, which this release does not know"),
    ],
)
def test_a_newer_file_is_refused_with_the_way_back(path: Path, change: str, words: str) -> None:
    SqliteStore(path.parent).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(change)
    copy = path.with_name("sharednorm.layout-2.sqlite3")
    with pytest.raises(StartError, match=rf"{words}.*put {copy} into an empty directory as {FILE_NAME}"):
        SqliteStore(path.parent)
    (other := path.parent.parent / "other").mkdir()
    copy.rename(other / FILE_NAME)  # the way back
    with pytest.raises(StartError, match=rf"{words}.*a newer one$"):
        SqliteStore(path.parent)
    store = SqliteStore(other)
    assert described(store) == expected(OLD)
    store.close()


def test_a_new_file_has_the_layout_of_one_that_was_brought_to_it(path: Path, tmp_path: Path) -> None:
    for directory in (path.parent, tmp_path / "new"):
        SqliteStore(directory).close()
    layouts = []
    for directory in (path.parent, tmp_path / "new"):
        with closing(sqlite3.connect(directory / FILE_NAME)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_schema ORDER BY name")]
            layouts.append({name: database.execute(f"PRAGMA table_info({name})").fetchall() for name in tables})
    assert layouts[0] == layouts[1]


def test_a_file_of_the_first_layout(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:  # take away what the second has added
        database.executescript(
            """
            DROP TABLE changes; DROP TABLE server; DROP TABLE snapshot_statistics; DROP TABLE snapshots;
            ALTER TABLE layers DROP COLUMN session_floor; PRAGMA user_version = 1
            """
        )
    known = expected(OLD)
    for layer in known["layers"]:
        layer.update(changes=[], floor=0, snapshots=[])
    store = SqliteStore(path.parent)
    assert (described(store), store.open_session()) == (known, 1 << 32)
    store.close()
    assert copies(path) == ["sharednorm.layout-1.sqlite3"]


def test_a_value_that_is_no_float32_is_not_rounded(path: Path) -> None:
    SqliteStore(path.parent).close()
    with closing(sqlite3.connect(path)) as database, database:
        wide = np.array([0.1, 0, 0]).tobytes()
        database.execute("UPDATE statistics SET mean = ? WHERE layer = 1 AND domain = ''", (wide,))
    store = SqliteStore(path.parent)
    with pytest.raises(StoreFailed):
        store.get(KEY)
    store.close()


def test_the_command_says_where_the_copy_is(path: Path) -> None:
    state = f"sqlite://{path.parent}"
    copy = path.with_name("sharednorm.layout-2.sqlite3")
    done = run(["migrate", state])
    assert (done.returncode, done.stdout) == (
        0, f"{state} has the layout of this release; what it was before that is in {copy}\n",
    )  # fmt: skip
    assert f"state migrated from layout 2 to {FILE_VERSION}; backup: {copy}" in done.stderr
    empty = run(["migrate", f"{state}/empty"])
    assert (empty.returncode, empty.stderr) == (2, f"sharednorm: there is no state in {path.parent}/empty\n")


def test_a_server_says_it_at_its_start(path: Path) -> None:
    with server_process("--state", f"sqlite://{path.parent}", "--log-level", "warning") as server:
        copy = path.with_name("sharednorm.layout-2.sqlite3")
        assert f"state migrated from layout 2 to {FILE_VERSION}; backup: {copy}\n" in server.log()
        with sharednorm.connect(server.address) as hub:
            assert [layer.name for layer in hub.layers()] == ["bn", "empty", "group"]
            assert hub.layer("bn").numOfProps == 5


def test_an_old_file_is_copied_into_another_state(path: Path, tmp_path: Path) -> None:
    source, target = SqliteStore(path.parent), SqliteStore(tmp_path / "other")
    assert migrate(source, target) == (4, 0)
    assert described(target) == expected(OLD)
    for store in (source, target):
        store.close()


def test_a_layer_that_comes_from_another_process_is_the_same(path: Path) -> None:
    """What is written of a record that was read is only what has changed, also of statistics of another type."""
    store = SqliteStore(path.parent)
    record = store.get(KEY)
    assert record is not None
    kept = store.put(replace(record, train=not record.train))
    assert kept is not None
    kept.wait()
    known = expected(OLD)
    known["layers"][0]["train"] = not record.train
    assert described(store) == known
    store.close()
