"""Reads of many handles' layers in one call, for `Hub.refresh`."""

from __future__ import annotations

from collections.abc import Sequence

from sharednorm.coordination.batching import read_many
from sharednorm.errors import InvalidConfiguration, SharedNormError
from sharednorm.remote.backends.client_compute import ClientComputeBackend
from sharednorm.remote.context import HubContext
from sharednorm.remote.handle import backend_of


def refresh(context: HubContext, layers: Sequence[object]) -> None:
    """Read parameters and statistics of many handles' layers, together; see `Hub.refresh`."""
    backends = [_keeper(context, layer) for layer in layers]
    for backend in backends:
        backend.flush()
    first: SharedNormError | None = None
    copies = [(backend.copy, backend.config.maps) for backend in backends]
    for index, error in read_many(context.exchange, copies):
        if error is not None and first is None:
            first = backends[index].refused(error)
    if first is not None:
        raise first


def _keeper(context: HubContext, layer: object) -> ClientComputeBackend:
    backend = backend_of(layer)
    if not isinstance(backend, ClientComputeBackend) or not backend.copy.max_staleness or not backend.is_of(context):
        raise InvalidConfiguration(
            f"{ascii(layer)[:120]} keeps nothing that could be read ahead (expected: a handle of this hub that was "
            "made with compute='client' and a max_staleness above 0)"
        )
    return backend
