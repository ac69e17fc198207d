"""Write the dashboard for Grafana, sharednorm.json: `python -m docker.monitoring.dashboard`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("sharednorm.json")
_SOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True)
class Panel:
    """One picture.

    Attributes:
        title: What it shows.
        unit: Of its numbers, as Grafana calls it.
        queries: What is asked of Prometheus, and how a line is called.
        about: What to make of it.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""


def _quantile(share: float, name: str, by: str) -> str:
    return f"histogram_quantile({share}, sum by (le, {by}) (rate({name}_bucket[$__rate_interval])))"


def _rate(name: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({name}[$__rate_interval]))" if by else f"sum(rate({name}[$__rate_interval]))"


PANELS = (
    Panel("Steps a second", "short", ((_rate("sharednorm_steps_total"), "all layers"),)),
    Panel("Calls per second, by method", "reqps", ((_rate("sharednorm_rpc_requests_total", "method"), "{{method}}"),)),
    Panel(
        "Failed calls per second, by code",
        "reqps",
        (('sum by (code) (rate(sharednorm_rpc_requests_total{code!="OK"}[$__rate_interval]))', "{{code}}"),),
        "RESOURCE_EXHAUSTED: a limit is reached, and clients retry. INTERNAL: a defect, which the log explains.",
    ),
    Panel(
        "Duration of a call: median and 99th percentile",
        "s",
        (
            (_quantile(0.5, "sharednorm_rpc_duration_seconds", "method"), "{{method}}, p50"),
            (_quantile(0.99, "sharednorm_rpc_duration_seconds", "method"), "{{method}}, p99"),
        ),
    ),
    Panel(
        "Time a call waits for a free worker: 99th percentile",
        "s",
        ((_quantile(0.99, "sharednorm_rpc_queue_seconds", "transport"), "{{transport}}"),),
        "If this grows, raise --workers, unless the device is the limit.",
    ),
    Panel(
        "Where calls spend their time, as concurrent calls",
        "short",
        (
            (_rate("sharednorm_rpc_duration_seconds_sum"), "total"),
            (_rate("sharednorm_rpc_queue_seconds_sum"), "waiting for a worker"),
            (_rate("sharednorm_device_duration_seconds_sum"), "on the device"),
            (_rate("sharednorm_commit_wait_seconds_sum"), "waiting for the commit"),
        ),
        "The rest of the total is the network, and the server itself.",
    ),
    Panel(
        "Bytes per second, by transport",
        "Bps",
        (
            (_rate("sharednorm_received_bytes_total", "transport"), "{{transport}}, received"),
            (_rate("sharednorm_sent_bytes_total", "transport"), "{{transport}}, sent"),
        ),
        "Tensors in shared memory do not travel, and do not count here.",
    ),
    Panel(
        "Calls in progress, and connections",
        "short",
        (
            ("sum by (transport) (sharednorm_rpc_in_flight)", "calls, {{transport}}"),
            ("sharednorm_direct_connections", "direct connections"),
        ),
    ),
    Panel(
        "Memory of tensors",
        "bytes",
        (
            ("sharednorm_in_flight_bytes", "in transfer"),
            ("sharednorm_activation_cache_bytes", "activation cache"),
            ("sharednorm_shared_memory_bytes", "shared with clients"),
            ("sharednorm_device_bytes", "on GPUs"),
        ),
    ),
    Panel(
        "Inputs evicted from the activation cache per second",
        "short",
        ((_rate("sharednorm_activation_cache_evictions_total"), "evictions"),),
        "Clients send evicted inputs again with their backwards. A larger --activation-cache-bytes avoids that.",
    ),
    Panel(
        "Store: transactions a second, and changes in each",
        "short",
        (
            (_rate("sharednorm_store_commits_total"), "transactions"),
            (
                f"{_rate('sharednorm_store_changes_total')} / {_rate('sharednorm_store_commits_total')}",
                "changes in each",
            ),
        ),
    ),
    Panel(
        "Store: time of a transaction",
        "s",
        ((f"{_rate('sharednorm_store_seconds_total')} / {_rate('sharednorm_store_commits_total')}", "mean"),),
    ),
    Panel(
        "Groups",
        "short",
        (
            ("sharednorm_groups", "groups"),
            ("sharednorm_group_calls_waiting", "members that wait"),
            (_rate("sharednorm_group_calls_aborted_total"), "calls a second given up"),
        ),
    ),
    Panel(
        "The process: processors in use, and memory",
        "short",
        (
            ("rate(process_cpu_seconds_total[$__rate_interval])", "processors"),
            ("process_resident_memory_bytes / 2^30", "GiB"),
        ),
    ),
    Panel("Open files", "short", (("process_open_fds", "open"), ("process_max_fds", "at most"))),
)


def dashboard() -> dict[str, Any]:
    """Return it."""
    panels = []
    for index, panel in enumerate(PANELS):
        panels.append(
            {
                "id": index + 1,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.about,
                "datasource": _SOURCE,
                "gridPos": {"x": 12 * (index % 2), "y": 8 * (index // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(ord("A") + place), "expr": query, "legendFormat": name, "datasource": _SOURCE}
                    for place, (query, name) in enumerate(panel.queries)
                ],
            }
        )
    return {
        "uid": "sharednorm",
        "title": "sharednorm",
        "schemaVersion": 41,
        "editable": False,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "panels": panels,
    }


def text() -> str:
    """Return the file."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    PATH.write_text(text(), encoding="utf-8")
