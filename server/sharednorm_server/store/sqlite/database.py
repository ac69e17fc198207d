"""The file of the store of SQLite's: how it is laid out, opened, read and written. Nothing here waits for anybody."""

from __future__ import annotations

import fcntl
import os
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sharednorm.core.domains import Domains, DomainStatistics, statistics_of, with_statistics
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, blank_state
from sharednorm.core.types import Vector
from sharednorm_server.errors import StartError
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.codec import (
    config_from_text,
    config_to_text,
    names_from_bytes,
    names_to_bytes,
    statistics_from_bytes,
    statistics_to_bytes,
)
from sharednorm_server.store.records import LastChange, Note, Remembered, TakenStep
from sharednorm_server.store.snapshots import SnapshotInfo
from sharednorm_server.store.sqlite.layout import keep_copy, migrate, refuse_unknown

# "snrm": a file of anything else is refused, whatever is in it.
APPLICATION_ID = 0x736E726D

# Of a layer, what changes together is in one row, and what a step does not change it does not write again.
_SCHEMA = (
    """
    CREATE TABLE layers (
        id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, name TEXT NOT NULL, uid TEXT NOT NULL, config TEXT NOT NULL,
        train INTEGER NOT NULL, initialized INTEGER NOT NULL, version INTEGER NOT NULL, UNIQUE (namespace, name))
    """,
    """
    CREATE TABLE parameters (
        layer INTEGER PRIMARY KEY REFERENCES layers ON DELETE CASCADE, scale BLOB NOT NULL, bias BLOB NOT NULL)
    """,
    """
    CREATE TABLE gradients (
        layer INTEGER PRIMARY KEY REFERENCES layers ON DELETE CASCADE, scale BLOB NOT NULL, bias BLOB NOT NULL)
    """,
    """
    CREATE TABLE statistics (
        layer INTEGER NOT NULL REFERENCES layers ON DELETE CASCADE, domain TEXT NOT NULL, mean BLOB NOT NULL,
        var BLOB NOT NULL, num_of_props INTEGER NOT NULL, frozen INTEGER NOT NULL, PRIMARY KEY (layer, domain))
    """,
    """
    CREATE TABLE merged (
        layer INTEGER NOT NULL REFERENCES layers ON DELETE CASCADE, domain TEXT NOT NULL, names BLOB NOT NULL,
        PRIMARY KEY (layer, domain))
    """,
)

# What brings a file of version i + 1 to version i + 2. A file's version is how it is laid out, and no release's.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE server (runs INTEGER NOT NULL)",
        "INSERT INTO server (runs) VALUES (0)",
        # Sessions with lower numbers than this may have been forgotten.
        "ALTER TABLE layers ADD COLUMN session_floor INTEGER NOT NULL DEFAULT 0",
        # The last change of each session, the least recent with the lowest turn.
        """
        CREATE TABLE changes (
            id INTEGER PRIMARY KEY, layer INTEGER NOT NULL REFERENCES layers ON DELETE CASCADE, session BLOB NOT NULL,
            turn INTEGER NOT NULL, seq INTEGER NOT NULL, content BLOB NOT NULL, version INTEGER NOT NULL,
            num_of_props INTEGER NOT NULL, count INTEGER, mean BLOB, m2 BLOB, scale BLOB, bias BLOB, sums BLOB,
            UNIQUE (layer, session))
        """,
        """
        CREATE TABLE snapshots (
            layer INTEGER NOT NULL REFERENCES layers ON DELETE CASCADE, version INTEGER NOT NULL, taken REAL NOT NULL,
            train INTEGER NOT NULL, initialized INTEGER NOT NULL, scale BLOB NOT NULL, bias BLOB NOT NULL,
            PRIMARY KEY (layer, version))
        """,
        """
        CREATE TABLE snapshot_statistics (
            layer INTEGER NOT NULL, version INTEGER NOT NULL, domain TEXT NOT NULL, mean BLOB NOT NULL,
            var BLOB NOT NULL, num_of_props INTEGER NOT NULL, frozen INTEGER NOT NULL, merged BLOB NOT NULL,
            PRIMARY KEY (layer, version, domain),
            FOREIGN KEY (layer, version) REFERENCES snapshots ON DELETE CASCADE)
        """,
    ),
    (
        # Running statistics are float64 from here on, which holds what the float32 were.
        "UPDATE statistics SET mean = widened(mean), var = widened(var)",
        "UPDATE snapshot_statistics SET mean = widened(mean), var = widened(var)",
        # How many values the statistics stand for, float64: one, or one a channel. NULL: it is not counted.
        "ALTER TABLE statistics ADD COLUMN count BLOB",
        "ALTER TABLE snapshot_statistics ADD COLUMN count BLOB",
        # How often the configuration was changed.
        "ALTER TABLE layers ADD COLUMN config_revision INTEGER NOT NULL DEFAULT 0",
        # Words for what a reader has to know beyond the layout, and the name of the copy of the layout before this one.
        "ALTER TABLE server ADD COLUMN features TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE server ADD COLUMN backup TEXT",
    ),
)
FILE_VERSION = 1 + len(MIGRATIONS)

