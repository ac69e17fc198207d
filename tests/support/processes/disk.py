"""A disk that is watched, and fails when it is told to; and what it has after the power went away."""

from __future__ import annotations

import random
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("disk.c")
SECTOR = 512

_RECORD = struct.Struct("<IIQQ")
_WRITE, _CUT, _SYNC = 1, 2, 3


def build(directory: Path) -> Path:
    """Compile what watches, and return the library; it needs gcc."""
    library = directory / "disk.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library), str(SOURCE), "-ldl", "-pthread"],
        check=True, timeout=60,
    )  # fmt: skip
    return library


def watched(library: Path, under: Path, log: Path | None = None, fault: str = "") -> dict[str, str]:
    """Return the environment of a process whose files under a path are on such a disk."""
    env = {"LD_PRELOAD": str(library), "DISK_UNDER": str(under)}
    if log is not None:
        env["DISK_LOG"] = str(log)
    if fault:
        env["DISK_FAULT"] = fault
    return env


@dataclass(frozen=True)
class Change:
    """Something that was done to a file.

    Attributes:
        end: Where its record ends in the log.
        kind: A write, a cut or a sync.
        name: The file's, without its directory.
        offset: Where was written, or what was left.
        data: What was written.
    """

    end: int
    kind: int
    name: str
    offset: int
    data: bytes


def read(log: Path) -> list[Change]:
    """Return all that was recorded."""
    text, at, found = log.read_bytes(), 0, []
    while at < len(text):
        kind, path_bytes, offset, data_bytes = _RECORD.unpack_from(text, at)
        at += _RECORD.size
        name = Path(text[at : at + path_bytes].decode()).name
        data = text[at + path_bytes : at + path_bytes + data_bytes]
        at += path_bytes + data_bytes
        found.append(Change(at, kind, name, offset, data))
    return found


def after_power_loss(
    base: dict[str, bytes], changes: list[Change], rng: random.Random, kept: float
) -> dict[str, bytes]:
    """Return what the files have when the power goes away behind some changes.

    What was synced is there. Of what came behind a file's last sync each write is there or not, whatever came before
    it, whole or in sectors.

    Args:
        base: The files before.
        changes: What was done to them.
        rng: Decides what is there.
        kept: How likely it is that a write is there that was not synced.
    """
    files = {name: bytearray(data) for name, data in base.items()}
    synced = {change.name: number for number, change in enumerate(changes) if change.kind == _SYNC}
    for number, change in enumerate(changes):
        file = files.setdefault(change.name, bytearray())
        certain = number < synced.get(change.name, -1)
        if change.kind == _CUT and (certain or rng.random() < kept):
            del file[change.offset :]
        elif change.kind == _WRITE and certain:
            _put(file, change.offset, change.data)
        elif change.kind == _WRITE and rng.random() < kept:
            torn = rng.random() < 0.5
            for begin in range(0, len(change.data), SECTOR) if torn else (0,):
                if not torn or rng.random() < 0.5:
                    _put(file, change.offset + begin, change.data[begin : begin + SECTOR] if torn else change.data)
    return {name: bytes(file) for name, file in files.items()}


def _put(file: bytearray, offset: int, data: bytes) -> None:
    if len(file) < offset:
        file.extend(bytes(offset - len(file)))
    file[offset : offset + len(data)] = data
