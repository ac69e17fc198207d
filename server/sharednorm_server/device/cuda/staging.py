"""Pinned memory of the host, in chunks: what tensors pass through on their way to a GPU and back.

The threads of the calls copy between their arrays and a chunk, the GPU between a chunk and its own memory, and both at
once. A thread that has no chunk may wait for one; a thread that has one never waits for a second. So somebody can
always go on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from sharednorm.errors import DeviceOutOfMemory
from sharednorm_server.device.cuda.context import Bytes, DeviceBuffer, Gpu, Part
from sharednorm_server.device.cuda.worker import CudaWorker, Issued

CHUNK_BYTES = 4 << 20
CHUNKS = 16
_AHEAD = 2  # chunks that a download has under way: one that the GPU fills while the host empties the other


class Staging:
    """The chunks of one GPU; they are pinned when they are first needed, and pinned until the end.

    Args:
        worker: The GPU's thread.
    """

    def __init__(self, worker: CudaWorker) -> None:
        self._worker = worker
        self._changed = threading.Condition()
        self._free: deque[Bytes] = deque()
        self._pinned = self._pinning = 0  # chunks that there are, and those that are being made
        self._most = CHUNKS

    def upload(self, data: Bytes, buffer: DeviceBuffer, offset: int = 0) -> list[Future[None]]:
        """Copy bytes into a buffer, to an offset; return when all have been read, and futures of what is under way.

        A computation that is handed in afterwards waits for them on the GPU. Whether they have gone well, the futures
        say.
        """
        futures = []
        for begin in range(0, data.nbytes, CHUNK_BYTES):
            chunk = self.take()
            part = chunk[: min(CHUNK_BYTES, data.nbytes - begin)]
            part[:] = data[begin : begin + part.nbytes]
            future = self._worker.submit(_copy_in(part, buffer, offset + begin))
            self.give_back(chunk, after=future)
            futures.append(future)
        return futures

    def download(self, buffer: DeviceBuffer, offset: int, data: Bytes) -> None:
        """Fill an array with a buffer's bytes from an offset on; what computes them has ended."""
        begin = 0
        under_way: deque[_Download] = deque()
        try:
            while begin < data.nbytes or under_way:
                chunk = self._take_if(not under_way) if begin < data.nbytes and len(under_way) < _AHEAD else None
                if chunk is not None:
                    nbytes = min(CHUNK_BYTES, data.nbytes - begin)
                    future = self._worker.submit(_copy_out(Part(buffer, offset + begin, nbytes), chunk[:nbytes]))
                    under_way.append(_Download(future, chunk, begin, nbytes))
                    begin += nbytes
                else:
                    under_way[0].future.result()
                    _, chunk, at, nbytes = under_way[0]
                    data[at : at + nbytes] = chunk[:nbytes]
                    self.give_back(under_way.popleft().chunk)
        finally:
            while under_way:  # emptied, since a future that failed refers to this frame
                self.give_back(under_way[0].chunk, after=under_way[0].future)
                under_way.popleft()

    def take(self) -> Bytes:
        """Return a chunk, as soon as there is one; `give_back` it.

        Raises:
            DeviceOutOfMemory: There is none, and no memory for one.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._pinned + self._pinning < self._most)
                if self._free:
                    return self._free.popleft()
                self._pinning += 1
            # Without the lock: the GPU's thread takes it to give chunks back.
            try:
                chunk = self._worker.call(lambda gpu: gpu.pin(CHUNK_BYTES))
            except BaseException as error:
                with self._changed:
                    self._pinning -= 1
                    enough = isinstance(error, DeviceOutOfMemory) and self._pinned > 0
                    if enough:
                        self._most = self._pinned  # those that there are have to do
                    self._changed.notify_all()
                if not enough:
                    raise
            else:
                with self._changed:
                    self._pinning -= 1
                    self._pinned += 1
                return chunk

    def give_back(self, chunk: Bytes, after: Future[Any] | None = None) -> None:
        """Give a chunk back: now, or when what a future stands for, which uses the chunk, is over."""
        if after is not None:
            after.add_done_callback(lambda _: self.give_back(chunk))
            return
        with self._changed:
            self._free.append(chunk)
            self._changed.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nobody has a chunk; return False if that took longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._free) == self._pinned and not self._pinning, timeout)

    def _take_if(self, wait: bool) -> Bytes | None:
        if wait:
            return self.take()
        with self._changed:
            return self._free.popleft() if self._free else None


class _Download(NamedTuple):
    future: Future[None]
    chunk: Bytes
    begin: int
    nbytes: int


def _copy_in(source: Bytes, buffer: DeviceBuffer, offset: int) -> Callable[[Gpu], Issued[None]]:
    return lambda gpu: Issued(gpu.copy_in(source, buffer, offset), None)


def _copy_out(part: Part, target: Bytes) -> Callable[[Gpu], Issued[None]]:
    return lambda gpu: Issued(gpu.copy_out([part], target, computed=True), None)
