"""The way to a hub."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

from sharednorm.core.address import Address, addresses_of, is_number, parse_addresses
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import MAX_SECONDS
from sharednorm.core.validation import check_namespace, is_finite
from sharednorm.errors import InvalidConfiguration
from sharednorm.remote.handle import RemoteBatchNorm
from sharednorm.remote.hub import Hub, HubSpec
from sharednorm.remote.options import HandleOptions
from sharednorm.transport.base import Transport
from sharednorm.transport.channel import proxy_hint
from sharednorm.transport.client import ServerClient
from sharednorm.transport.cluster import Cluster, ClusterTransport
from sharednorm.transport.credentials import TLS, Credentials
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.grpc import Connection
from sharednorm.transport.progress import ProgressCallback
from sharednorm.transport.selector import check_transport
from sharednorm.v1 import layer_pb2

# What takes longer than this to say which addresses a name has does not know it.
_NAME_SECONDS = 5.0


def connect(
    address: str,
    *,
    namespace: str = "default",
    token: str | None = None,
    tls: bool | str | os.PathLike[str] | TLS | None = None,
    timeout: float = 30.0,
    transport: str = "auto",
    progress: ProgressCallback | None = None,
    consistency: str = "bounded",
) -> Hub:
    """Connect to a server, or to several that share their layers.

    With several, each layer's calls go to one of them, and to the next, under the same keys, while that is away. See
    docs/servers.md.

    Processes that use one are spawned, not forked: a child that is forked after the first `connect` can neither
    use its parent's hubs nor connect anew, and is told so. (It can connect if GRPC_ENABLE_FORK_SUPPORT=1 was in
    the environment when gRPC was imported, as far as gRPC's own support of that goes.)

    Args:
        address: Where it listens: "host:port", "[::1]:port" or "unix:/path/of/socket". Several servers with commas
            between them, "a:50051,b:50051", or a name that has several addresses.
        namespace: Whose layers these are; two namespaces never see each other's.
        token: What a server that asks for tokens has given this client; None: the environment variable
            SHAREDNORM_TOKEN, if it is set. Handles that are pickled do not carry it.
        tls: How the connection is encrypted: True, by certificates that gRPC believes; the file of an authority's
            certificate; or a `TLS`. False: not at all, also if a token travels there. None: by the authority in the
            file that the environment variable SHAREDNORM_TLS_CA names, or, if there is none, not at all.
        timeout: Seconds that any one call may take, a large tensor's way there and back included; > 0,
            at most 1e8.
        transport: How tensors travel. "shm": in memory that the server shares with this process, which a server on a
            unix socket does; "direct": on a connection of their own, beside gRPC; "grpc". "auto" takes the first of
            them that works; any other is an error where it does not.
        consistency: Of servers that share their layers: "bounded", where evaluation may use a server's copy of a layer
            for up to the server's --max-staleness, but never one older than what this handle has been told of; or
            "strong", where it does not.
        progress: Called with a `Progress` as the tensors of calls come and go; None: nobody wants to know.

    Raises:
        InvalidConfiguration: An argument is not what it should be.
        InvalidName: The namespace is too long, or has control characters.
        ServerUnavailable: Nobody listens there.
        DeadlineExceeded: Whoever listens there did not answer in time.
        IncompatibleServer: It is not a sharednorm server, or one that speaks another protocol.
        Unauthenticated: The server asks for a token, and this is none of its.
        PermissionDenied: The token is not for this namespace.
        HubClosed: This process was forked from one that was connected.
    """
    hub = _open(address, namespace, token, tls, timeout, transport, progress, consistency)
    open_hubs.add(hub.place, hub)
    return hub


def _open(
    address: str,
    namespace: str,
    token: str | None,
    tls: bool | str | os.PathLike[str] | TLS | None,
    timeout: float,
    transport: str,
    progress: ProgressCallback | None,
    consistency: str,
) -> Hub:
    where = parse_addresses(address)
    if not (is_finite(timeout) and 0 < timeout <= MAX_SECONDS):
        raise InvalidConfiguration(
            f"timeout is {ascii(timeout)[:120]} (expected: a finite number of seconds > 0, at most {MAX_SECONDS:g})"
        )
    checked, way = check_namespace(namespace), check_transport(transport)
    if progress is not None and not callable(progress):
        raise InvalidConfiguration(f"progress is {ascii(progress)[:60]} (expected: a function, or None)")
    if consistency not in ("bounded", "strong"):
        raise InvalidConfiguration(f"consistency is {ascii(consistency)[:60]} (expected: 'bounded' or 'strong')")
    credentials = {each.text: Credentials.parse(token, tls, checked, each) for each in where}

    def make(place: Address, left: Deadline) -> ServerClient:
        known = credentials.get(place.text) or credentials[where[0].text].named(place.host)
        connection = Connection(place, float(timeout), known)
        try:
            connection.handshake(left)
            return ServerClient(connection, way, progress)
        except BaseException:
            connection.close()
            raise

    exchange: Transport
    named = where
    if len(where) == 1 and _is_name(where[0]):
        named = addresses_of(where[0], min(timeout, _NAME_SECONDS))
    if len(named) > 1:
        find = None if len(where) > 1 else lambda: addresses_of(where[0], _NAME_SECONDS)
        exchange = ClusterTransport(Cluster(str(address), named, float(timeout), make, way, find))
    else:
        exchange = make(where[0], Deadline(float(timeout)))
    return Hub(exchange, checked, attach_again, strong=consistency == "strong")


def _is_name(address: Address) -> bool:
    # Whether it may have several addresses, all of which could be meant. A proxy looks names up by itself.
    return not (address.local or proxy_hint(address) or is_number(address.host))


class OpenHubs:
    """The hubs of this process, for handles that are made again; any number of threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._known: weakref.WeakValueDictionary[HubSpec, Hub] = weakref.WeakValueDictionary()
        self._own: dict[HubSpec, Hub] = {}

    def add(self, place: HubSpec, hub: Hub) -> None:
        """Remember a hub, for as long as it is referenced elsewhere."""
        with self._lock:
            self._drop_parents()
            self._known[place] = hub

    def find(self, place: HubSpec, make: Callable[[], Hub]) -> Hub:
        """Return the open hub of a place; if there is none, make one, which stays open until the process ends."""
        with self._lock:
            self._drop_parents()
            hub = self._known.get(place)
            if hub is not None and not hub.closed:
                return hub
        made = make()
        with self._lock:
            first = self._own.get(place, made)
            if first.closed:
                first = made
            self._own[place] = self._known[place] = first
        if first is not made:  # another thread was faster; one hub is enough
            made.close()
        return first

    def _drop_parents(self) -> None:
        # A forked child cannot use the hubs of its parent.
        if os.getpid() != self._process:
            self._process = os.getpid()
            self._known.clear()
            self._own.clear()


open_hubs = OpenHubs()


def attach_again(
    place: HubSpec, ref: bytes, config: LayerConfig, handling: HandleOptions, inplace: bool, train: bool | None
) -> RemoteBatchNorm:
    """Return a handle of the layer that a pickled one was of; its calls raise LayerNotFound if that is gone."""
    hub = open_hubs.find(
        place,
        lambda: _open(
            place.address, place.namespace, None, None, place.timeout, place.transport, None, place.consistency
        ),
    )
    return hub.attach(layer_pb2.LayerRef.FromString(ref), config, handling, inplace, train)
