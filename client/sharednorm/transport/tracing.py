"""Spans of OpenTelemetry for calls, in programs that use OpenTelemetry; in others nothing, which costs nothing.

A program uses it if it has imported it: `opentelemetry-instrument` does, which sets it up by its variables. The server
is told of the span that runs, by W3C's trace context, so that its own spans stand within it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

from google.protobuf.message import Message

from sharednorm._version import __version__
from sharednorm.codec import frames
from sharednorm.errors import SharedNormError
from sharednorm.transport.channel import SERVICE

Metadata = tuple[tuple[str, str], ...]

_NO_SPAN: AbstractContextManager[None] = nullcontext()


def span(method: str, request: Message, address: str) -> AbstractContextManager[None]:
    """Return the span of a call, which is the current one as long as the context lasts.

    Args:
        method: Of the contract.
        request: What it asks.
        address: Where the server is.
    """
    api = _api()
    return _NO_SPAN if api is None else _span(api, method, request, address)


def metadata() -> Metadata:
    """Return what tells a server of the current span, as metadata of gRPC; empty if there is none."""
    if _api() is None:
        return ()
    from opentelemetry.propagate import inject  # noqa: PLC0415 - only where the program has it

    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple((name.lower(), value) for name, value in carrier.items())


def frame() -> bytes:
    """Return what tells a server of the current span on a direct connection; empty if there is none."""
    api = _api()
    if api is None:
        return b""
    context = api.get_current_span().get_span_context()
    if not context.is_valid:
        return b""
    return frames.TRACE.pack(
        context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big"), int(context.trace_flags)
    )


def _api() -> ModuleType | None:
    return sys.modules.get("opentelemetry.trace")


@contextmanager
def _span(api: Any, method: str, request: Message, address: str) -> Iterator[None]:
    tracer = api.get_tracer("sharednorm", __version__)
    attributes = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": method, "server.address": address}
    ref = getattr(request, "ref", None)
    if ref is not None:
        attributes |= {"sharednorm.namespace": ref.namespace, "sharednorm.layer": ref.name}
    with tracer.start_as_current_span(
        f"{SERVICE}/{method}", kind=api.SpanKind.CLIENT, attributes=attributes, record_exception=False
    ) as running:
        try:
            yield
        except SharedNormError as error:
            running.set_attribute("error.type", error.reason)
            raise
