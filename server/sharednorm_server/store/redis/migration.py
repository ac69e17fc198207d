"""What brings a Redis to this release's layout, key by key, while no server uses it.

Servers of an earlier release look at the stamp when they connect, and at no other time. So it says the new layout
first: from then on none of them connects. Those that are connected are found out by the channel that they listen to,
before and after that. One that is neither, since its cable was pulled in between, finds none of its layers afterwards
and can open no session, because the keys have other names, and the two that it needs for that have other contents.

Each key is renamed and rewritten in one transaction, of which Redis does all or nothing; what has its new name is done.
So it can be broken off anywhere and begun again, and takes hardly more memory than the larger statistics need.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis

from sharednorm.errors import StoreUnavailable
from sharednorm_server.errors import StartError
from sharednorm_server.store.redis.codec import widened_fields, widened_snapshot
from sharednorm_server.store.redis.connection import Command, Wire
from sharednorm_server.store.redis.layout import (
    LAYOUT,
    STAMP,
    literal,
    process_words,
    registered,
    require_layout,
    root_of,
    stamp_of,
)
from sharednorm_server.store.redis.store import RedisPlace, facts_of, pairs, require_usable

_SETTLING_SECONDS = 1.0
"""After the stamp: until a server that had just connected listens, too."""

# What the keys of sessions and of namespaces have in the old layout: whatever adds to them fails, and says why.
_MOVED = f"moved to layout {LAYOUT} by `sharednorm migrate`: use a newer release of sharednorm"


_log = logging.getLogger(__name__)


def migrate_layout(url: str) -> int:
    """Bring a Redis to this release's layout; return how many layers were of another.

    Args:
        url: Where; see `RedisPlace`.

    Raises:
        StartError: A server uses it, it cannot be used, or it is of a newer release. Nothing has changed, unless it
            failed in the middle: then no server starts until this was begun again, and has ended.
    """
    place = RedisPlace.parse(url)
    connection = place.make()
    try:
        connection.connect()
        return _Migration(connection, place).run()
    except (redis.RedisError, OSError, StoreUnavailable) as error:
        raise StartError(f"the state in {place.text} cannot be migrated: {str(error)[:500]}") from error
    finally:
        connection.disconnect()


class _Migration:
    def __init__(self, connection: Wire, place: RedisPlace) -> None:
        self._connection, self._place = connection, place
        self._prefix, self._stamp, self._root = place.prefix, stamp_of(place.prefix), root_of(place.prefix)

    def run(self) -> int:
        require_usable(facts_of(self._ask), "os")
        stamp = dict(zip(STAMP, self._ask("HMGET", self._stamp, *STAMP), strict=True))
        if stamp["version"] is None:
            raise StoreUnavailable("there is none")
        version, resumed = int(stamp["version"]), stamp["migrating"] is not None
        if version > LAYOUT or (version == LAYOUT and not resumed):
            require_layout(stamp, self._place.text)
            return 0
        self._require_alone()
        self._ask("HSET", self._stamp, "version", LAYOUT, "migrating", process_words())
        time.sleep(_SETTLING_SECONDS)
        try:
            self._require_alone()
        except StoreUnavailable:
            if not resumed:  # nothing has changed yet
                self._ask("HSET", self._stamp, "version", version)
                self._ask("HDEL", self._stamp, "migrating")
            raise
        for name in ("sessions", "namespaces"):
            self._fence(f"{self._prefix}:{name}", f"{self._root}:{name}")
        for key in self._keys("names:"):
            self._move(key)
        layers = 0
        for key in self._keys("{"):
            what = key.rpartition(b":")[2]
            if what == b"snapshots":
                self._move_snapshots(key)
            elif self._move(key, is_layer=what == b"layer"):
                layers += what == b"layer"
        self._ask("HDEL", self._stamp, "migrating")
        return layers

    def _require_alone(self) -> None:
        names = registered(self._ask, self._prefix, self._place.database)
        channel = f"{self._prefix}:changed:{self._place.database}"  # which servers of layout 1 listen to
        _, count = self._ask("PUBSUB", "NUMSUB", channel)
        if count:
            names.append(f"{count} server{'' if count == 1 else 's'} of an earlier release{self._addresses(count)}")
        if names:
            raise StoreUnavailable(
                f"it is used by {'; '.join(names)} (expected: no server; stop all that have this --state, and start "
                "those of this release afterwards)"
            )

    def _addresses(self, count: int) -> str:
        # Servers of layout 1 say no more of themselves than that; and other states may have such connections as well.
        try:
            lines = self._ask("CLIENT", "LIST").decode().splitlines()
        except redis.exceptions.NoPermissionError:
            return ""
        found = [dict(word.partition("=")[::2] for word in line.split(" ")) for line in lines]
        wanted = {"name": "sharednorm", "db": str(self._place.database), "sub": "1"}
        addresses = sorted(each["addr"] for each in found if wanted.items() <= each.items())
        return f", connected from {', '.join(addresses)}" if len(addresses) == count else ""

    def _ask(self, *command: bytes | str | float) -> Any:
        self._connection.send_command(*command)
        return self._connection.read_response()

    def _keys(self, start: str) -> Iterator[bytes]:
        # All that are there from its beginning to its end come, some of them twice.
        cursor, pattern = b"0", f"{literal(f'{self._prefix}:{start}')}*"
        while True:
            cursor, found = self._ask("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            yield from found
            if cursor == b"0":
                return

    def _transact(self, key: str | bytes, read: Command, write: Callable[[Any], Sequence[Command]]) -> None:
        while True:
            self._ask("WATCH", key)
            commands = write(self._ask(*read))
            self._ask("MULTI")
            for command in commands:
                self._ask(*command)
            answers = self._ask("EXEC")
            if answers is not None:  # else the key was changed between the two
                for answer in answers:
                    if isinstance(answer, Exception):
                        raise answer
                return

    def _fence(self, old: str, new: str) -> None:
        def write(kind: bytes) -> Sequence[Command]:
            return [*([] if kind == b"none" else [("RENAME", old, new)]), ("SET", old, _MOVED)]

        if self._ask("TYPE", old) != b"string" or self._ask("GET", old) != _MOVED.encode():
            self._transact(old, ("TYPE", old), write)

    def _move(self, key: bytes, *, is_layer: bool = False) -> bool:
        new = self._renamed(key)
        if self._ask("EXISTS", new):
            if self._ask("EXISTS", key):  # it may have come twice
                _log.warning("%r was written by a server of an earlier release meanwhile, and is left alone", key)
            return False

        def write(found: Any) -> Sequence[Command]:
            commands: list[Command] = [("RENAME", key, new)]
            if is_layer:
                wide = widened_fields(pairs(found))
                commands.append(("HSET", new, *(each for pair in wide.items() for each in pair)))
            return commands

        self._transact(key, ("HGETALL" if is_layer else "TYPE", key), write)
        return True

    def _move_snapshots(self, key: bytes) -> None:
        # One by one: all of a layer, with its domains, may be large.
        new = self._renamed(key)
        for version in self._ask("HKEYS", key):

            def write(found: bytes, version: bytes = version) -> Sequence[Command]:
                return [("HSETNX", new, version, widened_snapshot(found)), ("HDEL", key, version)]

            self._transact(key, ("HGET", key, version), write)

    def _renamed(self, key: bytes) -> bytes:
        return self._root.encode() + key[len(self._prefix.encode()) :]
