"""Puts the rooms together and opens the door."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sharednorm.arithmetic.thread_pool import processors
from sharednorm.codec import wire
from sharednorm.core.limits import MAX_GROUP_MEMBERS
from sharednorm_server.auth.tls import CertificateFiles
from sharednorm_server.auth.tokens import TokenFile
from sharednorm_server.config.options import ServerConfig, parse_devices, parse_state, without_secrets
from sharednorm_server.device.base import Device
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.device.timed import TimedDevice
from sharednorm_server.direct.listener import DirectServer
from sharednorm_server.direct.shared_memory import AVAILABLE, SharedMemory
from sharednorm_server.errors import StartError
from sharednorm_server.groups.coordinator import Synchronizer
from sharednorm_server.layers.idempotency import DEFAULT_MAX_SESSIONS
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.service import LayerService
from sharednorm_server.observability.instrumentation import NOBODY, Watcher, Watchers
from sharednorm_server.observability.tracing import open_traces, wanted
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.endpoints import MAX_SOCKET_PATH_BYTES, UnixEndpoint, parse_endpoint
from sharednorm_server.rpc.group_methods import GroupCalls
from sharednorm_server.rpc.interceptors import AdmissionInterceptor
from sharednorm_server.rpc.servicer import SERVICE_NAME, Limits, Servicer
from sharednorm_server.rpc.transfer_scheduler import TransferScheduler
from sharednorm_server.store.base import AnyStore
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.snapshots import SnapshotPolicy
from sharednorm_server.store.sqlite.store import SqliteStore

if TYPE_CHECKING:
    from sharednorm_server.http.pages import Pages

# A message beside its tensor: names and shapes, and 20 bytes a map of moments and scale, or 24 of a whole state.
_HEADER_ROOM = 4 << 20

# Health and reflection have threads of their own, and answer also when every worker is busy.
_SIDE_WORKERS = 4

# The socket for direct connections stands beside gRPC's.
_DIRECT_SUFFIX = ".direct"

# How long new calls are refused with a typed error before gRPC closes its connections.
_CLOSING_SECONDS = 0.2

# What is left when all calls have ended: watchers of the health service, which never end by themselves.
_WATCHERS_GRACE = 0.25

_log = logging.getLogger(__name__)


class RunningServer:
    """A server that listens. Made by `start`.

    Attributes:
        address: Where: "HOST:PORT" with the real port, or "unix:PATH" with an absolute path.
        banner: One line that says release, address, device and state.
        http: Where its page is, "HOST:PORT"; None: nowhere.
    """

    def __init__(
        self,
        address: str,
        service: LayerService,
        grpc_server: grpc.Server,
        pools: Sequence[CallPool],
        groups: Synchronizer,
        status: health.HealthServicer,
        direct: DirectServer,
        watch: _Watch,
    ) -> None:
        info = service.info
        self.address = address
        self.banner = f"sharednorm {info.version} listening on {address}, device {info.device}, state {info.store}"
        self._service = service
        self._grpc_server = grpc_server
        self._pools = pools
        self._groups = groups
        self._status = status
        self._direct = direct
        self._watch = watch
        self.http = watch.http
        if self.http is not None:
            self.banner += f", http {self.http}"
        self._stopping = threading.Lock()
        self._result: bool | None = None

    def stop(self, grace: float) -> bool:
        """Take no more calls, let the running ones end, and close. Again: nothing, and the same result.

        Args:
            grace: Seconds that the running calls are given; what is left then is cut off.

        Returns:
            Whether every call ended by itself.
        """
        with self._stopping:
            if self._result is None:
                self._result = self._stop(grace)
            return self._result

    def on_device_lost(self, callback: Callable[[str], None]) -> None:
        """Have a function called once a device has failed for good; it gets the reason, and should stop the server.

        By then the health service says NOT_SERVING, and calls that compute fail with `DeviceLost`.
        """
        self._service.on_device_lost(self._last_words(callback))

    def on_store_failed(self, callback: Callable[[str], None]) -> None:
        """Have a function called once the store has failed for good; it gets the reason, and should stop the server.

        By then the health service says NOT_SERVING, and calls that change or read a layer fail with `StoreFailed`.
        """
        self._service.on_store_failed(self._last_words(callback))

    def _last_words(self, callback: Callable[[str], None]) -> Callable[[str], None]:
        def failed(reason: str) -> None:
            self._status.enter_graceful_shutdown()
            callback(reason)

        return failed

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped; return False if that took longer than so many seconds."""
        return not self._grpc_server.wait_for_termination(timeout)

    def _stop(self, grace: float) -> bool:
        end = time.monotonic() + grace
        self._status.enter_graceful_shutdown()
        # New calls are refused with a typed error first. What arrives while gRPC closes its connections
        # ends as "cancelled", without a reason, so that clients get a moment to hear of it before that.
        for pool in self._pools:
            pool.close()
        self._groups.close()
        time.sleep(min(_CLOSING_SECONDS, grace))
        self._grpc_server.stop(grace)
        left = [pool for pool in self._pools if not pool.wait_idle(end - time.monotonic())]
        ended = not left
        if not ended:
            _log.warning("calls were still running after %g s and have been cut off", grace)
        self._grpc_server.stop(min(_WATCHERS_GRACE, max(0.0, end - time.monotonic()))).wait()
        self._direct.close()
        self._watch.hide()
        for pool in self._pools:
            pool.shutdown(wait=False)
        if ended:  # a call that was cut off may still compute
            self._service.close()
        self._watch.close()
        return ended


