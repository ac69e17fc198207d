"""Prometheus metrics of a server.

The edges report calls; each scrape asks the functions that the server registers at its start for everything else.
Labels have few values: methods, codes, transports. No label has a value that a client chooses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sharednorm_server.observability.instrumentation import DEVICE, STORE, Origin, Seen

# When each series began, which nobody asks of these.
disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Seconds, from a small call on a fast machine to a large one on a slow network.
_BUCKETS = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure that somebody else keeps.

    Attributes:
        name: Its name, of one that grows without "_total".
        meaning: What it is.
        value: What it is now.
        grows: Whether it only grows.
    """

    name: str
    meaning: str
    value: float
    grows: bool = False


class Metrics:
    """The metrics of one server. Any number of threads may use them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        labels = ("method", "transport")
        registry = self._registry
        self.calls = Counter("sharednorm_rpc_requests", "Completed calls.", (*labels, "code"), registry=registry)
        self.seconds = Histogram(
            "sharednorm_rpc_duration_seconds", "Time from the first byte of a request to the last of its response.",
            labels, registry=registry, buckets=_BUCKETS,
        )  # fmt: skip
        self.queued = Histogram(
            "sharednorm_rpc_queue_seconds", "Time a call waited for a free worker.", labels,
            registry=registry, buckets=_BUCKETS,
        )  # fmt: skip
        self.device = Histogram(
            "sharednorm_device_duration_seconds", "Time a call spent on the device: copies and arithmetic.",
            labels, registry=registry, buckets=_BUCKETS,
        )  # fmt: skip
        self.commit_wait = Histogram(
            "sharednorm_commit_wait_seconds", "Time a call waited for the store to commit its changes.", labels,
            registry=registry, buckets=_BUCKETS,
        )  # fmt: skip
        self.received = Counter("sharednorm_received_bytes", "Bytes of requests.", labels, registry=registry)
        self.sent = Counter("sharednorm_sent_bytes", "Bytes of responses.", labels, registry=registry)
        self._series: dict[tuple[str, str], _Series] = {}
        self.running = Gauge("sharednorm_rpc_in_flight", "Calls in progress.", labels, registry=registry)

    def info(self, **values: str) -> None:
        """Have texts told that stay as they are."""
        Info("sharednorm", "Release, device and store of this server.", registry=self._registry).info(values)

    def tell(self, figures: Callable[[], Iterable[Figure]]) -> None:
        """Have figures told that others keep: they are asked for once each time that somebody looks."""
        self._registry.register(_Asked(figures))

    def begin(self, method: str, transport: str, id: str, origin: Callable[[], Origin], arrived: float) -> Seen:  # noqa: A002
        """Watch a call."""
        del id, origin
        series = self._series.get((method, transport))
        if series is None:
            series = self._series[method, transport] = _Series(self, method, transport)
        return _Seen(series, arrived)

    @property
    def in_progress(self) -> int:
        """How many calls are in progress."""
        return int(sum(sample.value for metric in self.running.collect() for sample in metric.samples))

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _Asked(Collector):
    # Figures that others keep.
    def __init__(self, figures: Callable[[], Iterable[Figure]]) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        for figure in self._figures():
            family = CounterMetricFamily if figure.grows else GaugeMetricFamily
            yield family(figure.name, figure.meaning, figure.value)


class _Series:
    # The series of one method by one transport. Finding them by labels takes longer than counting.
    def __init__(self, metrics: Metrics, method: str, transport: str) -> None:
        labels = (method, transport)
        self.running = metrics.running.labels(*labels)
        self.seconds, self.queued = metrics.seconds.labels(*labels), metrics.queued.labels(*labels)
        self.received, self.sent = metrics.received.labels(*labels), metrics.sent.labels(*labels)
        self._calls, self._codes = metrics.calls, {"OK": metrics.calls.labels(*labels, "OK")}
        self._spent = {DEVICE: metrics.device, STORE: metrics.commit_wait}
        self._places: dict[str, Histogram] = {}
        self._labels = labels

    def code(self, code: str) -> Counter:
        """Return the counter of calls that end so."""
        if code not in self._codes:
            self._codes[code] = self._calls.labels(*self._labels, code)
        return self._codes[code]

    def place(self, where: str) -> Histogram:
        """Return the histogram of the time that is spent there."""
        if where not in self._places:  # no series of methods that never do
            self._places[where] = self._spent[where].labels(*self._labels)
        return self._places[where]


class _Seen:
    __slots__ = ("_began", "_code", "_received", "_sent", "_series", "_spent", "_started")

    def __init__(self, series: _Series, arrived: float) -> None:
        self._series = series
        self._began, self._started = arrived, 0.0
        self._code, self._received, self._sent = "OK", 0, 0
        self._spent: dict[str, float] = {}
        series.running.inc()

    def started(self) -> None:
        self._started = time.perf_counter()

    def moved(self, received: int, sent: int) -> None:
        self._received += received
        self._sent += sent

    def spent(self, where: str, what: str, began: float, seconds: float) -> None:
        del what, began
        self._spent[where] = self._spent.get(where, 0.0) + seconds

    def failed(self, code: str) -> None:
        self._code = code

    def ended(self) -> None:
        series, now = self._series, time.perf_counter()
        series.running.dec()
        series.code(self._code).inc()
        series.seconds.observe(now - self._began)
        series.queued.observe((self._started or now) - self._began)
        for where, seconds in self._spent.items():
            series.place(where).observe(seconds)
        series.received.inc(self._received)
        series.sent.inc(self._sent)
