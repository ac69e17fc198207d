"""What is inside a hub of one server, for tests that look there."""

from __future__ import annotations

import sharednorm
from sharednorm.transport.client import ServerClient
from sharednorm.transport.grpc import Connection


def exchange_of(hub: sharednorm.Hub) -> ServerClient:
    """Return what makes its calls."""
    assert isinstance(hub._exchange, ServerClient)
    return hub._exchange


def connection_of(hub: sharednorm.Hub) -> Connection:
    """Return what makes those by gRPC."""
    return exchange_of(hub).connection
