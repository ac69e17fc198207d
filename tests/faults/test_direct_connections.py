"""Direct connections from strangers, from clients that break off, and with bytes that no client should send."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import sharednorm
from sharednorm.v1 import direct_pb2
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.server import RunningServer
from tests.support import lane as lanes
from tests.support import oracle
from tests.support.lane import BACKWARD, FORWARD, GO_ON, RawLane, connected, forward, lane_to, offer, train
from tests.support.processes import server
from tests.support.service import KEY
from tests.support.stock import MAPS, StockClient, channel_to, floats

SHAPE = (4, MAPS, 5, 2)
NBYTES = 4 * 4 * MAPS * 5 * 2
LARGE = (4, MAPS, 300, 200)
LARGE_BYTES = 4 * 4 * MAPS * 300 * 200
NAME = "bn"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server.in_process(ServerConfig(max_tensor_bytes=64 << 20, max_inflight_bytes=64 << 20)) as started:
        yield started


@pytest.fixture
def client(running: RunningServer) -> Iterator[StockClient]:
    """Give a client; afterwards nothing is in flight, and the next call works."""
    with channel_to(running.address) as channel:
        made = StockClient.on(channel)
        made.create(NAME)
        yield made
        before = made.stats(NAME).layer.version
        with lane_to(made) as lane:
            train(lane, NAME, oracle.random_tensor(1, LARGE))
        assert made.stats(NAME).layer.version == before + 1
        settled(running)


def settled(running: RunningServer) -> None:
    end = time.monotonic() + 10
    while running._service._in_flight.used or running._direct.turns._free._value != 32:
        assert time.monotonic() < end, "a call that is over still holds something"
        time.sleep(0.01)


def version(client: StockClient) -> int:
    return client.stats(NAME).layer.version


# --- What the documentation promises ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
def test_a_client_that_knows_the_documentation_gets_right_answers(client: StockClient, shape: tuple[int, ...]) -> None:
    x = oracle.random_tensor(3, shape)
    with lane_to(client) as lane:
        for _ in range(3):
            answer, data = train(lane, NAME, x)
            _, mean, m2 = oracle.batch_moments(x)
            expected = oracle.normalized(x, mean, m2 * MAPS / x.size, np.ones(MAPS), np.zeros(MAPS), 1e-5)
            np.testing.assert_allclose(floats(data, shape), expected, rtol=2e-6, atol=2e-6)
            assert answer.version == version(client)


def test_errors_have_the_reasons_that_grpc_would_give(client: StockClient) -> None:
    before = version(client)
    with lane_to(client) as lane:
        for message, data_bytes, reason in (
            (forward("nobody", SHAPE), NBYTES, "LAYER_NOT_FOUND"),
            (forward("nobody", LARGE), LARGE_BYTES, "LAYER_NOT_FOUND"),
            (forward(NAME, (4, MAPS + 1, 5, 2)), NBYTES, "INVALID_SHAPE"),
            (forward(NAME, (400, MAPS, 500, 200)), 480_000_000, "LIMIT_EXCEEDED"),
            (forward(NAME, SHAPE), NBYTES - 4, "MALFORMED_MESSAGE"),
            (forward(NAME, LARGE), LARGE_BYTES - 4, "MALFORMED_MESSAGE"),
            (forward(NAME, LARGE), NBYTES, "LIMIT_EXCEEDED"),  # more than fits a small call
            (b"\xff\xff\xff", NBYTES, "MALFORMED_MESSAGE"),
            (b"\xff\xff\xff", LARGE_BYTES, "MALFORMED_MESSAGE"),
            (b"", 0, "UNSUPPORTED_DTYPE"),
        ):
            lane.request(FORWARD, message, data_bytes)
            if data_bytes <= lanes.WAIT_BYTES:
                lane.sock.sendall(bytes(data_bytes))
            assert lane.reply().reason == reason
        for method, reason in ((0, "NOT_SUPPORTED"), (3, "MALFORMED_MESSAGE"), (65535, "NOT_SUPPORTED")):
            lane.request(method, forward(NAME, SHAPE), NBYTES)
            lane.sock.sendall(bytes(NBYTES))
            assert lane.reply().reason == reason
        lane.request(BACKWARD, b"", NBYTES)
        lane.sock.sendall(bytes(NBYTES))
        assert lane.reply().reason == "INVALID_NAME"
        assert version(client) == before
        train(lane, NAME, oracle.random_tensor(1, SHAPE))  # on the same connection


def test_a_poisoned_tensor_in_parts_changes_nothing(client: StockClient) -> None:
    x, before = oracle.random_tensor(3, LARGE), client.stats(NAME)
    x[-1, -1, -1, -1] = np.inf
    with lane_to(client) as lane:
        lane.request(FORWARD, forward(NAME, LARGE), LARGE_BYTES)
        assert lane.reply().status == GO_ON
        lane.sock.sendall(x.tobytes())
        assert lane.reply().reason == "NON_FINITE_INPUT"
        assert client.stats(NAME) == before
        train(lane, NAME, oracle.random_tensor(1, LARGE))


# --- Who is there ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "say",
    [
        lambda _: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(100),
        lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
        lambda where: lanes.hello(where.instance).replace(b"conn3", b"conn4"),
        lambda _: random.Random(1).randbytes(4096),
    ],
    ids=["http", "http2", "another version", "noise"],
)
def test_a_stranger_is_shown_the_door(client: StockClient, say: Callable[[object], bytes]) -> None:
    where = offer(client)
    with connected(where.port) as sock:
        sock.sendall(say(where))
        assert RawLane(sock).ended()


@pytest.mark.parametrize(
    ("instance", "session", "purpose", "status"),
    [
        (b"x" * 16, b"", lanes.CALLS, direct_pb2.WELCOME_STATUS_OTHER_SERVER),
        (None, b"s" * 16, lanes.CALLS, direct_pb2.WELCOME_STATUS_NO_SESSION),
        (None, b"", lanes.MEMORY, direct_pb2.WELCOME_STATUS_NO_SESSION),
        (b"x" * 16, b"", lanes.MEMORY, direct_pb2.WELCOME_STATUS_OTHER_SERVER),
        (None, b"", 7, direct_pb2.WELCOME_STATUS_REFUSED),
    ],
    ids=["another server", "an unknown session", "memory over TCP", "memory of another server", "no purpose"],
)
def test_a_client_that_is_wrong_here_is_told_so(
    client: StockClient, instance: bytes | None, session: bytes, purpose: int, status: int
) -> None:
    where = offer(client)
    with connected(where.port) as sock:
        sock.sendall(lanes.hello(instance or where.instance, session, purpose))
        lane = RawLane(sock)
        assert lane.welcome().status == status
        assert lane.ended()


def test_more_connections_than_a_server_takes() -> None:
    with server.in_process(ServerConfig(max_direct_connections=2)) as running, channel_to(running.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        refused_beyond_two(client)


def refused_beyond_two(client: StockClient) -> None:
    where = offer(client)
    with lane_to(client) as first, lane_to(client), connected(where.port) as third:
        third.sendall(lanes.hello(where.instance))
        assert RawLane(third).welcome().status == direct_pb2.WELCOME_STATUS_FULL
        train(first, NAME, oracle.random_tensor(1, SHAPE))
    end = time.monotonic() + 10
    while True:  # until the server has noticed that there is room again
        with connected(where.port) as sock:
            sock.sendall(lanes.hello(where.instance))
            if RawLane(sock).welcome().status == direct_pb2.WELCOME_STATUS_OK:
                break
        assert time.monotonic() < end


def test_one_who_says_nothing_is_not_waited_for_long() -> None:
    with server.in_process(ServerConfig(handshake_timeout=0.2)) as running, channel_to(running.address) as channel:
        where = offer(StockClient.on(channel))
        with connected(where.port) as sock:
            sock.sendall(b"sharednorm")
            assert RawLane(sock).ended()


@pytest.mark.parametrize(
    "frame",
    [
        struct.pack("<HHIQQ", 1, 0, (8 << 20) + 1, 0, 10**7),
        struct.pack("<HHIQQ", 1, 1, 4, 0, 10**7) + bytes(48) + b"abcd",  # shared memory without a session
        struct.pack("<HHIQQ", 1, 0, 0, 0, 10**7) * 2,  # the next call before the answer
        struct.pack("<HHIQQ", 1, 0, 100, NBYTES, 0) + b"not all",  # no time at all
    ],
    ids=["a huge message", "no session", "two calls", "no time"],
)
def test_a_frame_that_no_client_sends_ends_the_connection(client: StockClient, frame: bytes) -> None:
    before = client.stats(NAME)
    with lane_to(client) as lane:
        lane.sock.sendall(frame)
        assert lane.ended()
    assert client.stats(NAME) == before


def test_noise_behind_the_welcome_harms_nobody(client: StockClient) -> None:
    before, noise = client.stats(NAME), random.Random(7)
    for _ in range(200):
        with lane_to(client) as lane:
            size = noise.choice([1, 24, 100, 5000])
            head = struct.pack(
                "<HHIQQ", noise.choice([0, 1, 2, 9]), noise.choice([0, 0, 1]), noise.randrange(200),
                noise.choice([0, 10, NBYTES, LARGE_BYTES, 1 << 40, (1 << 64) - 1]), noise.choice([0, 10**5, 1 << 63]),
            )  # fmt: skip
            lane.sock.sendall(noise.choice([head, b""]) + noise.randbytes(size))
            lane.sock.shutdown(socket.SHUT_WR)
            while lane.sock.recv(1 << 16):
                pass
    assert client.stats(NAME) == before


# --- Those who break off ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 100, LARGE_BYTES // 2, LARGE_BYTES - 1])
def test_a_client_that_breaks_off_its_upload_has_changed_nothing(
    client: StockClient, running: RunningServer, sent: int
) -> None:
    before = client.stats(NAME)
    with lane_to(client) as lane:
        lane.request(FORWARD, forward(NAME, LARGE, keep=True), LARGE_BYTES)
        assert lane.reply().status == GO_ON
        lane.sock.sendall(bytes(sent))
    settled(running)
    assert client.stats(NAME) == before


def test_a_client_that_sends_too_slowly_is_given_up_at_its_deadline(
    client: StockClient, running: RunningServer
) -> None:
    before = client.stats(NAME)
    with lane_to(client) as lane:
        lane.request(FORWARD, forward(NAME, LARGE), LARGE_BYTES, seconds=0.5)
        assert lane.reply().status == GO_ON
        began = time.monotonic()
        lane.sock.sendall(bytes(1000))
        assert lane.ended()
        assert 0.3 < time.monotonic() - began < 3
    settled(running)
    assert client.stats(NAME) == before


def test_a_client_that_does_not_take_its_answer_is_given_up_at_its_deadline(
    client: StockClient, running: RunningServer
) -> None:
    x = oracle.random_tensor(1, (40, MAPS, 300, 200))  # 29 MB, more than the buffers of sockets hold
    before = version(client)
    with lane_to(client) as lane:
        lane.request(FORWARD, forward(NAME, x.shape), x.nbytes, seconds=3)
        assert lane.reply().status == GO_ON
        lane.sock.sendall(x.tobytes())
        assert lane.reply().status == lanes.OK
        settled(running)
    assert version(client) == before + 1  # the answer had begun: the step was taken


def test_a_client_that_goes_before_its_answer_takes_no_step(client: StockClient, running: RunningServer) -> None:
    before = version(client)
    lock = running._service._layers.find(KEY).exclusive()
    with lock:
        with lane_to(client) as lane:
            lane.request(FORWARD, forward(NAME, SHAPE), NBYTES)
            lane.sock.sendall(oracle.random_tensor(1, SHAPE).tobytes())
            time.sleep(0.2)  # it has been computed, and waits for the layer
        time.sleep(0.1)
    settled(running)
    assert version(client) == before


def test_more_calls_than_workers_wait_for_their_turn() -> None:
    with server.in_process(ServerConfig(workers=2)) as few, channel_to(few.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        done: list[int] = []

        def steps() -> None:
            with lane_to(client) as lane:
                done.extend(train(lane, NAME, oracle.random_tensor(1, LARGE))[0].version for _ in range(10))

        threads = [threading.Thread(target=steps) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(done) == list(range(1, 81))


def test_a_server_that_stops_lets_a_call_end_and_refuses_the_next() -> None:
    with server.in_process() as stopping, channel_to(stopping.address) as channel:
        client = StockClient.on(channel)
        client.create(NAME)
        x = oracle.random_tensor(1, LARGE)
        with lane_to(client) as running, lane_to(client) as other:
            running.request(FORWARD, forward(NAME, LARGE), LARGE_BYTES)
            assert running.reply().status == GO_ON
            stop = threading.Thread(target=stopping.stop, args=(10.0,))
            stop.start()
            time.sleep(0.5)
            other.request(FORWARD, forward(NAME, SHAPE), NBYTES)
            other.sock.sendall(bytes(NBYTES))
            assert other.reply().reason == "UNAVAILABLE"
            running.sock.sendall(x.tobytes())
            reply = running.reply()
            assert reply.status == lanes.OK
            assert len(running.read(reply.data_bytes)) == LARGE_BYTES
            stop.join(10)
            assert running.ended()
            assert other.ended()


def test_a_client_for_whom_there_is_no_connection_more_harms_none_of_its_calls() -> None:
    began, go_on = threading.Event(), threading.Event()

    def tell(progress: sharednorm.Progress) -> None:
        if progress.to_send > 1 << 20 and not began.is_set():
            began.set()
            assert go_on.wait(30)

    x, small = oracle.random_tensor(1, LARGE), oracle.random_tensor(1, SHAPE)
    few_connections = server.in_process(ServerConfig(max_direct_connections=2))
    with few_connections as few, sharednorm.connect(few.address, progress=tell) as hub:
        slow, quick = hub.BatchNorm2D(MAPS, name="slow"), hub.BatchNorm2D(MAPS, name="quick")
        future = slow.forward_async(x)
        assert began.wait(30)
        with channel_to(few.address) as channel, lane_to(StockClient.on(channel)):
            assert quick(small).shape == SHAPE  # by gRPC, since both connections are taken
            assert hub.transport == "direct"
            with sharednorm.connect(few.address) as other:
                assert other.transport == "grpc"
                assert other.layer("quick").numOfProps == 1
            go_on.set()
            assert future.result(30).shape == LARGE
        assert slow(x).shape == LARGE
