"""Spans of OpenTelemetry for the calls of a server, set up by OpenTelemetry's own variables.

A span for each call, within that of the client if it tells one; within it one for each operation of the device, and
one for the wait until the store has kept what has changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from sharednorm._version import __version__
from sharednorm_server.errors import StartError
from sharednorm_server.observability.instrumentation import Origin, Seen

_EXPORTERS = ("otlp", "console", "none")
_PROTOCOLS = {
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
}
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def wanted(environment: Mapping[str, str]) -> str:
    """Return what the environment says of the exporter of traces: "otlp", "console" or "none".

    OTEL_TRACES_EXPORTER names it; without it an endpoint for OTLP is as good. OTEL_SDK_DISABLED=true: "none".

    Raises:
        StartError: It names another one.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if not exporter:
        exporter = "otlp" if any(environment.get(name, "").strip() for name in _ENDPOINTS) else "none"
    if exporter not in _EXPORTERS:
        raise StartError(f"OTEL_TRACES_EXPORTER is {exporter!r} (expected: one of {', '.join(_EXPORTERS)})")
    return exporter


def open_traces(environment: Mapping[str, str], service: str) -> Traces | None:
    """Return the traces that the environment asks for; None if it asks for none. Raises what both others raise."""
    exporter = wanted(environment)
    return None if exporter == "none" else Traces(exporter, service)


class Traces:
    """The spans of one server. Any number of threads may use them.

    Args:
        exporter: Where they go: "otlp" or "console"; OpenTelemetry's variables say everything else.
        service: The full name of the service whose calls they are.

    Raises:
        StartError: OpenTelemetry is not installed, or OTEL_EXPORTER_OTLP_PROTOCOL names no protocol.
    """

    def __init__(self, exporter: str, service: str) -> None:
        self._service = service
        sdk, resources = _load("opentelemetry.sdk.trace"), _load("opentelemetry.sdk.resources")
        export = _load("opentelemetry.sdk.trace.export")
        self._api, self._context = _load("opentelemetry.trace"), _load("opentelemetry.context")
        self._parent = _load("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()
        named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        facts = {"service.version": __version__} | ({} if named else {"service.name": "sharednorm"})
        self._provider = sdk.TracerProvider(resource=resources.Resource.create(facts), shutdown_on_exit=False)
        if exporter == "console":
            processor = export.SimpleSpanProcessor(export.ConsoleSpanExporter())
        else:
            processor = export.BatchSpanProcessor(_otlp())
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("sharednorm", __version__)

    def begin(self, method: str, transport: str, id: str, origin: Callable[[], Origin], arrived: float) -> Seen:  # noqa: A002
        """Begin the span of a call."""
        came = origin()
        carrier = {"traceparent": came.parent, "tracestate": came.state} if came.parent else {}
        span = self._tracer.start_span(
            f"{self._service}/{method}",
            context=self._parent.extract(carrier, self._context.Context()),
            kind=self._api.SpanKind.SERVER,
            start_time=_nanoseconds(arrived),
            attributes={
                "rpc.system": "grpc", "rpc.service": self._service, "rpc.method": method,
                "network.peer.address": came.peer, "sharednorm.transport": transport, "sharednorm.request_id": id,
            },
        )  # fmt: skip
        return _Span(self._tracer, self._api, span, arrived)

    def close(self) -> None:
        """Send what is left, for as long as OTEL_BSP_EXPORT_TIMEOUT allows."""
        self._provider.shutdown()


class _Span:
    __slots__ = ("_api", "_began", "_inside", "_received", "_sent", "_span", "_spent", "_tracer")

    def __init__(self, tracer: Any, api: Any, span: Any, began: float) -> None:
        self._tracer, self._api, self._span, self._began = tracer, api, span, began
        self._inside = api.set_span_in_context(span)
        self._received, self._sent = 0, 0
        self._spent: dict[str, float] = {}

    def started(self) -> None:
        self._span.set_attribute("sharednorm.queue_seconds", time.perf_counter() - self._began)

    def moved(self, received: int, sent: int) -> None:
        self._received += received
        self._sent += sent

    def spent(self, where: str, what: str, began: float, seconds: float) -> None:
        self._spent[where] = self._spent.get(where, 0.0) + seconds
        if what and self._span.is_recording():
            span = self._tracer.start_span(f"{where} {what}", context=self._inside, start_time=_nanoseconds(began))
            span.end(_nanoseconds(began + seconds))

    def failed(self, code: str) -> None:
        self._span.set_attribute("error.type", code)
        self._span.set_status(self._api.StatusCode.ERROR, code)

    def ended(self) -> None:
        self._span.set_attributes(
            {
                "sharednorm.received_bytes": self._received,
                "sharednorm.sent_bytes": self._sent,
                **{f"sharednorm.{where}_seconds": seconds for where, seconds in self._spent.items()},
            }
        )
        self._span.end()


def _nanoseconds(moment: float) -> int:
    return time.time_ns() - round((time.perf_counter() - moment) * 1e9)


def _otlp() -> Any:
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((os.environ[name] for name in names if os.environ.get(name)), "grpc")
    if protocol not in _PROTOCOLS:
        raise StartError(f"the protocol of OTLP is {protocol!r} (expected: one of {', '.join(_PROTOCOLS)})")
    return _load(_PROTOCOLS[protocol]).OTLPSpanExporter()


def _load(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or ""
        if not name.startswith("opentelemetry"):
            raise
        needed = "opentelemetry-exporter-otlp-proto-http" if "http" in module else "'sharednorm[traces]'"
        raise StartError(
            f"OpenTelemetry's variables ask for traces, which need {name}: pip install {needed} (or set "
            "OTEL_TRACES_EXPORTER=none)"
        ) from error
