"""Shared memory when a side dies, races, or lies: it goes when its client does, and nobody else's numbers change."""

from __future__ import annotations

import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import HubClosed
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.shared_memory import SharedRegions
from sharednorm.v1 import direct_pb2, layer_pb2, service_pb2
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.server import RunningServer
from tests.support import lane as lanes
from tests.support import oracle
from tests.support.inside import exchange_of
from tests.support.processes.server import in_process, server_process
from tests.support.service import InterruptedDevice, new_service
from tests.support.stock import StockClient, channel_to, ref, spec

SHAPE = (8, 3, 128, 96)  # 1.2 MB
NBYTES = 4 * 8 * 3 * 128 * 96

CLIENT = """
import sys, time
import numpy as np
import sharednorm
hub = sharednorm.connect(sys.argv[1], transport="shm")
bn = hub.BatchNorm2D(3, name="bn", sscale=0.0)
x = hub.empty({shape})
x[...] = np.random.default_rng(0).normal(size=x.shape)
y = bn(x)
held = [hub.empty(x.shape) for _ in range(4)]
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    with in_process(ServerConfig(listen=f"unix:{tmp_path}/s.sock")) as running:
        yield running


def settles(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def shared_bytes(server: RunningServer) -> int:
    memory = server._direct.memory
    assert memory is not None
    return memory.used


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_memory_goes_when_its_client_dies(server: RunningServer, number: signal.Signals) -> None:
    code = CLIENT.format(shape=SHAPE)
    with subprocess.Popen([sys.executable, "-c", code, server.address], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        assert shared_bytes(server) >= 6 * NBYTES
        assert len(server._service._saved) == 1
        client.send_signal(number)
        client.wait(10)
    # The kept input lies in that memory: it goes, too.
    assert settles(lambda: shared_bytes(server) == 0)
    assert len(server._service._saved) == 0
    with sharednorm.connect(server.address) as hub:
        assert hub.layer("bn").numOfProps == 1
        hub.layer("bn")(oracle.random_tensor(1, SHAPE))


def test_no_mapping_of_the_server_is_left(tmp_path: Path) -> None:
    with server_process(listen=f"unix:{tmp_path}/s.sock") as process:
        maps = Path(f"/proc/{process.pid}/maps")
        for _ in range(3):
            with sharednorm.connect(process.address, transport="shm") as hub:
                bn = hub.BatchNorm2D(3, name="bn")
                bn(oracle.random_tensor(1, SHAPE))
                assert "memfd:sharednorm" in maps.read_text()
            assert settles(lambda: "memfd:sharednorm" not in maps.read_text())
        assert not [path for path in Path(f"/proc/{process.pid}/fd").iterdir() if "memfd" in str(path.readlink())]


def test_a_server_that_was_restarted_shares_memory_again(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s.sock"
    x = oracle.random_tensor(1, SHAPE)
    with server_process(listen=listen) as process:
        hub = sharednorm.connect(process.address, transport="shm")
        bn = hub.BatchNorm2D(3, name="bn", sscale=0.0)
        kept, mine = bn(x), hub.empty(SHAPE)
        mine[...] = x
        process.process.kill()
        process.wait()
        expected = kept.copy()
    with server_process(listen=listen), hub:
        again = hub.BatchNorm2D(3, name="bn", sscale=0.0)
        assert again(mine).tobytes() == expected.tobytes()  # of memory that the new server does not know
        assert hub.transport == "shm"
        assert kept.tobytes() == expected.tobytes()
        fresh = hub.empty(SHAPE)
        fresh[...] = x
        again(fresh)


def test_a_client_that_writes_while_the_server_reads_harms_itself_alone(server: RunningServer) -> None:
    x, stop = oracle.random_tensor(1, SHAPE), threading.Event()
    with (
        sharednorm.connect(server.address, transport="shm") as honest,
        sharednorm.connect(server.address, transport="shm") as racing,
    ):
        good, bad = honest.BatchNorm2D(3, name="good", sscale=0.0), racing.BatchNorm2D(3, name="bad", sscale=0.0)
        local = sharednorm.BatchNorm2D(3, sscale=0.0)
        mine = racing.empty(SHAPE)
        mine[...] = x

        def scribble() -> None:
            random = np.random.default_rng(0)
            while not stop.is_set():
                mine.reshape(-1)[random.integers(0, mine.size, 1000)] = random.normal(0, 1e3, 1000)

        thread = threading.Thread(target=scribble)
        thread.start()
        try:
            for _ in range(30):
                assert good(x).tobytes() == local(x).tobytes()
                bad(mine)
                bad.backward(mine)
        finally:
            stop.set()
            thread.join(10)
        assert good.mean.tobytes() == local.mean.tobytes()
        assert np.isfinite(bad.mean).all()


# --- A client of its own kind ---------------------------------------------------------------------------


class SharedMemorySession:
    """A client that speaks what docs/protocol.md says."""

    def __init__(self, server: RunningServer) -> None:
        self.path = server.address.removeprefix("unix:") + ".direct"
        with channel_to(server.address) as channel:
            client = StockClient.on(channel)
            client.create("bn")
            self.where = lanes.offer(client)
        assert self.where.shared_memory
        self.memory = self.connect(b"", lanes.MEMORY)
        self.id = self.welcome(self.memory)

    def connect(self, session: bytes, purpose: int = lanes.CALLS) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10)
        sock.connect(self.path)
        sock.sendall(lanes.hello(self.where.instance, session, purpose))
        return sock

    def welcome(self, sock: socket.socket) -> bytes:
        welcome = lanes.RawLane(sock).welcome()
        assert welcome.status == direct_pb2.WELCOME_STATUS_OK
        return welcome.session

    def lane(self) -> lanes.RawLane:
        sock = self.connect(self.id)
        self.welcome(sock)
        return lanes.RawLane(sock)

    def allocate(self, nbytes: int) -> lanes.Reply:
        self.memory.sendall(struct.pack("<HHIQ", 1, 0, 0, nbytes))
        data, descriptors, _, _ = socket.recv_fds(self.memory, 16, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        status, _, size, data_bytes = struct.unpack("<HHIQ", data)
        return lanes.Reply(status, lanes.RawLane(self.memory).read(size), data_bytes)


def shared_forward(
    lane: lanes.RawLane, places: tuple[int, ...], shape: tuple[int, ...] = SHAPE, mode: int = layer_pb2.MODE_TRAIN
) -> lanes.Reply:
    request = service_pb2.ForwardRequest(ref=ref("bn"), input=spec(shape))
    request.mode = mode  # type: ignore[assignment]
    message = request.SerializeToString()
    head = struct.pack("<HHIQQ", 1, 1, len(message), 0, 10**7) + struct.pack("<6Q", *places)
    lane.sock.sendall(head + message)
    return lane.reply()


def test_places_that_no_client_should_name(server: RunningServer) -> None:
    session, other = SharedMemorySession(server), SharedMemorySession(server)
    lane = session.lane()
    with session.memory, other.memory, lane.sock:
        size = session.allocate(NBYTES).data_bytes
        session.allocate(NBYTES)
        for _ in range(5):
            other.allocate(NBYTES)  # number 3 and more are theirs alone
        for places in (
            (0, 0, 0, 0, 2, 0),
            (1, 0, 0, 0, 0, 0),
            (3, 0, 0, 0, 2, 0),
            (1, 0, 0, 0, 5, 0),
            (1, size - NBYTES + 4, 0, 0, 2, 0),
            (1, 0, 0, 0, 2, size - NBYTES + 4),
            (1, (1 << 64) - 4, 0, 0, 2, 0),
            (1, 2, 0, 0, 2, 0),
            (1, 0, 0, 0, 1, 0),
            ((1 << 64) - 1, 0, 0, 0, 2, 0),
        ):
            assert shared_forward(lane, places).reason == "MALFORMED_MESSAGE", places
        assert shared_forward(lane, (1, 0, 0, 0, 2, 0), (8, 3, 128, 97)).reason == "MALFORMED_MESSAGE"
        assert shared_forward(lane, (1, 0, 0, 0, 2, 0), (1 << 20, 3, 1 << 20, 1)).reason == "LIMIT_EXCEEDED"
        assert shared_forward(lane, (1, 0, 0, 0, 1, 0), mode=0).reason == "MALFORMED_MESSAGE"  # it may train
        assert shared_forward(lane, (1, 0, 0, 0, 1, 0), mode=layer_pb2.MODE_EVAL).status == lanes.OK
        assert shared_forward(lane, (1, 0, 0, 0, 2, 0)).status == lanes.OK
    assert settles(lambda: shared_bytes(server) == 0)


def test_a_session_gets_so_much(tmp_path: Path) -> None:
    config = ServerConfig(listen=f"unix:{tmp_path}/s.sock", shared_memory_bytes_per_client=NBYTES)
    with in_process(config) as server:
        session = SharedMemorySession(server)
        with session.memory:
            assert session.allocate(NBYTES + 1).reason == "LIMIT_EXCEEDED"
            assert session.allocate((1 << 64) - 1).reason == "LIMIT_EXCEEDED"
            assert session.allocate(NBYTES).status == lanes.OK
            assert session.allocate(1).reason == "LIMIT_EXCEEDED"


def test_a_session_that_has_ended_is_known_to_nobody(server: RunningServer) -> None:
    session = SharedMemorySession(server)
    lane = session.lane()
    with lane.sock:
        session.allocate(NBYTES)
        session.memory.close()
        assert settles(lambda: shared_bytes(server) == 0)
        assert shared_forward(lane, (1, 0, 0, 0, 2, 0)).status == 5
        with session.connect(session.id) as late:
            assert lanes.RawLane(late).welcome().status == direct_pb2.WELCOME_STATUS_NO_SESSION


@pytest.mark.parametrize("frame", [struct.pack("<HHIQ", 9, 0, 0, 0), bytes(16)], ids=["unknown", "zeros"])
def test_a_wish_that_there_is_not_ends_the_session(server: RunningServer, frame: bytes) -> None:
    session = SharedMemorySession(server)
    with session.memory:
        session.memory.sendall(frame)
        assert lanes.RawLane(session.memory).ended()


def test_the_sockets_are_for_one_user_alone(server: RunningServer) -> None:
    path = Path(server.address.removeprefix("unix:"))
    for each in (path, path.with_name(path.name + ".direct")):
        assert each.stat().st_mode & 0o777 == 0o600


def test_a_hub_that_was_closed_gives_no_more_arrays(server: RunningServer) -> None:
    hub = sharednorm.connect(server.address)
    x = hub.empty(SHAPE)
    hub.close()
    x[...] = 1  # still an array
    with pytest.raises(HubClosed):
        hub.empty(SHAPE)


FEW_FILES = """
import resource, sys
import numpy as np
import sharednorm
with sharednorm.connect(sys.argv[1]) as hub:
    bn, x = hub.BatchNorm2D(3, name="few", sscale=0.0), np.random.default_rng(0).normal(size={shape}).astype(np.float32)
    expected = bn(x).copy()
    used = len(__import__("os").listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, used + 6))
    held = [hub.empty({shape}) for _ in range(12)]
    assert all(array.flags.writeable for array in held)
    results = [bn(x) for _ in range(12)]
    assert all(np.array_equal(result, expected) for result in results)
    print(hub.transport, bn.numOfProps)
