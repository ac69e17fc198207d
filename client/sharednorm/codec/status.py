"""Errors on the wire: an exception becomes a gRPC status with a detail, and that the same exception again.

The detail travels in trailing metadata, where gRPC allows little: over 8 KiB it may drop the call's whole
status, over 16 KiB it does. So everything that goes there is cut to a size, here.
"""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError

from sharednorm.errors import (
    CallCancelled,
    ConfigurationMismatch,
    DeadlineExceeded,
    IncompatibleServer,
    InternalError,
    LayerNotFound,
    LimitExceeded,
    ModuleError,
    PermissionDenied,
    ServerUnavailable,
    SharedNormError,
    Unauthenticated,
    error_class,
)
from sharednorm.v1 import service_pb2

ERROR_KEY = "sharednorm-error-bin"
"""Trailing metadata entry that holds a serialized ErrorDetail."""

MAX_METADATA_BYTES = 1024
"""Most bytes of a detail's metadata, keys and values together; a message may have 4 KiB besides."""

MAX_STATUS_BYTES = 512
"""Most bytes of gRPC's own status message, which travels in ASCII. The detail has the whole text."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}

# What a status means that no known reason explains.
_FALLBACKS: dict[grpc.StatusCode, type[SharedNormError]] = {
    grpc.StatusCode.CANCELLED: CallCancelled,
    grpc.StatusCode.INVALID_ARGUMENT: ModuleError,
    grpc.StatusCode.OUT_OF_RANGE: ModuleError,
    grpc.StatusCode.FAILED_PRECONDITION: ModuleError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: LayerNotFound,
    grpc.StatusCode.ALREADY_EXISTS: ConfigurationMismatch,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceeded,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleServer,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
}


def error_to_status(error: SharedNormError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Return what a server ends a call with: status code, status message, trailing metadata."""
    # gRPC writes each byte beyond ASCII as three.
    text = error.message.encode("ascii", "backslashreplace")[:MAX_STATUS_BYTES].decode("ascii")
    return _CODES[error.code], text, ((ERROR_KEY, error_to_detail(error).SerializeToString()),)


def error_to_detail(error: SharedNormError) -> service_pb2.ErrorDetail:
    """Return an error as a message. Metadata beyond 1 KiB in all is cut, then left out."""
    detail = service_pb2.ErrorDetail(reason=error.reason, message=error.message)
    left = MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        name = _utf8(key)
        left -= len(name.encode())
        if left <= 0:
            break
        text = _utf8(value, left)
        left -= len(text.encode())
        detail.metadata[name] = text
    return detail


def error_from_detail(detail: service_pb2.ErrorDetail) -> SharedNormError | None:
    """Return the error that a detail describes, or None for a reason that this release does not know."""
    cls = error_class(detail.reason)
    return None if cls is None else cls(detail.message, dict(detail.metadata))


def error_from_call(error: grpc.RpcError, target: str, timeout: float) -> SharedNormError:
    """Return the typed error of a failed call, unary or stream.

    Args:
        error: What grpcio raised.
        target: The server's address, for the message.
        timeout: Seconds that the call was given, for the message.
    """
    if not isinstance(error, grpc.Call):
        return InternalError(f"the call to {target} failed: {error}")
    code, text = error.code(), error.details() or "no details"
    detail = _detail(error)
    if detail is None:
        return _class_of(code)(_advice(code, text, target, timeout))
    known = error_from_detail(detail)
    if known is not None:
        return known
    return _class_of(code)(detail.message or text, {**detail.metadata, "reason": detail.reason})


def _class_of(code: grpc.StatusCode) -> type[SharedNormError]:
    return _FALLBACKS.get(code, InternalError)


def _detail(call: grpc.Call) -> service_pb2.ErrorDetail | None:
    """Return the detail of a failed call, or None if it has none that can be read and names a reason.

    Then it comes from something else than a sharednorm server, and the status itself says what happened.
    """
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                detail = service_pb2.ErrorDetail.FromString(value)
            except (DecodeError, UnicodeDecodeError):  # the latter by protobuf's pure Python runtime
                return None
            return detail if detail.reason else None
    return None


def _advice(code: grpc.StatusCode, text: str, target: str, timeout: float) -> str:
    if code is grpc.StatusCode.UNAVAILABLE:
        return (
            f"no answer from {target}: {text} (is the server running? start one with "
            f"`sharednorm serve --listen {target}`)"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return (
            f"{target} did not answer within {timeout:g} s (pass a larger timeout to connect(), or look at the server)"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return (
            f"{target} does not know this call: {text} (is it a sharednorm server? if so, its release and this "
            "library's do not fit; install the same release on both sides)"
        )
    if code is grpc.StatusCode.CANCELLED:
        return f"the call to {target} was given up: {text}"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return (
            f"the call to {target} is beyond a limit of gRPC or of the server: {text} (send a smaller tensor, or "
            "try again when the server is less busy)"
        )
    return f"the call to {target} failed with {code.name}: {text}"


def _utf8(text: str, longest: int = 256) -> str:
    encoded = text.encode("utf-8", "backslashreplace")[:longest]
    return encoded.decode("utf-8", "ignore")
