"""Locks that may be held across I/O, each with the reason; see `tests/support/lock_audit.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Allowed:
    """Why a lock may be held.

    Attributes:
        kinds: During which waits.
        reason: Why no thread waits there for something that it has no need of.
        within: Only inside this function: "module.function".
    """

    kinds: frozenset[str]
    reason: str
    within: str = ""


def _allowed(reason: str, *kinds: str, within: str = "") -> Allowed:
    return Allowed(frozenset(kinds), reason, within)


_SQLITE = "sharednorm_server.store.sqlite.store:SqliteStore._committing"
_REDIS = "sharednorm_server.store.redis.connection:RedisConnection._using"
_NAME = "sharednorm_server.layers.registry:_Opening.lock"
_EXCLUSIVE_LAYER = "sharednorm_server.layers.stored_layer:ExclusiveLayer._lock"
_SHARED_LAYER = "sharednorm_server.layers.shared_layer:SharedLayer._lock"
_STOPPING = "sharednorm_server.server:RunningServer._stopping"
_JOINING = "sharednorm:Group._joining"
_OPEN_SESSION = "sharednorm.coordination.idempotency:IdempotencySession._lock"
_SELECTOR = "sharednorm.transport.selector:TransportSelector._lock"
_MEMBER = "sharednorm.transport.cluster:_Member._lock"

# What a store does, whichever it is; and what a call of a client does, whichever way it goes, retries included.
_STORE = ("store", "commit", "sqlite", f"lock {_SQLITE}", "redis", "socket", f"lock {_REDIS}")
_CALL = ("grpc", "socket", "socket.getaddrinfo", "open file", "sleep", "wait", f"lock {_SELECTOR}", f"lock {_MEMBER}")

ALLOWED: dict[str, tuple[Allowed, ...]] = {
    # --- The server -------------------------------------------------------------------------------------
    _SQLITE: (
        _allowed(
            "SQLite's one connection: the leader of a group commit holds it, and the others wait for it.", "sqlite"
        ),
    ),
    _REDIS: (
        _allowed(
            "The one connection to Redis: the leader sends all commands that wait, and reads the answers.", "socket"
        ),
    ),
    _NAME: (
        _allowed(
            "One name: threads that open, create or delete that layer need each other's result. A creation waits until "
            "there is room, and a deletion until the layer's steps are over.",
            *_STORE,
            "wait",
            f"lock {_EXCLUSIVE_LAYER}",
            f"lock {_SHARED_LAYER}",
        ),
    ),
    _EXCLUSIVE_LAYER: (
        _allowed(
            "Calls of a layer that is being deleted need to hear that it is gone, which is so once that is committed.",
            *_STORE,
            within="sharednorm_server.layers.registry.delete",
        ),
    ),
    _SHARED_LAYER: (
        _allowed(
            "A change of a shared layer is made of its newest record, which Redis has: the next one on this server "
            "needs that this one is there.",
            *_STORE,
        ),
    ),
    _STOPPING: (
        _allowed(
            "A second call that stops the server waits until it has stopped.", *_STORE, "sleep", "wait", "open file"
        ),
    ),
    "sharednorm_server.auth.tokens:TokenFile._lock": (
        _allowed("Taken without waiting: other calls go on with the tokens that there are.", "open file"),
    ),
    "sharednorm_server.direct.connection:DirectConnection._telling": (
        _allowed(
            "One connection, whose thread waits for it at its end. Threads that answer other members try only.",
            "socket",
        ),
    ),
    "sharednorm_server.http.charts:_drawing": (
        _allowed("Matplotlib, whose settings are the process's, reads its fonts: pages wait for pages.", "open file"),
    ),
    # --- The client -------------------------------------------------------------------------------------
    _OPEN_SESSION: (
        _allowed(
            "Every thread's first change needs the session's number, and all calls of a hub have one timeout: who "
            "waits for the call that began earlier waits no longer than its own deadline.",
            *_CALL,
        ),
    ),
    _JOINING: (_allowed("Every thread's step needs the membership that this call returns.", *_CALL),),
    "sharednorm:Group._turn": (
        _allowed(
            "Steps of one layer and direction are numbered, and each is made when the one before it is over.",
            *_CALL,
            f"lock {_JOINING}",
        ),
    ),
    _SELECTOR: (
        _allowed(
            "One thread looks for a direct way. Those whose way is gone need what it finds; the others go by gRPC.",
            "grpc",
            "socket",
            "socket.getaddrinfo",
        ),
    ),
    _MEMBER: (
        _allowed(
            "One server of several: calls that go there need the connection, for which there are three seconds.", *_CALL
        ),
    ),
    "sharednorm.transport.shared_memory:SharedRegions._asking": (
        _allowed("A wish and its answer on the one socket for memory.", "socket"),
    ),
}

SIGNALS = frozenset({
    "sharednorm_server.store.sqlite.group_commit:Waiter._signal",
    "sharednorm_server.store.redis.connection:_Request._signal",
    "sharednorm_server.device.cuda.task_queue:TaskQueue._wake",
})  # fmt: skip
"""Locks by which one thread wakes another: they guard nothing, and no thread waits for the holder of one."""