# Of 4096 bytes: so much of the log is written before it is brought into the file.
_LOG_PAGES = 4096

_SYNCHRONOUS = {"os": "NORMAL", "fsync": "FULL"}


# What a step changes, as one statement: several tables through a view, which is this connection's and in no file.
_STEPS = (
    """
    CREATE TEMP VIEW steps (
        layer, train, initialized, layer_version, mean, var, steps, frozen,
        place, turn, seq, content, version, num_of_props, sums, count, batch_mean, m2, scale, bias
    ) AS SELECT 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20
    """,
    """
    CREATE TEMP TRIGGER step INSTEAD OF INSERT ON steps BEGIN
        UPDATE layers SET train = NEW.train, initialized = NEW.initialized, version = NEW.layer_version
            WHERE id = NEW.layer;
        UPDATE statistics SET mean = NEW.mean, var = NEW.var, num_of_props = NEW.steps, frozen = NEW.frozen
            WHERE layer = NEW.layer AND domain = '';
        UPDATE changes SET turn = NEW.turn, seq = NEW.seq, content = NEW.content, version = NEW.version,
            num_of_props = NEW.num_of_props, sums = NEW.sums, count = NEW.count, mean = NEW.batch_mean, m2 = NEW.m2,
            scale = NEW.scale, bias = NEW.bias WHERE id = NEW.place;
    END
    """,
)
_NOT_OF_STEPS = ("scale", "bias", "scale_grad", "bias_grad", "merged")