def start(config: ServerConfig) -> RunningServer:
    """Start a server in this process, on threads of its own, with the device and the store that are configured.

    Raises:
        InvalidConfiguration: The address is not one, or the arithmetic that the environment names is not there.
        StartError: The address cannot be listened on, the device is not there, or the store is not part of this
            release.
    """
    _require_private(config)
    store = open_store(config.state, config.durability, config.max_idempotency_sessions)
    try:
        placement = _open_devices(config)
        placement.warm_up()
        policy = SnapshotPolicy(config.snapshot_interval, config.snapshot_retain, config.snapshot_max_age)
        service = LayerService(
            store,
            placement,
            config.activation_cache_bytes,
            config.max_inflight_bytes,
            max_sessions=config.max_idempotency_sessions,
            policy=policy,
            max_layers=config.max_layers,
            max_staleness=config.max_staleness,
        )
        return serve(config, service)
    except BaseException:
        store.close()
        raise


def serve(config: ServerConfig, service: LayerService) -> RunningServer:
    """Start a server for a service that is there already.

    Raises:
        InvalidConfiguration: The address is not one.
        StartError: The address cannot be listened on.
    """
    _require_private(config)
    pool, waiting = CallPool(config.workers), CallPool(MAX_GROUP_MEMBERS)
    groups = Synchronizer(service)
    if config.tls_cert is not None and config.tokens is None and config.tls_client_ca is None:
        _log.warning("whoever reaches %s may use all layers: there are no --tokens, nor --tls-client-ca", config.listen)
    tokens = None if config.tokens is None else TokenFile(config.tokens)
    watch = _Watch(config)
    watcher = watch.all
    grpc_server = grpc.server(
        ThreadPoolExecutor(_SIDE_WORKERS, thread_name_prefix="side"),
        interceptors=[AdmissionInterceptor(SERVICE_NAME, tokens, pool, config.max_concurrent_rpcs, watcher)],
        options=_options(config),
    )
    # Half of the processors: the other half of a transfer's work is in the threads that send and receive.
    movers = TransferScheduler(max(1, processors() // 2))
    servicer = Servicer(service, GroupCalls(service, groups), Limits(config.max_tensor_bytes), movers)
    grpc_server.add_generic_rpc_handlers([servicer.handlers(pool, waiting, watcher, tokens)])
    status = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, grpc_server)
    reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), grpc_server)
    memory = None
    if AVAILABLE and config.shared_memory_bytes:
        memory = SharedMemory(config.shared_memory_bytes_per_client, config.shared_memory_bytes, service.forget_keeper)
    direct = DirectServer(
        servicer, pool, config.workers, memory, config.max_direct_connections, config.handshake_timeout, watcher
    )
    started, trouble = threading.Event(), [""]

    def why_not_ready() -> str:
        if pool.closed:
            return "the server is stopping"
        return trouble[0] if started.is_set() else "the server is starting"

    try:
        watch.show(config, service, groups, direct, tokens, why_not_ready)
        address = _listen(config, grpc_server, direct)
    except BaseException:
        watch.close()
        raise
    grpc_server.start()
    started.set()
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", SERVICE_NAME):
        status.set(name, serving)

    def in_trouble(why: str) -> None:
        trouble[0] = f"the store cannot be used: {why}" if why else ""
        for name in ("", SERVICE_NAME):
            status.set(name, not_serving if why else serving)

    service.on_store_trouble(in_trouble)
    return RunningServer(address, service, grpc_server, (pool, waiting), groups, status, direct, watch)


class _Watch:
    # Whoever watches the calls: metrics and the page, and traces, where they are wanted.
    def __init__(self, config: ServerConfig) -> None:
        self._web: Pages | None = None
        self._traces = open_traces(os.environ, SERVICE_NAME)
        watchers: list[Watcher] = [] if self._traces is None else [self._traces]
        if config.http_listen is not None:
            from sharednorm_server.http.recent_callers import Attached  # noqa: PLC0415 - as above
            from sharednorm_server.observability.metrics import Metrics  # noqa: PLC0415 - most servers tell nobody

            self._metrics, self._attached = Metrics(), Attached()
            watchers += [self._metrics, self._attached]
        self.all: Watcher = Watchers(*watchers) if watchers else NOBODY

    @property
    def http(self) -> str | None:
        return None if self._web is None else self._web.address

    def show(
        self,
        config: ServerConfig,
        service: LayerService,
        groups: Synchronizer,
        direct: DirectServer,
        tokens: TokenFile | None,
        why_not_ready: Callable[[], str],
    ) -> None:
        if config.http_listen is None:
            return
        from sharednorm_server.http.collectors import register  # noqa: PLC0415 - as above
        from sharednorm_server.http.pages import Pages  # noqa: PLC0415 - as above

        register(self._metrics, service, groups, direct)
        self._web = Pages(service, groups, self._metrics, direct.peers, self._attached.recent, why_not_ready)
        self._web.serve(config.http_listen, tokens, _context(config))

    def hide(self) -> None:
        web, self._web = self._web, None
        if web is not None:
            web.close()

    def close(self) -> None:
        self.hide()
        if self._traces is not None:
            self._traces.close()


