"""Answers to members on direct connections, which the thread of whoever completes a step sends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import sharednorm
from sharednorm.v1 import service_pb2
from sharednorm_server.direct.connection import DirectConnection
from sharednorm_server.server import RunningServer
from tests.support import oracle
from tests.support.lane import RawLane, lane_to
from tests.support.members import Members, all_of
from tests.support.processes import server
from tests.support.stock import StockClient, channel_to, ref

SYNCHRONIZE_MOMENTS = 5
MANY = 1000  # maps, whose answer has 24 KB
NAME = "bn"


def test_an_answer_that_is_larger_than_a_socket_takes_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    send_now = DirectConnection._send_now
    # As if the socket had no more room than that.
    monkeypatch.setattr(DirectConnection, "_send_now", lambda lane, frame: send_now(lane, frame[:5000]) + frame[5000:])
    with server.in_process() as running, Members(running.address, 2, "direct", "large") as members:
        layers = members.layers("BatchNorm", MANY, name=NAME, sscale=0.0)
        parts = [oracle.random_tensor(rank, (2, MANY)) for rank in range(2)]
        results = all_of(2, lambda rank: layers[rank](parts[rank]))
        whole = sharednorm.BatchNorm(MANY, sscale=0.0)(np.concatenate(parts))
        np.testing.assert_allclose(np.concatenate(results), whole, rtol=1e-5, atol=1e-5)
        assert settled(running)


def test_a_second_call_before_the_answer_of_the_first_ends_the_connection() -> None:
    with (
        server.in_process() as running,
        channel_to(running.address) as channel,
        Members(running.address, 2, "direct", "impatient", timeout=2.0) as members,
    ):
        layer = members.layers("BatchNorm", 3, name=NAME)[0]
        joining = [threading.Thread(target=group.join) for group in members.groups]
        for thread in joining:
            thread.start()
        for thread in joining:
            thread.join()
        with lane_to(StockClient.on(channel)) as lane:
            for _ in range(2):
                bring(lane, members.groups[0])
            assert lane.ended()
        assert layer.numOfProps == 0
        assert settled(running)  # when the group has given the step up


def bring(lane: RawLane, group: sharednorm.Group) -> None:
    assert group._membership is not None
    request = service_pb2.SynchronizeMomentsRequest(ref=ref(NAME), ticket=group._membership.ticket, step=1)
    lane.request(SYNCHRONIZE_MOMENTS, request.SerializeToString(), 0)
    time.sleep(0.2)


def settled(running: RunningServer) -> bool:
    end = time.monotonic() + 10
    while running._direct.turns._pool._unfinished:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
