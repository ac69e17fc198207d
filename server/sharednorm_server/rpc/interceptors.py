"""What happens before a call by gRPC runs: access, and the limit of concurrent calls."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import grpc

from sharednorm.errors import ServerBusy
from sharednorm_server.auth.tokens import TokenFile
from sharednorm_server.observability.instrumentation import Watcher
from sharednorm_server.observability.logs import in_call, new_call
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.errors import refuse
from sharednorm_server.rpc.handlers import WAY, known_method, origin_of


class AdmissionInterceptor(grpc.ServerInterceptor):
    """Refuses calls before anything of their bodies is read: of those who may not, and when there are too many.

    Args:
        service: The full name of the service that is guarded; others are open.
        tokens: Who may call; None: every client.
        pool: Knows how many calls there are.
        most: Most at a time, those that wait included; but a group's members wait for each other, and are not counted.
        watcher: Is told of those that are refused.
    """

    def __init__(self, service: str, tokens: TokenFile | None, pool: CallPool, most: int, watcher: Watcher) -> None:
        self._watcher = watcher
        self._tokens = tokens
        self._prefix = f"/{service}/"
        self._pool = pool
        self._most = most

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Return what handles a call."""
        handler = continuation(details)
        if handler is None or not details.method.startswith(self._prefix):
            return handler
        name = known_method(details.method[len(self._prefix) :])
        try:
            if self._tokens is not None:
                self._tokens.admit(name, dict(details.invocation_metadata))
            self._require_room()
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
            refused = error

            def answer(_: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
                call = new_call(name)
                seen = self._watcher.begin(name, WAY, call.id, lambda: origin_of(context), time.perf_counter())
                try:
                    with in_call(call):
                        refuse(name, refused, context, seen)
                finally:
                    seen.ended()

            return grpc.stream_stream_rpc_method_handler(answer)
        return handler

    def _require_room(self) -> None:
        if self._pool.calls >= self._most:
            raise ServerBusy(
                f"{self._most} calls run or wait already (max_concurrent_rpcs = {self._most}): try again in a moment",
                {"limit": "max_concurrent_rpcs", "value": str(self._most), "retry_seconds": "0.1"},
            )
