"""A store that several servers share, in Redis 7 or Valkey: what is said to be kept is as safe as that Redis makes it.

A change is one script, which Redis runs in one piece: if the layer's record still is the one that the change was
computed from, the new one takes its place, together with what is remembered of the session that has made it. Which
server asks, and what it believes, does not matter to that; so a server that has been cut off for an hour harms nobody.

All keys of a layer have its name in braces, and so are in one slot. But the list of names is elsewhere, and changes
with them, so that this is no store for a Redis Cluster.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import redis

from sharednorm.errors import BackupFailed, StoreUnavailable
from sharednorm_server.config.options import without_secrets
from sharednorm_server.errors import StartError
from sharednorm_server.store.base import LayerKey, LayerRecord, Look, StoreCounts, Whole
from sharednorm_server.store.records import Note, Remembered
from sharednorm_server.store.redis import scripts
from sharednorm_server.store.redis.codec import (
    TAKEN,
    change_from_bytes,
    change_to_bytes,
    snapshot_from_bytes,
    snapshot_to_bytes,
    to_fields,
    to_record,
)
from sharednorm_server.store.redis.connection import RedisConnection, Wire
from sharednorm_server.store.redis.layout import (
    LAYOUT,
    REFUSED,
    STAMP,
    registered,
    registration,
    require_layout,
    root_of,
    stamp_of,
)
from sharednorm_server.store.snapshots import SnapshotInfo

_DELETED_SECONDS = 30 * 86400  # for which a layer that is gone is known to have been deleted
_RECORDS = 100  # that are read in one piece
_OLDEST = 7  # release of Redis

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RedisPlace:
    """Where a Redis is, and what is ours there.

    Attributes:
        options: For its connections.
        kind: Of the connections.
        text: The URL without secrets.
        prefix: Of all keys.
    """

    options: dict[str, Any]
    kind: type[redis.Connection]
    text: str
    prefix: str

    @classmethod
    def parse(cls, url: str) -> RedisPlace:
        """Return the place that a URL names.

        Raises:
            StartError: It is none, or names a file that cannot be read.
        """
        parts = urlsplit(url)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        prefix = query.pop("prefix", "sharednorm")
        seconds = query.pop("timeout", "2")
        secret = query.pop("password_file", None)
        plain = f"{parts.scheme.removeprefix('redis+')}://{parts.netloc}{parts.path}?{urlencode(query)}"
        try:
            timeout = _between(float(seconds), 0.01, 3600.0)
            pool = redis.ConnectionPool.from_url(
                plain,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
                protocol=2,
                client_name="sharednorm",
            )
            password = None if secret is None else Path(secret).read_text(encoding="utf-8").strip()
        except (ValueError, OSError) as error:
            raise StartError(
                f"--state {without_secrets(url)} cannot be understood: {error} (expected: redis://HOST:PORT/DB, rediss://"
                " with TLS, or redis+unix:///SOCKET?db=0; behind a ? also prefix, timeout and password_file)"
            ) from None
        options = dict(pool.connection_kwargs)
        if password is not None:
            options["password"] = password
        return cls(options, pool.connection_class, without_secrets(url), prefix)

    @property
    def database(self) -> int:
        """Number of the database."""
        return self.options.get("db") or 0

    def make(self) -> Wire:
        """Return a connection that is not connected yet."""
        return cast("Wire", self.kind(**self.options))


class RedisStore:
    """Keeps records in Redis, which other servers use meanwhile.

    Args:
        url: Where; see `RedisPlace`.
        durability: What a change has to survive before it is kept: "os", no more than what this Redis makes sure of; or
            "fsync", loss of power: then this has to be a Redis that syncs its file at each change.
        max_sessions: Sessions whose last changes each layer remembers.

    Raises:
        StartError: Redis cannot be reached, is too old, a replica, or part of a cluster; may throw layers away; does
            not do what `durability` asks for; or has the layers of a newer release.
    """

    def __init__(self, url: str, durability: str = "os", max_sessions: int = 1024) -> None:
        self._place = RedisPlace.parse(url)
        self.description = self._place.text
        self._durability = durability
        self._max_sessions = max_sessions
        self._server = secrets.token_bytes(8)
        self._root = root_of(self._place.prefix)
        self._channel = f"{self._root}:changed:{self._place.database}"
        self._registration = registration(self._place.prefix, self._place.database)
        self._on_changed: Callable[[LayerKey | None, bool], None] = lambda _, __: None
        self._on_trouble: Callable[[str], None] = lambda _: None
        self._hashes = {
            script: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            for script, text in scripts.ALL.items()
        }
        self._sessions = f"{self._root}:sessions"
        self._highest = 0  # number of a session that is known to have been given
        self.identity = ""
        self._told = False
        try:
            self._line = RedisConnection(
                self._place.make,
                self._place.text,
                f"{self._place.prefix}:probe",
                self._prepare,
                [self._channel, self._registration],
                self._heard,
                lambda why: self._on_trouble(why),  # noqa: PLW0108 - which is another one later
            )
        except (redis.RedisError, OSError, StoreUnavailable) as error:
            raise StartError(f"the state in {self._place.text} cannot be used: {str(error)[:500]}") from error

    @property
    def counts(self) -> StoreCounts:
        """What has travelled to Redis: pieces, and the commands in them."""
        return StoreCounts(self._line.pieces, self._line.commands, self._line.seconds)

    def on_failed(self, callback: Callable[[str], None]) -> None:
        """Never call it: a Redis that is away may come back."""

    def on_trouble(self, callback: Callable[[str], None]) -> None:
        """Have a function called when Redis cannot be used for now, with the reason, and with "" when it can."""
        self._on_trouble = callback
        if self._line.trouble:
            callback(self._line.trouble)

    def on_changed(self, callback: Callable[[LayerKey | None, bool], None]) -> None:
        """Have a function called soon after another server has changed a layer; None: after any may have been."""
        self._on_changed = callback

    def close(self) -> None:
        """Let go of the connections."""
        self._line.close()

    # --- Layers -------------------------------------------------------------------------------------------

    def look(self, key: LayerKey, known: LayerRecord | None = None, session: bytes = b"") -> Look:
        """Return what there is of a layer now, and of a session's last change of it."""
        mark = b"" if known is None else known.mark
        kind, *found = self._run(scripts.LOOK, self._keys(key), mark, session, key.uid.encode())
        if kind == 0:
            return Look(None, deleted=bool(found[0]))
        change = change_from_bytes(found[0]) if found[0] else None
        record = known if kind == 1 else to_record(key, pairs(found[2]))
        return Look(record, change, int(found[1]))

    def get(self, key: LayerKey) -> LayerRecord | None:
        """Return a layer's record, or None."""
        return self.look(key).record

    def compare_and_set(self, before: LayerRecord, record: LayerRecord, note: Note | None = None) -> bool:
        """Replace a record, and what is known of a session; return False if it is not the one of before any more."""
        found, gone = to_fields(record, before)
        values = [each for pair in found.items() for each in pair]
        session, change = (b"", b"") if note is None else (note.session, change_to_bytes(note.change))
        message = self._server + b"." + _name_of(record.key)
        head = before.mark, len(values), session, change, self._max_sessions, self._channel, message
        return bool(self._run(scripts.SWAP, self._keys(record.key), *head, *values, *gone))

    def create(self, record: LayerRecord) -> bool:
        """Keep a new layer's record; return False, and change nothing, if its key exists."""
        return self.take_in(Whole(record, Remembered()))

    def delete(self, key: LayerKey) -> bool:
        """Forget a layer and its snapshots; return False if its key does not exist."""
        message = self._server + b"-" + _name_of(key)
        about = key.name, key.namespace, key.uid, _DELETED_SECONDS, self._channel, message
        return bool(self._run(scripts.DELETE, self._keys_and_index(key), *about))

    def namespaces(self) -> list[str]:
        """Return the namespaces that have layers, in the order of their names."""
        return sorted(name.decode() for name in self._line.ask("SMEMBERS", self._namespaces))

    def count(self, namespace: str) -> int:
        """Return how many layers a namespace has."""
        return int(self._line.ask("ZCARD", self._names(namespace)))

    def page(self, namespace: str, after: str, limit: int) -> list[LayerRecord]:
        """Return up to `limit` records of a namespace in the order of their names, those behind name `after`."""
        records: list[LayerRecord] = []
        behind = after.encode()
        while len(records) < limit:
            start = b"(%b" % behind if behind else b"-"
            most = min(_RECORDS, limit - len(records))
            names = self._line.ask("ZRANGEBYLEX", self._names(namespace), start, "+", "LIMIT", 0, most)
            if not names:
                break
            behind = names[-1]
            keys = [LayerKey(namespace, name.decode()) for name in names]
            hashes = self._line.ask_all([("HGETALL", self._keys(key)[0]) for key in keys])
            # One that was deleted a moment ago has none.
            records += [to_record(key, pairs(found)) for key, found in zip(keys, hashes, strict=True) if found]
        return records

    # --- Snapshots ----------------------------------------------------------------------------------------

    def take_snapshot(self, record: LayerRecord, taken: float, drop: Sequence[int]) -> None:
        """Keep a copy of a record, unless there is one of its version."""
        state = record.state
        about = TAKEN.pack(taken, state.num_of_props)
        what = record.key.uid, state.version, about, snapshot_to_bytes(record)
        self._run(scripts.SNAPSHOT, self._keys(record.key), *what, *drop)

    def snapshots(self, key: LayerKey) -> list[SnapshotInfo]:
        """Return what is known of a layer's snapshots, the oldest first."""
        found = pairs(self._line.ask("HGETALL", self._keys(key)[4]))
        return sorted(
            (SnapshotInfo(int(version), *TAKEN.unpack(about)) for version, about in found.items()),
            key=lambda info: info.version,
        )

    def snapshot(self, key: LayerKey, version: int) -> LayerRecord | None:
        """Return a layer as it was at a version that there is a snapshot of, without gradients."""
        found = self._line.ask("HGET", self._keys(key)[3], version)
        return None if found is None else snapshot_from_bytes(key, found)

    def back_up(self) -> tuple[Path, int]:
        """Refuse: Redis has its own way.

        Raises:
            BackupFailed: Always.
        """
        raise BackupFailed(
            f"the state is in {self.description}, which is copied by Redis itself (expected: `redis-cli BGSAVE`, and a "
            "copy of the file that it writes; or `sharednorm export`)"
        )

    # --- Sessions -----------------------------------------------------------------------------------------

    def open_session(self) -> int:
        """Return the number of a new session: of whichever server, later ones are higher."""
        number = int(self._run(scripts.SESSIONS, (self._sessions,), 1))
        self._highest = max(self._highest, number)
        return number

    def session_opened(self, number: int) -> bool:
        """Return whether a session was given that number, by whichever server."""
        if number > self._highest:
            self._highest = int(self._line.ask("GET", self._sessions) or 0)
        return number <= self._highest

    # --- To and from other stores -------------------------------------------------------------------------

    @property
    def last_session(self) -> int:
        """A number that no session before has a higher one than."""
        return int(self._line.ask("GET", self._sessions) or 0)

    def begin_sessions_behind(self, number: int) -> None:
        """Give sessions higher numbers than this one from now on, and know all up to it as given."""
        while self.last_session < number:
            self._run(scripts.SESSIONS, (self._sessions,), number)

    def whole(self, key: LayerKey) -> Whole | None:
        """Return all that there is of a layer, or None; of one that nobody changes meanwhile."""
        look, keys = self.look(key), self._keys(key)
        if look.record is None:
            return None
        order, found = self._line.ask_all([("ZRANGE", keys[2], 0, -1), ("HGETALL", keys[1])])
        changes = pairs(found)
        remembered = Remembered({session: change_from_bytes(changes[session]) for session in order}, look.floor)
        earlier = [(info.taken, self.snapshot(key, info.version)) for info in self.snapshots(key)]
        return Whole(look.record, remembered, tuple((taken, each) for taken, each in earlier if each is not None))

    def take_in(self, whole: Whole) -> bool:
        """Keep a layer with all that comes with it; return False, and change nothing, if its key exists."""
        key, (found, _), known = whole.record.key, to_fields(whole.record), whole.remembered
        sessions = [each for session, change in known.changes.items() for each in (session, change_to_bytes(change))]
        snapshots: list[bytes | int] = []
        for taken, record in whole.snapshots:
            state = record.state
            snapshots += [state.version, TAKEN.pack(taken, state.num_of_props), snapshot_to_bytes(record)]
        values = [each for pair in found.items() for each in pair]
        parts = len(found), *values, len(known.changes), *sessions, len(whole.snapshots), *snapshots
        return bool(self._run(scripts.TAKE_IN, self._keys_and_index(key), key.name, key.namespace, known.floor, *parts))

    # --- Inside -------------------------------------------------------------------------------------------

    @property
    def _namespaces(self) -> str:
        return f"{self._root}:namespaces"

    def _names(self, namespace: str) -> str:
        return f"{self._root}:names:{namespace}"

    def _keys(self, key: LayerKey) -> tuple[str, ...]:
        return _keys_of(self._root, key.namespace, key.name)

    def _keys_and_index(self, key: LayerKey) -> tuple[str, ...]:
        return (*self._keys(key), self._names(key.namespace), self._namespaces)

    def others(self) -> list[str]:
        """Return what the other servers are called that use this Redis now."""
        return registered(self._line.ask, self._place.prefix, self._place.database, self._registration)

    def _run(self, script: str, keys: Sequence[str], *arguments: bytes | str | float) -> Any:
        words = (len(keys) + 1, *keys, stamp_of(self._place.prefix), *arguments)
        try:
            try:
                return self._line.ask("EVALSHA", self._hashes[script], *words)
            except redis.exceptions.NoScriptError:  # Redis was made to forget it, and nothing was done
                return self._line.ask("EVAL", scripts.ALL[script], *words)
        except redis.ResponseError as error:
            if not str(error).startswith(REFUSED):
                raise
            # Others have migrated what is there, and nothing was done. The next connection finds out what to say.
            raise self._line.give_up(f"what is there is not of version {LAYOUT} any more") from None

    def _heard(self, channel: bytes, message: bytes | None) -> None:
        del channel  # there is one
        if message is None:
            self._on_changed(None, False)
        elif not message.startswith(self._server):
            namespace, _, name = message[9:].decode().partition("\0")
            self._on_changed(LayerKey(namespace, name), message[8:9] == b"-")

    def _prepare(self, run: Callable[..., Any]) -> None:
        """See that a connection is to the Redis that is meant, and can be used.

        Raises:
            StoreUnavailable: It is, and cannot.
        """
        facts = facts_of(run)
        require_usable(facts, self._durability)
        for text in scripts.ALL.values():
            run("SCRIPT", "LOAD", text)
        key = stamp_of(self._place.prefix)
        run("HSETNX", key, "version", LAYOUT)
        require_layout(dict(zip(STAMP, run("HMGET", key, *STAMP), strict=True)), self._place.text)
        # One that has lost everything stays the same for clients: what they had is missed at each layer.
        empty = run("HSETNX", key, "id", self.identity or secrets.token_hex(8))
        identity = run("HGET", key, "id")
        if self.identity and (empty or identity.decode() != self.identity):
            _log.error(
                "the store %s is another one than before, or has lost everything: handles of layers that were in it "
                "are told DATA_LOSS",
                self._place.text,
            )
        self.identity = identity.decode()
        self._highest = 0
        if not self._told:
            self._told = True
            level = logging.INFO if facts.get("aof_enabled") == "1" else logging.WARNING
            _log.log(level, "the state in %s, of %s: %s", self._place.text, facts["name"], _kept(facts))


