"""A store that remembers in a file of SQLite's: what it has said is kept survives the process, or the machine.

One connection, used by one thread at a time, and a transaction for all changes that are waiting. Whoever first waits
for a change leads: commits what has come until then, wakes those whose changes that were, and one of those that have
come meanwhile, to lead the next. So a change that comes alone is committed at once and wakes no thread; many at a time
share a commit, and its write to the disk; and nobody whose change is kept waits for another commit.

On a slow disk those who were woken come back while the next commit has begun, and would share only every other one.
There a leader waits a moment for as many as there were the last time, unless they have not come lately.

A commit that fails ends the store: nobody knows what the disk has, and layers in memory are ahead of it. All that waits
is told so, the process ends, and the next one goes on with what the file has.
"""

from __future__ import annotations

import logging
import os
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from sharednorm.errors import BackupFailed, StoreFailed
from sharednorm_server.errors import StartError
from sharednorm_server.store.base import CommitHandle, LayerKey, LayerRecord, StoreCounts, Whole
from sharednorm_server.store.idempotency import SessionNumbers
from sharednorm_server.store.records import Note, Remembered
from sharednorm_server.store.snapshots import SnapshotInfo
from sharednorm_server.store.sqlite.database import Rows, hold, prepare
from sharednorm_server.store.sqlite.group_commit import Change, Waiter, Works, failed, needed
from sharednorm_server.store.sqlite.layout import kept_copy, sync

FILE_NAME = "sharednorm.sqlite3"
LOCK_NAME = "lock"
BACKUPS = "backups"

# Changes in one transaction; the others wait for the next.
_MOST_CHANGES = 256
# A commit that takes longer than this is one of a slow disk, and the next one is worth a wait for others: for this part
# of what the last one took, behind its end. If less than half of them come, so many commits do not wait for them,
# unless there are suddenly others.
_SLOW_SECONDS = 2e-3
_PATIENCE = 1.5
_COMMITS_WITHOUT = 8

T = TypeVar("T")

_log = logging.getLogger(__name__)


