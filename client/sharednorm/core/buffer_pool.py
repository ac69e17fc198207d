"""Memory for large results, used again when the last reference to the result that it held is gone.

The C library gives large blocks back to the system when they are freed, always above 32 MiB and often below. The
next result then comes as new pages, which the system first fills with zeros, and that takes longer than a forward.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from sharednorm.core.types import Array

LARGE_BYTES = 1 << 22
"""Smaller results are NumPy's own. From here on NumPy asks for huge pages, whose first use costs most."""
IDLE_BYTES = 1 << 28
"""What is kept while nobody uses it, at most; the longest unused goes first."""

Block = npt.NDArray[np.uint8]


class ResultMemory:
    """Hands out arrays, and takes the memory of the large ones back. Safe from any thread.

    Nobody waits for its lock, since a block may come back at any moment, from the garbage collector too: whoever
    finds it taken does without.
    """

    def __init__(self) -> None:
        self._idle: list[Block] = []
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a C-contiguous, writable array that holds whatever its memory did."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < LARGE_BYTES:
            return np.empty(shape, dtype)
        return np.asarray(_Lease(self._take(nbytes), self))[:nbytes].view(dtype).reshape(shape)

    def give_back(self, block: Block) -> None:
        """Keep a block that nobody refers to any more, and let go of those that are too many."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._idle.append(block)
            while sum(kept.nbytes for kept in self._idle) > IDLE_BYTES:
                del self._idle[0]
        finally:
            self._lock.release()

    def _take(self, nbytes: int) -> Block:
        if self._lock.acquire(blocking=False):
            try:
                for index, block in enumerate(self._idle):
                    if nbytes <= block.nbytes <= nbytes + nbytes // 4:
                        return self._idle.pop(index)
            finally:
                self._lock.release()
        return np.empty(nbytes, np.uint8)


class _Lease:
    """What an array in a block refers to; it goes when the last such array does, and the block goes back."""

    def __init__(self, block: Block, memory: ResultMemory) -> None:
        self._block = block
        self._memory = memory

    @property
    def __array_interface__(self) -> dict[str, object]:
        """The block as memory that NumPy may write to."""
        return self._block.__array_interface__

    def __del__(self) -> None:
        self._memory.give_back(self._block)
