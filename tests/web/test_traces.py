"""One trace from a client's span to what the device did, collected as OTLP by a real gRPC server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import sharednorm
from sharednorm_server.errors import StartError
from sharednorm_server.observability.tracing import wanted
from tests.support.oracle import random_tensor
from tests.support.processes.server import server_process, spawn

SERVICE = "sharednorm.v1.BatchNormService"

CLIENT = """
import sys
import numpy as np
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
import sharednorm

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)
address, transport, maps, size = sys.argv[1], sys.argv[2], 4, int(sys.argv[3])
with sharednorm.connect(address, transport=transport) as hub, trace.get_tracer("test").start_as_current_span("step"):
    layer = hub.BatchNorm2D(maps, name="stem/bn")
    x = np.random.default_rng(0).normal(size=(2, maps, size, size)).astype(np.float32)
    layer.backward(layer(x))
    x[0] = np.nan
    try:
        layer(x)
    except sharednorm.NonFiniteInput:
        pass
provider.shutdown()
"""


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it is sent."""

    spans: list[tuple[str, Span]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def Export(  # noqa: N802 - gRPC's name
        self, request: trace_service_pb2.ExportTraceServiceRequest, _: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keep spans, with the name of the service that they are of."""
        with self.changed:
            for of in request.resource_spans:
                names = [each.value.string_value for each in of.resource.attributes if each.key == "service.name"]
                self.spans += [(names[0], span) for scope in of.scope_spans for span in scope.spans]
            self.changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name: str, service: str, count: int = 1) -> list[Span]:
        """Wait for so many spans of a name, and return them."""

        def found() -> list[Span]:
            return [span for of, span in self.spans if span.name == name and of == service]

        with self.changed:
            assert self.changed.wait_for(lambda: len(found()) >= count, 20), f"no {name} among {self.spans}"
            return found()


@contextmanager
def collector() -> Iterator[tuple[Collector, dict[str, str]]]:
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield found, environment(port)
    finally:
        server.stop(1).wait()


def environment(port: int) -> dict[str, str]:
    return {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_SERVICE_NAME": "",
    }


def attributes(span: Span) -> dict[str, str | float]:
    return {
        each.key: each.value.string_value or each.value.double_value or each.value.int_value for each in span.attributes
    }


@pytest.mark.parametrize(
    ("transport", "size", "method"),
    [("shm", 4, "Forward"), ("shm", 200, "Forward"), ("direct", 4, "Forward"), ("direct", 400, "Forward"),
     ("grpc", 4, "Forward"), ("grpc", 400, "ForwardStream")],
)  # fmt: skip
def test_a_call_is_one_trace(transport: str, size: int, method: str, tmp_path: Path) -> None:
    with (
        collector() as (spans, env),
        server_process("--state", f"sqlite:///{tmp_path}/state", listen=f"unix:{tmp_path}/s", env=env) as server,
    ):
        of_client = {**env, "OTEL_SERVICE_NAME": "trainer"}
        subprocess.run(
            [sys.executable, "-c", CLIENT, server.address, transport, str(size)], env=of_client, check=True, timeout=60
        )
        (step,) = spans.named("step", "trainer")
        calls = spans.named(f"{SERVICE}/Forward", "trainer", 2)
        served = spans.named(f"{SERVICE}/{method}", "sharednorm", 2)
        assert {span.trace_id for span in (*calls, *served)} == {step.trace_id}
        assert {span.parent_span_id for span in calls} == {step.span_id}
        assert {span.parent_span_id for span in served} == {span.span_id for span in calls}
        assert {span.kind for span in calls} == {Span.SPAN_KIND_CLIENT}
        assert {span.kind for span in served} == {Span.SPAN_KIND_SERVER}
        good, bad = sorted(served, key=lambda span: span.start_time_unix_nano)
        assert good.status.code == Status.STATUS_CODE_UNSET
        assert bad.status.code == Status.STATUS_CODE_ERROR
        assert attributes(bad)["error.type"] == "INVALID_ARGUMENT"
        assert attributes(max(calls, key=lambda span: span.start_time_unix_nano))["error.type"] == "NON_FINITE_INPUT"
        about = attributes(calls[0])
        assert (about["sharednorm.layer"], about["sharednorm.namespace"]) == ("stem/bn", "default")
        inside = [span for _, span in spans.spans if span.parent_span_id == good.span_id]
        assert {"device forward", "store keep"} <= {span.name for span in inside}
        for span in inside:
            assert good.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= good.end_time_unix_nano
        told = attributes(good)
        nbytes = 2 * 4 * size * size * 4
        if transport == "shm" and nbytes >= 1 << 16:
            assert told["sharednorm.transport"] == "shm"
        else:
            assert float(told["sharednorm.received_bytes"]) > nbytes
            assert float(told["sharednorm.sent_bytes"]) > nbytes
        lasted = (good.end_time_unix_nano - good.start_time_unix_nano) / 1e9
        assert 0 < float(told["sharednorm.device_seconds"]) < lasted
        assert 0 < float(told["sharednorm.store_seconds"]) < lasted
        assert 0 <= float(told["sharednorm.queue_seconds"]) < lasted
        spans.named(f"{SERVICE}/Backward" + ("Stream" if method == "ForwardStream" else ""), "sharednorm")


def test_a_collector_that_is_not_there_holds_nothing_up() -> None:
    env = environment(1) | {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with server_process(env=env) as server:
        with sharednorm.connect(server.address) as hub:
            layer, x = hub.BatchNorm2D(3, name="bn"), random_tensor(1, (2, 3, 4, 4))
            for _ in range(20):
                layer(x)
            assert layer.numOfProps == 20
        began = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - began < 15


def test_console() -> None:
    with server_process(env={**os.environ, "OTEL_TRACES_EXPORTER": "console"}) as server:
        with sharednorm.connect(server.address) as hub:
            hub.layers()
        assert server.stop() == 0
        assert server.process.stdout is not None
        assert f'"name": "{SERVICE}/ListLayers"' in server.process.stdout.read()


@pytest.mark.parametrize(
    ("told", "exporter"),
    [
        ({}, "none"),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "none"),
        ({"OTEL_TRACES_EXPORTER": " OTLP "}, "otlp"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "TRUE"}, "none"),
    ],
)
def test_what_the_variables_ask_for(told: dict[str, str], exporter: str) -> None:
    assert wanted(told) == exporter


def test_an_exporter_that_there_is_not() -> None:
    with pytest.raises(StartError, match=r"OTEL_TRACES_EXPORTER is 'zipkin' \(expected: one of otlp, console, none\)"):
        wanted({"OTEL_TRACES_EXPORTER": "zipkin"})


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "OTEL_TRACES_EXPORTER is 'jaeger'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTLP is 'http/json'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"},
         "pip install opentelemetry-exporter-otlp-proto-http"),
    ],
)  # fmt: skip
def test_a_server_that_cannot_trace_does_not_start(env: dict[str, str], message: str) -> None:
    refused(env, message)


def test_a_server_without_opentelemetry_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "opentelemetry").mkdir()
    (tmp_path / "opentelemetry" / "__init__.py").touch()  # found first, and empty
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    refused({"OTEL_TRACES_EXPORTER": "otlp", "PYTHONPATH": path}, "pip install 'sharednorm[traces]'")


def refused(env: dict[str, str], message: str) -> None:
    process = spawn(
        "serve", "--listen", "127.0.0.1:0", "--state", "memory:", stderr=subprocess.PIPE, env={**os.environ, **env}
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    assert out == ""
    assert message in err
    assert "Traceback" not in err
