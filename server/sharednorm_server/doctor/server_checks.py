"""`sharednorm doctor --server`: whether a server answers, and what it is.

It is what a container's health check runs, every few seconds: it imports nothing that computes, ends within its
timeout, and says nothing on stderr unless something is wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import grpc

import sharednorm
from sharednorm.codec.convert import error_from_call
from sharednorm.core.address import Address, parse_address
from sharednorm.core.limits import MAX_SECONDS
from sharednorm.errors import (
    DeadlineExceeded,
    IncompatibleServer,
    InvalidConfiguration,
    ServerUnavailable,
    Unauthenticated,
)
from sharednorm_server.doctor.checks import size

SECONDS = 5.0
SERVICE = "sharednorm.v1.BatchNormService"

_LEAST_SECONDS = 0.001
_MAX_ANSWER_BYTES = 1 << 16


def ask(server: str, timeout: float, tls_ca: str | None = None) -> Mapping[str, str]:
    """Ask a server for its health, then for what it is, all within a time.

    Args:
        server: Its address, as `sharednorm.connect` takes it.
        timeout: Seconds, > 0.
        tls_ca: File of the authority of its certificate; None: as `sharednorm.connect` has it.

    Raises:
        InvalidConfiguration: The address is not one, the timeout is out of its range, or the package that knows the
            health service is not installed.
        ServerUnavailable: Nobody listens there, or the server says that it does not serve.
        DeadlineExceeded: It did not answer in time.
        IncompatibleServer: It is not a sharednorm server, or one that speaks another protocol.
    """
    address = parse_address(server)
    if not 0 < timeout <= MAX_SECONDS:
        raise InvalidConfiguration(
            f"timeout is {timeout} (expected: a number of seconds > 0, at most {MAX_SECONDS:g}): pass another --timeout"
        )
    end = time.monotonic() + timeout
    authority = tls_ca or os.environ.get("SHAREDNORM_TLS_CA")
    credentials = sharednorm.TLS(authority).credentials() if authority and not address.path else None
    _require_serving(address, credentials, end, timeout)
    try:
        # What the checks of its health have left. A server that has answered those may still be too busy for this.
        with sharednorm.connect(server, timeout=max(_LEAST_SECONDS, end - time.monotonic()), tls=tls_ca) as hub:
            info = hub.info
    except Unauthenticated:
        told = "asks for a token, and this was none of its (SHAREDNORM_TOKEN)"
        return {"server": address.text, "health": "SERVING", "access": told}
    except DeadlineExceeded as error:
        raise DeadlineExceeded(
            f"{address.text} is SERVING, but did not say within {timeout:g} s what it is: every worker may be busy "
            "(pass a larger --timeout, or start it with more --workers)"
        ) from error
    return {
        "server": address.text,
        "health": "SERVING",
        "release": info.version,
        "protocol": str(info.protocol),
        "device": info.device,
        "store": info.store,
        "limits": f"{size(info.max_tensor_bytes)} a tensor, {size(info.max_unary_bytes)} in one message, "
        f"else in chunks of {size(info.chunk_bytes)}",
    }


def _require_serving(address: Address, credentials: grpc.ChannelCredentials | None, end: float, timeout: float) -> None:
    try:
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "grpc_health":
            raise
        raise InvalidConfiguration("doctor --server needs grpc_health: pip install 'sharednorm[server]'") from error
    # As the library's own channels: a proxy is never on the way to this machine itself.
    options = (
        ("grpc.enable_http_proxy", 0 if address.local else 1),
        ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
    )
    with (
        grpc.insecure_channel(address.target, options)
        if credentials is None
        else grpc.secure_channel(address.target, credentials, options)
    ) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            try:
                answer = check(request, timeout=max(_LEAST_SECONDS, end - time.monotonic()))
            except grpc.RpcError as error:
                raise _explained(error, address, service, timeout) from error
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                raise ServerUnavailable(
                    f"{service or 'the server'} at {address.text} is {status} (expected: SERVING): it is stopping, or "
                    "its log says what is wrong"
                )


def _explained(error: grpc.RpcError, address: Address, service: str, timeout: float) -> Exception:
    code = error.code() if isinstance(error, grpc.Call) else None
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return IncompatibleServer(f"{address.text} has no health service: it is not a sharednorm server")
    if code is grpc.StatusCode.NOT_FOUND:
        return IncompatibleServer(
            f"{address.text} is not a sharednorm server: its health service does not know {service or 'the server'}"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(
            f"{address.text} did not answer within {timeout:g} s: is it a sharednorm server, and alive? (pass a larger "
            "--timeout if the way to it is slow)"
        )
    return error_from_call(error, address.text, timeout)
