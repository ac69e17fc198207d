"""Asking a server by HTTP, as programs and browsers do."""

from __future__ import annotations

import http.client
import ssl
from contextlib import closing
from dataclasses import dataclass

from sharednorm_server.server import RunningServer


@dataclass(frozen=True)
class Got:
    """What was answered."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        """The body."""
        return self.body.decode()


def get(
    server: RunningServer,
    path: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> Got:
    """Ask a server for a path."""
    assert server.http is not None
    host, _, port = server.http.rpartition(":")
    made = (
        http.client.HTTPConnection(host, int(port), timeout=10)
        if context is None
        else http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    )
    with closing(made) as connection:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return Got(response.status, response.headers, response.read())
