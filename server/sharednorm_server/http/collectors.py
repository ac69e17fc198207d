"""Which figures of a server its metrics tell, beside those of its calls."""

from __future__ import annotations

from collections.abc import Iterator

from sharednorm_server.direct.listener import DirectServer
from sharednorm_server.groups.coordinator import Synchronizer
from sharednorm_server.layers.service import LayerService
from sharednorm_server.observability.metrics import Figure, Metrics


def register(metrics: Metrics, service: LayerService, groups: Synchronizer, direct: DirectServer) -> None:
    """Have them told."""
    info = service.info
    metrics.info(version=info.version, device=info.device, store=info.store)
    metrics.tell(lambda: _figures(service, groups, direct))


def _figures(service: LayerService, groups: Synchronizer, direct: DirectServer) -> Iterator[Figure]:
    now = service.figures  # once: it asks the devices
    shared = 0 if direct.memory is None else direct.memory.used
    grows = True
    yield Figure("sharednorm_steps", "Steps that were taken, of all layers.", now.steps, grows)
    yield Figure("sharednorm_layers_alive", "Layers that somebody has asked for since the start.", now.layers)
    yield Figure("sharednorm_saved_input_bytes", "Inputs that are kept for backwards.", now.activation_cache_bytes)
    yield Figure(
        "sharednorm_saved_input_evictions",
        "Inputs that had to leave for others; their clients send them again.",
        now.activation_cache_evictions,
        grows,
    )
    yield Figure("sharednorm_in_flight_bytes", "Large tensors that are on their way.", now.in_flight_bytes)
    yield Figure("sharednorm_device_bytes", "Memory of the GPUs that is in use.", now.device_bytes)
    yield Figure("sharednorm_store_commits", "Transactions of the store.", now.store_commits, grows)
    yield Figure("sharednorm_store_changes", "Changes in them: so many share one.", now.store_changes, grows)
    yield Figure("sharednorm_store_seconds", "Time that the transactions took.", now.store_seconds, grows)
    yield Figure("sharednorm_direct_connections", "Direct connections.", direct.connections)
    yield Figure("sharednorm_shared_memory_bytes", "Memory that is shared with clients.", shared)
    yield Figure("sharednorm_groups", "Groups.", len(groups.groups()))
    yield Figure("sharednorm_group_calls_waiting", "Calls of members that wait for others.", groups.waiting)
    yield Figure(
        "sharednorm_group_calls_aborted", "Calls of members that ended since one was missing.", groups.aborted, grows
    )
