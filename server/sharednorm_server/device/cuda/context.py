"""One GPU, for the one thread that owns its context: memory, streams, copies. Nothing here may leave that thread.

Copies in, computation and copies out have a stream each, and overlap. What orders them is events: a computation waits
for the copies into what it reads, a copy out for the computations before it. Memory is given back by the host, which
knows nothing of streams; so whatever the GPU still reads or writes is held until the event behind that has come.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pycuda.driver as cuda
import pycuda.tools

from sharednorm.core.types import Vector
from sharednorm.errors import DeviceOutOfMemory
from sharednorm_kernels import DeviceLimits
from sharednorm_server.device.cuda.module import Kernels

Bytes = npt.NDArray[np.uint8]

_NON_BLOCKING = 1  # a stream that is not ordered with the legacy one, which nobody uses


class DeviceBuffer:
    """Memory of a GPU. Any thread may hold it; when nobody does any more, the GPU's thread takes it back."""

    __slots__ = ("__weakref__", "address", "nbytes")

    def __init__(self, address: int, nbytes: int) -> None:
        self.address = address
        self.nbytes = nbytes


class Mark(NamedTuple):
    """A place in a stream: what comes when the GPU gets there.

    Attributes:
        event: A pycuda.driver.Event.
        stream: Which: events of one stream come in the order in which they were recorded.
    """

    event: Any
    stream: str


class Part(NamedTuple):
    """A range of a buffer: what a copy reads or writes."""

    buffer: DeviceBuffer
    offset: int
    nbytes: int


