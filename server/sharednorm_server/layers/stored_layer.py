"""Layers in memory: their current record, one lock, and the session changes that are remembered with them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from sharednorm_server.layers.idempotency import IdempotencyTable
from sharednorm_server.layers.layer import Layer, not_found
from sharednorm_server.observability.instrumentation import STORE, spending
from sharednorm_server.store.base import CommitHandle, ExclusiveStore, LayerRecord, Store
from sharednorm_server.store.records import CallKey, LastChange
from sharednorm_server.store.snapshots import SnapshotInfo, SnapshotPolicy

T = TypeVar("T")


class StoredLayer(Layer):
    """A layer in memory, whose record a store keeps.

    Args:
        record: The current record.
        store: Which keeps it.
        ledger: The changes of sessions that are known here.
        policy: When snapshots are taken.
        taken: The snapshots that there are.
        on_steps: Called with how many steps a commit has taken.
    """

    def __init__(
        self,
        record: LayerRecord,
        store: Store,
        ledger: IdempotencyTable,
        policy: SnapshotPolicy,
        taken: Sequence[SnapshotInfo] = (),
        on_steps: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.key = record.key
        self._on_steps = on_steps
        self._ledger = ledger
        self._policy = policy
        self._taken = list(taken)
        # The current record, None once the layer is deleted; and what says when it is committed, None if it is.
        self._now: tuple[LayerRecord | None, CommitHandle | None] = record, None
        self._snapshots = store
        self._lock = threading.Lock()

    @property
    def parent(self) -> Layer:
        """The layer itself."""
        return self

    @property
    def latest(self) -> LayerRecord:
        """The current record, which the store may not have committed yet."""
        record, _ = self._now
        if record is None:
            raise not_found(self.key)
        return record

    def committed(self) -> LayerRecord:
        """Wait until the store has committed the current record, and return it."""
        record, handle = self._now
        if record is None:
            raise not_found(self.key)
        if handle is not None:
            _wait(handle)
        return record

    def find_change(self, call: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key, if it was; only while holding the layer."""
        return self._ledger.find(call, content)

    def last_change_of(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, if one is remembered; only while holding the layer."""
        return self._ledger.last(session)

    def take_snapshot(self, record: LayerRecord) -> None:
        """Keep a copy of the current record, to go back to, unless there is one of its version. While holding it."""
        state = record.state
        if self._taken and state.version <= self._taken[-1].version:
            return
        taken = [*self._taken, SnapshotInfo(state.version, self._policy.clock(), state.num_of_props)]
        expired = self._policy.expired(taken)
        self._snapshots.take_snapshot(record, taken[-1].taken, [info.version for info in expired])
        self._taken = [info for info in taken if info not in expired]

    @abstractmethod
    def revalidate(self, *, strong: bool) -> bool:
        """Bring the current record up to date, if others change the layer; return False if it is not there any more.

        Args:
            strong: Whether a copy that may be a moment old is not good enough.
        """

    def mark_deleted(self) -> None:
        """Mark the layer as deleted. Only while holding it."""
        self._now = None, None


class ExclusiveLayer(StoredLayer):
    """A layer of a store that no other server uses: the record in memory is the newest there is.

    Args:
        record: The current record.
        store: Which keeps it.
        ledger: The changes of all sessions.
        policy: When snapshots are taken.
        taken: The snapshots that there are.
        on_steps: Called with how many steps a commit has taken.
    """

    def __init__(
        self,
        record: LayerRecord,
        store: ExclusiveStore,
        ledger: IdempotencyTable,
        policy: SnapshotPolicy,
        taken: Sequence[SnapshotInfo] = (),
        on_steps: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(record, store, ledger, policy, taken, on_steps)
        self._store = store

    @contextmanager
    def exclusive(self) -> Iterator[LayerRecord]:
        """Hold the layer, so that no other thread changes it; gives its current record.

        The wait for the commit of a change that was made meanwhile comes after the layer has been let go of: the next
        change can be made, and is committed with this one or after it.
        """
        with self._lock:
            _, before = self._now
            try:
                yield self.latest
            finally:
                _, handle = self._now
        if handle is not None and handle is not before:
            _wait(handle)

    def attempt(self, act: Callable[[LayerRecord], T]) -> T:
        """Hold the layer, and act on its current record; wait until what is current then is in the store.

        That is what it has committed; or what another call has, on which its answer may depend.
        """
        with self._lock:
            found = act(self.latest)
            _, handle = self._now
        if handle is not None:
            _wait(handle)
        return found

    def end_session(self, session: bytes, ended: Callable[[LastChange | None], LastChange]) -> LastChange | None:
        """Return the last change of a session of another server, which has ended with its process."""
        del ended
        with self.exclusive():
            found = self._ledger.last(session)
        self.committed()
        return found

    def commit(self, record: LayerRecord, call: CallKey | None = None, change: LastChange | None = None) -> None:
        """Make a record the current one, and have the store commit it. Only while holding the layer."""
        note = None if call is None or change is None else self._ledger.note(call, change)
        before, _ = self._now
        handle = self._store.put(record, note)
        if handle is None or before is None:
            raise not_found(self.key)
        if note is not None:
            self._ledger.remember(note)
        self._now = record, handle
        self._on_steps(record.state.version - before.state.version)
        policy = self._policy
        if policy.every and (not self._taken or policy.clock() >= self._taken[-1].taken + policy.every):
            self.take_snapshot(record)

    def revalidate(self, *, strong: bool) -> bool:
        """Return whether the layer is there: no other server changes it."""
        del strong
        return self._now[0] is not None


def _wait(handle: CommitHandle) -> None:
    with spending(STORE, "keep"):
        handle.wait()
