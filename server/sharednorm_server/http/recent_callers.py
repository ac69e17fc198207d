"""Who uses a server by gRPC, which has no list of them: whoever has called within the last minute."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from urllib.parse import unquote

from sharednorm_server.observability.instrumentation import NOBODY, Origin, Seen

TRANSPORT = "grpc"
RECENT_SECONDS = 60.0
_MOST = 10_000  # connections; of more, those that have been silent for longest are not counted


class Attached:
    """Notes who calls.

    Args:
        clock: Tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, float] = {}  # when each connection has called, the one that did so last at the end

    def begin(self, method: str, transport: str, id: str, origin: Callable[[], Origin], arrived: float) -> Seen:  # noqa: A002
        """Note who has made a call."""
        if transport == TRANSPORT:
            peer, now = origin().peer, self._clock()
            with self._lock:
                self._last.pop(peer, None)
                self._last[peer] = now
                if len(self._last) > _MOST:
                    del self._last[next(iter(self._last))]
        return NOBODY.begin(method, transport, id, origin, arrived)

    def recent(self) -> Counter[str]:
        """Return how many connections of each host have called within the last minute."""
        since = self._clock() - RECENT_SECONDS
        with self._lock:
            peers = [peer for peer, moment in self._last.items() if moment >= since]
        return Counter(_host(peer) for peer in peers)


def _host(peer: str) -> str:
    # gRPC writes "ipv4:10.0.0.1:5000", "ipv6:%5B::1%5D:5000" or "unix:".
    family, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if family in {"ipv4", "ipv6"} else "unix socket"
