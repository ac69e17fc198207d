"""The way to a server: memory that it shares, direct connections, or gRPC alone; and what to do when one is closed."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from sharednorm.errors import DeadlineExceeded, InvalidConfiguration, ServerUnavailable, SharedNormError
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.direct import DirectLink, Place, SessionLost, Unreachable
from sharednorm.transport.grpc import Connection
from sharednorm.transport.shared_memory import SharedRegions
from sharednorm.v1 import service_pb2

TRANSPORTS = ("auto", "shm", "direct", "grpc")

# How long a way that was found closed is not tried again.
_PAUSE_SECONDS = 30.0

_log = logging.getLogger("sharednorm")


@dataclass(frozen=True)
class Way:
    """A direct way to a server: connections, and perhaps memory that it shares."""

    link: DirectLink
    regions: SharedRegions | None

    def is_of(self, offer: service_pb2.DirectEndpoint | None) -> bool:
        """Return whether it leads to a server that is still there, with the session that it has."""
        there = offer is not None and offer.instance == self.link.place.instance
        return there and not (self.regions is not None and self.regions.closed)

    def close(self) -> None:
        """End what runs on it."""
        self.link.close()
        if self.regions is not None:
            self.regions.close()


class TransportSelector:
    """Finds the way to one server, for any number of threads.

    Args:
        connection: To the server, which has been greeted.
        requested_transport: "auto", or the one way to go.

    Raises:
        ServerUnavailable: The one way to go is not there.
    """

    def __init__(self, connection: Connection, requested_transport: str) -> None:
        self.requested_transport = requested_transport
        self._connection = connection
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._way: Way | None = None
        self._again = 0.0  # when to look for one once more
        if requested_transport != "grpc":
            self.look_again(None, connection.deadline(), greeted=True)

    @property
    def transport(self) -> str:
        """The way that calls go now: "shm", "direct" or "grpc"."""
        way = self._way
        if way is None:
            return "grpc"
        return "direct" if way.regions is None else "shm"

    def current(self, left: Deadline) -> Way | None:
        """Return the way, looking for one if that has not been done for a while; None: there is gRPC alone."""
        way = self._way
        if way is None and self.requested_transport != "grpc" and time.monotonic() >= self._again:
            way = self.look_again(None, left)
        return way

    def close(self) -> None:
        """End what runs; in a forked child nothing, since the connections are its parent's."""
        way = self._way
        if way is not None and os.getpid() == self._process:
            way.close()

    def look_again(
        self, broken: Way | None, left: Deadline, why: Unreachable | None = None, *, greeted: bool = False
    ) -> Way | None:
        """Look for a direct way, at another port perhaps if the server was restarted; return None if there is none.

        Args:
            broken: The one that could not be gone.
            left: When the call that wanted to go it has to be over.
            why: What it said.
            greeted: Whether the server was asked a moment ago where it is.

        Raises:
            ServerUnavailable: There is none, and it was asked for.
        """
        # Where gRPC does as well, a call that has no other way does not wait while another thread looks for one.
        may_wait = broken is not None or greeted or self.requested_transport != "auto"
        if not self._lock.acquire(blocking=may_wait):
            return None
        try:
            if self._connection.closed:
                raise self._connection.was_closed()
            if self._way is not broken:
                return self._way  # another thread has been here
            if broken is None and not greeted and time.monotonic() < self._again:
                return None  # and has found none
            if not greeted:
                self._connection.handshake(left)  # another server may be there now, and elsewhere
            try:
                lost = isinstance(why, SessionLost)
                if broken is not None and why is not None and not lost and broken.is_of(self._connection.direct):
                    raise why  # that takes no more connections, say: others go on with those that they have
                self._way = None
                found = self._find(left)
            except Unreachable as error:
                self._there_is_none(error, left)
                return None
            except (OSError, EOFError) as error:
                raise self.typed(error, left) from None
            self._way = found
            if self._connection.closed:  # meanwhile, when there was nothing to close
                found.close()
                raise self._connection.was_closed()
            return found
        finally:
            self._lock.release()

    def _there_is_none(self, error: Unreachable, left: Deadline) -> None:
        if not left.left():
            raise self.typed(BlockingIOError(), left) from None
        self._again = time.monotonic() + _PAUSE_SECONDS
        where = self._connection.address.text
        if self.requested_transport != "auto":
            raise ServerUnavailable(
                f'{where} cannot be reached as transport="{self.requested_transport}" asks: {error} (pass '
                'transport="auto" to do without)'
            ) from None
        _log.info("a call to %s goes by gRPC: %s", where, error)

    def _find(self, left: Deadline) -> Way:
        offer, address = self._connection.direct, self._connection.address
        if offer is None:
            raise Unreachable("the server takes no direct connections")
        if offer.tls:
            raise Unreachable("the server's direct connections are encrypted, which this release is not able to")
        if address.path and offer.socket and offer.socket == Path(offer.socket).name:
            path = str(Path(address.path).with_name(offer.socket))
            place = Place("", 0, path, offer.instance, offer.traces)
        elif offer.port and not address.path:
            place = Place(address.host, offer.port, "", offer.instance, offer.traces)
        else:
            raise Unreachable("the server takes no direct connections where gRPC has reached it")
        regions, patient = None, self.requested_transport != "auto"
        if self.requested_transport != "direct":
            if offer.shared_memory and place.path:
                regions = SharedRegions(place, left, patient=patient)
            elif self.requested_transport == "shm":
                raise Unreachable("the server shares no memory there (it does on a unix socket, on Linux)")
        session = b"" if regions is None else regions.session
        link = DirectLink(place, session, patient=patient)
        try:
            link.probe(left)
        except BaseException:
            Way(link, regions).close()
            raise
        return Way(link, regions)

    def typed(self, error: OSError | EOFError | SharedNormError, left: Deadline) -> SharedNormError:
        """Return what a call that went a direct way raises for what has happened there."""
        where = self._connection.address.text
        if isinstance(error, SharedNormError):
            return error
        if self._connection.closed:
            return self._connection.was_closed()
        if isinstance(error, (BlockingIOError, TimeoutError)) or not left.left():
            return DeadlineExceeded(
                f"{where} did not answer within {left.timeout:g} s (pass a larger timeout to connect(), or look at "
                "the server)"
            )
        return ServerUnavailable(
            f"the connection to {where} broke during the call: {_words(error)} (is the server running? start one "
            f"with `sharednorm serve --listen {where}`)"
        )


def check_transport(transport: object) -> str:
    """Check the name of a way.

    Raises:
        InvalidConfiguration: There is none of that name.
    """
    if not isinstance(transport, str) or transport not in TRANSPORTS:
        raise InvalidConfiguration(f"transport is {ascii(transport)[:60]} (expected: one of {', '.join(TRANSPORTS)})")
    return transport


def _words(error: OSError | EOFError) -> str:
    return "the server has closed it" if isinstance(error, EOFError) else str(error.strerror or error)
