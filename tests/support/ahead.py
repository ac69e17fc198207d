"""Handles whose training runs ahead of the server, and a gate that their steps wait at."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

import sharednorm
from sharednorm.core.types import Array
from sharednorm.remote.handle import RemoteBatchNorm
from sharednorm.v1 import service_pb2
from sharednorm_server.rpc import batch_methods

LONG = 30.0


class Gate:
    """What the server was sent in calls of many steps, each of which waits until the gate is open."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        """Let no call through."""
        self._open.clear()

    def open(self) -> None:
        """Let all calls through."""
        self._open.set()

    def enter(self, request: service_pb2.BatchPushMomentsRequest) -> None:
        """Note a call, and wait."""
        self.calls.append([push.ref.name for push in request.pushes])
        assert self._open.wait(LONG)


@contextmanager
def gated() -> Iterator[Gate]:
    """Put a gate before the calls of many steps of all servers of this process; it is open in the end."""
    made = Gate()

    def push_many(request: service_pb2.BatchPushMomentsRequest, push: Any) -> service_pb2.BatchPushMomentsResponse:
        made.enter(request)
        return batch_methods.push_many(request, push)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sharednorm_server.rpc.servicer.push_many", push_many)
        yield made
        made.open()


def ahead(hub: sharednorm.Hub, name: str = "bn", **options: Any) -> RemoteBatchNorm:
    """Return a handle of a layer of 5 maps that runs ahead."""
    return hub.BatchNorm2D(5, name=name, sscale=0.0, compute="client", push="async", **options)


@dataclass(frozen=True)
class At:
    """What a call may need."""

    bn: RemoteBatchNorm
    hub: sharednorm.Hub
    x: Array


def eventually(true: Callable[[], bool]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
