"""How a call fails: every exception becomes a typed error, and every typed error a gRPC status."""

from __future__ import annotations

import logging
import secrets
from typing import NoReturn

import grpc

from sharednorm.codec.convert import error_to_status
from sharednorm.errors import InternalError, LimitExceeded, SharedNormError
from sharednorm_server.observability.instrumentation import Seen

_log = logging.getLogger(__name__)


def known_error(name: str, error: Exception) -> SharedNormError:
    """Return the error that a call ends with; one that was not raised on purpose goes to the log."""
    if isinstance(error, SharedNormError):
        return error
    identity = secrets.token_hex(4)
    _log.error("defect %s in %s", identity, name, exc_info=error)
    if isinstance(error, MemoryError):
        return LimitExceeded("the server has not enough memory for this call", {"limit": "memory"})
    return InternalError(f"the server failed; its log has the details under defect {identity}", {"id": identity})


def refuse(name: str, error: Exception, context: grpc.ServicerContext, seen: Seen) -> NoReturn:
    """End a call by gRPC with an error's status, message and details."""
    known = known_error(name, error)
    _log.debug("%s refused: %s: %s", name, known.reason, known.message)
    code, text, metadata = error_to_status(known)
    seen.failed(code.name)
    context.set_trailing_metadata(metadata)
    context.abort(code, text)
