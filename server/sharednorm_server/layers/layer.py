"""The layers that are alive: one lock and one current record each.

The store is what remembers; a `Layer` is what makes the changes of one layer happen one after the other,
while those of different layers happen at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from sharednorm.errors import DataLoss, LayerNotFound
from sharednorm_server.layers.idempotency import Content, Ledger, digest, last_change
from sharednorm_server.observability.instrumentation import STORE, spending
from sharednorm_server.store.base import Kept, LayerKey, LayerRecord, OwnStore
from sharednorm_server.store.records import CallKey, LastChange
from sharednorm_server.store.snapshots import SnapshotInfo, SnapshotPolicy

T = TypeVar("T")


class Layer:
    """One layer that is alive. A layer that is deleted and made again is another object."""

    def __init__(
        self,
        record: LayerRecord,
        store: OwnStore,
        ledger: Ledger,
        policy: SnapshotPolicy,
        taken: Sequence[SnapshotInfo] = (),
        on_steps: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.key = record.key
        self._on_steps = on_steps
        self._ledger = ledger
        self._policy = policy
        self._taken = list(taken)  # the snapshots that there are
        # The current record, None once the layer is deleted; and what says when it is kept, None if it is.
        self._now: tuple[LayerRecord | None, Kept | None] = record, None
        self._store = store
        self._lock = threading.Lock()

    @property
    def whole(self) -> Layer:
        """The layer, whichever of its domains this is."""
        return self

    @property
    def latest(self) -> LayerRecord:
        """The current record, all of one moment. The store may not have kept it yet, so that nobody is told of it.

        Raises:
            LayerNotFound: The layer has been deleted.
        """
        record, _ = self._now
        if record is None:
            raise not_found(self.key)
        return record

    def committed(self) -> LayerRecord:
        """Wait until the store has kept the current record, and return it, all of one moment.

        Raises:
            LayerNotFound: The layer has been deleted.
            StoreFailed: It is not known whether it is kept.
        """
        record, kept = self._now
        if record is None:
            raise not_found(self.key)
        if kept is not None:
            _wait(kept)
        return record

    @contextmanager
    def exclusive(self) -> Iterator[LayerRecord]:
        """Hold the layer, so that nobody else changes it; gives its current record.

        What is committed meanwhile is kept when this ends. The wait for that comes after the layer has been let go of:
        the next change can be made, and is kept with this one or after it.

        Raises:
            LayerNotFound: The layer has been deleted.
            StoreFailed: It is not known whether the change is kept.
        """
        with self._lock:
            _, before = self._now
            try:
                yield self.latest
            finally:
                _, kept = self._now
        if kept is not None and kept is not before:
            _wait(kept)

    def attempt(self, act: Callable[[LayerRecord], T]) -> T:
        """Hold the layer, and do something with its current record, which may commit another; wait until that is kept.

        Args:
            act: What. It is called again, with a newer record, where another server has changed the layer meanwhile; so
                what it does to other things than the layer comes behind the commit.
        """
        with self.exclusive() as record:
            return act(record)

    def made(self, call: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key, if it was; only while holding the layer.

        Its caller answers with it after `committed`, which waits until it is kept.

        Raises:
            KeyReused, StepOutOfOrder, SessionExpired: It cannot be made under that key.
        """
        return self._ledger.find(call, content)

    def last_of(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, if one is remembered; only while holding the layer."""
        return self._ledger.last(session)

    def end_session(self, session: bytes, ended: Callable[[LastChange | None], LastChange]) -> LastChange | None:
        """Return the last change of a session of another server, and see that it makes none any more.

        Args:
            session: Which one.
            ended: Makes of its last change the one that says so; the same if it says so already.
        """
        del ended  # whoever could make one is gone with its process
        with self.exclusive():
            found = self._ledger.last(session)
        self.committed()
        return found

    def commit(self, record: LayerRecord, call: CallKey | None = None, change: LastChange | None = None) -> None:
        """Make a record the current one. Only while holding the layer.

        Args:
            record: The record.
            call: The key that the change came under, if any; `made` has said that it is the next one.
            change: What is remembered of it.

        Raises:
            LayerNotFound: The store does not know the layer any more.
            StoreFailed: It keeps nothing any more.
        """
        note = None if call is None or change is None else self._ledger.note(call, change)
        before, _ = self._now
        kept = self._store.put(record, note)
        if kept is None or before is None:
            raise not_found(self.key)
        if note is not None:
            self._ledger.remember(note)
        self._now = record, kept
        self._on_steps(record.state.version - before.state.version)
        policy = self._policy
        if policy.every and (not self._taken or policy.clock() >= self._taken[-1].taken + policy.every):
            self.take_snapshot(record)

    def take_snapshot(self, record: LayerRecord) -> None:
        """Keep a copy of the current record, to go back to, unless there is one of its version. While holding it."""
        state = record.state
        if self._taken and state.version <= self._taken[-1].version:
            return
        taken = [*self._taken, SnapshotInfo(state.version, self._policy.clock(), state.num_of_props)]
        expired = self._policy.expired(taken)
        self._store.take_snapshot(record, taken[-1].taken, [info.version for info in expired])
        self._taken = [info for info in taken if info not in expired]

    def change(self, change: Callable[[LayerRecord], LayerRecord]) -> LayerRecord:
        """Replace the record by what a function makes of it; if that raises, nothing has changed."""
        return self.change_once(None, (), change)[0]

    def change_once(
        self,
        call: CallKey | None,
        asked: Sequence[Content],
        change: Callable[[LayerRecord], LayerRecord],
    ) -> tuple[LayerRecord, bool]:
        """Change the record as `change` does, once for a key; return it, and whether that was done before.

        Args:
            call: The key; None: it is done now.
            asked: What it is asked for, by which a call that comes again is told from another one.
            change: Makes the new record.
        """
        content = b"" if call is None else digest(*asked)

        def act(record: LayerRecord) -> LayerRecord | None:
            if call is not None and self.made(call, content) is not None:
                return None
            changed = change(record)
            self.commit(changed, call, None if call is None else last_change(call, content, changed.state))
            return changed

        changed = self.attempt(act)
        return (self.committed(), True) if changed is None else (changed, False)

    def freshen(self, *, strong: bool) -> bool:
        """Bring the current record up to date, if others change the layer; return False if it is not there any more.

        Args:
            strong: Whether a copy that may be a moment old is not good enough.
        """
        del strong
        return True

    def bury(self) -> None:
        """Mark the layer as deleted. Only while holding it."""
        self._now = None, None


class LayerInDomain(Layer):
    """A layer that is alive, seen with the statistics of one of its domains. Each question gets another one.

    Records that are read here have the domain's statistics, and those that are committed here change them. Where the
    layer has no such domain, that raises LayerNotFound.

    Args:
        layer: The layer.
        domain: The domain.
    """

    def __init__(self, layer: Layer, domain: str) -> None:
        self.key = replace(layer.key, domain=domain)
        self._layer = layer

    @property
    def whole(self) -> Layer:
        """The layer, whichever of its domains this is."""
        return self._layer

    @property
    def latest(self) -> LayerRecord:
        """The current record, which the store may not have kept yet."""
        return self._layer.latest.within(self.key.domain)

    def committed(self) -> LayerRecord:
        """Wait until the store has kept the current record, and return it."""
        return self._layer.committed().within(self.key.domain)

    @contextmanager
    def exclusive(self) -> Iterator[LayerRecord]:
        """Hold the layer, so that nobody else changes it, in whatever domain; gives its current record."""
        with self._layer.exclusive() as record:
            yield record.within(self.key.domain)

    def attempt(self, act: Callable[[LayerRecord], T]) -> T:
        """Hold the layer, and do something with its current record."""
        return self._layer.attempt(lambda record: act(record.within(self.key.domain)))

    def made(self, call: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key, if it was; only while holding the layer."""
        return self._layer.made(call, content)

    def last_of(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, if one is remembered; only while holding the layer."""
        return self._layer.last_of(session)

    def end_session(self, session: bytes, ended: Callable[[LastChange | None], LastChange]) -> LastChange | None:
        """Return the last change of a session of another server, and see that it makes none any more."""
        return self._layer.end_session(session, ended)

    def commit(self, record: LayerRecord, call: CallKey | None = None, change: LastChange | None = None) -> None:
        """Make a record the current one, once the store has kept it. Only while holding the layer."""
        self._layer.commit(record.within(""), call, change)


def _wait(kept: Kept) -> None:
    with spending(STORE, "keep"):
        kept.wait()


def not_found(key: LayerKey) -> LayerNotFound:
    """Return the error for a layer that is not there."""
    return LayerNotFound(
        f"{key} does not exist on this server, or was deleted (expected: the name of one that was created)",
        {"namespace": key.namespace, "name": key.name},
    )


def lost(key: LayerKey) -> DataLoss:
    """Return the error for a layer that is not there, and that nobody has deleted."""
    return DataLoss(
        f"{key} is gone, and nobody has deleted it: the store has lost it (expected: its newest state in place; or a "
        "new layer)",
        {"namespace": key.namespace, "name": key.name},
    )