class SqliteStore:
    """Keeps records in a directory, which no other process uses meanwhile.

    Args:
        directory: Where; it is made if it is not there.
        durability: What a change has to survive before it is kept: "os", the end of this process, whichever way; or
            "fsync", that of the machine.

    Attributes:
        earlier: The copy of the file that was made before its layout was changed, if there is one.

    Raises:
        StartError: Another process uses the directory; the file is of a newer release, damaged, or no store; or the
            disk refuses something.
    """

    def __init__(self, directory: Path, durability: str = "os") -> None:
        self.directory = directory
        self.description = f"sqlite://{quote(str(directory))}?durability={durability}"
        self.identity = secrets.token_hex(8)
        self._lock = threading.Lock()  # of what waits, and of the names
        self._committing = threading.Lock()  # of the connection
        self._waiting: list[Change] = []
        self._led = False  # whether a thread commits, or has been woken to
        self._siblings = 0  # changes that may come together: those of the last commit, and that waited at its end
        self._until = 0.0  # when nobody waits for them any more, by `time.perf_counter`
        self._gathered = threading.Event()  # that they are there
        self._without = 0  # commits that do not wait for them any more
        self._names: dict[LayerKey, int] = {}  # the rows of the layers that are there, or will be
        self._counts: Counter[str] = Counter()  # of each namespace
        self._next_row = 1
        self._failed = False
        self.counts = StoreCounts()
        self._callbacks: list[Callable[[str], None]] = []
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = hold(directory / LOCK_NAME)
        except OSError as error:
            raise StartError(f"the state cannot be kept in {directory}: {error.strerror}") from error
        try:
            self._open(directory / FILE_NAME, durability)
        except BaseException:
            os.close(self._held)
            raise

    def _open(self, path: Path, durability: str) -> None:
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                prepare(self._database, path, durability)
                self.earlier = kept_copy(self._database, path)
                self._rows = Rows(self._database)
                self._names = self._rows.names()
                self._numbers = SessionNumbers(self._rows.opened())
            except BaseException:
                self._database.close()
                raise
        except sqlite3.Error as error:
            raise StartError(f"the state in {path} cannot be used: {error}") from error
        self._next_row = max(self._names.values(), default=0) + 1
        self._counts.update(key.namespace for key in self._names)

    def on_failed(self, callback: Callable[[str], None]) -> None:
        """Have a function called once the store has failed for good; it gets the reason."""
        with self._lock:
            self._callbacks.append(callback)

    def on_trouble(self, callback: Callable[[str], None]) -> None:
        """Never call it: a file that cannot be used once has failed for good."""

    def get(self, key: LayerKey) -> LayerRecord | None:
        """Return a layer's record, or None."""
        with self._committing:
            self._commit_all()  # what waits may be of this layer
            row = self._names.get(key)
            if row is None:
                return None
            return self._guarded(lambda: self._rows.find(row))

    def create(self, record: LayerRecord) -> bool:
        """Keep a new layer's record; return False, and change nothing, if its key exists."""
        return self.take_in(Whole(record, Remembered()))

    def open_session(self) -> int:
        """Return the number of a new session."""
        return self._numbers.open()

    def session_opened(self, number: int) -> bool:
        """Return whether a session was given that number."""
        return self._numbers.given(number)

    @property
    def last_session(self) -> int:
        """A number that no session before has a higher one than."""
        return self._numbers.highest

    def begin_sessions_behind(self, number: int) -> None:
        """Give sessions higher numbers than this one from now on."""
        with self._committing:
            self._commit_all()
            run = self._guarded(lambda: self._rows.opened(SessionNumbers.run_behind(number)))
        self._numbers = SessionNumbers(run)

    def whole(self, key: LayerKey) -> Whole | None:
        """Return all that there is of a layer, or None."""
        record = self.get(key)
        if record is None:
            return None
        earlier = [(info.taken, self.snapshot(key, info.version)) for info in self.snapshots(key)]
        snapshots = tuple((taken, each) for taken, each in earlier if each is not None)
        return Whole(record, self.remembered(key), snapshots)

    def take_in(self, whole: Whole) -> bool:
        """Keep a layer with all that comes with it; return False, and change nothing, if its key exists."""
        record, known = whole.record, whole.remembered
        with self._lock:
            if record.key in self._names:
                return False
            row = self._names[record.key] = self._next_row
            self._next_row += 1
            self._counts[record.key.namespace] += 1

            def work() -> None:
                self._rows.insert(row, record)
                for session, change in known.changes.items():
                    self._rows.note(row, Note(session, change, (b"",), known.floor))
                for taken, each in whole.snapshots:
                    self._rows.take_snapshot(row, each, taken, ())

            change = self._begin(record.key, work, put=False)
        change.wait()
        return True

    def namespaces(self) -> list[str]:
        """Return the namespaces that have layers, in the order of their names."""
        with self._lock:
            return sorted(namespace for namespace, count in self._counts.items() if count)

    def count(self, namespace: str) -> int:
        """Return how many layers a namespace has."""
        with self._lock:
            return self._counts[namespace]

    def remembered(self, key: LayerKey) -> Remembered:
        """Return what is kept of the sessions that have changed a layer that is there."""
        with self._committing:
            self._commit_all()
            row = self._names.get(key)
            return Remembered() if row is None else self._guarded(lambda: self._rows.remembered(row))

    def put(self, record: LayerRecord, note: Note | None = None) -> CommitHandle | None:
        """Replace an existing layer's record, and what is known of a session; return what says when both are kept.

        None: there is no such layer, and nothing has changed.
        """
        with self._lock:
            row = self._names.get(record.key)
            if row is None:
                return None
            update = partial(self._rows.update, row, record)
            if note is None:
                return self._begin(record.key, update, put=True)
            noted, at_once = partial(self._rows.note, row, note), partial(self._rows.step, row, record, note)
            return self._begin(record.key, update, noted, at_once, put=True)

    def take_snapshot(self, record: LayerRecord, taken: float, drop: Sequence[int]) -> None:
        """Keep a copy of a record that was put, unless there is one of its version. Who waits next waits for it."""
        with self._lock:
            row = self._names.get(record.key)
            if row is not None:
                self._begin(record.key, partial(self._rows.take_snapshot, row, record, taken, drop), put=False)

    def snapshots(self, key: LayerKey) -> list[SnapshotInfo]:
        """Return what is known of a layer's snapshots, the oldest first."""
        with self._committing:
            self._commit_all()
            row = self._names.get(key)
            return [] if row is None else self._guarded(lambda: self._rows.snapshots(row))

    def snapshot(self, key: LayerKey, version: int) -> LayerRecord | None:
        """Return a layer as it was at a version that there is a snapshot of, without gradients."""
        with self._committing:
            self._commit_all()
            row = self._names.get(key)
            return None if row is None else self._guarded(lambda: self._rows.snapshot(row, version))

    def back_up(self) -> tuple[Path, int]:
        """Copy all that is kept to a file in `backups`, and return it and its size. Commits wait meanwhile.

        Raises:
            BackupFailed: It could not be written; there is no such file then.
        """
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        path = self.directory / BACKUPS / f"{now}-{secrets.token_hex(2)}.sqlite3"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with self._committing:
                if self._failed:
                    raise failed()
                self._database.execute("VACUUM INTO ?", (str(path),))
            for place in (path, path.parent):
                sync(place)
            return path, path.stat().st_size
        except (OSError, sqlite3.Error) as error:
            with suppress(OSError):  # it may never have been there
                path.unlink()
            raise BackupFailed(f"the state cannot be copied to {path}: {error}") from error

    def delete(self, key: LayerKey) -> bool:
        """Forget a layer; return False if its key does not exist."""
        with self._lock:
            row = self._names.pop(key, None)
            if row is None:
                return False
            self._counts[key.namespace] -= 1
            change = self._begin(key, lambda: self._rows.remove(row), put=False)
        change.wait()
        return True

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        with self._committing:
            self._commit_all()
            return self._guarded(lambda: self._rows.page(namespace, after, limit))

    def close(self) -> None:
        """Keep what waits, and let go of the file."""
        with self._committing:
            self._commit_all()
            try:
                if not self._failed:
                    self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                self._database.close()
            except sqlite3.Error as error:
                _log.warning(
                    "the state's log could not be brought into its file, and will be at the next start: %s", error
                )
        os.close(self._held)

    # --- Changes that wait ----------------------------------------------------------------------------

    def _begin(
        self,
        key: LayerKey,
        work: Callable[[], None],
        note: Callable[[], None] | None = None,
        at_once: Callable[[], bool] | None = None,
        *,
        put: bool,
    ) -> Change:
        # Under the lock of what waits: in the order in which they come here they are done.
        if self._failed:
            raise failed()
        change = Change(self.settle, key, work, note, at_once, put=put)
        self._waiting.append(change)
        if len(self._waiting) == self._siblings:
            self._gathered.set()
        return change

    def settle(self, change: Change) -> None:
        """Return when a change is done, and with it all that came before; does it, if nobody else does."""
        waiter = None
        with self._lock:
            if change.done:
                return
            if self._led:
                waiter = Waiter()
                change.waiters.append(waiter)
            self._led = True
        if waiter is not None:
            waiter.wait()
            if not waiter.leads:
                return
        try:
            self._gather()
            while not change.done:
                with self._committing:
                    if not change.done:
                        self._commit()
        finally:
            self._hand_over()

    def _gather(self) -> None:
        """Wait for others, if that is worth it."""
        with self._lock:
            left = self._until - time.perf_counter()
            if left <= 0 or len(self._waiting) >= self._siblings:
                return
            if self._without:
                self._without -= 1
                return
            self._gathered.clear()
        if not self._gathered.wait(left):
            with self._lock:
                if len(self._waiting) < self._siblings / 2:
                    self._without = _COMMITS_WITHOUT

    def _hand_over(self) -> None:
        with self._lock:
            for change in self._waiting:
                if change.waiters:
                    leader = change.waiters.pop(0)
                    leader.leads = True
                    leader.wake()
                    return
            self._led = False

    def _finish(self, changes: list[Change], *, failed: bool) -> None:
        with self._lock:
            for change in changes:
                change.failed, change.done = change.failed or failed, True
                while change.waiters:
                    change.waiters.pop().wake()

    def _commit(self) -> None:
        # With the connection. Whatever comes while this works is for the next one.
        with self._lock:
            batch, self._waiting = self._waiting[:_MOST_CHANGES], self._waiting[_MOST_CHANGES:]
        if not batch:
            return
        kept = False
        try:
            begin = time.perf_counter()
            self._guarded(lambda: self._transact(needed(batch)))
            took, before = time.perf_counter() - begin, self.counts
            self.counts = StoreCounts(before.commits + 1, before.changes + len(batch), before.seconds + took)
            kept = True
            with self._lock:
                siblings = len(batch) + len(self._waiting)
                if siblings > 2 * self._siblings:
                    self._without = 0
                self._siblings = siblings
                self._until = begin + took * (1 + _PATIENCE) if took > _SLOW_SECONDS else 0.0
        except StoreFailed:
            pass  # which those hear of that wait
        finally:
            self._finish(batch, failed=not kept)

    def _commit_all(self) -> None:
        while self._waiting:
            self._commit()

    def _transact(self, works: Works) -> None:
        # One statement is a transaction by itself. Each is a moment in which other threads get the interpreter.
        if len(works) == 1 and works[0][0] is not None and works[0][0]():
            return
        self._database.execute("BEGIN IMMEDIATE")
        for at_once, parts in works:
            if at_once is None or not at_once():
                for part in parts:
                    part()
        self._database.execute("COMMIT")

    def _guarded(self, work: Callable[[], T]) -> T:
        """Do something with the connection; whatever fails there ends the store."""
        if self._failed:
            raise failed()
        try:
            return work()
        except Exception as error:
            self._fail(error)
            raise failed() from error

    def _fail(self, error: Exception) -> None:
        reason = f"the state in {self.directory} cannot be kept any more: {error}"
        _log.critical("%s", reason, exc_info=error)
        with self._lock:
            self._failed = True
            left, self._waiting = self._waiting, []
            callbacks = list(self._callbacks)
        self._finish(left, failed=True)
        for callback in callbacks:
            callback(reason)
