"""Which layers are alive, found by their names; whichever kind of store remembers them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from sharednorm.errors import DataLoss, LayerNotFound, LimitExceeded
from sharednorm_server.layers.idempotency import DEFAULT_MAX_SESSIONS, IdempotencyTable
from sharednorm_server.layers.layer import Layer, LayerInDomain, lost, not_found
from sharednorm_server.layers.shared_layer import SharedLayer
from sharednorm_server.layers.stored_layer import ExclusiveLayer, StoredLayer
from sharednorm_server.store.base import AnyStore, LayerKey, LayerRecord, SharedStore
from sharednorm_server.store.records import NUMBER_BYTES
from sharednorm_server.store.snapshots import SnapshotPolicy

DEFAULT_MAX_LAYERS = 10_000
DEFAULT_MAX_STALENESS = 1.0


class _Opening:
    # One name that threads open, create or delete a layer of; they do so one after the other.
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0


class LayerRegistry:
    """Finds layers by name.

    The registry's lock guards its tables, and is never held during a call of the store. A thread that reads a layer
    from the store, creates or deletes one, holds its name (`_alone`), so that other names do not wait for it. A name is
    held before a layer's lock is taken, and that before the registry's.

    Args:
        store: What remembers them.
        max_sessions: Sessions whose last changes each layer remembers.
        policy: When snapshots are taken.
        max_layers: Layers of a namespace.
        max_staleness: Longest time, in seconds, that a copy of a layer is used without asking the shared store.
    """

    def __init__(
        self,
        store: AnyStore,
        max_sessions: int = DEFAULT_MAX_SESSIONS,
        policy: SnapshotPolicy | None = None,
        max_layers: int = DEFAULT_MAX_LAYERS,
        max_staleness: float = DEFAULT_MAX_STALENESS,
    ) -> None:
        self._max_layers = max_layers
        self._max_staleness = max_staleness
        self._store = store
        self._shared = store if isinstance(store, SharedStore) else None
        self._policy = policy or SnapshotPolicy()
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._layers: dict[LayerKey, StoredLayer] = {}
        self._openings: dict[LayerKey, _Opening] = {}
        self._room = threading.Condition()
        self._creating: Counter[str] = Counter()  # layers whose creation has begun, by namespace
        self._counting = threading.Lock()
        self._steps = 0
        if self._shared is not None:
            self._shared.on_changed(self._changed)

    @property
    def steps(self) -> int:
        """How many steps have been taken, of all layers, since the server was started."""
        return self._steps

    def alive(self) -> list[StoredLayer]:
        """Return the layers that a call has asked for since the server was started, in no order."""
        with self._lock:
            return list(self._layers.values())

    def open_session(self) -> bytes:
        """Return the number of a new session, the first half of what its changes are known by."""
        return self._store.open_session().to_bytes(NUMBER_BYTES, "big")

    def find(self, key: LayerKey) -> Layer:
        """Return a layer, seen in the key's domain, which may not be there.

        Raises:
            DataLoss: It is older than the caller has been told, or is gone and was not deleted.
            LayerNotFound: There is none of that name, or it is not the one that the key's `uid` means.
        """
        layer = self._find(key)
        return LayerInDomain(layer, key.domain) if key.domain else layer

    def _find(self, key: LayerKey) -> StoredLayer:
        there = self._layers.get(key)
        if there is None:
            with self._alone(key):
                there = self._layers.get(key)  # another thread has opened it, perhaps a while ago
                layer = self._open(key) if there is None else there
        else:
            layer = there
        if there is not None and self._shared is not None:
            layer = self._revalidated(there, key)
        if layer is None:
            raise self._missing(key)
        if key.uid and key.uid != layer.key.uid:
            raise LayerNotFound(
                f"{key} was deleted, and another one has its name now (expected: a handle of that one)",
                {"namespace": key.namespace, "name": key.name},
            )
        version = layer.latest.state.version
        if key.seen > version:
            raise DataLoss(
                f"{key} is at version {version}, and this handle was told of version {key.seen}: steps that were "
                "answered are lost, since an older state was put in place (expected: the newest one; a new handle goes "
                "on from here)",
                {"version": str(version), "seen": str(key.seen)},
            )
        return layer

    def create(self, key: LayerKey, make: Callable[[], LayerRecord]) -> tuple[LayerRecord, bool]:
        """Return the record of a layer, and whether this call created it.

        Args:
            key: Its name.
            make: Returns the record of a new layer.

        Raises:
            LimitExceeded: It would be created, and its namespace has as many as it may have.
        """
        while True:
            layer = self._layers.get(key)
            with suppress(LayerNotFound):  # it is being deleted
                if layer is not None and layer.revalidate(strong=True):
                    return layer.committed(), False
            with self._alone(key):
                self._forget(key, layer)
                if self._layers.get(key) is None:  # else another thread has opened it
                    record = self._create(key, make)
                    if record is not None:
                        return record
            # Another server has deleted it meanwhile, or it has to be seen whether the copy is new enough.

    def _create(self, key: LayerKey, make: Callable[[], LayerRecord]) -> tuple[LayerRecord, bool] | None:
        """Create a layer that is not in memory, or open it; None: it is gone again. Only while holding the name."""
        # A store of one server knows all names, so that it need not be asked before.
        layer = None if self._shared is None else self._open(key)
        if layer is None:
            record = make()
            try:
                with self._reserved(key.namespace):
                    created = self._store.create(record)
            except LimitExceeded:
                layer = self._open(key)
                if layer is None:
                    raise
            else:
                if created:
                    self._add(key, record, new=True)
                    return record, True
                layer = self._open(key)
        with suppress(LayerNotFound):
            return None if layer is None else (layer.committed(), False)
        return None

    def delete(self, key: LayerKey) -> Layer:
        """Forget a layer with all its domains, and return what it was.

        Raises:
            LayerNotFound: There is none of that name.
        """
        layer = self._find(key)
        with self._alone(key), layer.exclusive():
            self._store.delete(layer.key)
            layer.mark_deleted()
            self._forget(key, layer)
        return layer

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        return self._store.page(namespace, after, limit)

    def _count_steps(self, count: int) -> None:
        if count:
            with self._counting:
                self._steps += count

    @contextmanager
    def _alone(self, key: LayerKey) -> Iterator[None]:
        """Hold a name, so that no other thread opens, creates or deletes a layer of it."""
        with self._lock:
            opening = self._openings.setdefault(key, _Opening())
            opening.threads += 1
        try:
            with opening.lock:
                yield
        finally:
            with self._lock:
                opening.threads -= 1
                if not opening.threads:
                    del self._openings[key]

    def _is_full(self, namespace: str) -> bool:
        return self._store.count(namespace) >= self._max_layers

    @contextmanager
    def _reserved(self, namespace: str) -> Iterator[None]:
        """Have room for one more layer of a namespace, among those that other threads create now.

        Raises:
            LimitExceeded: It has as many as it may have.
        """
        if self._shared is not None:  # other servers create layers at the same moment, which this one cannot know
            self._require_room(namespace)
            yield
            return
        with self._room:
            # While creations run that may fail, it is not known whether the last places are taken.
            self._room.wait_for(
                lambda: (
                    self._creating[namespace] == 0
                    or self._store.count(namespace) + self._creating[namespace] < self._max_layers
                )
            )
            self._require_room(namespace)
            self._creating[namespace] += 1
        try:
            yield
        finally:
            with self._room:
                self._creating[namespace] -= 1
                if not self._creating[namespace]:
                    del self._creating[namespace]
                self._room.notify_all()

    def _require_room(self, namespace: str) -> None:
        if self._is_full(namespace):
            raise LimitExceeded(
                f"the namespace {namespace!r} has {self._max_layers} layers (expected: at most max_layers = "
                f"{self._max_layers}; delete some, or start the server with a larger --max-layers)",
                {"limit": "max_layers", "value": str(self._max_layers)},
            )

    def _revalidated(self, layer: StoredLayer, key: LayerKey) -> StoredLayer | None:
        # What a copy says that is not the newest is not told to a caller that may know better.
        found: StoredLayer | None = layer
        while found is not None:
            other = bool(key.uid) and key.uid != found.key.uid
            if found.revalidate(strong=key.strong or other) and (
                key.seen <= found.latest.state.version or found.revalidate(strong=True)
            ):
                return found
            with self._alone(key):
                self._forget(key, found)
                found = self._layers.get(key)
                if found is None:
                    return self._open(key)
        return None

    def _forget(self, key: LayerKey, layer: StoredLayer | None) -> None:
        with self._lock:
            if layer is not None and self._layers.get(key) is layer:
                self._layers.pop(key, None)  # what another server has deleted goes without the lock

    def _changed(self, key: LayerKey | None, deleted: bool) -> None:
        # By another server. No lock is taken here: its holder may wait for the store, which calls this.
        layers = list(self._layers.values()) if key is None else [self._layers.get(key)]
        for layer in layers:
            if isinstance(layer, SharedLayer):
                layer.invalidate()
                if deleted:
                    self._layers.pop(layer.key, None)

    def _missing(self, key: LayerKey) -> LayerNotFound | DataLoss:
        if self._shared is not None and key.uid and not self._shared.look(key).deleted:
            return lost(key)
        return not_found(key)

    def _open(self, key: LayerKey) -> StoredLayer | None:
        """Return a layer, which is read from the store if it is not in memory. Only while holding the name."""
        layer = self._layers.get(key)
        if layer is None:
            record = self._store.get(key)
            if record is not None:
                layer = self._add(key, record)
        return layer

    def _add(self, key: LayerKey, record: LayerRecord, *, new: bool = False) -> StoredLayer:
        layer = self._alive(record, new=new)
        with self._lock:
            self._layers[key] = layer
        return layer

    def _alive(self, record: LayerRecord, *, new: bool) -> StoredLayer:
        opened = self._store.session_opened
        store = self._store
        if isinstance(store, SharedStore):
            ledger = IdempotencyTable(self._max_sessions, opened)
            return SharedLayer(record, store, ledger, self._policy, self._count_steps, self._max_staleness)
        if new:  # no session has changed it, and it has no snapshot
            return ExclusiveLayer(
                record, store, IdempotencyTable(self._max_sessions, opened), self._policy, (), self._count_steps
            )
        ledger = IdempotencyTable(self._max_sessions, opened, store.remembered(record.key))
        return ExclusiveLayer(record, store, ledger, self._policy, store.snapshots(record.key), self._count_steps)
