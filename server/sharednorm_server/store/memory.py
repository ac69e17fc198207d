"""A store that remembers as long as its process lives."""

from __future__ import annotations

import bisect
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from sharednorm.errors import BackupFailed
from sharednorm_server.store.base import CommitHandle, LayerKey, LayerRecord, StoreCounts, without_gradients
from sharednorm_server.store.idempotency import SessionNumbers
from sharednorm_server.store.records import Note, Remembered
from sharednorm_server.store.snapshots import SnapshotInfo


class _AtOnce:
    def wait(self) -> None:
        """Return at once."""


_AT_ONCE = _AtOnce()


class MemoryStore:
    """Keeps records in this process. `kill` loses them; that is what `memory:` means."""

    description = "memory:"
    counts = StoreCounts()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.identity = secrets.token_hex(8)
        numbers = SessionNumbers(1)  # layers of another run do not exist any more
        self.open_session, self.session_opened = numbers.open, numbers.given
        self._records: dict[LayerKey, LayerRecord] = {}
        self._sessions: dict[LayerKey, Remembered] = {}
        self._snapshots: dict[LayerKey, dict[int, tuple[float, LayerRecord]]] = {}
        self._names: dict[str, list[str]] = {}  # of each namespace, in the order of their code points

    def get(self, key: LayerKey) -> LayerRecord | None:
        """Return a layer's record, or None."""
        with self._lock:
            return self._records.get(key)

    def create(self, record: LayerRecord) -> bool:
        """Keep a new layer's record; return False, and change nothing, if its key exists."""
        with self._lock:
            if record.key in self._records:
                return False
            self._records[record.key] = record
            bisect.insort(self._names.setdefault(record.key.namespace, []), record.key.name)
            return True

    def namespaces(self) -> list[str]:
        """Return the namespaces that have layers, in the order of their names."""
        with self._lock:
            return sorted(namespace for namespace, names in self._names.items() if names)

    def count(self, namespace: str) -> int:
        """Return how many layers a namespace has."""
        with self._lock:
            return len(self._names.get(namespace, ()))

    def remembered(self, key: LayerKey) -> Remembered:
        """Return what is kept of the sessions that have changed a layer that is there."""
        with self._lock:
            return self._sessions.get(key, Remembered()).copy()

    def put(self, record: LayerRecord, note: Note | None = None) -> CommitHandle | None:
        """Replace an existing layer's record, and what is known of a session; return None if its key does not exist."""
        with self._lock:
            if record.key not in self._records:
                return None
            self._records[record.key] = record
            if note is not None:
                self._sessions.setdefault(record.key, Remembered()).take(note)
            return _AT_ONCE

    def take_snapshot(self, record: LayerRecord, taken: float, drop: Sequence[int]) -> None:
        """Keep a copy of a record that was put, unless there is one of its version."""
        with self._lock:
            if record.key in self._records:
                kept = self._snapshots.setdefault(record.key, {})
                kept.setdefault(record.state.version, (taken, without_gradients(record)))
                for version in drop:
                    kept.pop(version, None)

    def snapshots(self, key: LayerKey) -> list[SnapshotInfo]:
        """Return what is known of a layer's snapshots, the oldest first."""
        with self._lock:
            kept = self._snapshots.get(key, {}).items()
            return [SnapshotInfo(version, taken, record.state.num_of_props) for version, (taken, record) in kept]

    def snapshot(self, key: LayerKey, version: int) -> LayerRecord | None:
        """Return a layer as it was at a version that there is a snapshot of, without gradients."""
        with self._lock:
            found = self._snapshots.get(key, {}).get(version)
            return None if found is None else found[1]

    def back_up(self) -> tuple[Path, int]:
        """Refuse: there is nothing that a file could bring back.

        Raises:
            BackupFailed: Always.
        """
        raise BackupFailed("the state is memory:, of which there is no copy (expected: a server with --state sqlite:)")

    def delete(self, key: LayerKey) -> bool:
        """Forget a layer; return False if its key does not exist."""
        with self._lock:
            if self._records.pop(key, None) is None:
                return False
            self._sessions.pop(key, None)
            self._snapshots.pop(key, None)
            names = self._names[key.namespace]
            del names[bisect.bisect_left(names, key.name)]
            if not names:
                del self._names[key.namespace]
            return True

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        with self._lock:
            names = self._names.get(namespace, [])
            start = bisect.bisect_right(names, after)
            return [self._records[LayerKey(namespace, name)] for name in names[start : start + limit]]

    def on_failed(self, callback: Callable[[str], None]) -> None:
        """Never call it: memory does not fail."""

    def on_trouble(self, callback: Callable[[str], None]) -> None:
        """Never call it."""

    def close(self) -> None:
        """Nothing to let go of."""
