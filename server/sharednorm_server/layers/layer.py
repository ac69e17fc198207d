"""A layer in memory, as the service uses it: itself, or seen with the statistics of one of its domains.

The store is what remembers; a `Layer` is what makes the changes of one layer happen one after the other, while those of
different layers happen at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TypeVar

from sharednorm.errors import DataLoss, LayerNotFound
from sharednorm_server.layers.idempotency import Content, digest, last_change
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import CallKey, LastChange

T = TypeVar("T")


class Layer(ABC):
    """A layer in memory, or one of its domains. A layer that is deleted and created again is another object.

    Attributes:
        key: Its name, and the domain.
    """

    key: LayerKey

    @property
    @abstractmethod
    def parent(self) -> Layer:
        """The layer itself, whichever of its domains this is."""

    @property
    @abstractmethod
    def latest(self) -> LayerRecord:
        """The current record, all of one moment. The store may not have committed it yet, so do not answer with it.

        Raises:
            LayerNotFound: The layer has been deleted.
        """

    @abstractmethod
    def committed(self) -> LayerRecord:
        """Wait until the store has committed the current record, and return it, all of one moment.

        Raises:
            LayerNotFound: The layer has been deleted.
            StoreFailed: It is not known whether it is committed.
        """

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[LayerRecord]:
        """Hold the layer, so that no other thread changes it; gives its current record.

        Raises:
            LayerNotFound: The layer has been deleted.
            StoreFailed: It is not known whether a change that was made meanwhile is committed.
        """

    @abstractmethod
    def attempt(self, act: Callable[[LayerRecord], T]) -> T:
        """Hold the layer, and act on its current record, perhaps with a `commit`; wait until that is committed.

        Args:
            act: What to do. It is called again, with a newer record, where another server has changed the layer
                meanwhile; so its effects on anything but the layer come after the commit.
        """

    @abstractmethod
    def find_change(self, call: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key, if it was; only while holding the layer.

        Its caller answers with it after `committed`, which waits until the store has it.

        Raises:
            KeyReused, StepOutOfOrder, SessionExpired: No change can be made under that key.
        """

    @abstractmethod
    def last_change_of(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, if one is remembered; only while holding the layer."""

    @abstractmethod
    def end_session(self, session: bytes, ended: Callable[[LastChange | None], LastChange]) -> LastChange | None:
        """Return the last change of a session of another server, and see that it makes none any more.

        Args:
            session: Which one.
            ended: Makes of its last change the one that says so; the same if it says so already.
        """

    @abstractmethod
    def commit(self, record: LayerRecord, call: CallKey | None = None, change: LastChange | None = None) -> None:
        """Make a record the current one. Only while holding the layer.

        Args:
            record: The record.
            call: The key that the change came under, if any; `find_change` has said that it is the next one.
            change: What is remembered of it.

        Raises:
            LayerNotFound: The store does not know the layer any more.
            StoreFailed: It commits nothing any more.
        """

    @abstractmethod
    def take_snapshot(self, record: LayerRecord) -> None:
        """Keep a copy of the current record, to go back to, unless there is one of its version. While holding it."""

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
            if call is not None and self.find_change(call, content) is not None:
                return None
            changed = change(record)
            self.commit(changed, call, None if call is None else last_change(call, content, changed.state))
            return changed

        changed = self.attempt(act)
        return (self.committed(), True) if changed is None else (changed, False)


class LayerInDomain(Layer):
    """A layer, seen with the statistics of one of its domains.

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
    def parent(self) -> Layer:
        """The layer itself."""
        return self._layer

    @property
    def latest(self) -> LayerRecord:
        """The current record, which the store may not have committed yet."""
        return self._layer.latest.within(self.key.domain)

    def committed(self) -> LayerRecord:
        """Wait until the store has committed the current record, and return it."""
        return self._layer.committed().within(self.key.domain)

    @contextmanager
    def exclusive(self) -> Iterator[LayerRecord]:
        """Hold the layer, so that no other thread changes it, in whatever domain; gives its current record."""
        with self._layer.exclusive() as record:
            yield record.within(self.key.domain)

    def attempt(self, act: Callable[[LayerRecord], T]) -> T:
        """Hold the layer, and act on its current record."""
        return self._layer.attempt(lambda record: act(record.within(self.key.domain)))

    def find_change(self, call: CallKey, content: bytes) -> LastChange | None:
        """Return the change that was made under a key, if it was; only while holding the layer."""
        return self._layer.find_change(call, content)

    def last_change_of(self, session: bytes) -> LastChange | None:
        """Return the last change of a session, if one is remembered; only while holding the layer."""
        return self._layer.last_change_of(session)

    def end_session(self, session: bytes, ended: Callable[[LastChange | None], LastChange]) -> LastChange | None:
        """Return the last change of a session of another server, and see that it makes none any more."""
        return self._layer.end_session(session, ended)

    def commit(self, record: LayerRecord, call: CallKey | None = None, change: LastChange | None = None) -> None:
        """Make a record the current one. Only while holding the layer."""
        self._layer.commit(record.within(""), call, change)

    def take_snapshot(self, record: LayerRecord) -> None:
        """Keep a copy of the current record, of all domains, to go back to."""
        self._layer.take_snapshot(record.within(""))


def not_found(key: LayerKey) -> LayerNotFound:
    """Return the error for a layer that is not there."""
    return LayerNotFound(
        f"{key} does not exist on this server, or was deleted (expected: the name of one that was created)",
        {"namespace": key.namespace, "name": key.name},
    )


def lost(key: LayerKey) -> DataLoss:
    """Return the error for a layer that is not there, and was not deleted."""
    return DataLoss(
        f"{key} is gone, and nobody has deleted it: the store has lost it (expected: its newest state in place; or a "
        "new layer)",
        {"namespace": key.namespace, "name": key.name},
    )
