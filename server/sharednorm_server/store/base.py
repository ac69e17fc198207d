"""Layer storage backends. A store knows no device, no RPC, and no arithmetic.

A record is immutable, and every change atomic. `create` and `delete` return when the change is committed.

There are two kinds. An `ExclusiveStore` is used by one server at a time, which knows what is in it: `put` returns at
once, since a layer's next step need not wait for the commit, and a call that answers with the record waits for it. A
`SharedStore` is used by several servers: each keeps copies, `compare_and_set` replaces a record only if it still is the
one that was changed, and `look` says what it is now.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from sharednorm.core.domains import Domains, swapped
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, blank_state
from sharednorm_server.store.records import LastChange, Note, Remembered
from sharednorm_server.store.snapshots import SnapshotInfo

_RUN = secrets.token_bytes(8)
_records = itertools.count()


@dataclass(frozen=True, order=True)
class LayerKey:
    """Names a layer; ordered by namespace, then by the code points of the name.

    Attributes:
        namespace: Whose.
        name: What it is called there.
        uid: Which of the layers that have had this name, one after the other; "" in a question means whichever
            has it now. Two keys of one name are equal, since never two layers have it.
        domain: Whose statistics are meant; "" for the layer's own. They are of the same layer, so that keys which
            differ in nothing else are equal.
        seen: In a question, the highest version that the caller has been told of.
        strong: In a question, whether a copy that another server may have changed since is not good enough.
    """

    namespace: str
    name: str
    uid: str = field(default="", compare=False)
    domain: str = field(default="", compare=False)
    seen: int = field(default=0, compare=False)
    strong: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        """For messages."""
        return f"layer {self.name!r} of namespace {self.namespace!r}"


@dataclass(frozen=True)
class LayerRecord:
    """All that is kept of a layer.

    Attributes:
        key: Its name, and whose statistics the state has.
        config: Its configuration.
        state: Parameters, statistics, gradients, version.
        train: The mode of calls that do not choose one.
        domains: The statistics that the state does not have, by domain.
    """

    key: LayerKey
    config: LayerConfig
    state: LayerState
    train: bool = True
    domains: Domains = field(default_factory=dict)
    # Never handed on, not by `replace` either, so that no change can be forgotten; but by `within`.
    _mark: bytes = field(default_factory=lambda: _RUN + next(_records).to_bytes(8, "little"), init=False, compare=False)

    @property
    def tag(self) -> bytes:
        """What names this record among all that this process has ever made: records of one tag are one record.

        A store of one server that reads a record anew makes another one of it. Servers that share a store agree.
        """
        return self._mark + self.key.domain.encode("utf-8", "surrogatepass")

    @property
    def mark(self) -> bytes:
        """The same, whichever domain is seen."""
        return self._mark

    def marked(self, mark: bytes) -> LayerRecord:
        """Return the record that a store has under a mark, which another server may have made."""
        object.__setattr__(self, "_mark", mark)
        return self

    def with_state(self, state: LayerState) -> LayerRecord:
        """Return the record with another state, of the same domain."""
        return LayerRecord(self.key, self.config, state, self.train, self.domains)

    def within(self, domain: str) -> LayerRecord:
        """Return the same record, seen with the statistics of a domain; "" are the layer's own.

        Raises:
            LayerNotFound: The layer has no such domain.
        """
        if domain == self.key.domain:
            return self
        state, domains = swapped(self.state, self.domains, self.key.domain, domain, str(self.key))
        seen = LayerRecord(replace(self.key, domain=domain), self.config, state, self.train, domains)
        object.__setattr__(seen, "_mark", self._mark)
        return seen


def without_gradients(record: LayerRecord) -> LayerRecord:
    """Return a layer as a snapshot has it: with accumulated gradients of 0."""
    zeros = blank_state(record.config).scale_grad
    return record.with_state(replace(record.state, scale_grad=zeros, bias_grad=zeros))


class CommitHandle(Protocol):
    """A change that a store has accepted and not committed yet."""

    def wait(self) -> None:
        """Wait until the change is committed, and with it all that came before.

        Raises:
            StoreFailed: It is not known whether it is, and the store has failed for good.
        """
        ...


@dataclass(frozen=True)
class StoreCounts:
    """What a store has written since it was opened.

    Attributes:
        commits: Transactions.
        changes: What they had in them.
        seconds: That they took together.
    """

    commits: int = 0
    changes: int = 0
    seconds: float = 0.0


class Store(Protocol):
    """What remembers layers: what both kinds have. Every method may be called from many threads at once."""

    @property
    def counts(self) -> StoreCounts:
        """What has been written."""
        ...

    @property
    def description(self) -> str:
        """Its URL without secrets, for example "memory:"."""
        ...

    @property
    def identity(self) -> str:
        """Names what is remembered: of servers that share it the same, of others another."""
        ...

    def open_session(self) -> int:
        """Return the number of a new session, less than 2^63: higher than those of all sessions before."""
        ...

    def session_opened(self, number: int) -> bool:
        """Return whether a session was given that number."""
        ...

    def get(self, key: LayerKey) -> LayerRecord | None:
        """Return a layer's record, or None."""
        ...

    def create(self, record: LayerRecord) -> bool:
        """Keep a new layer's record; return False, and change nothing, if its key exists."""
        ...

    def namespaces(self) -> list[str]:
        """Return the namespaces that have layers, in the order of their names."""
        ...

    def count(self, namespace: str) -> int:
        """Return how many layers a namespace has."""
        ...

    def take_snapshot(self, record: LayerRecord, taken: float, drop: Sequence[int]) -> None:
        """Keep a copy of a record that was put, unless there is one of its version; the next wait covers it.

        Args:
            record: The record.
            taken: When, in seconds since the epoch.
            drop: Versions of the layer's snapshots that are kept no longer.
        """
        ...

    def snapshots(self, key: LayerKey) -> list[SnapshotInfo]:
        """Return what is known of a layer's snapshots, the oldest first."""
        ...

    def snapshot(self, key: LayerKey, version: int) -> LayerRecord | None:
        """Return a layer as it was at a version that there is a snapshot of, without gradients."""
        ...

    def back_up(self) -> tuple[Path, int]:
        """Copy all that is kept to a file, while others go on; return it and its size.

        Raises:
            BackupFailed: It could not be written; or this store keeps nothing.
        """
        ...

    def delete(self, key: LayerKey) -> bool:
        """Forget a layer and its snapshots; return False if its key does not exist."""
        ...

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        ...

    def on_failed(self, callback: Callable[[str], None]) -> None:
        """Have a function called once the store has failed for good; it gets the reason."""
        ...

    def on_trouble(self, callback: Callable[[str], None]) -> None:
        """Have a function called when the store cannot be used for now, with the reason, and with "" when it can."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


class ExclusiveStore(Store, Protocol):
    """A store that no other server uses meanwhile."""

    def remembered(self, key: LayerKey) -> Remembered:
        """Return what is kept of the sessions that have changed a layer that is there."""
        ...

    def put(self, record: LayerRecord, note: Note | None = None) -> CommitHandle | None:
        """Replace an existing layer's record, and with it what is known of a session; return what says when it is kept.

        None: its key does not exist, and nothing has changed. Later changes of the layer may be put before that.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """All that a store has of a layer: what it takes for another one to go on with it.

    Attributes:
        record: The record.
        remembered: What is known of the sessions that have changed it.
        snapshots: Earlier states, the oldest first, and when each was taken, in seconds since the epoch.
    """

    record: LayerRecord
    remembered: Remembered
    snapshots: tuple[tuple[float, LayerRecord], ...] = ()


