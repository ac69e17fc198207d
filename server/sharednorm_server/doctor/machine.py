"""What this machine has for a server: Python, packages, processors, and the arithmetic that would be used."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from dataclasses import dataclass

from sharednorm._version import __version__
from sharednorm_server.doctor.checks import MISSING, NOTE, OK, Check
from sharednorm_server.doctor.subprocesses import Child

SECONDS = 60.0
"""How long all imports together may take; they run at the same time."""

_CLIENT = (("numpy", "numpy"), ("grpc", "grpcio"), ("google.protobuf", "protobuf"))


@dataclass(frozen=True)
class _Extra:
    """A package of an extra: what is lost without it, or "" if a server cannot start without it."""

    module: str
    distribution: str
    extra: str
    without: str = ""


_EXTRAS = (
    _Extra("grpc_health.v1", "grpcio-health-checking", "server"),
    _Extra("grpc_reflection.v1alpha", "grpcio-reflection", "server"),
    _Extra("numba", "numba", "fast", "NumPy computes, several times slower"),
    _Extra("ml_dtypes", "ml_dtypes", "bfloat16", "no bfloat16 tensors"),
)


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        checks: All of it.
        server: Those that every server needs.
        cpu: Those that `--device cpu` needs besides.
    """

    checks: tuple[Check, ...]
    server: tuple[Check, ...]
    cpu: tuple[Check, ...]


def examine() -> Machine:
    """Look at this machine, for at most `SECONDS` and a moment."""
    end = time.monotonic() + SECONDS
    arithmetic = Child("arithmetic()")
    imports = [Child(f"package({each.module!r}, {each.distribution!r})") if _there(each) else None for each in _EXTRAS]
    extras = [_extra(each, child, end) for each, child in zip(_EXTRAS, imports, strict=True)]
    server = tuple(check for each, check in zip(_EXTRAS, extras, strict=True) if not each.without)
    computes = _arithmetic(arithmetic, end)
    checks = (
        Check("python", OK, f"{platform.python_version()} ({sys.executable})"),
        Check("sharednorm", OK, __version__),
        # They are there: the library, which this process has loaded, needs them.
        *(Check(module.rpartition(".")[2], OK, importlib.metadata.version(name)) for module, name in _CLIENT),
        *extras,
        Check("processors", OK, f"{_usable()} of {os.cpu_count()} may be used"),
        computes,
    )
    return Machine(checks, server, (computes,))


def _there(extra: _Extra) -> bool:
    return importlib.util.find_spec(extra.module.partition(".")[0]) is not None


def _extra(extra: _Extra, child: Child | None, end: float) -> Check:
    name = extra.module.partition(".")[0]
    if child is None:
        install = f"pip install 'sharednorm[{extra.extra}]'"
        if extra.without:
            return Check(name, NOTE, f"not installed, so {extra.without}", install)
        return Check(name, MISSING, "not installed", install)
    outcome = child.outcome(end)
    if outcome.failure:
        again = f"pip install --force-reinstall '{extra.distribution}'"
        return Check(name, MISSING, f"installed, and cannot be imported ({outcome.failure})", again)
    return Check(name, OK, str(outcome.fact("version")))


def _arithmetic(child: Child, end: float) -> Check:
    outcome = child.outcome(end)
    if outcome.failure:
        return Check(
            "arithmetic",
            MISSING,
            f"none ({outcome.failure})",
            "mend that, or set SHAREDNORM_ARITHMETIC=numpy, which needs NumPy only",
        )
    return Check("arithmetic", OK, str(outcome.fact("description")))


def _usable() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
