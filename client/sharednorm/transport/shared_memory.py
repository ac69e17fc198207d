"""Memory that a server shares with this process: tensors in it are never copied on their way.

The server gives it in regions. An array that has come of a region holds it; when the last one is gone, the region is
used for the next tensor of about that size.
"""

from __future__ import annotations

import bisect
import errno
import math
import mmap
import os
import socket
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm.codec import frames, wire
from sharednorm.codec.convert import error_from_detail
from sharednorm.core.types import Array
from sharednorm.errors import LimitExceeded, MalformedMessage, SharedNormError
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.direct import Place, Unreachable, handshake, welcome_seconds
from sharednorm.v1 import service_pb2

IDLE_BYTES = 1 << 29
"""What is kept while no array uses it, at most; the longest unused goes first."""

_ROUND_BYTES = 1 << 16


class SharedRegions:
    """The regions of one session.

    Args:
        place: Where the server gives them; its unix socket.
        left: When that has to be over.
        patient: Whether to wait for them as long as that, since there is no other way.

    Raises:
        Unreachable: It gives none.
    """

    def __init__(self, place: Place, left: Deadline, *, patient: bool) -> None:
        self._sock = place.connect(max(1e-3, left.left()))
        # Of a hub that nobody has closed; see `PooledConnection`.
        weakref.finalize(self, self._sock.close).atexit = False
        self._reader = frames.Reader(self._sock)
        try:
            self.session = handshake(
                self._sock, self._reader, place, welcome_seconds(left, patient=patient), memory=True
            )
        except BaseException:
            self._sock.close()
            raise
        self._asking = threading.Lock()  # of the socket: the server takes a while to find large memory
        self._lock = threading.Lock()  # of the tables; never held while the server is asked
        self._starts: list[int] = []  # addresses of all regions, in order
        self._regions: dict[int, _Region] = {}  # by address
        self._idle: list[_Region] = []
        self._unwanted: list[_Region] = []  # to be given back to the server
        self._returned: deque[_Region] = deque()  # filled without the lock, by the garbage collector at any moment
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether the session has ended."""
        return self._closed

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any], left: Deadline) -> Array:
        """Return a C-contiguous, writable array in shared memory that holds whatever its memory did.

        Raises:
            LimitExceeded: The server gives no more.
            Unreachable: The server is gone, and with it the session.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        region = self._reused(nbytes)
        if region is None:
            with self._asking:
                region = self._reused(nbytes) or self._new(nbytes, left)  # one may have come back meanwhile
        return np.asarray(_Lease(region, self._returned))[:nbytes].view(dtype).reshape(shape)

    def find(self, array: Array) -> tuple[int, int] | None:
        """Return region and offset of an array, if it lies in this memory, in one piece and native."""
        if not array.flags.c_contiguous or not array.dtype.isnative or self._closed:
            return None
        with self._lock:
            region = self._region_of(array)
        return None if region is None else (region.number, array.__array_interface__["data"][0] - region.address)

    def abandon(self, array: Array) -> None:
        """Have nobody else get an array's region: a call that was given up may still read it, or write to it."""
        with self._lock:
            region = self._region_of(array)
        if region is not None:
            region.abandoned = True

    def close(self) -> None:
        """End the session. Arrays stay what they are, in memory that is this process's alone then."""
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _region_of(self, array: Array) -> _Region | None:
        address: int = array.__array_interface__["data"][0]
        index = bisect.bisect_right(self._starts, address) - 1
        region = self._regions[self._starts[index]] if index >= 0 else None
        inside = region is not None and address + array.nbytes <= region.address + region.nbytes
        return region if inside else None

    def _reused(self, nbytes: int) -> _Region | None:
        with self._lock:
            while self._returned:
                region = self._returned.popleft()
                (self._unwanted if region.abandoned else self._idle).append(region)
            for index in range(len(self._idle) - 1, -1, -1):  # the last used is the likeliest to be in a cache
                if nbytes <= self._idle[index].nbytes <= max(_ROUND_BYTES, nbytes + nbytes // 4):
                    return self._idle.pop(index)
        return None

    def _new(self, nbytes: int, left: Deadline) -> _Region:
        # Only while asking.
        self._free_all(IDLE_BYTES, left)
        try:
            return self._ask(nbytes, left)
        except LimitExceeded:
            if not self._free_all(0, left):
                raise
        return self._ask(nbytes, left)

    def _ask(self, nbytes: int, left: Deadline) -> _Region:
        size = -(-max(1, nbytes) // _ROUND_BYTES) * _ROUND_BYTES
        descriptors: list[int] = []
        try:
            with self._wish(left):
                self._sock.sendall(frames.ALLOCATE.pack(frames.ASK, 0, 0, size))
                reply, descriptors, _, _ = socket.recv_fds(self._sock, frames.REPLY.size, 1)
                answered = self._answered(reply)
            if isinstance(answered, SharedNormError):
                raise answered
            number, given = answered
            try:
                return self._mapped(number, given, descriptors)
            except OSError as error:
                self._release(number, left)
                raise LimitExceeded(
                    f"shared memory cannot be mapped: {error.strerror or error} (see `ulimit -n`)", {"limit": "process"}
                ) from None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @contextmanager
    def _wish(self, left: Deadline) -> Iterator[None]:
        # A wish and its answer. Whatever comes between them leaves an answer that nobody has read, and so ends the
        # session: the next wish would take it for its own.
        seconds = left.left()
        if not seconds:
            raise BlockingIOError  # before anything was sent
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                frames.set_timeout(self._sock, option, seconds)
            yield
        except (OSError, EOFError) as error:
            self.close()
            raise Unreachable(f"the server that shared memory is gone ({error!r})") from None
        except BaseException:
            self.close()
            raise

    def _answered(self, reply: bytes) -> tuple[int, int] | SharedNormError:
        while len(reply) < frames.REPLY.size:
            more = self._sock.recv(frames.REPLY.size - len(reply))
            if not more:
                raise EOFError
            reply += more
        status, _, size, nbytes = frames.REPLY.unpack(reply)
        message = self._reader.take(min(size, frames.MAX_MESSAGE_BYTES))
        if status != frames.OK:
            detail = wire.parse(service_pb2.ErrorDetail, message)
            return error_from_detail(detail) or LimitExceeded(detail.message)
        if size != frames.REGION.size:
            raise MalformedMessage("the server's answer has no region of shared memory")
        return frames.REGION.unpack(message)[0], nbytes

    def _mapped(self, number: int, nbytes: int, descriptors: list[int]) -> _Region:
        if not descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # the system has dropped it on its way
        region = _Region(number, mmap.mmap(
            descriptors[0], nbytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        ))  # fmt: skip
        with self._lock:
            bisect.insort(self._starts, region.address)
            self._regions[region.address] = region
        return region

    def _free_all(self, most: int, left: Deadline) -> bool:
        """Give back what nobody wants, and of what is idle all but so many bytes; return whether that was something."""
        with self._lock:
            while self._idle and sum(idle.nbytes for idle in self._idle) > most:
                self._unwanted.append(self._idle.pop(0))
            some = bool(self._unwanted)
        while self._unwanted:
            self._free(self._unwanted[0], left)  # if there is no time to say so, another call will
        return some

    def _free(self, region: _Region, left: Deadline) -> None:
        self._release(region.number, left)
        with self._lock:
            self._unwanted.remove(region)
            self._starts.remove(region.address)
            del self._regions[region.address]

    def _release(self, number: int, left: Deadline) -> None:
        with self._wish(left):
            self._sock.sendall(frames.ALLOCATE.pack(frames.FREE, 0, 0, number))
            self._reader.start(frames.REPLY.size)


class _Region:
    """A region, mapped."""

    def __init__(self, number: int, memory: mmap.mmap) -> None:
        self.number = number
        self.abandoned = False
        self.array: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
        self.nbytes = self.array.nbytes
        self.address: int = self.array.__array_interface__["data"][0]


class _Lease:
    """What an array in a region refers to; when it goes, the region may be used again."""

    def __init__(self, region: _Region, returned: deque[_Region]) -> None:
        self._region = region
        self._returned = returned

    @property
    def __array_interface__(self) -> dict[str, object]:
        """The region as memory that NumPy may write to."""
        return self._region.array.__array_interface__

    def __del__(self) -> None:
        self._returned.append(self._region)
