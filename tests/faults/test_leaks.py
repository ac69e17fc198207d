"""Nothing leaks: after thousands of calls that failed, and clients that died, a server is as it was."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from sharednorm.v1 import layer_pb2, service_pb2
from tests.support import lane as lanes
from tests.support import oracle
from tests.support.processes.server import ServerProcess, server_process
from tests.support.stock import MAPS, SECONDS, Floats, StockClient, channel_to, ref, spec

SHAPE = (4, MAPS, 5, 2)
FAILED, DEAD = 10_000, 1_000


def descriptors(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


def threads(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.pid}/task").iterdir()))


def settles(count: Callable[[ServerProcess], int], server: ServerProcess, most: int) -> None:
    """Wait until there are no more of something; a server notices that a client is gone a moment later."""
    end = time.monotonic() + 20
    while count(server) > most:
        assert time.monotonic() < end, (count.__name__, count(server), most)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_is_as_it_was_after_10000_failed_calls() -> None:
    x = oracle.random_tensor(1, SHAPE)
    bad = x.copy()
    bad[0, 0, 0, 0] = np.nan
    with server_process() as server, channel_to(server.address) as channel:
        client = StockClient.on(channel)
        client.create("bn")

        def forward(name: str, tensor: Floats, shape: tuple[int, ...]) -> service_pb2.ForwardRequest:
            train = layer_pb2.MODE_TRAIN
            return service_pb2.ForwardRequest(ref=ref(name), mode=train, input=spec(shape), data=tensor.tobytes())

        requests = [
            forward("nothing", x, SHAPE), forward("bn", bad, SHAPE), forward("bn", x, (4, MAPS + 1, 5, 2)),
            forward("bn", x[:1, :, :1, :1], (1, MAPS, 1, 1)), forward("", x, SHAPE),
        ]  # fmt: skip
        requests[0].key.session, requests[1].key.session = b"\xff" * 16, b"short"

        def fail(number: int) -> None:
            with pytest.raises(grpc.RpcError):
                client.stub.Forward(requests[number % len(requests)], timeout=SECONDS)

        for number in range(2_000):
            fail(number)
        before = server.resident_bytes(), descriptors(server), threads(server)
        for number in range(FAILED):
            fail(number)
        assert server.resident_bytes() - before[0] < 8 << 20
        settles(descriptors, server, before[1] + 2)
        settles(threads, server, before[2] + 8)  # pools grow as they are needed, up to their size
        assert client.stats("bn").layer.version == 0
        assert client.forward("bn", x).version == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_is_as_it_was_after_1000_clients_that_died(tmp_path: Path) -> None:
    """On direct connections, at each place where one may die; and on gRPC, where they wait for a group."""
    header = service_pb2.ForwardRequest(
        ref=ref("bn"), mode=layer_pb2.MODE_TRAIN, input=spec((8, MAPS, 256, 192)), keep_input=True
    ).SerializeToString()
    nbytes = 4 * 8 * MAPS * 256 * 192
    with server_process() as server, channel_to(server.address) as channel:
        client = StockClient.on(channel)
        client.create("bn")
        where = lanes.offer(client)

        def die(number: int) -> None:
            with lanes.connected(where.port) as sock:
                lane, step = lanes.RawLane(sock), number % 5
                if step > 0:
                    sock.sendall(lanes.hello(where.instance)[: None if step > 1 else 20])
                if step > 1:
                    lane.welcome()
                if step > 2:
                    lane.request(lanes.FORWARD, header, nbytes)
                if step > 3:
                    assert lane.reply().status == lanes.GO_ON
                    sock.sendall(bytes(1 << 16))
                # As the system does for a process that is killed, without goodbye.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if number % 10 == 0:
                request = service_pb2.JoinGroupRequest(
                    group=f"g{number}", member="alone", size=2, min_members=2, timeout=0.5
                )
                with channel_to(server.address) as dead:
                    StockClient.on(dead).stub.JoinGroup.future(request, timeout=SECONDS)
                    time.sleep(0.002)

        for number in range(200):
            die(number)
        time.sleep(1.5)
        before = server.resident_bytes(), descriptors(server), threads(server)
        for number in range(DEAD):
            die(number)
        # The threads of those who wait for a group stay in their pool; a few more may be there than before.
        settles(descriptors, server, before[1] + 2)
        settles(threads, server, before[2] + 40)
        assert server.resident_bytes() - before[0] < 24 << 20
        assert client.stats("bn").layer.version == 0
        assert client.forward("bn", oracle.random_tensor(1, SHAPE)).version == 1
