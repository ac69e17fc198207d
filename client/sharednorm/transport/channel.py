"""How a channel to a server is opened: its options, and what it retries."""

from __future__ import annotations

import json
import os

import grpc

from sharednorm.codec import wire
from sharednorm.core.address import Address
from sharednorm.core.limits import MAX_MAPS
from sharednorm.core.state import ARRAY_FIELDS
from sharednorm.errors import HubClosed
from sharednorm.transport.credentials import TLS

SERVICE = "sharednorm.v1.BatchNormService"

# gRPC's switch for its fork handlers, which the package turns off unless the environment has set it.
FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"

# The largest messages that a server has reason to send: a whole state of the widest layer, or a
# tensor in one message; and beside it names, shapes and tags.
_MAX_RECEIVE_BYTES = max(4 * len(ARRAY_FIELDS) * MAX_MAPS, wire.MAX_UNARY_BYTES + 20 * MAX_MAPS) + (1 << 20)

# So that whoever connects waits a moment for a server that is just starting. Other calls are retried by those who make
# them: see `retry`.
_RETRIED = ("GetServerInfo",)

_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")

# Processes, this one and those it was forked from, in which gRPC has been at work.
_PROCESSES: set[int] = set()


def open_channel(address: Address, tls: TLS | None) -> grpc.Channel:
    """Return a channel, which connects at its first call.

    Raises:
        InvalidConfiguration: A file of `tls` cannot be read.
        HubClosed: This process was forked from one that had a channel. gRPC's threads are not in the child,
            and a call there would hang beyond its deadline.
    """
    if _PROCESSES and os.getpid() not in _PROCESSES and os.environ.get(FORK_SUPPORT) not in {"1", "true", "yes"}:
        raise HubClosed(
            "this process was forked from one that was connected to a server, and gRPC does not survive that: "
            'use the start method "spawn", or fork before the first connect()'
        )
    credentials = None if tls is None else tls.credentials()
    options = channel_options(address)
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    _PROCESSES.add(os.getpid())
    if credentials is None:
        return grpc.insecure_channel(address.target, options=options)
    return grpc.secure_channel(address.target, credentials, options=options)


def proxy_hint(address: Address) -> str:
    """Return a sentence for the error of a host that could not be reached, if a proxy may be why; or ""."""
    variable = next((name for name in _PROXY_VARIABLES if os.environ.get(name)), None)
    if address.local or variable is None:
        return ""
    exceptions = next((os.environ[name] for name in _NO_PROXY_VARIABLES if os.environ.get(name)), "")
    if any(entry.strip() and address.host.endswith(entry.strip()) for entry in exceptions.split(",")):
        return ""
    return (
        f" The call goes through the proxy that the environment variable {variable} names; "
        f"if it should not, add {address.host} to no_proxy."
    )


def channel_options(address: Address) -> list[tuple[str, int | str]]:
    """Return the options of a channel to an address."""
    return [
        # A connection of its own: two hubs share neither a socket nor a back-off.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),  # the server says what it takes
        ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
        # Find out that the other machine has vanished, also while a call waits for long.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.max_pings_without_data", 0),
        # After a restart of the server, be back within seconds; gRPC's own is up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Only "identity": neither are tensors worth compressing, nor is inflating safe.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # A proxy is never on the way to this machine itself. Other hosts follow the environment, as
        # every gRPC program does: http_proxy and its like, with no_proxy for the exceptions.
        ("grpc.enable_http_proxy", 0 if address.local else 1),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.service_config", _service_config()),
    ]


def _service_config() -> str:
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.05s",
        "maxBackoff": "0.5s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    names = [{"service": SERVICE, "method": method} for method in _RETRIED]
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})