def _context(config: ServerConfig) -> Callable[[], ssl.SSLContext] | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    return CertificateFiles(config.tls_cert, config.tls_key, config.tls_client_ca).context


def _require_private(config: ServerConfig) -> None:
    for listen in (config.listen, config.http_listen):
        if listen is not None and not (
            config.insecure or config.tls_cert is not None or parse_endpoint(listen).private
        ):
            raise StartError(
                f"{listen} can be reached by other machines, and nothing would be encrypted: pass --tls-cert and "
                "--tls-key (`sharednorm certs create` makes them), listen on 127.0.0.1 or a unix socket, or pass "
                "--insecure if the network is trusted"
            )


def _listen(config: ServerConfig, grpc_server: grpc.Server, direct: DirectServer) -> str:
    address = _bind(config, grpc_server)
    if config.tokens is not None or config.tls_cert is not None:
        _log.info("no direct connections, which ask for no token and are not encrypted: tensors come by gRPC")
    elif config.direct_port is not None:
        _listen_directly(direct, config.listen, config.direct_port)
    return address


def _bind(config: ServerConfig, grpc_server: grpc.Server) -> str:
    endpoint = parse_endpoint(config.listen)
    if config.tls_cert is None or config.tls_key is None:
        return endpoint.bind(grpc_server.add_insecure_port)
    credentials = CertificateFiles(config.tls_cert, config.tls_key, config.tls_client_ca).credentials()
    return endpoint.bind(lambda address: grpc_server.add_secure_port(address, credentials))


def _listen_directly(direct: DirectServer, listen: str, port: int) -> None:
    endpoint = parse_endpoint(listen)
    if not isinstance(endpoint, UnixEndpoint):
        direct.listen_tcp(endpoint.host, port)
        return
    path = endpoint.path.with_name(endpoint.path.name + _DIRECT_SUFFIX)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        _log.warning("no direct connections: the path of their socket would be too long (shorten %s)", listen)
        return
    direct.listen_unix(path)


def _open_devices(config: ServerConfig) -> Placement:
    devices = _devices(config)
    watched = config.http_listen is not None or wanted(os.environ) != "none"
    return Placement(*map(TimedDevice, devices)) if watched else Placement(*devices)


def _devices(config: ServerConfig) -> Sequence[Device]:
    ordinals = parse_devices(config.device)
    if not ordinals:
        return [CpuDevice(threads=config.compute_threads)]
    try:
        from sharednorm_server.device.cuda.device import CudaDevice  # noqa: PLC0415 - needs the extra, and a driver
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pycuda":
            raise
        raise StartError(
            f"--device {config.device} needs PyCUDA: pip install 'sharednorm[cuda]', which needs the CUDA toolkit"
        ) from error
    except ImportError as error:
        raise StartError(
            f"--device {config.device} needs NVIDIA's driver: {error} (`sharednorm doctor` says more)"
        ) from error
    return [CudaDevice(ordinal, config.device_memory_bytes) for ordinal in ordinals]


def open_store(state: str, durability: str = "os", max_sessions: int = DEFAULT_MAX_SESSIONS) -> AnyStore:
    """Return what a `--state` names.

    Raises:
        InvalidConfiguration: It names nothing.
        StartError: It cannot be used.
    """
    place = parse_state(state)
    if place is None:
        return MemoryStore()
    if isinstance(place, Path):
        return SqliteStore(place, durability)
    try:
        from sharednorm_server.store.redis.store import RedisStore  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise StartError(
            f"--state {without_secrets(place)} needs redis-py: pip install 'sharednorm[server,redis]'"
        ) from error
    return RedisStore(place, durability, max_sessions)


def _options(config: ServerConfig) -> Sequence[tuple[str, int]]:
    return (
        ("grpc.so_reuseport", 0),  # two servers on one port would share its calls, silently
        ("grpc.max_receive_message_length", wire.MAX_UNARY_BYTES + _HEADER_ROOM),
        ("grpc.max_send_message_length", -1),
        # Only "identity": a small compressed message can be a huge one.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.server_handshake_timeout_ms", round(1000 * config.handshake_timeout)),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # A client that has vanished is found out within 80 seconds, and its call ended.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may ask as often whether the server is there, also between calls.
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )
