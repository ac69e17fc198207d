"""Which layers are alive, found by their names; whichever kind of store remembers them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

from sharednorm.errors import DataLoss, LayerNotFound, LimitExceeded
from sharednorm_server.layers.idempotency import DEFAULT_MAX_SESSIONS, Ledger
from sharednorm_server.layers.layer import Layer, LayerInDomain, lost, not_found
from sharednorm_server.layers.shared_layer import SharedLayer
from sharednorm_server.store.base import LayerKey, LayerRecord, OwnStore, SharedStore, Store
from sharednorm_server.store.records import NUMBER_BYTES
from sharednorm_server.store.snapshots import SnapshotPolicy

DEFAULT_MAX_LAYERS = 10_000
DEFAULT_MAX_AGE = 1.0


class LayerRegistry:
    """Finds layers by name. Where both locks are taken, the layer's comes first and the registry's second.

    Args:
        store: What remembers them.
        max_sessions: Sessions whose last changes each layer remembers.
        policy: When snapshots are taken.
        max_layers: Layers of a namespace.
        max_age: Seconds that a copy of a layer may be old which other servers change, too.
    """

    def __init__(
        self,
        store: Store,
        max_sessions: int = DEFAULT_MAX_SESSIONS,
        policy: SnapshotPolicy | None = None,
        max_layers: int = DEFAULT_MAX_LAYERS,
        max_age: float = DEFAULT_MAX_AGE,
    ) -> None:
        self._max_layers = max_layers
        self._max_age = max_age
        self._store = store
        self._shared = store if isinstance(store, SharedStore) else None
        self._policy = policy or SnapshotPolicy()
        self._max_sessions = max_sessions
        self._lock = threading.Lock()
        self._layers: dict[LayerKey, Layer] = {}
        self._counting = threading.Lock()
        self._steps = 0
        if self._shared is not None:
            self._shared.on_changed(self._changed)

    @property
    def steps(self) -> int:
        """How many steps have been taken, of all layers, since the server was started."""
        return self._steps

    def alive(self) -> list[Layer]:
        """Return the layers that somebody has asked for since the server was started, in no order."""
        with self._lock:
            return list(self._layers.values())

    def open_session(self) -> bytes:
        """Return the number of a new session, the first half of what its changes are known by."""
        return self._store.open_session().to_bytes(NUMBER_BYTES, "big")

    def find(self, key: LayerKey) -> Layer:
        """Return a layer, seen in the key's domain, which may not be there.

        Raises:
            DataLoss: It is older than whoever asks has been told, or is gone and was not deleted.
            LayerNotFound: There is none of that name, or it is not the one that the key's `uid` means.
        """
        layer = self._layers.get(key)
        if layer is None:
            with self._lock:
                layer = self._alive(key)
        elif self._shared is not None:
            layer = self._freshened(layer, key)
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
        return LayerInDomain(layer, key.domain) if key.domain else layer

    def create(self, key: LayerKey, make: Callable[[], LayerRecord]) -> tuple[LayerRecord, bool]:
        """Return the record of a layer, and whether this call made it; only then is `make` called.

        Raises:
            LimitExceeded: It would be made, and its namespace has as many as it may have.
        """
        while True:
            layer = self._layers.get(key)
            if layer is not None and layer.freshen(strong=True):
                return layer.record, False
            with self._lock:
                self._forget(key, layer)
                layer = self._alive(key)
                if layer is not None:
                    return layer.record, False
                self._require_room(key.namespace)
                record = make()
                if self._store.create(record):
                    self._layers[key] = self._bring_to_life(record)
                    return record, True
            # Another server has made it meanwhile.

    def delete(self, key: LayerKey) -> Layer:
        """Forget a layer with all its domains, and return what it was.

        Raises:
            LayerNotFound: There is none of that name.
        """
        layer = self.find(key).whole
        with layer.exclusive(), self._lock:
            self._store.delete(layer.key)
            layer.bury()
            self._layers.pop(key, None)
        return layer

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        return self._store.page(namespace, after, limit)

    def _count_steps(self, count: int) -> None:
        if count:
            with self._counting:
                self._steps += count

    def _require_room(self, namespace: str) -> None:
        if self._store.count(namespace) >= self._max_layers:
            raise LimitExceeded(
                f"the namespace {namespace!r} has {self._max_layers} layers (expected: at most max_layers = "
                f"{self._max_layers}; delete some, or start the server with a larger --max-layers)",
                {"limit": "max_layers", "value": str(self._max_layers)},
            )

    def _freshened(self, layer: Layer, key: LayerKey) -> Layer | None:
        # What a copy says that is not the newest is not told to somebody who may know better.
        other = bool(key.uid) and key.uid != layer.key.uid
        if layer.freshen(strong=key.strong or other) and (
            key.seen <= layer.latest.state.version or layer.freshen(strong=True)
        ):
            return layer
        with self._lock:
            self._forget(key, layer)
            return self._alive(key)

    def _forget(self, key: LayerKey, layer: Layer | None) -> None:
        if layer is not None and self._layers.get(key) is layer:
            del self._layers[key]

    def _changed(self, key: LayerKey | None, deleted: bool) -> None:
        # By another server. No lock is taken here: whoever has one may wait for the store, which calls this.
        layers = list(self._layers.values()) if key is None else [self._layers.get(key)]
        for layer in layers:
            if isinstance(layer, SharedLayer):
                layer.doubt()
                if deleted:
                    self._layers.pop(layer.key, None)

    def _missing(self, key: LayerKey) -> LayerNotFound | DataLoss:
        if self._shared is not None and key.uid and not self._shared.look(key).deleted:
            return lost(key)
        return not_found(key)

    def _alive(self, key: LayerKey) -> Layer | None:
        # Under the registry's lock, so that two threads never make two locks for one layer.
        layer = self._layers.get(key)
        if layer is None:
            record = self._store.get(key)
            if record is not None:
                layer = self._layers[key] = self._bring_to_life(record)
        return layer

    def _bring_to_life(self, record: LayerRecord) -> Layer:
        opened = self._store.session_opened
        if self._shared is not None:
            ledger = Ledger(self._max_sessions, opened)
            return SharedLayer(record, self._shared, ledger, self._policy, self._count_steps, self._max_age)
        own = cast("OwnStore", self._store)
        ledger = Ledger(self._max_sessions, opened, own.remembered(record.key))
        return Layer(record, own, ledger, self._policy, own.snapshots(record.key), self._count_steps)
