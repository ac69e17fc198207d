"""Pinned memory of the host, in chunks: what tensors pass through on their way to a GPU and back.

The threads of the calls copy between their arrays and a chunk, the GPU between a chunk and its own memory, and both at
once. A thread that has no chunk may wait for one; a thread that has one never waits for a second. So somebody can
always go on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from sharednorm.errors import DeviceOutOfMemory
from sharednorm_server.device._cuda_gpu import Bytes, DeviceBuffer, Gpu, Part
from sharednorm_server.device._cuda_worker import CudaWorker, Issued

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
        self._made = 0
        self._most = CHUNKS

    def upload(self, data: Bytes, buffer: DeviceBuffer) -> list[Future[None]]:
        """Copy bytes into a buffer; return when the last of them have been read, and futures of what is under way.

        A computation that is handed in afterwards waits for them on the GPU. Whether they have gone well, the futures
        say.
        """
        futures = []
        for begin in range(0, data.nbytes, CHUNK_BYTES):
            chunk = self._take()
            part = chunk[: min(CHUNK_BYTES, data.nbytes - begin)]
            part[:] = data[begin : begin + part.nbytes]
            future = self._worker.submit(_copy_in(part, buffer, begin))
            future.add_done_callback(partial(self._give_back, chunk))
            futures.append(future)
        return futures

    def download(self, buffer: DeviceBuffer, begin: int, data: Bytes) -> None:
        """Copy a buffer's bytes from `begin` on to the same place of an array."""
        under_way: deque[_Download] = deque()
        try:
            while begin < data.nbytes or under_way:
                chunk = self._take_if(not under_way) if begin < data.nbytes and len(under_way) < _AHEAD else None
                if chunk is not None:
                    nbytes = min(CHUNK_BYTES, data.nbytes - begin)
                    future = self._worker.submit(_copy_out(Part(buffer, begin, nbytes), chunk[:nbytes]))
                    under_way.append(_Download(future, chunk, begin, nbytes))
                    begin += nbytes
                else:
                    first = under_way[0]
                    first.future.result()
                    data[first.begin : first.begin + first.nbytes] = first.chunk[: first.nbytes]
                    self._give_back(under_way.popleft().chunk)
        finally:
            for each in under_way:
                each.future.add_done_callback(partial(self._give_back, each.chunk))

    @contextmanager
    def chunk(self) -> Iterator[Bytes]:
        """Lend a chunk, whose use by the GPU must be over when the block ends."""
        chunk = self._take()
        try:
            yield chunk
        finally:
            self._give_back(chunk)

    def _take(self) -> Bytes:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._made < self._most)
                if self._free:
                    return self._free.popleft()
                self._made += 1
            # Without the lock: the GPU's thread takes it to give chunks back.
            try:
                return self._worker.call(lambda gpu: gpu.pin(CHUNK_BYTES))
            except DeviceOutOfMemory:
                with self._changed:
                    self._made -= 1
                    if not self._made:
                        raise
                    self._most = self._made  # those that there are have to do
            except BaseException:
                with self._changed:
                    self._made -= 1
                raise

    def _take_if(self, wait: bool) -> Bytes | None:
        if wait:
            return self._take()
        with self._changed:
            return self._free.popleft() if self._free else None

    def _give_back(self, chunk: Bytes, _: object = None) -> None:
        with self._changed:
            self._free.append(chunk)
            self._changed.notify()


class _Download(NamedTuple):
    future: Future[None]
    chunk: Bytes
    begin: int
    nbytes: int


def _copy_in(source: Bytes, buffer: DeviceBuffer, offset: int) -> Callable[[Gpu], Issued[None]]:
    return lambda gpu: Issued(gpu.copy_in(source, buffer, offset), None)


def _copy_out(part: Part, target: Bytes) -> Callable[[Gpu], Issued[None]]:
    return lambda gpu: Issued(gpu.copy_out([part], target), None)
