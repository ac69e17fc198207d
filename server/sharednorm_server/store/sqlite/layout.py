"""What brings a file of SQLite to another layout: a copy first, then one transaction; and what refuses a file.

A file says its layout (`PRAGMA user_version`), and in the table `server` what else a reader has to know: `features`,
words for what its contents use, of which a release that does not know one refuses the file; and `backup`, the name of
the copy that was made before its layout was changed. Every later layout has both, so that each release from the first
of them on can name the way back when it refuses a file.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sharednorm_server.errors import StartError
from sharednorm_server.store.codec import widened

# What the contents of a file may use, beyond its layout, that this release reads.
FEATURES: frozenset[str] = frozenset()

# Of the file's size, so much has to be free: for the copy 1; for the log of the transaction 2, since vectors of
# statistics take twice their room at the most; and 1 by which the file may grow when the log is brought into it.
_ROOM = 4

_log = logging.getLogger(__name__)


def refuse_unknown(database: sqlite3.Connection, path: Path, version: int, known: int) -> None:
    """See that this release can read a file.

    Raises:
        StartError: It has a newer layout, or uses what this release does not know.
    """
    if version < known:
        return
    way_back = ""
    copy = kept_copy(database, path)
    if copy is not None:
        way_back = (
            f". To go back to the state from before its layout was changed, put {copy} into an empty directory as "
            f"{path.name}"
        )
    if version > known:
        raise StartError(
            f"the state in {path} is of file version {version}, and this release knows {known}: use the release "
            f"that wrote it, or a newer one{way_back}"
        )
    (words,) = database.execute("SELECT features FROM server").fetchone()
    unknown = sorted(set(words.split()) - FEATURES)
    if unknown:
        raise StartError(
            f"the state in {path} uses {', '.join(unknown)}, which this release does not know: use the release that "
            f"wrote it, or a newer one{way_back}"
        )


def kept_copy(database: sqlite3.Connection, path: Path) -> Path | None:
    """Return the copy that was made before a file's layout was changed; None: there is none, or it is gone."""
    try:
        (name,) = database.execute("SELECT backup FROM server").fetchone()
    except sqlite3.Error:  # a layout may be so new that even this is another
        return None
    copy = None if name is None else path.with_name(name)
    return copy if copy is not None and os.path.lexists(copy) else None


def keep_copy(database: sqlite3.Connection, path: Path, version: int) -> Path:
    """Copy a file of an earlier layout, completely and onto the disk, to a new file beside it; return that.

    Raises:
        StartError: There is no room for it, or for the change of the layout. Nothing has changed.
    """
    (pages,) = database.execute("PRAGMA page_count").fetchone()
    (page,) = database.execute("PRAGMA page_size").fetchone()
    needed, free = _ROOM * pages * page, shutil.disk_usage(path.parent).free
    if free < needed:
        mib = 1 << 20
        raise _unchanged(path, version, f"{-(-needed // mib)} MiB have to be free for that, and {free // mib} are")
    number, copy = 0, path.with_name(f"{path.stem}.layout-{version}{path.suffix}")
    while os.path.lexists(copy):
        number += 1
        copy = path.with_name(f"{path.stem}.layout-{version}-{number}{path.suffix}")
    # Under another name until it is complete: what has this one, of an attempt that was killed, is worth nothing.
    part = path.with_name(f"{path.stem}.layout-{version}.part")
    parts = part, part.with_name(f"{part.name}-journal")
    try:
        for each in parts:
            each.unlink(missing_ok=True)
        database.execute("VACUUM INTO ?", (str(part),))
        sync(part)
        part.rename(copy)
        sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        for each in (*parts, copy):
            with suppress(OSError):
                each.unlink(missing_ok=True)
        raise _unchanged(path, version, f"the copy that comes first cannot be written: {error}") from error
    return copy


def migrate(
    database: sqlite3.Connection, path: Path, copy: Path | None, statements: Iterable[str], version: int
) -> None:
    """Bring a file to this release's layout in one transaction, which is on the disk afterwards.

    Args:
        database: The file.
        path: Where it is.
        copy: The copy of what it was; None: it is new.
        statements: What changes it.
        version: The layout that it has then.

    Raises:
        StartError: It is as it was.
        sqlite3.Error: The disk has failed in the commit, and the next start finds out what it has.
    """
    (before,) = database.execute("PRAGMA user_version").fetchone()
    (synchronous,) = database.execute("PRAGMA synchronous").fetchone()
    database.create_function("widened", 1, widened, deterministic=True)
    if copy is not None:  # whatever the durability: power that goes away must not leave another file than the log says
        database.execute("PRAGMA synchronous = FULL")
    database.execute("BEGIN IMMEDIATE")
    try:
        for statement in statements:
            database.execute(statement)
        if copy is not None:
            database.execute("UPDATE server SET backup = ?", (copy.name,))
        database.execute(f"PRAGMA user_version = {version}")
    except sqlite3.Error as error:
        with suppress(sqlite3.Error):  # SQLite may have rolled back by itself
            database.execute("ROLLBACK")
        if copy is None:
            raise
        copy.unlink()  # of which the file has no other contents
        raise _unchanged(path, before, str(error)) from error
    database.execute("COMMIT")
    if copy is not None:
        database.execute(f"PRAGMA synchronous = {synchronous}")
        _log.warning("state migrated from layout %d to %d; backup: %s", before, version, copy)


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unchanged(path: Path, version: int, why: str) -> StartError:
    return StartError(
        f"the state in {path} is of layout {version}, and could not be brought to the one of this release: {why}. It "
        "is as it was (expected: room on its disk; the release that wrote it can go on with it)"
    )
