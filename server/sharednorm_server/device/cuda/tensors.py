"""Tensors of a GPU: in its memory, on their way there, and on their way back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sharednorm.core.dtypes import dtype_of
from sharednorm.core.types import Array
from sharednorm_kernels import Plan
from sharednorm_server.device.cuda.context import Bytes, DeviceBuffer, Gpu
from sharednorm_server.device.cuda.launches import Tensors
from sharednorm_server.device.cuda.staging import Staging

# Of a tensor that arrives, before they are copied on.
_ROOM_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class CudaTensor:
    """A tensor in a GPU's memory, or on its way there."""

    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype_name: str
    plan: Plan
    owner: object  # the device
    uploads: list[Future[None]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies."""
        return self.buffer.nbytes

    def settle(self) -> None:
        """Raise what went wrong on its way; only after a computation has used it, so that all has happened."""
        while self.uploads:
            self.uploads.pop().result()

    def tensors(self, gpu: Gpu) -> Tensors:
        """Return it for the computations of a task, which wait until it has come."""
        return Tensors(self.plan, self.dtype_name, gpu.wait_for_copies_into(self.buffer))


class CudaIncoming:
    """A tensor on its way to the GPU.

    What arrives is put into ordinary memory first: pinned chunks are few, and nobody may hold one while a client that
    is slow keeps it waiting.
    """

    def __init__(self, tensor: CudaTensor, staging: Staging) -> None:
        self._tensor, self._staging = tensor, staging
        self._room = np.empty(min(_ROOM_BYTES, tensor.nbytes), np.uint8)
        self._full = self._sent = 0  # bytes in that room, and bytes handed on before

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self._tensor.nbytes

    def space(self, most: int) -> memoryview:
        """Return memory for the next bytes."""
        return self._room[self._full : min(self._full + most, self.nbytes - self._sent)].data

    def filled(self, nbytes: int) -> None:
        """Hand the bytes on when there are many, or all."""
        self._full += nbytes
        if self._full == min(self._room.nbytes, self.nbytes - self._sent):
            part = self._room[: self._full]
            self._tensor.uploads.extend(self._staging.upload(part, self._tensor.buffer, self._sent))
            self._sent, self._full = self._sent + self._full, 0

    def finish(self) -> CudaTensor:
        """Return the tensor; computations with it wait, on the GPU, for the copies that are under way."""
        return self._tensor


class Computed(NamedTuple):
    """An output that has been computed.

    Attributes:
        buffer: Where it is; None if all of it has come back.
        nbytes: Its size.
        first: As many of its bytes as have come back.
    """

    buffer: DeviceBuffer | None
    nbytes: int
    first: Bytes


class CudaOutput:
    """An output in the GPU's memory."""

    def __init__(self, like: CudaTensor, computed: Computed, staging: Staging, out: Array | None) -> None:
        self.shape, self.dtype_name, self.nbytes = like.shape, like.dtype_name, computed.nbytes
        self._computed, self._staging, self._out = computed, staging, out

    def array(self) -> Array:
        """Bring the whole back."""
        result = np.empty(self.shape, dtype_of(self.dtype_name)) if self._out is None else self._out
        data, first = result.reshape(-1).view(np.uint8), self._computed.first
        data[: first.nbytes] = first
        if self._computed.buffer is not None:
            self._staging.download(self._computed.buffer, first.nbytes, data[first.nbytes :])
        return result

    def parts(self, most: int) -> Iterator[memoryview]:
        """Bring the bytes back in order, into ordinary memory, since whoever takes them may be slow."""
        first = self._computed.first
        for begin in range(0, first.nbytes, most):
            yield first[begin : begin + most].data
        if self._computed.buffer is None:
            return
        room = np.empty(min(most, self.nbytes - first.nbytes), np.uint8)
        for begin in range(first.nbytes, self.nbytes, most):
            part = room[: min(most, self.nbytes - begin)]
            self._staging.download(self._computed.buffer, begin, part)
            yield part.data