_PARTS = ("layer", "sessions", "turns", "snapshots", "taken", "deleted")


@functools.lru_cache(1 << 14)
def _keys_of(root: str, namespace: str, name: str) -> tuple[str, ...]:
    # The namespace has no colon here, so that no two layers have one name.
    start = f"{root}:{{{quote(namespace, safe=' /')}:{name}}}"
    return tuple(f"{start}:{what}" for what in _PARTS)


def facts_of(run: Callable[..., Any]) -> dict[str, str]:
    """Return what is known of a Redis: all of INFO, what it is called, and how it keeps its files if it tells."""
    facts = {}
    for line in run("INFO").decode("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            facts[name] = value
    valkey = facts.get("valkey_version")
    facts["name"] = f"Valkey {valkey}" if valkey else f"Redis {facts.get('redis_version', 'of no version')}"
    try:
        found = run("CONFIG", "GET", "appendfsync")
        facts["appendfsync"] = found[1].decode() if found else "unknown"
    except redis.ResponseError:  # which an ACL may forbid
        facts["appendfsync"] = "unknown"
    return facts


def require_usable(facts: dict[str, str], durability: str) -> None:
    """See that a Redis keeps what it is told, as far as it is asked to.

    Raises:
        StoreUnavailable: It does not.
    """
    name = facts["name"]
    if int(facts.get("redis_version", "0").partition(".")[0]) < _OLDEST:
        raise StoreUnavailable(f"{name} is too old (expected: Redis {_OLDEST} or Valkey, or newer)")
    if facts.get("redis_mode") == "cluster" or facts.get("cluster_enabled") == "1":
        raise StoreUnavailable(
            f"{name} is part of a cluster, whose fail-over loses answered changes (expected: a single primary, with "
            "replicas if you like)"
        )
    if facts.get("role") != "master":
        raise StoreUnavailable(f"{name} is a replica (expected: the primary)")
    if facts.get("loading") == "1":
        raise StoreUnavailable(f"{name} is still loading")
    policy = facts.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and facts.get("maxmemory", "0") != "0":
        raise StoreUnavailable(
            f"{name} has maxmemory-policy {policy}, by which it throws layers away when it is full (expected: "
            "noeviction, by which it refuses)"
        )
    if durability == "fsync" and (facts.get("aof_enabled") != "1" or facts["appendfsync"] != "always"):
        raise StoreUnavailable(
            f"--durability fsync is asked for, and {name} has appendonly {_yes(facts)} and appendfsync "
            f"{facts['appendfsync']} (expected: appendonly yes and appendfsync always)"
        )


def _yes(facts: dict[str, str]) -> str:
    return "yes" if facts.get("aof_enabled") == "1" else "no"


def _kept(facts: dict[str, str]) -> str:
    if facts.get("aof_enabled") != "1":
        return (
            "it appends to no file, so that what was answered since its last snapshot is lost when it ends in any way "
            "(set appendonly yes); clients that were told of it hear DATA_LOSS"
        )
    if facts["appendfsync"] == "always":
        return "it syncs its file at each change, so that what was answered survives loss of power"
    return (
        f"it syncs its file by appendfsync {facts['appendfsync']}, so that what was answered in the last seconds can "
        "be lost when it or its machine fails (appendfsync always loses nothing); clients that were told of it hear "
        "DATA_LOSS"
    )


def _name_of(key: LayerKey) -> bytes:
    return f"{key.namespace}\0{key.name}".encode()


def _between(value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise ValueError(f"{value:g} is not from {least:g} to {most:g}")
    return value


def pairs(found: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields of a hash."""
    return dict(zip(found[::2], found[1::2], strict=True))