@runtime_checkable
class LastingStore(Store, Protocol):
    """A store whose layers can be taken elsewhere, and that takes in those of another."""

    def whole(self, key: LayerKey) -> Whole | None:
        """Return all that there is of a layer, or None."""
        ...

    def take_in(self, whole: Whole) -> bool:
        """Keep a layer with all that comes with it; return False, and change nothing, if its key exists."""
        ...

    @property
    def last_session(self) -> int:
        """A number that no session before has a higher one than."""
        ...

    def begin_sessions_behind(self, number: int) -> None:
        """Give sessions higher numbers than this one from now on, and know all up to it as given."""
        ...


@dataclass(frozen=True)
class Look:
    """What a shared store has of a layer.

    Attributes:
        record: The record; None: there is none.
        change: The last change of the session that was asked for, if one is remembered.
        floor: The highest number of the sessions that the layer has forgotten.
        deleted: Of a layer that is not there: whether the one that was asked for was deleted, and is not lost.
    """

    record: LayerRecord | None
    change: LastChange | None = None
    floor: int = 0
    deleted: bool = False


@runtime_checkable
class SharedStore(Store, Protocol):
    """A store that other servers use as well.

    Every method may raise StoreUnavailable; then it is not known whether what was to change has changed, and calls that
    come later find out.
    """

    def look(self, key: LayerKey, known: LayerRecord | None = None, session: bytes = b"") -> Look:
        """Return what there is of a layer now.

        Args:
            key: Which one.
            known: A copy, which is returned if it still is the record.
            session: Whose last change is asked for as well.
        """
        ...

    def compare_and_set(self, before: LayerRecord, record: LayerRecord, note: Note | None = None) -> bool:
        """Replace a record, and with it what is known of a session; return False if it is not the one of before.

        What the note says of forgotten sessions is not looked at: the store knows all of them, and a server some.
        """
        ...

    def others(self) -> list[str]:
        """Return what the other servers are called that use the store now."""
        ...

    def on_changed(self, callback: Callable[[LayerKey | None, bool], None]) -> None:
        """Have a function called soon after another server has changed a layer, and with whether it has deleted it.

        None: any of them may have changed.
        """
        ...


AnyStore: TypeAlias = ExclusiveStore | SharedStore
"""A store of either kind."""
