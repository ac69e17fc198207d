"""Where a hub is, so that a handle which is copied or pickled finds one there, in whatever process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sharednorm.config import LayerConfig
from sharednorm.v1 import layer_pb2

if TYPE_CHECKING:
    from sharednorm._handling import Handling
    from sharednorm.hub import Hub
    from sharednorm.remote import RemoteBatchNorm


class HubPlace(NamedTuple):
    """What `connect` needs to know to make the same hub again."""

    address: str
    namespace: str
    timeout: float
    transport: str
    consistency: str


class OpenHubs:
    """The hubs of this process, for handles that are made again; any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._known: weakref.WeakValueDictionary[HubPlace, Hub] = weakref.WeakValueDictionary()
        self._own: dict[HubPlace, Hub] = {}

    def add(self, place: HubPlace, hub: Hub) -> None:
        """Remember a hub, for as long as somebody else holds it."""
        with self._lock:
            self._drop_parents()
            self._known[place] = hub

    def find(self, place: HubPlace, make: Callable[[], Hub]) -> Hub:
        """Return the open hub of a place; if there is none, make one, which stays open until the process ends."""
        with self._lock:
            self._drop_parents()
            hub = self._known.get(place)
            if hub is not None and not hub.closed:
                return hub
        made = make()
        with self._lock:
            first = self._own.get(place, made)
            if first.closed:
                first = made
            self._own[place] = self._known[place] = first
        if first is not made:  # another thread was faster; one hub is enough
            made.close()
        return first

    def _drop_parents(self) -> None:
        # A forked child cannot use the hubs of its parent.
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._known.clear()
            self._own.clear()


open_hubs = OpenHubs()


def attach_again(
    place: HubPlace, ref: bytes, config: LayerConfig, handling: Handling, inplace: bool, train: bool | None
) -> RemoteBatchNorm:
    """Return a handle of the layer that a pickled one was of; its calls raise LayerNotFound if that is gone."""
    from sharednorm._connect import connect  # noqa: PLC0415 - which makes hubs, whose handles are pickled as this

    hub = open_hubs.find(
        place,
        lambda: connect(
            place.address,
            namespace=place.namespace,
            timeout=place.timeout,
            transport=place.transport,
            consistency=place.consistency,
        ),
    )
    return hub.attach(layer_pb2.LayerRef.FromString(ref), config, handling, inplace, train)