"""


def test_a_client_that_may_open_few_files_goes_on_without_shared_memory(server: RunningServer) -> None:
    code = FEW_FILES.format(shape=SHAPE)
    done = subprocess.run(
        [sys.executable, "-c", code, server.address], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("shm 13\n", "")


def test_small_arrays_take_no_shared_memory(server: RunningServer) -> None:
    with sharednorm.connect(server.address, transport="shm") as hub:
        held = [hub.empty((100, 100)) for _ in range(1000)]
        assert len(held) == 1000
        assert shared_bytes(server) == 0


# --- Calls that are given up ------------------------------------------------------------------------------


def regions_of(hub: sharednorm.Hub) -> SharedRegions:
    way = exchange_of(hub)._ways._way
    assert way is not None
    assert way.regions is not None
    return way.regions


def test_memory_of_a_call_that_was_given_up_is_given_to_nobody_else(tmp_path: Path) -> None:
    device, go_on = InterruptedDevice(), threading.Event()
    service = new_service(device)
    with (
        in_process(ServerConfig(listen=f"unix:{tmp_path}/s.sock"), service) as server,
        sharednorm.connect(server.address, transport="shm", timeout=0.5) as hub,
    ):
        bn, x = hub.BatchNorm2D(3, name="bn", sscale=0.0), oracle.random_tensor(1, SHAPE)
        bn(x)
        bn.reset()
        before = {region.number for region in regions_of(hub)._regions.values()}
        device.interrupt = lambda _: go_on.wait(10)
        with pytest.raises(sharednorm.DeadlineExceeded):
            bn(x)  # computed, and not answered: its regions are those of `before`
        gc.collect()
        device.interrupt = lambda _: None
        others = [hub.empty(SHAPE) for _ in range(4)]
        # By number: the system may map other memory where that of the call was mapped.
        used = {place[0] for place in map(regions_of(hub).find, others) if place is not None}
        assert len(used) == 4
        assert not used & before
        for array in others:
            array[...] = 7
        go_on.set()
        assert settles(lambda: server._direct.turns._free._value == 32)
        assert all((array == 7).all() for array in others)
        local = sharednorm.BatchNorm2D(3, sscale=0.0)
        np.testing.assert_allclose(bn(x), local(x), atol=1e-5)
        assert bn.version == 2


def test_an_interrupt_between_a_wish_and_its_answer(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with sharednorm.connect(server.address) as hub:
        bn, x = hub.BatchNorm2D(3, name="interrupted", sscale=0.0), oracle.random_tensor(1, SHAPE)
        expected = bn(x).copy()
        first = regions_of(hub)

        def interrupt(*_: object) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(socket, "recv_fds", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hub.empty((64, *SHAPE))
        assert first.closed  # since nobody knows any more which answer is whose
        assert hub.empty(SHAPE).shape == SHAPE
        assert regions_of(hub) is not first
        np.testing.assert_array_equal(bn(x), expected)


def test_a_deadline_that_has_passed_ends_no_session(server: RunningServer) -> None:
    with sharednorm.connect(server.address) as hub:
        before = shared_bytes(server)
        given_up = hub.empty(SHAPE)
        regions_of(hub).abandon(given_up)
        del given_up
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                regions_of(hub).empty((16, *SHAPE), np.dtype(np.float32), Deadline(0.0))
        assert not regions_of(hub).closed
        assert hub.empty((16, *SHAPE)).shape == (16, *SHAPE)
        assert settles(lambda: shared_bytes(server) - before < 17 * NBYTES)  # what was to be freed has been


def test_a_session_that_the_server_has_ended_is_begun_anew(server: RunningServer) -> None:
    with sharednorm.connect(server.address, transport="shm") as hub:
        bn, x = hub.BatchNorm2D(3, name="anew", sscale=0.0), oracle.random_tensor(1, SHAPE)
        expected = bn(x).copy()
        memory = server._direct.memory
        assert memory is not None
        for session in list(memory._sessions.values()):
            session.close()
        np.testing.assert_array_equal(bn(x), expected)
        assert bn.version == 2


def test_so_many_regions_and_no_more(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharednorm_server.direct.shared_memory.MAX_REGIONS", 3)
    session = SharedMemorySession(server)
    with session.memory:
        for _ in range(3):
            assert session.allocate(1).status == lanes.OK
        assert session.allocate(1).reason == "LIMIT_EXCEEDED"
