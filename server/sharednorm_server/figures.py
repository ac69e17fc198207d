"""Which figures of a server its metrics tell, beside those of its calls."""

from __future__ import annotations

from sharednorm_server.direct import DirectServer
from sharednorm_server.metrics import Metrics
from sharednorm_server.service import LayerService
from sharednorm_server.synchronization import Synchronizer


def register(metrics: Metrics, service: LayerService, groups: Synchronizer, direct: DirectServer) -> None:
    """Have them told."""
    counter, gauge = metrics.counter, metrics.gauge
    info = service.info
    metrics.info(version=info.version, device=info.device, store=info.store)
    counter("sharednorm_steps", "Steps that were taken, of all layers.", lambda: service.figures.steps)
    gauge("sharednorm_layers_alive", "Layers that somebody has asked for since the start.",
          lambda: service.figures.layers)  # fmt: skip
    gauge("sharednorm_saved_input_bytes", "Inputs that are kept for backwards.",
          lambda: service.figures.saved_input_bytes)  # fmt: skip
    counter("sharednorm_saved_input_evictions", "Inputs that had to leave for others; their clients send them again.",
            lambda: service.figures.saved_input_evictions)  # fmt: skip
    gauge("sharednorm_in_flight_bytes", "Large tensors that are on their way.",
          lambda: service.figures.in_flight_bytes)  # fmt: skip
    gauge("sharednorm_device_bytes", "Memory of the GPUs that is in use.", lambda: service.figures.device_bytes)
    counter("sharednorm_store_commits", "Transactions of the store.", lambda: service.figures.store_commits)
    counter("sharednorm_store_changes", "Changes in them: so many share one.", lambda: service.figures.store_changes)
    counter("sharednorm_store_seconds", "Time that the transactions took.", lambda: service.figures.store_seconds)
    gauge("sharednorm_direct_connections", "Direct connections.", lambda: direct.connections)
    gauge("sharednorm_shared_memory_bytes", "Memory that is shared with clients.",
          lambda: 0 if direct.memory is None else direct.memory.used)  # fmt: skip
    gauge("sharednorm_groups", "Groups.", lambda: len(groups.groups()))
    gauge("sharednorm_group_calls_waiting", "Calls of members that wait for others.", lambda: groups.waiting)
    counter("sharednorm_group_calls_aborted", "Calls of members that ended since one was missing.",
            lambda: groups.aborted)  # fmt: skip
