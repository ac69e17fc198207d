"""Put the emulated driver where PyCUDA finds it: call `load()` before anything imports `pycuda.driver`.

The dynamic linker looks for libcuda.so.1 among the libraries that the process already has before it searches the disk,
so no environment and no second process is needed.
"""

from __future__ import annotations

import ctypes
import functools
import sys

from tests.emulation.build import driver


@functools.cache
def load() -> ctypes.CDLL:
    """Load the emulated libcuda.so.1 into this process, once.

    Raises:
        RuntimeError: PyCUDA's extension is already there, linked with another driver.
    """
    if "pycuda._driver" in sys.modules:
        raise RuntimeError("pycuda.driver has been imported before the emulated driver was loaded")
    library = ctypes.CDLL(str(driver()), mode=ctypes.RTLD_GLOBAL)
    library.emu_count.restype = ctypes.c_longlong
    library.emu_count.argtypes = [ctypes.c_char_p]
    library.emu_fail.restype = None
    library.emu_fail.argtypes = [ctypes.c_char_p]
    return library


def count(kind: str) -> int:
    """Return how many things of a kind there are.

    Alive: allocations, bytes, pinned, streams, events, modules, contexts. Since the start: total_allocations,
    total_calls, total_copies, total_launches.

    Raises:
        ValueError: There is no such kind.
    """
    number = int(load().emu_count(kind.encode()))
    if number < 0:
        raise ValueError(f"the emulated driver does not count {kind!r}")
    return number


def fail(rules: str = "") -> None:
    """Make calls fail, counted from now: rules as of SHAREDNORM_EMULATED_FAIL. A lost device comes back."""
    load().emu_fail(rules.encode())
