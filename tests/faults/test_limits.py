"""What a server takes at most, which is said with the limit's name and value, before anything is allocated."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm.errors import LimitExceeded, ServerBusy
from sharednorm.v1 import service_pb2
from sharednorm_server.config.options import ServerConfig
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process, server_process
from tests.support.stock import SECONDS, StockClient, channel_to, code_of, detail_of, ref, spec

SHAPE = (4, 3, 5, 2)


def test_layers_of_a_namespace() -> None:
    with in_process(ServerConfig(max_layers=2)) as server, sharednorm.connect(server.address) as hub:
        for name in "ab":
            hub.BatchNorm2D(3, name=name)
        for _ in range(2):
            with pytest.raises(LimitExceeded, match=r"has 2 layers \(expected: at most max_layers = 2;") as caught:
                hub.BatchNorm2D(3, name="c")
            assert caught.value.metadata == {"limit": "max_layers", "value": "2"}
        hub.BatchNorm2D(3, name="a")  # is there already
        with sharednorm.connect(server.address, namespace="other") as other:
            other.BatchNorm2D(3, name="c")
        hub.delete("a")
        hub.BatchNorm2D(3, name="c")
        assert [layer.name for layer in hub.layers()] == ["b", "c"]


def test_layers_of_a_namespace_are_counted_over_restarts(tmp_path: object) -> None:
    config = ServerConfig(max_layers=2, state=f"sqlite://{tmp_path}/state")
    for name, fits in (("a", True), ("b", True), ("c", False)):
        with in_process(config) as server, sharednorm.connect(server.address) as hub:
            if fits:
                hub.BatchNorm2D(3, name=name)
                continue
            with pytest.raises(LimitExceeded):
                hub.BatchNorm2D(3, name=name)


def test_calls_that_run_or_wait() -> None:
    """Those beyond are told to come again, before their bodies are read; the library does so by itself."""
    with (
        server_process("--workers", "1", "--max-concurrent-rpcs", "3") as process,
        channel_to(process.address) as channel,
    ):
        client = StockClient.on(channel)
        client.create("bn")
        go_on, begun = threading.Event(), threading.Event()

        def slowly() -> Iterator[service_pb2.ForwardStreamRequest]:
            # A stream that has begun holds the one worker.
            header = service_pb2.ForwardRequest(ref=ref("bn"), input=spec((4, 3, 400, 400)))
            yield service_pb2.ForwardStreamRequest(header=header)
            begun.set()
            assert go_on.wait(30)
            chunk = bytes(4 * 4 * 3 * 400 * 400)
            for offset in range(0, len(chunk), 1 << 20):
                yield service_pb2.ForwardStreamRequest(offset=offset, chunk=chunk[offset : offset + (1 << 20)])

        slow = client.stub.ForwardStream(slowly(), timeout=SECONDS)
        assert begun.wait(10)
        waiting = [client.stub.ListLayers.future(service_pb2.ListLayersRequest(), timeout=SECONDS) for _ in range(2)]
        time.sleep(1.0)  # until they have arrived, of which nobody outside can tell
        end = time.monotonic() + 10
        while True:
            try:
                client.stub.ListLayers(service_pb2.ListLayersRequest(), timeout=0.5)
            except grpc.RpcError as error:
                if code_of(error) is grpc.StatusCode.RESOURCE_EXHAUSTED:
                    detail = detail_of(error)
                    break
            assert time.monotonic() < end
        assert detail.reason == "SERVER_BUSY"
        assert dict(detail.metadata) == {"limit": "max_concurrent_rpcs", "value": "3", "retry_seconds": "0.1"}
        # Whoever uses the library waits, and is answered when there is room; its health can be asked for all the time.
        found: list[object] = []
        with pytest.raises(ServerBusy):
            sharednorm.connect(process.address, timeout=2.0)
        threading.Timer(0.5, go_on.set).start()
        patient = threading.Thread(target=lambda: found.append(train(process.address)))
        go_on.wait(10)
        patient.start()
        list(slow)
        patient.join(30)
        assert found == [1]
        assert all(call.result(SECONDS) is not None for call in waiting)


def train(address: str) -> int:
    with sharednorm.connect(address) as hub:
        layer = hub.BatchNorm2D(3, name="mine")
        layer(random_tensor(1, SHAPE))
        return layer.version


def test_many_calls_at_a_time_are_all_answered() -> None:
    """64 threads of one hub, at a limit of 4 calls: each waits for its turn."""
    config = ServerConfig(max_concurrent_rpcs=4, workers=2, direct_port=None)
    with in_process(config) as server, sharednorm.connect(server.address) as hub:
        layer = hub.BatchNorm2D(3, name="bn")
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for _ in range(3):
                    layer(random_tensor(seed, SHAPE))
            except BaseException as error:  # noqa: BLE001 - told below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert layer.version == 64 * 3
        assert np.isfinite(layer.mean).all()


@pytest.mark.parametrize("path", ["", "unix"])
def test_connections(path: str, tmp_path: Path) -> None:
    """One beyond the limit is closed at once; those that there are go on, and when one ends there is room again."""
    listen = f"unix:{tmp_path}/socket" if path else "127.0.0.1:0"
    config = ServerConfig(listen=listen, max_connections=2, direct_port=None)
    with in_process(config) as server, sharednorm.connect(server.address) as first:
        layer = first.BatchNorm2D(3, name="bn")
        with sharednorm.connect(server.address) as second:
            with pytest.raises(sharednorm.ServerUnavailable):
                sharednorm.connect(server.address, timeout=2)
            second.layer("bn")(random_tensor(1, SHAPE))
            layer(random_tensor(2, SHAPE))
        end = time.monotonic() + 10
        while True:  # until the server has noticed
            try:
                sharednorm.connect(server.address, timeout=1).close()
                break
            except sharednorm.ServerUnavailable:
                assert time.monotonic() < end
        assert layer.numOfProps == 2


@pytest.mark.parametrize(
    "option",
    ["max_layers", "max_concurrent_rpcs", "max_idempotency_sessions", "max_connections", "max_direct_connections"],
)
def test_no_limit_is_below_one(option: str) -> None:
    with pytest.raises(sharednorm.InvalidConfiguration, match="expected: a whole number, at least 1"):
        ServerConfig(**{option: 0})  # type: ignore[arg-type]
