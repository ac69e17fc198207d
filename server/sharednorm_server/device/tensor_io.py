"""Tensors on their way: what devices make of those that come in, and give for those that go out.

An edge moves bytes into an `Incoming` and out of an `Output`, and knows nothing else of a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sharednorm.core.types import Array


class DeviceTensor(Protocol):
    """A tensor where the device computes. It is not changed any more."""

    @property
    def nbytes(self) -> int:
        """Bytes that it occupies there."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype_name(self) -> str:
        """Its element type: "float32", "float16" or "bfloat16"."""
        ...


class Incoming(Protocol):
    """A tensor on its way to the device, its bytes in order. One thread fills it, and may give up at any byte."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        ...

    def space(self, most: int) -> memoryview:
        """Return memory for the next bytes: at least 1 and at most so many, and none beyond the tensor's end."""
        ...

    def filled(self, nbytes: int) -> None:
        """Say that so many bytes of that memory, from its begin, have been written."""
        ...

    def finish(self) -> DeviceTensor:
        """Return the tensor, when all bytes have been filled in."""
        ...


class Output(Protocol):
    """What a device gives. It is asked once: for the whole, or for its parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype_name(self) -> str:
        """Its element type."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        ...

    def array(self) -> Array:
        """Return the whole; in the `out` that the device was given, if it was given one."""
        ...

    def parts(self, most: int) -> Iterator[memoryview]:
        """Give the bytes in order, at most so many at a time; each part's memory is reused for the next one."""
        ...
