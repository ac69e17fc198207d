"""Memory that the server shares with clients on the same machine.

The server creates it, so that its size is the server's business and nobody can take pages away while they are read: it
is sealed against that. A client gets a file descriptor, over a socket that only this user can connect to, and maps it.
Who has got it may write to it at any moment; what is computed from it is checked like anything else that arrives, and
nobody but the session that it was given to can name it in a call. It goes when the client's connection does, or as soon
as no call uses it any more.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharednorm.codec import wire
from sharednorm.core.types import Array
from sharednorm.errors import LimitExceeded, MalformedMessage

AVAILABLE = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS") and hasattr(mmap, "MAP_POPULATE")
"""Whether this system can do that: Linux."""

MAX_REGIONS = 1024
"""Of one session: each is a file descriptor and a mapping of the server's."""

_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Region:
    """A piece of shared memory.

    Attributes:
        number: Its name in the session, at least 1.
        memory: All of it.
    """

    number: int
    memory: mmap.mmap


class SessionEnded(Exception):
    """The session whose memory a call names has ended; nothing was done."""


class SharedMemory:
    """The shared memory of a server.

    Args:
        session_bytes: Most bytes of one session.
        total_bytes: Most bytes of all.
        forget: Called with a session's name when it has ended: what was kept in its memory has to go.
    """

    def __init__(self, session_bytes: int, total_bytes: int, forget: Callable[[str], None]) -> None:
        self._session_bytes, self._total_bytes = session_bytes, total_bytes
        self._forget = forget
        self._lock = threading.RLock()  # a finalizer may need it at any moment, also of a thread that holds it
        self._sessions: dict[bytes, SharedMemorySession] = {}
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes that are mapped now, those that calls or kept inputs still use included."""
        return self._used

    def open(self) -> SharedMemorySession:
        """Return a new session, under a name that nobody can guess."""
        session = SharedMemorySession(secrets.token_bytes(16), self)
        with self._lock:
            self._sessions[session.id] = session
        return session

    def find(self, session_id: bytes) -> SharedMemorySession | None:
        """Return a session that has not ended."""
        return self._sessions.get(session_id)

    def close(self, session: SharedMemorySession) -> None:
        """End a session. Again: nothing."""
        with self._lock:
            self._sessions.pop(session.id, None)
        session.ended = True
        session.regions.clear()
        self._forget(session.keeper)

    def allocate(self, session: SharedMemorySession, nbytes: int) -> tuple[Region, int]:
        """Return a new region of at least so many bytes, and a descriptor of it, which the caller closes.

        Raises:
            LimitExceeded: The session, or all together, would have more than they may, or there is no memory.
        """
        size = -(-max(1, nbytes) // _PAGE) * _PAGE
        self._take(session, size)
        try:
            _require_available(size)
            descriptor = os.memfd_create("sharednorm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.posix_fallocate(descriptor, 0, size)
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
                memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            self._give_back(session, size)
            raise LimitExceeded(
                f"no memory for {size} bytes to share: {error.strerror}", {"limit": "memory"}
            ) from error
        # The bytes count until nobody uses them: not the session, no call, and no input that is kept for a backward.
        weakref.finalize(memory, self._give_back, session, size).atexit = False
        region = Region(next(session.numbers), memory)
        session.regions[region.number] = region
        if session.ended:
            session.regions.clear()
        return region, descriptor

    def _take(self, session: SharedMemorySession, size: int) -> None:
        with self._lock:
            if len(session.regions) >= MAX_REGIONS:
                raise LimitExceeded(
                    f"the session has {len(session.regions)} regions of shared memory (expected: at most "
                    f"{MAX_REGIONS})",
                    {"limit": "regions", "value": str(MAX_REGIONS)},
                )
            limits = (
                ("shared_memory_bytes_per_client", session.used, self._session_bytes),
                ("shared_memory_bytes", self._used, self._total_bytes),
            )
            for name, used, most in limits:
                if used + size > most:
                    raise LimitExceeded(
                        f"{size} bytes of shared memory do not fit beside the {used} in use (expected: at most "
                        f"{name} = {most})",
                        {"limit": name, "value": str(most)},
                    )
            session.used += size
            self._used += size

    def _give_back(self, session: SharedMemorySession, size: int) -> None:
        with self._lock:
            session.used -= size
            self._used -= size


def _require_available(size: int) -> None:
    # The system would give page after page until there is none left for anybody, and then end a process.
    available = _number_in("/proc/meminfo", r"MemAvailable: +([0-9]+) kB") * 1024
    group = Path("/sys/fs/cgroup")
    try:
        most, used = (int((group / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        available = min(available, most - used)
    except (OSError, ValueError):
        pass  # no cgroup v2, or none with a limit
    if size > available - available // 8:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def _number_in(path: str, pattern: str) -> int:
    found = re.search(pattern, Path(path).read_text("ascii"))
    return int(found[1]) if found else 0


class SharedMemorySession:
    """What one client shares with the server.

    Attributes:
        id: Its secret name.
        keeper: Its name for what is kept in its memory.
        regions: Its regions by number.
        used: Bytes of them, and of those that are gone and still used.
        ended: Whether the client's connection is gone.
    """

    def __init__(self, session_id: bytes, owner: SharedMemory) -> None:
        self.id = session_id
        self.keeper = session_id.hex()
        self.regions: dict[int, Region] = {}
        self.numbers = itertools.count(1)
        self.used = 0
        self.ended = False
        self._owner = owner

    def allocate(self, nbytes: int) -> tuple[Region, int]:
        """Return a new region, and a descriptor of it, which the caller closes."""
        return self._owner.allocate(self, nbytes)

    def free(self, number: int) -> None:
        """Let go of a region; one that is not there is no error."""
        self.regions.pop(number, None)

    def close(self) -> None:
        """End it."""
        self._owner.close(self)


class InRegions:
    """Tensors of a call in shared memory: `transfers.Here`.

    Args:
        session: Whose memory.
        places: Region and offset of up to two inputs, then of the output; region 0 is none.
    """

    def __init__(self, session: SharedMemorySession, places: Sequence[int]) -> None:
        self.keeper = session.keeper
        self._session = session
        self._inputs = [(places[0], places[1]), (places[2], places[3])]
        self._output = (places[4], places[5])

    def arrays(self, layouts: Sequence[wire.TensorLayout]) -> list[Array]:
        """Return the tensors, where they lie.

        Raises:
            MalformedMessage: A place is not in the session's memory, or overlaps the output's.
        """
        return [self._array(place, layout) for place, layout in zip(self._inputs[: len(layouts)], layouts, strict=True)]

    def out(self, layout: wire.TensorLayout, *, over_input: bool) -> Array | None:
        """Return where the answer has to be.

        Raises:
            MalformedMessage: The place is not in the session's memory, or overlaps an input's in another way than being
                it, or without `over_input` at all.
        """
        region, offset = self._output
        for other, begin in self._inputs:
            # All tensors of a call have one layout.
            apart = other != region or offset + layout.nbytes <= begin or begin + layout.nbytes <= offset
            if not apart and not (over_input and offset == begin):
                raise MalformedMessage("the output's place in shared memory overlaps an input's")
        return self._array(self._output, layout)

    def _array(self, place: tuple[int, int], layout: wire.TensorLayout) -> Array:
        number, offset = place
        region = self._session.regions.get(number)
        if region is None and self._session.ended:
            raise SessionEnded
        if region is None:
            raise MalformedMessage(f"the session has no region {number} of shared memory")
        size = len(region.memory)
        item = layout.itemsize
        if offset > size or layout.nbytes > size - offset or offset % item:
            raise MalformedMessage(
                f"{layout.nbytes} bytes at offset {offset} are not in a region of {size} bytes (expected: within it, "
                f"at a multiple of {item})"
            )
        return wire.as_array(layout, memoryview(region.memory)[offset : offset + layout.nbytes])
