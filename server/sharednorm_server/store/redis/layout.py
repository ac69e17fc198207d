"""How what is in a Redis is laid out: under which keys, in which layout, and which servers use it.

The stamp is the hash `PREFIX:state`, under that name in every layout: `version` is the layout, `features` are words for
what its contents use beyond it, and `migrating`, while it is there, says who changes the layout. Everything else has
the layout in its name, `PREFIX:2:...`, so that a server of another release that is still connected finds nothing to
change. Every script looks at the stamp as well.

A server is registered as long as it listens to a channel that is called what the server is. So a registration ends
with its connection and needs no clock; and a server that is frozen, and would go on when it wakes, still has its own.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from sharednorm.errors import StoreUnavailable

LAYOUT = 2
"""Of what is in Redis. A release refuses what a newer one has written, and has an older one migrated first."""

FEATURES: frozenset[str] = frozenset()
"""What the contents may use, beyond the layout, that this release reads."""

STAMP = "version", "features", "migrating"

# First in each script, whose last key is the stamp. A Redis that has lost everything has none; each layer is missed.
CHECK = f"""
local layout, stamp = '{LAYOUT}', redis.call('HMGET', KEYS[#KEYS], 'version', 'features', 'migrating')
if stamp[1] and (stamp[1] ~= layout or (stamp[2] or '') ~= '' or stamp[3]) then
  return redis.error_reply('LAYOUT ' .. stamp[1])
end
"""
REFUSED = "LAYOUT "
"""How the answer of a script begins that has found another layout."""


def root_of(prefix: str) -> str:
    """Return how the names of all keys begin but that of the stamp."""
    return f"{prefix}:{LAYOUT}"


def stamp_of(prefix: str) -> str:
    """Return the key of the stamp."""
    return f"{prefix}:state"


def require_layout(stamp: Mapping[str, bytes | None], where: str) -> None:
    """See that this release can use what is in a Redis.

    Args:
        stamp: The fields of the stamp.
        where: The Redis's URL without secrets.

    Raises:
        StoreUnavailable: It cannot, or not yet.
    """
    version, words = int(stamp["version"] or 0), (stamp["features"] or b"").decode().split()
    unknown = sorted(set(words) - FEATURES)
    if version > LAYOUT:
        raise StoreUnavailable(
            f"what is in {where} is of version {version}, and this release knows {LAYOUT} "
            "(expected: the release that wrote it, or a newer one)"
        )
    if stamp["migrating"] is not None:
        raise StoreUnavailable(
            f"what is in {where} is being migrated by {stamp['migrating'].decode('utf-8', 'replace')} (expected: that "
            f"this ends; if it was broken off, `sharednorm migrate {where}` goes on with it)"
        )
    if version < LAYOUT:
        raise StoreUnavailable(
            f"what is in {where} is of version {version}, and this release needs {LAYOUT} (expected: stop all servers "
            f"that use it, keep a copy, and run `sharednorm migrate {where}`)"
        )
    if unknown:
        raise StoreUnavailable(
            f"what is in {where} uses {', '.join(unknown)}, which this release does not know (expected: the release "
            "that wrote it, or a newer one)"
        )


def process_words() -> str:
    """Return what this process is called when it keeps others from something."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %z')}"


def registration(prefix: str, database: int) -> str:
    """Return the channel that a store of this process listens to, so that others know of it."""
    return f"{root_of(prefix)}:server:{database}:{secrets.token_hex(4)}:{process_words()}"


def registered(ask: Callable[..., Any], prefix: str, database: int, but: str = "") -> list[str]:
    """Return what the servers are called that use a Redis now.

    Args:
        ask: Runs a command.
        prefix: Of all keys.
        database: Which of the Redis's.
        but: A registration that is left out: the caller's own.
    """
    start = f"{root_of(prefix)}:server:{database}:"
    found = ask("PUBSUB", "CHANNELS", f"{literal(start)}*")
    names = sorted(name.decode("utf-8", "replace") for name in found)
    return [name[len(start) :].partition(":")[2] for name in names if name != but]


def literal(text: str) -> str:
    """Return the pattern of Redis that means a text and no other."""
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", text)
