"""No thread waits for a lock while its holder waits for the server, unless for the same answer: the client's side."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from sharednorm.coordination.group import Group
from sharednorm.errors import GroupAborted
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.selector import TransportSelector
from sharednorm.v1 import layer_pb2

SECONDS, SOON = 10, 5


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


class SlowConnection:
    """What `TransportSelector` needs of a connection, to a slow server that offers no other way.

    Attributes:
        asked: How often it was asked.
        answers: Whether it answers.
    """

    closed = False
    direct = None
    address = SimpleNamespace(text="host:1", path="")

    def __init__(self) -> None:
        self.asked = 0
        self.answers = threading.Event()

    def deadline(self) -> Deadline:
        return Deadline(SECONDS)

    def handshake(self, _left: Deadline) -> None:
        self.asked += 1
        assert self.answers.wait(SECONDS)


def test_a_call_goes_by_grpc_while_another_looks_for_a_direct_way(threads: ThreadPoolExecutor) -> None:
    connection: Any = SlowConnection()
    ways = TransportSelector(connection, "auto")
    ways._again = 0.0  # it is time to look again
    first = threads.submit(ways.current, Deadline(SECONDS))
    until(lambda: connection.asked == 1)
    try:
        assert threads.submit(ways.current, Deadline(SECONDS)).result(SOON) is None
        assert connection.asked == 1
        assert not first.done()
    finally:
        connection.answers.set()
    assert first.result(SECONDS) is None


class SlowServer:
    """An exchange with a server where joining takes until a test ends it, and the steps of layers what it says.

    Attributes:
        joins: How many have begun to join.
        joined: Whether they have.
        steps: By layer, what its step waits for.
    """

    timeout = float(SECONDS)
    text = "host:1"

    def __init__(self) -> None:
        self.joins = 0
        self.joined = threading.Event()
        self.steps: dict[str, threading.Event] = {}
        self.left = 0

    @property
    def connection(self) -> SlowServer:
        return self

    def of(self, *_: object) -> SlowServer:
        return self

    def rebalance(self) -> bool:
        return False

    def call(self, method: str, *_: object) -> Any:
        if method == "LeaveGroup":
            self.left += 1
            return None
        self.joins += 1
        assert self.joined.wait(SECONDS)
        return SimpleNamespace(ticket=b"ticket", generation=1, rank=0, members=1)

    def plain(self, _method: str, _number: int, request: Any, *_: object) -> Any:
        assert self.steps[request.ref.uid].wait(SECONDS)
        raise GroupAborted("another member is missing")


@pytest.fixture
def server() -> SlowServer:
    return SlowServer()


@pytest.fixture
def group(server: SlowServer) -> Group:
    made, exchange = Group("run", 2), server
    made.settle(exchange, "default")  # type: ignore[arg-type]  # what a group needs of one
    return made


def test_a_hub_that_closes_waits_for_no_group_that_is_being_joined(
    group: Group, server: SlowServer, threads: ThreadPoolExecutor
) -> None:
    joining = threads.submit(group.join)
    until(lambda: server.joins == 1)
    try:
        threads.submit(group.say_goodbye).result(SOON)
        assert not joining.done()
    finally:
        server.joined.set()
    joining.result(SECONDS)
    assert group.rank == 0
    group.leave()
    assert group.generation is None
    assert server.left == 1


def test_a_member_that_leaves_while_it_joins_has_left(
    group: Group, server: SlowServer, threads: ThreadPoolExecutor
) -> None:
    joining = threads.submit(group.join)
    until(lambda: server.joins == 1)
    leaving = threads.submit(group.leave)
    server.joined.set()
    joining.result(SECONDS)
    leaving.result(SECONDS)
    assert server.left == 1


def test_a_step_that_has_failed_does_not_wait_for_another_threads_join(
    group: Group, server: SlowServer, threads: ThreadPoolExecutor
) -> None:
    server.joined.set()
    group.join()
    server.steps = {"a": threading.Event(), "b": threading.Event()}
    a, b = (threads.submit(group.moments, layer_pb2.LayerRef(uid=uid), None) for uid in server.steps)
    server.steps["a"].set()
    assert isinstance(a.exception(SECONDS), GroupAborted)
    server.joined.clear()
    joining = threads.submit(group.join)
    until(lambda: server.joins == 2)
    try:
        server.steps["b"].set()
        assert isinstance(b.exception(SOON), GroupAborted)
        assert not joining.done()
    finally:
        server.joined.set()
    joining.result(SECONDS)
