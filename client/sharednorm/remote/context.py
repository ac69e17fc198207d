"""What all handles of one hub share."""

from __future__ import annotations

from sharednorm.coordination.idempotency import IdempotencySession
from sharednorm.coordination.push_queue import PushQueue
from sharednorm.layers.call_queue import CallQueues
from sharednorm.transport.base import Transport


class HubContext:
    """The hub's connections, its idempotency session, the queues of its layers' calls, and its asynchronous steps.

    Args:
        exchange: With the server, or with all of them.

    Attributes:
        exchange: The same.
        session: Identifies the hub's changes to the servers.
        queues: Order the calls of each layer.
        sender: Sends the steps of handles with `push="async"`.
    """

    def __init__(self, exchange: Transport) -> None:
        self.exchange = exchange
        self.session = IdempotencySession(exchange.connection)
        self.queues = CallQueues()
        self.sender = PushQueue(exchange)