class Rows:
    """The layers of a file, each by the number of its row.

    Args:
        database: The file, prepared. Whoever calls has it to themselves.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._written: dict[int, LayerRecord] = {}  # as the file has them
        self._changes: dict[int, dict[bytes, int]] = {}  # the rows of the changes of each layer's sessions
        self._turn = 0
        for statement in _STEPS:
            database.execute(statement)

    def names(self) -> dict[LayerKey, int]:
        """Return all layers."""
        for place, layer, session, turn in self._database.execute("SELECT id, layer, session, turn FROM changes"):
            self._changes.setdefault(layer, {})[session] = place
            self._turn = max(self._turn, turn)
        rows = self._database.execute("SELECT namespace, name, uid, id FROM layers")
        return {LayerKey(namespace, name, uid): row for namespace, name, uid, row in rows}

    def find(self, row: int) -> LayerRecord:
        """Return a layer that is there."""
        return self._written.get(row) or self._load(row)

    def insert(self, row: int, record: LayerRecord) -> None:
        """Write a new layer."""
        key = record.key
        self._database.execute(
            "INSERT INTO layers (id, namespace, name, uid, config, train, initialized, version) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (row, key.namespace, key.name, key.uid, config_to_text(record.config), *_counters(record)),
        )
        self._write(row, record, None)

    def update(self, row: int, record: LayerRecord) -> None:
        """Write what has changed of a layer that is there."""
        before = self.find(row)
        self._database.execute(
            "UPDATE layers SET train = ?, initialized = ?, version = ? WHERE id = ?", (*_counters(record), row)
        )
        self._write(row, record, before)

    def step(self, row: int, record: LayerRecord, note: Note) -> bool:
        """Do what `update` and `note` do, in one statement; return False, and do nothing, if it takes more than that.

        It is enough for what steps do: change the running statistics, and what a known session has done last.
        """
        before = self.find(row)
        state, old = record.state, before.state
        place = self._changes.get(row, {}).get(note.session)
        if place is None or note.forgotten or record.domains is not before.domains:
            return False
        if any(getattr(state, name) is not getattr(old, name) for name in _NOT_OF_STEPS):
            return False
        mean, var = statistics_to_bytes(state.mean), statistics_to_bytes(state.var)
        statistics = mean, var, state.num_of_props, state.stats_frozen
        self._database.execute(
            "INSERT INTO temp.steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (row, *_counters(record), *statistics, place, *self._values(note)),
        )
        self._written[row] = record
        return True

    def _values(self, note: Note) -> tuple[object, ...]:
        change, step = note.change, note.change.step
        vectors: tuple[object, ...] = (None,) * 5
        sums = None if change.sums is None else _to_wide_blob(change.sums)
        if step is not None:
            moments = step.moments
            wide = _to_wide_blob(moments.mean), _to_wide_blob(moments.m2)
            vectors = moments.count, *wide, _to_blob(step.scale), _to_blob(step.bias)
        self._turn += 1
        return self._turn, change.seq, change.content, change.version, change.num_of_props, sums, *vectors

    def note(self, row: int, note: Note) -> None:
        """Write the last change of a session."""
        values = self._values(note)
        known = self._changes.setdefault(row, {})
        place = known.get(note.session)
        if place is not None:
            self._database.execute(
                "UPDATE changes SET turn = ?, seq = ?, content = ?, version = ?, num_of_props = ?, sums = ?, "
                "count = ?, mean = ?, m2 = ?, scale = ?, bias = ? WHERE id = ?",
                (*values, place),
            )
        else:
            found = self._database.execute(
                "INSERT INTO changes (layer, session, turn, seq, content, version, num_of_props, sums, count, mean, "
                "m2, scale, bias) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (row, note.session, *values),
            )
            known[note.session] = found.lastrowid or 0
        if note.forgotten:
            for session in note.forgotten:
                known.pop(session, None)
            self._database.executemany(
                "DELETE FROM changes WHERE layer = ? AND session = ?", [(row, session) for session in note.forgotten]
            )
            self._database.execute("UPDATE layers SET session_floor = ? WHERE id = ?", (note.floor, row))

    def remembered(self, row: int) -> Remembered:
        """Return what is known of the sessions that have changed a layer."""
        changes = {
            session: LastChange(
                seq, content, version, steps, _to_step(*vectors), None if sums is None else _to_sums(sums)
            )
            for session, seq, content, version, steps, sums, *vectors in self._database.execute(
                "SELECT session, seq, content, version, num_of_props, sums, count, mean, m2, scale, bias FROM changes "
                "WHERE layer = ? ORDER BY turn",
                (row,),
            )
        }
        (floor,) = self._database.execute("SELECT session_floor FROM layers WHERE id = ?", (row,)).fetchone()
        return Remembered(changes, floor)

    def take_snapshot(self, row: int, record: LayerRecord, taken: float, drop: Iterable[int]) -> None:
        """Write a copy of a layer, unless there is one of its version, and take some away."""
        write, state = self._database.execute, record.state
        values = row, state.version, taken, record.train, state.initialized, _to_blob(state.scale), _to_blob(state.bias)
        if write("INSERT OR IGNORE INTO snapshots VALUES (?, ?, ?, ?, ?, ?, ?)", values).rowcount:
            for domain, each in {"": statistics_of(state), **record.domains}.items():
                write(
                    "INSERT INTO snapshot_statistics (layer, version, domain, mean, var, num_of_props, frozen, merged) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        row, state.version, domain, statistics_to_bytes(each.mean), statistics_to_bytes(each.var),
                        each.num_of_props, each.stats_frozen, names_to_bytes(each.merged),
                    ),
                )  # fmt: skip
        for version in drop:
            write("DELETE FROM snapshots WHERE layer = ? AND version = ?", (row, version))

    def snapshots(self, row: int) -> list[SnapshotInfo]:
        """Return what is known of a layer's snapshots, the oldest first."""
        found = self._database.execute(
            "SELECT version, taken, num_of_props FROM snapshots NATURAL JOIN snapshot_statistics "
            "WHERE layer = ? AND domain = '' ORDER BY version",
            (row,),
        )
        return [SnapshotInfo(*each) for each in found]

    def snapshot(self, row: int, version: int) -> LayerRecord | None:
        """Return a layer as it was at a version, without gradients."""
        read = self._database.execute
        found = read(
            "SELECT train, initialized, scale, bias FROM snapshots WHERE layer = ? AND version = ?", (row, version)
        ).fetchone()
        if found is None:
            return None
        train, initialized, *pair = found
        now = self.find(row)
        sets = {
            domain: DomainStatistics(
                *_pair(each, now.config, statistics_from_bytes), steps, bool(frozen), names_from_bytes(merged)
            )
            for domain, *each, steps, frozen, merged in read(
                "SELECT domain, mean, var, num_of_props, frozen, merged FROM snapshot_statistics "
                "WHERE layer = ? AND version = ?",
                (row, version),
            )
        }
        scale, bias = _pair(pair, now.config)
        blank = blank_state(now.config)
        state = replace(blank, scale=scale, bias=bias, version=version, initialized=bool(initialized))
        return LayerRecord(now.key, now.config, with_statistics(state, sets.pop("")), bool(train), sets)

    def opened(self, least: int = 0) -> int:
        """Count how often the file has been opened, or at least so often, and return that."""
        self._database.execute("UPDATE server SET runs = max(runs + 1, ?)", (least,))
        (runs,) = self._database.execute("SELECT runs FROM server").fetchone()
        return int(runs)

    def remove(self, row: int) -> None:
        """Forget a layer."""
        self._database.execute("DELETE FROM layers WHERE id = ?", (row,))
        self._changes.pop(row, None)
        self._written.pop(row, None)

    def _write(self, row: int, record: LayerRecord, before: LayerRecord | None) -> None:
        # What is the same object is in the file already.
        state, old = record.state, None if before is None else before.state
        if old is None or state.scale is not old.scale or state.bias is not old.bias:
            self._replace("parameters", row, state.scale, state.bias)
        if old is None or state.scale_grad is not old.scale_grad or state.bias_grad is not old.bias_grad:
            self._replace("gradients", row, state.scale_grad, state.bias_grad)
        self._write_statistics(row, "", statistics_of(state), None if old is None else statistics_of(old))
        domains: Domains = {} if before is None else before.domains
        if record.domains is not domains:
            for domain in domains.keys() - record.domains.keys():
                for table in ("statistics", "merged"):
                    self._database.execute(f"DELETE FROM {table} WHERE layer = ? AND domain = ?", (row, domain))  # noqa: S608 - one of two
            for domain, each in record.domains.items():
                self._write_statistics(row, domain, each, domains.get(domain))
        self._written[row] = record

    def _replace(self, table: str, row: int, scale: Vector, bias: Vector) -> None:
        self._database.execute(
            f"INSERT INTO {table} (layer, scale, bias) VALUES (?, ?, ?) "  # noqa: S608 - one of two
            "ON CONFLICT (layer) DO UPDATE SET scale = excluded.scale, bias = excluded.bias",
            (row, _to_blob(scale), _to_blob(bias)),
        )

    def _write_statistics(self, row: int, domain: str, now: DomainStatistics, old: DomainStatistics | None) -> None:
        if old is not None and all(getattr(now, field.name) is getattr(old, field.name) for field in fields(now)):
            return
        values = statistics_to_bytes(now.mean), statistics_to_bytes(now.var), now.num_of_props, now.stats_frozen
        self._database.execute(
            "INSERT INTO statistics (mean, var, num_of_props, frozen, layer, domain) VALUES (?, ?, ?, ?, ?, ?)"
            if old is None
            else "UPDATE statistics SET mean = ?, var = ?, num_of_props = ?, frozen = ? WHERE layer = ? AND domain = ?",
            (*values, row, domain),
        )
        if now.merged is not (old.merged if old is not None else ()):
            names = names_to_bytes(now.merged)
            self._database.execute(
                "INSERT INTO merged (layer, domain, names) VALUES (?, ?, ?) "
                "ON CONFLICT (layer, domain) DO UPDATE SET names = excluded.names",
                (row, domain, names),
            )

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` layers of a namespace in the order of their names, those behind name `after`."""
        # SQLite compares the bytes of UTF-8, which is the order of the code points.
        rows = self._database.execute(
            "SELECT id FROM layers WHERE namespace = ? AND name > ? ORDER BY name LIMIT ?", (namespace, after, limit)
        ).fetchall()
        return [self.find(row) for (row,) in rows]

    def _load(self, row: int) -> LayerRecord:
        read = self._database.execute
        namespace, name, uid, text, train, initialized, version = read(
            "SELECT namespace, name, uid, config, train, initialized, version FROM layers WHERE id = ?", (row,)
        ).fetchone()
        config = config_from_text(text)
        scale, bias = _pair(read("SELECT scale, bias FROM parameters WHERE layer = ?", (row,)).fetchone(), config)
        scale_grad, bias_grad = _pair(
            read("SELECT scale, bias FROM gradients WHERE layer = ?", (row,)).fetchone(), config
        )
        merged = dict(read("SELECT domain, names FROM merged WHERE layer = ?", (row,)).fetchall())
        sets = {
            domain: DomainStatistics(
                *_pair(pair, config, statistics_from_bytes),
                steps,
                bool(frozen),
                names_from_bytes(merged.get(domain, b"")),
            )
            for domain, *pair, steps, frozen in read(
                "SELECT domain, mean, var, num_of_props, frozen FROM statistics WHERE layer = ?", (row,)
            )
        }
        blank = blank_state(config)
        own = with_statistics(
            LayerState(
                scale, bias, blank.mean, blank.var, scale_grad, bias_grad,
                version=version, initialized=bool(initialized),
            ),
            sets.pop(""),
        )  # fmt: skip
        record = LayerRecord(LayerKey(namespace, name, uid), config, own, bool(train), sets)
        self._written[row] = record
        return record


def hold(path: Path) -> int:
    """Hold a file for this process, and say in it who does; return its descriptor.

    Raises:
        StartError: Another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 512, 0).decode("utf-8", "replace").strip() or "another process"
            raise StartError(
                f"the state in {path.parent} is used by {holder}: stop that server, or pass another --state"
            ) from None
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def prepare(database: sqlite3.Connection, path: Path, durability: str) -> None:
    """Make the file ready, of this release's version.

    Raises:
        StartError: It is of a newer release, of something else, or damaged; or it is of an earlier one, and there is
            no room to bring it to this one's layout.
    """
    # Alone from the first access on, so that the log's index is in this process's memory: no file is shared.
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or version or tables):
        raise StartError(f"{path} is not a state of sharednorm (expected: one, or an empty directory)")
    refuse_unknown(database, path, version, FILE_VERSION)
    database.execute("PRAGMA temp_store = MEMORY")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}")
    database.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
    database.execute("PRAGMA foreign_keys = ON")
    (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise StartError(f"the state in {path} is damaged ({found}): put a backup in its place")
    steps = [_SCHEMA, *MIGRATIONS][version:]
    if steps:
        copy = keep_copy(database, path, version) if version else None
        statements = [statement for step in steps for statement in step]
        migrate(database, path, copy, [*statements, f"PRAGMA application_id = {APPLICATION_ID}"], FILE_VERSION)


def _counters(record: LayerRecord) -> tuple[bool, bool, int]:
    return record.train, record.state.initialized, record.state.version


def _to_blob(vector: Vector) -> bytes:
    return vector.astype("<f4", copy=False).tobytes()


def _from_blob(blob: bytes) -> Vector:
    vector = np.frombuffer(blob, "<f4").astype(np.float32)
    vector.setflags(write=False)
    return vector


def _to_wide_blob(vector: npt.NDArray[np.float64]) -> bytes:
    return vector.astype("<f8", copy=False).tobytes()


def _from_wide_blob(blob: bytes) -> npt.NDArray[np.float64]:
    return np.frombuffer(blob, "<f8").astype(np.float64)


def _to_sums(blob: bytes) -> npt.NDArray[np.float64]:
    return _from_wide_blob(blob).reshape(2, -1)


def _to_step(count: int | None, mean: bytes, m2: bytes, scale: bytes, bias: bytes) -> TakenStep | None:
    if count is None:
        return None
    moments = Moments(count, _from_wide_blob(mean), _from_wide_blob(m2))
    return TakenStep(moments, _from_blob(scale), _from_blob(bias))


def _pair(
    blobs: Iterable[bytes], config: LayerConfig, read: Callable[[bytes], Vector] = _from_blob
) -> tuple[Vector, Vector]:
    one, two = map(read, blobs)
    if not one.size == two.size == config.maps:
        raise ValueError(f"a vector of {one.size} or {two.size} values, of a layer of {config.maps} maps")
    return one, two
