"""Losing the rights of root for a moment, so that what a file's mode forbids is forbidden to a test as well."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522  # of the interface of capget and capset: two words of 32 bits for each set
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1 << 1, 1 << 2  # to read, write and search in spite of a mode


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def modes_obeyed() -> Iterator[None]:
    """Have files' modes hold for this thread, also where it is root's, who may do anything.

    Unlike another user, it still reads what belongs to root, for example the modules that it has yet to import.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION_3, 0), (_Set * 2)()
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    before = sets[0].effective
    sets[0].effective = before & ~(_DAC_OVERRIDE | _DAC_READ_SEARCH)
    _set(libc, header, sets)
    try:
        yield
    finally:
        sets[0].effective = before
        _set(libc, header, sets)


def _set(libc: ctypes.CDLL, header: _Header, sets: ctypes.Array[_Set]) -> None:
    if libc.capset(ctypes.byref(header), sets):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
