"""What a request means that computes with no tensor: layers and their domains made, found, changed and forgotten."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from sharednorm.core.domains import DomainStatistics, blank_statistics, with_domain, without_domain
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import (
    Moments,
    StateUpdate,
    initial_state,
    merge_delta,
    require_initialized,
    update_params,
    updated,
)
from sharednorm.errors import InvalidConfiguration, SnapshotNotFound
from sharednorm_server.layers.layer import Layer
from sharednorm_server.layers.pagination import name_of_token, page_size, token_of_name
from sharednorm_server.layers.registry import LayerRegistry
from sharednorm_server.layers.validation import require_same_config
from sharednorm_server.store.base import AnyStore, LayerKey, LayerRecord
from sharednorm_server.store.records import CallKey
from sharednorm_server.store.snapshots import SnapshotInfo, SnapshotPolicy


class LayerCatalog:
    """Keeps layers. Every method may be called from many threads at once.

    A method that raises has changed nothing.

    Args:
        store: What remembers.
        max_sessions: Sessions whose last changes each layer remembers, so that a call that comes twice is one change.
        policy: When snapshots are taken; None: as it is by default.
        max_layers: Layers of a namespace.
        max_staleness: Longest time, in seconds, that a copy of a layer is used without asking the shared store.
    """

    def __init__(
        self, store: AnyStore, max_sessions: int, policy: SnapshotPolicy | None, max_layers: int, max_staleness: float
    ) -> None:
        self._store = store
        self._layers = LayerRegistry(store, max_sessions, policy, max_layers, max_staleness)

    def open_session(self) -> bytes:
        """Return the number of a new session, 8 bytes."""
        return self._layers.open_session()

    def create_layer(
        self, key: LayerKey, config: LayerConfig, initial: StateUpdate, *, sscale: float, empty: bool
    ) -> tuple[LayerRecord, bool]:
        """Create a layer, or find the one of that name; return it, and whether this call created it.

        Args:
            key: Its name.
            config: What it, or the one that exists, is configured with.
            initial: State of a new layer. What it leaves open: scale ~ N(1, sscale), bias 0, mean 0, variance 1.
            sscale: Standard deviation of the initial scale.
            empty: Whether a new layer waits for a state.

        Raises:
            ConfigurationMismatch: It exists with another configuration.
            LimitExceeded: The namespace has as many layers as it may have.
            InvalidConfiguration, InvalidShape, LayerEmpty: The state of a new layer is not one, or the key is of a
                domain.
        """
        _require_no_domain(key, "CreateLayer")

        def make() -> LayerRecord:
            state = initial_state(config, sscale, np.random.default_rng(), empty=empty)
            return LayerRecord(
                replace(key, uid=secrets.token_hex(8)),
                config,
                updated(state, config, initial) if _sets_anything(initial) else state,
            )

        record, created = self._layers.create(key, make)
        require_same_config(record.config, config, key)
        return record, created

    def get_layer(self, key: LayerKey) -> LayerRecord:
        """Return all of a layer, of one moment.

        Raises:
            LayerNotFound: There is none of that name. So does every other method that takes a key.
        """
        return self._layers.find(key).committed()

    def layer_config(self, key: LayerKey) -> LayerConfig:
        """Return a layer's configuration, which never changes: from memory, if the layer is there."""
        return self._layers.find(replace(key, strong=False)).latest.config

    def list_layers(self, namespace: str, size: int, page_token: str) -> tuple[list[LayerRecord], str]:
        """Return a page of a namespace's layers, in the order of their names, and the token of the next page.

        Args:
            namespace: Whose layers.
            size: Most layers, 1 to 1000; 0 for 100.
            page_token: "" for the first page.

        Raises:
            InvalidConfiguration: The page size is out of its range.
            InvalidPageToken: The token is none that this method gave for this namespace.
        """
        most = page_size(size)
        records = self._layers.page(namespace, name_of_token(namespace, page_token), most + 1)
        page = records[:most]
        return page, token_of_name(namespace, page[-1].key.name) if len(records) > most else ""

    def list_namespaces(self) -> list[tuple[str, int]]:
        """Return the namespaces that have layers, and how many, in the order of their names."""
        return [(namespace, self._store.count(namespace)) for namespace in self._store.namespaces()]

    def alive(self) -> Sequence[Layer]:
        """Return the layers that a call has asked for since the server was started, in no order."""
        return self._layers.alive()

    def delete_layer(self, key: LayerKey) -> Layer:
        """Forget a layer with all its domains; return what it was.

        Raises:
            InvalidConfiguration: The key is of one domain.
        """
        _require_no_domain(key, "DeleteLayer")
        return self._layers.delete(key)

    # --- Domains ------------------------------------------------------------------------------------

    def create_domain(self, key: LayerKey, initial: StateUpdate) -> tuple[LayerRecord, bool]:
        """Have a layer keep statistics of a domain; return the layer, seen there, and whether this call made them.

        Args:
            key: The layer, and the domain.
            initial: What new statistics begin with. What it leaves open: mean 0, variance 1, no step.

        Raises:
            InvalidName: The domain has no name.
            LimitExceeded: The layer has as many domains as it may have.
            InvalidConfiguration, InvalidShape: What is initial are no statistics of this layer.
        """
        layer = self._layers.find(key).parent

        def act(record: LayerRecord) -> tuple[LayerRecord, bool]:
            if key.domain in record.domains:
                return record.within(key.domain), False
            domains = with_domain(record.domains, key.domain, blank_statistics(record.config, initial))
            changed = replace(record, domains=domains)
            layer.commit(changed)
            return changed.within(key.domain), True

        return layer.attempt(act)

    def list_domains(self, key: LayerKey) -> list[tuple[str, DomainStatistics]]:
        """Return the domains of a layer and what it keeps of each, in the order of their names."""
        return sorted(self._layers.find(key).parent.committed().domains.items(), key=lambda each: each[0])

    def delete_domain(self, key: LayerKey) -> LayerRecord:
        """Forget a domain and its statistics; return the layer.

        Raises:
            InvalidName: The domain has no name.
            LayerNotFound: The layer has no such domain.
        """

        def change(record: LayerRecord) -> LayerRecord:
            return replace(record, domains=without_domain(record.domains, key.domain, str(key)))

        return self._layers.find(key).parent.change(change)

    # --- Snapshots ----------------------------------------------------------------------------------

    def list_snapshots(self, key: LayerKey) -> list[SnapshotInfo]:
        """Return what is known of the states of a layer that there are to go back to, the oldest first."""
        self._layers.find(replace(key, domain=""))
        return self._store.snapshots(key)

    def roll_back(self, key: LayerKey, version: int, call: CallKey | None = None) -> tuple[LayerRecord, bool]:
        """Put an earlier state of a layer in place; return the layer, and whether that was done before.

        What it has now is kept as a snapshot first, unless there is one of its version.

        Raises:
            SnapshotNotFound: There is none of that version.
        """
        layer = self._layers.find(replace(key, domain=""))
        # Read before the layer is held, whose steps would wait for the store otherwise.
        found = self._store.snapshot(key, version)
        there = [] if found is not None else [str(info.version) for info in self._store.snapshots(key)]

        def change(record: LayerRecord) -> LayerRecord:
            if found is None:  # an error here, since a call that comes again is answered although it is gone
                raise SnapshotNotFound(
                    f"{key} has no snapshot of version {version} (expected: one of {', '.join(there[-50:]) or 'none'})",
                    {"version": str(version)},
                )
            layer.take_snapshot(record)
            state = replace(found.state, version=record.state.version)
            return replace(record, state=state, domains={**record.domains, **found.domains})

        return layer.change_once(call, ("Rollback", version), change)

    def back_up(self) -> tuple[str, int]:
        """Copy all that is kept to a file, while others go on; return its path and its size.

        Raises:
            BackupFailed: It could not be written; or what is kept is gone with this process.
        """
        path, size = self._store.back_up()
        return str(path), size

    # --- Changes ------------------------------------------------------------------------------------

    # With a `call`, a change is made once. Beside what each says, all raise KeyReused, StepOutOfOrder or SessionExpired
    # if it cannot be made under that key.

    def set_train(self, key: LayerKey, train: bool, call: CallKey | None = None) -> tuple[LayerRecord, bool]:
        """Set the mode of calls that choose none; return the layer, and whether that was done before."""
        return self._layers.find(key).change_once(
            call, ("SetTrain", train), lambda record: replace(record, train=train)
        )

    def set_state(self, key: LayerKey, update: StateUpdate, call: CallKey | None = None) -> tuple[LayerRecord, bool]:
        """Replace parts of a layer's state, all at once; return the layer, and whether that was done before.

        Raises:
            InvalidShape, InvalidConfiguration, LayerEmpty: The new values are not a state of this layer.
        """

        def change(record: LayerRecord) -> LayerRecord:
            return record.with_state(updated(record.state, record.config, update))

        values = (getattr(update, field.name) for field in fields(update))
        asked = [None if value is None else np.asarray(value, np.float64) for value in values] if call else []
        return self._layers.find(key).change_once(call, ("SetState", key.domain, *asked), change)

    def update_params(self, key: LayerKey, learn_rate: float, call: CallKey | None = None) -> tuple[LayerRecord, bool]:
        """Add `learn_rate` times the gradients to scale and bias; return the layer, and whether that was done before.

        Raises:
            InvalidConfiguration: `learn_rate` is not finite.
            LayerEmpty: The layer has no state yet.
        """

        def change(record: LayerRecord) -> LayerRecord:
            require_initialized(record.state, str(key))
            return record.with_state(update_params(record.state, record.config, learn_rate))

        return self._layers.find(key).change_once(call, ("UpdateParams", learn_rate), change)

    def merge_statistics(self, key: LayerKey, delta: bytes, batch: Moments) -> tuple[LayerRecord, bool]:
        """Take statistics that were gathered elsewhere into a layer's; return it, and whether that was not done before.

        Raises:
            InvalidConfiguration: The layer's statistics are frozen, or the name is not one.
            TooFewValues: There is one value a map.
            LayerEmpty: The layer has no state yet.
            NonFiniteInput: The moments are not finite, and the layer refuses that.
        """
        layer = self._layers.find(key)

        def act(record: LayerRecord) -> tuple[LayerRecord, bool]:
            require_initialized(record.state, str(key))
            state = merge_delta(record.state, record.config, delta, batch)
            if state is record.state:
                return record, False
            merged = record.with_state(state)
            layer.commit(merged)
            return merged, True

        return layer.attempt(act)


def _require_no_domain(key: LayerKey, method: str) -> None:
    if key.domain:
        raise InvalidConfiguration(
            f"{method} is for a layer with all its domains, and {key.domain!r} is one of them (expected: no domain)"
        )


def _sets_anything(update: StateUpdate) -> bool:
    return any(getattr(update, field.name) is not None for field in fields(update))
