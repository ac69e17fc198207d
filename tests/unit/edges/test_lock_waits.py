"""No thread waits for a lock while its holder waits for the store, a file or a slow client: the server's side."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sharednorm.codec import frames
from sharednorm_server.auth import tokens
from sharednorm_server.auth.tokens import TokenFile
from sharednorm_server.direct.connection import DirectConnection
from sharednorm_server.groups.coordinator import GroupKey, Synchronizer
from sharednorm_server.groups.state_machine import GroupSettings
from sharednorm_server.store.memory import MemoryStore
from tests.support.service import new_service

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


class Gate:
    """Holds calls of a function until a test lets them go on.

    Attributes:
        waiting: How many calls have come.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.waiting = 0
        self._function = function
        self._free = threading.Event()
        self._free.set()

    def __call__(self, *args: Any) -> Any:
        self.waiting += not self._free.is_set()
        assert self._free.wait(SECONDS)
        return self._function(*args)

    def shut(self) -> None:
        self._free.clear()

    def open(self) -> None:
        self._free.set()


def test_calls_of_groups_do_not_wait_while_the_store_numbers_another_group(threads: ThreadPoolExecutor) -> None:
    store = MemoryStore()
    gate = Gate(store.open_session)
    store.open_session = gate  # as slow as Redis can be
    groups = Synchronizer(new_service(store=store))
    settings = GroupSettings(2, 2, float(SECONDS))
    first = [groups.join(GroupKey("default", "old"), member, None, settings) for member in "ab"]
    ticket = first[0].result(SECONDS).ticket
    gate.shut()
    try:
        joining = [threads.submit(groups.join, GroupKey("default", "new"), each, None, settings) for each in "ab"]
        until(lambda: gate.waiting == 2)
        assert [group.key.name for group in threads.submit(groups.groups).result(SOON)] == ["old"]
        threads.submit(groups.leave, ticket).result(SOON)
        threads.submit(groups.join, GroupKey("default", "old"), "c", None, settings).result(SOON)
    finally:
        gate.open()
    members = [each.result(SECONDS).result(SECONDS) for each in joining]
    assert sorted(member.rank for member in members) == [0, 1]  # of one group, whoever made it
    groups.close()


def test_calls_do_not_wait_while_another_reads_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: ThreadPoolExecutor
) -> None:
    path = tmp_path / "tokens"
    secret, token = tokens.new_token("reader", tokens.Right.READ, ("*",), None)
    tokens.append(path, token)
    gate = Gate(tokens._stamp)
    monkeypatch.setattr(tokens, "_stamp", gate)
    file = TokenFile(path)
    gate.shut()
    try:
        file._looked = float("-inf")
        reader = threads.submit(file.require_known, f"Bearer {secret}")
        until(lambda: gate.waiting == 1)
        file._looked = float("-inf")  # as for a call that has looked at the clock at the same moment
        threads.submit(file.require_known, f"Bearer {secret}").result(SOON)
        assert not reader.done()
    finally:
        gate.open()
    reader.result(SECONDS)


def test_an_answer_does_not_wait_for_the_one_before_it_that_its_client_does_not_read(
    threads: ThreadPoolExecutor,
) -> None:
    # Whichever thread completes a step of a group answers all members. One that makes calls and reads no answers must
    # not hold it up.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        turns: Any = SimpleNamespace(end_none=lambda: None)
        nothing: Any = None
        lane = DirectConnection(nothing, turns, ours, frames.Reader(ours), None, "somebody", nothing)
        sending = threads.submit(lane._send_later, bytes(1 << 24))
        until(lane._telling.locked)
        assert threads.submit(lane._send_now, b"answer").result(SOON) == b"answer"
        assert not sending.done()
        theirs.close()
        sending.result(SECONDS)