class Gpu:
    """One GPU, ready to compute. Made and closed by the thread that uses it.

    Args:
        ordinal: Its number.
        image: The compiled kernels.
        budget: Most bytes of its memory to use; None for nine tenths of what is free now.
        post: Runs a function on the GPU's thread, later; may be called from any thread, also in the middle of a
            garbage collection.

    Raises:
        pycuda.driver.Error: It cannot be used; the caller knows what that means.
    """

    def __init__(
        self, ordinal: int, image: bytes, budget: int | None, post: Callable[[Callable[[Gpu], None]], None]
    ) -> None:
        device = cuda.Device(ordinal)
        self.name = f"cuda:{ordinal} ({device.name()})"
        self.limits = limits_of(device)
        self._post = post
        self._context = device.retain_primary_context()
        self._context.push()
        try:
            self.budget: int = cuda.mem_get_info()[0] // 10 * 9 if budget is None else budget
            self.kernels = Kernels(image, self.limits.shared_bytes)
            self.incoming, self.computing, self.outgoing = (cuda.Stream(_NON_BLOCKING) for _ in range(3))
            self._pool = pycuda.tools.DeviceMemoryPool()
            self._small_pinned = pycuda.tools.PageLockedMemoryPool()
        except BaseException:
            self._context.pop()
            self._context.detach()
            raise
        self._memory: dict[int, tuple[Any, int]] = {}  # by address: an allocation, and its size as the pool rounds it
        self._rounded = 0  # all of these sizes
        self._returned: deque[int] = deque()  # addresses of buffers that nobody holds any more
        self._writes: dict[int, Any] = {}  # the event behind the last copy into a buffer, until somebody has waited
        self._pinned: list[Any] = []
        self._held: list[object] = []
        self._vectors: dict[int, tuple[weakref.ref[Vector], DeviceBuffer, int]] = {}

    # --- Memory -------------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes that somebody holds."""
        self.reclaim()
        return int(self._pool.active_bytes)

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Return memory.

        Raises:
            DeviceOutOfMemory: The budget does not allow it.
            pycuda.driver.MemoryError: The GPU has no more.
        """
        self.reclaim()
        rounded = int(self._pool.alloc_size(self._pool.bin_number(nbytes)))
        if self._rounded + rounded > self.budget:
            raise out_of_memory(self.name, f"{nbytes} bytes are needed, {self._rounded} of {self.budget} are in use")
        # What the pool keeps for later use counts too; but giving that back waits for the GPU.
        if self._pool.managed_bytes + rounded > self.budget and self._pool.held_blocks:
            self._pool.free_held()
        memory = self._pool.allocate(nbytes)
        address = int(memory)
        self._memory[address] = memory, rounded
        self._rounded += rounded
        buffer = DeviceBuffer(address, nbytes)
        # Not at exit: then the thread that could take it back is gone.
        weakref.finalize(buffer, _give_back, self._returned, self._post, address).atexit = False
        return buffer

    def reclaim(self) -> None:
        """Take back what buffers were whose last holders have let go of them."""
        while self._returned:
            address = self._returned.popleft()
            self._writes.pop(address, None)
            memory, rounded = self._memory.pop(address)
            self._rounded -= rounded
            memory.free()

    def scratch(self, nbytes: int) -> int:
        """Return the address of memory that is held until the GPU is through with the current task."""
        buffer = self.allocate(nbytes)
        self._held.append(buffer)
        return buffer.address

    def take_held(self) -> list[object]:
        """Hand over what the current task, which ends here, needs until the GPU is through with it."""
        taken, self._held = self._held, []
        return taken

    def pin(self, nbytes: int) -> Bytes:
        """Return memory of the host that the GPU reads and writes by itself. It stays until the end."""
        pinned: Bytes = cuda.pagelocked_empty(nbytes, np.uint8)
        self._pinned.append(pinned)
        return pinned

    # --- Copies and their order ---------------------------------------------------------------------

    def copy_in(self, source: Bytes, buffer: DeviceBuffer, offset: int) -> Mark:
        """Copy pinned memory into a buffer, and return the place behind that."""
        cuda.memcpy_htod_async(buffer.address + offset, source, self.incoming)
        event = self._writes[buffer.address] = record(self.incoming)
        return Mark(event, "incoming")

    def copy_out(self, parts: Sequence[Part], target: Bytes, *, computed: bool = False) -> Mark:
        """Copy parts of buffers, one behind the other, into pinned memory, and return the place behind that.

        Args:
            parts: What is copied.
            target: Where to.
            computed: Whether what computes them is known to have ended; else the copy waits for all that is under way.
        """
        if not computed:
            self.outgoing.wait_for_event(record(self.computing))
        begin = 0
        for buffer, offset, nbytes in parts:
            if nbytes:
                cuda.memcpy_dtoh_async(target[begin : begin + nbytes], buffer.address + offset, self.outgoing)
            begin += nbytes
        return Mark(record(self.outgoing), "outgoing")

    def wait_for_copies_into(self, buffer: DeviceBuffer) -> int:
        """Let the computations from here on wait until a buffer holds what was copied into it; return its address."""
        event = self._writes.pop(buffer.address, None)
        if event is not None:
            self.computing.wait_for_event(event)
        return buffer.address

    def upload(self, values: npt.NDArray[Any]) -> int:
        """Return the address of a small array's copy, for the computations of the current task."""
        address = self.scratch(values.nbytes)
        self._copy_small(values, address)
        return address

    def _copy_small(self, values: npt.NDArray[Any], address: int) -> None:
        # Through pinned memory, since a copy from other memory waits until its stream has nothing left to do.
        pinned = self._small_pinned.allocate(values.shape, values.dtype)
        pinned[...] = values
        self._held.append(pinned)
        cuda.memcpy_htod_async(address, pinned, self.computing)

    def synchronize(self) -> None:
        """Wait until the GPU has done everything that it was told."""
        self._context.synchronize()

    # --- Vectors that stay --------------------------------------------------------------------------

    def vector(self, values: Vector) -> int:
        """Return the address of a vector's copy, which stays on the GPU for as long as the vector is there.

        Parameters and statistics are immutable, and a state that follows from another shares what did not change:
        so a vector is copied once, and one that was computed here (`adopt`) never.
        """
        known = self._vectors.get(id(values))
        if known is not None and known[0]() is values:
            return known[1].address + known[2]
        buffer = self.allocate(values.nbytes)
        self._copy_small(values, buffer.address)
        self.adopt(values, buffer, 0)
        return buffer.address

    def adopt(self, values: Vector, buffer: DeviceBuffer, offset: int) -> None:
        """Remember that a buffer holds a vector's values at an offset."""
        key, post = id(values), self._post

        def forget(dead: weakref.ref[Vector]) -> None:
            post(lambda gpu: gpu.forget(key, dead))

        self._vectors[key] = weakref.ref(values, forget), buffer, offset

    def forget(self, key: int, dead: weakref.ref[Vector]) -> None:
        """Drop the copy of a vector that is gone; by now another vector may have its id."""
        known = self._vectors.get(key)
        if known is not None and known[0] is dead:
            del self._vectors[key]

    # --- The end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back, pinned memory too, and leave the context."""
        self.synchronize()
        for pinned in self._pinned:
            pinned.base.free()
        self._vectors.clear()
        self._writes.clear()
        self._held.clear()
        self._small_pinned.stop_holding()
        for memory, _ in self._memory.values():
            memory.free()
        self._memory.clear()
        self._returned.clear()
        self._pool.stop_holding()
        del self.kernels, self.incoming, self.computing, self.outgoing, self._pool, self._small_pinned
        self._context.pop()
        self._context.detach()


def _give_back(returned: deque[int], post: Callable[[Callable[[Gpu], None]], None], address: int) -> None:
    returned.append(address)
    post(Gpu.reclaim)


def record(stream: Any) -> Any:
    """Return an event that comes when a stream gets here."""
    event = cuda.Event(cuda.event_flags.DISABLE_TIMING)
    event.record(stream)
    return event


def limits_of(device: Any) -> DeviceLimits:
    """Return what a pycuda.driver.Device allows."""
    attribute = cuda.device_attribute
    return DeviceLimits(
        multiprocessors=device.get_attribute(attribute.MULTIPROCESSOR_COUNT),
        shared_bytes=device.get_attribute(attribute.MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
        shared_bytes_per_multiprocessor=device.get_attribute(attribute.MAX_SHARED_MEMORY_PER_MULTIPROCESSOR),
        compute_capability=device.compute_capability(),
    )


def out_of_memory(name: str, details: str) -> DeviceOutOfMemory:
    """Return the error of a GPU that has no room."""
    return DeviceOutOfMemory(
        f"{name} has no room for this call: {details}; try again later, or give the server more with "
        "--device-memory-bytes",
        {"limit": "device_memory"},
    )
