"""Layers that other servers change, too: a copy of each, and changes that are made only to what is the newest.

A change is computed from the copy, and takes the record's place in the store only if that still is the one that it was
computed from; else the copy is brought up to date, and the change is computed again. So steps through several servers
come one after the other, and none is lost, whatever a server believes. Reads use the copy until
another server announces a change of the layer, and for at most `max_staleness` seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sharednorm.errors import DataLoss, ServerBusy
from sharednorm_server.layers.idempotency import IdempotencyTable
from sharednorm_server.layers.layer import lost
from sharednorm_server.layers.stored_layer import StoredLayer
from sharednorm_server.observability.instrumentation import STORE, spending
from sharednorm_server.store.base import LayerKey, LayerRecord, Look, SharedStore
from sharednorm_server.store.records import NUMBER_BYTES, CallKey, LastChange
from sharednorm_server.store.snapshots import SnapshotPolicy

# Each loss is a step that another server has taken; so many in a row are seen only where servers fight for one layer.
_MOST_RACES = 1000

T = TypeVar("T")

_log = logging.getLogger(__name__)


class _Raced(Exception):
    # Another server has changed the layer; nothing was changed here.
    pass


class SharedLayer(StoredLayer):
    """A layer of a store that other servers use as well.

    Args:
        record: What the store had a moment ago.
        store: The store.
        ledger: Which knows some sessions only.
        policy: When snapshots are taken.
        on_steps: Told of each step.
        max_staleness: Longest time, in seconds, that the copy is used without asking the store.
    """

    def __init__(
        self,
        record: LayerRecord,
        store: SharedStore,
        ledger: IdempotencyTable,
        policy: SnapshotPolicy,
        on_steps: Callable[[int], None],
        max_staleness: float,
    ) -> None:
        super().__init__(record, store, ledger, policy, (), on_steps)
        self._shared = store
        self._max_staleness = max_staleness
        self._checked = time.monotonic()  # when the copy was the newest for certain
        self._lost = False  # whether the store has it no more, and nobody has deleted it
        self._doubts = self._settled = 0  # how often it was doubted, and up to which of them it was looked at since

    @property
    def latest(self) -> LayerRecord:
        """The copy.

        Raises:
            LayerNotFound: The layer has been deleted.
            DataLoss: The store has lost it.
        """
        record, _ = self._now
        if record is None and self._lost:
            raise lost(self.key)
        return super().latest

    def invalidate(self) -> None:
        """Mark the copy as stale: another server may have changed the layer. Lock-free."""
        self._doubts += 1

    def revalidate(self, *, strong: bool) -> bool:
        """Bring the copy up to date, unless it is new enough; return False if the layer is not there any more."""
        if self._now[0] is None:
            return False
        asked = time.monotonic()
        if strong or self._is_old(asked):
            with self._lock:
                if self._checked < asked or self._is_old(asked):  # not looked at by somebody else meanwhile
                    self._look()
        return self._now[0] is not None

    def _is_old(self, now: float) -> bool:
        return self._doubts != self._settled or now > self._checked + self._max_staleness

    @contextmanager
    def exclusive(self) -> Iterator[LayerRecord]:
        """Hold the layer, so that nobody else of this server changes it; gives its newest record.

        Raises:
            LayerNotFound: The layer has been deleted.
        """
        with self._lock:
            self._look()
            yield self.latest

    def attempt(self, act: Callable[[LayerRecord], T]) -> T:
        """Do something with the layer's newest record, and perhaps commit another in its place.

        Raises:
            LayerNotFound: The layer has been deleted.
            DataLoss: The store has lost steps of it, or all of it.
            StoreUnavailable: The store cannot be used now.
            ServerBusy: Other servers have changed it again and again.
        """
        with self._lock:
            if self._doubts != self._settled:
                self._look_forward()
            for _ in range(_MOST_RACES):
                try:
                    return act(self.latest)
                except _Raced:  # noqa: PERF203 - each is a step of another server
                    self._look_forward()
        raise ServerBusy(
            f"{self.key} was changed by other servers {_MOST_RACES} times while this one was at one change (expected: "
            "most calls of a layer by one server, as `connect` with several addresses has it)",
            {"retry_seconds": "0.1"},
        )

    def find_change(self, call: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key, by whichever server; only while holding the layer."""
        last = self._ledger.last(call.session)
        if last is None or call.seq != last.seq + 1:  # what is known here may be a moment old; a change will show that
            self._learn(call.session)
        return super().find_change(call, content)

    def last_change_of(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, by whichever server; only within `attempt`."""
        if self._ledger.last(session) is None:
            self._learn(session)
        return self._ledger.last(session)

    def end_session(self, session: bytes, ended: Callable[[LastChange | None], LastChange]) -> LastChange | None:
        """Return the last change of a session of another server, and see that it makes none any more.

        That server may only be slow. What it commits from now on is made of a record that is not the newest, and before
        it tries again, it reads what is kept here.
        """
        if not self._shared.session_opened(int.from_bytes(session[:NUMBER_BYTES], "big")):
            return None  # a number that was made up would, once it is forgotten, make others look forgotten

        def act(record: LayerRecord) -> LastChange | None:
            self._learn(session)
            last = self._ledger.last(session)
            over = ended(last)
            if over is not last:
                self.commit(record.with_state(record.state), CallKey(session, over.seq), over)
            return last

        return self.attempt(act)

    def commit(self, record: LayerRecord, call: CallKey | None = None, change: LastChange | None = None) -> None:
        """Make a record the current one, if what it was made of still is. Only within `attempt`."""
        note = None if call is None or change is None else self._ledger.note(call, change)
        before, sent = self.latest, time.monotonic()
        doubts = self._doubts
        with spending(STORE, "swap"):
            # If this fails, nobody knows whether it was done; then the copy's mark is an old one, which the next change
            # finds out.
            swapped = self._shared.compare_and_set(before, record, note)
        if not swapped:
            raise _Raced
        if note is not None:
            self._ledger.remember(note)
        self._now = record, None
        if self._doubts == doubts:
            self._checked = sent
        self._on_steps(record.state.version - before.state.version)
        self._take_snapshot_if_due(record)

    def _take_snapshot_if_due(self, record: LayerRecord) -> None:
        policy = self._policy
        if policy.every and not self._is_recent():
            self._taken = self._shared.snapshots(self.key)  # another server may have taken one
            if not self._is_recent():
                self.take_snapshot(record)

    def _is_recent(self) -> bool:
        return bool(self._taken) and self._policy.clock() < self._taken[-1].taken + self._policy.every

    def take_snapshot(self, record: LayerRecord) -> None:
        """Keep a copy of the current record, to go back to, unless there is one of its version. While holding it."""
        self._taken = self._shared.snapshots(self.key)
        super().take_snapshot(record)

    def _look(self) -> None:
        """Bring the copy up to date. Only while holding the layer."""
        record = self._now[0]
        if record is None:
            return
        doubts, sent = self._doubts, time.monotonic()
        with spending(STORE, "look"):
            look = self._shared.look(self.key, record)
        self._take(look)
        self._settled, self._checked = doubts, sent

    def _look_forward(self) -> None:
        """Bring the copy up to date.

        Raises:
            DataLoss: What there is now is older than the copy, so that whoever was told of that must not go on.
        """
        version = self.latest.state.version
        self._look()
        if self.latest.state.version < version:
            raise _went_back(self.key, version, self.latest.state.version)

    def _learn(self, session: bytes) -> None:
        with spending(STORE, "look"):
            look = self._shared.look(self.key, self._now[0], session)
        self._ledger.learn(session, look.change, look.floor)
        if look.record is not self._now[0]:
            raise _Raced  # of another moment than the copy

    def _take(self, look: Look) -> None:
        record = self._now[0]
        if look.record is record:
            return
        self._ledger.forget()
        if look.record is None or look.record.key.uid != self.key.uid:
            self._lost = look.record is None and not look.deleted
            self.mark_deleted()
            return
        before = self.latest.state.version
        if look.record.state.version < before:
            _log.warning("%s", _went_back(self.key, before, look.record.state.version))
        self._now = look.record, None


def _went_back(key: LayerKey, before: int, now: int) -> DataLoss:
    return DataLoss(
        f"{key} has gone back from version {before} to {now}: the store has lost steps that were answered, as when it "
        "was started from an older copy (expected: the newest state in place; calls that come now go on from this one)",
        {"version": str(now), "seen": str(before)},
    )
