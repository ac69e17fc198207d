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
    yield Figure("sharednorm_steps", "Training steps of all layers.", now.steps, grows)
    yield Figure("sharednorm_layers_loaded", "Layers that the server has loaded since its start.", now.layers)
    yield Figure(
        "sharednorm_activation_cache_bytes",
        "Bytes of forward inputs in the activation cache.",
        now.activation_cache_bytes,
    )
    yield Figure(
        "sharednorm_activation_cache_evictions",
        "Inputs evicted from the activation cache; their clients send them again.",
        now.activation_cache_evictions,
        grows,
    )
    yield Figure("sharednorm_in_flight_bytes", "Bytes of large tensors in transfer.", now.in_flight_bytes)
    yield Figure("sharednorm_device_bytes", "GPU memory in use.", now.device_bytes)
    yield Figure("sharednorm_store_commits", "Transactions that the store has committed.", now.store_commits, grows)
    yield Figure(
        "sharednorm_store_changes", "Changes in these transactions; several share one.", now.store_changes, grows
    )
    yield Figure("sharednorm_store_seconds", "Duration of these transactions.", now.store_seconds, grows)
    yield Figure("sharednorm_direct_connections", "Open direct connections.", direct.connections)
    yield Figure("sharednorm_shared_memory_bytes", "Memory shared with clients.", shared)
    yield Figure("sharednorm_groups", "Groups.", len(groups.groups()))
    yield Figure("sharednorm_group_calls_waiting", "Group calls that wait for other members.", groups.waiting)
    yield Figure(
        "sharednorm_group_calls_aborted", "Group calls aborted because a member was missing.", groups.aborted, grows
    )
