"""What all handles of one hub share."""

from __future__ import annotations

from sharednorm.coordination.idempotency import Session
from sharednorm.coordination.push_queue import Sender
from sharednorm.layers.call_queue import CallQueues
from sharednorm.transport.base import Exchanger


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

    def __init__(self, exchange: Exchanger) -> None:
        self.exchange = exchange
        self.session = Session(exchange.connection)
        self.queues = CallQueues()
        self.sender = Sender(exchange)
