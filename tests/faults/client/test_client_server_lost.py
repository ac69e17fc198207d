"""A server that dies, hangs, restarts or forgets while a client uses it, and a hub that is closed meanwhile."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm.core.types import Array
from sharednorm.errors import (
    DeadlineExceeded,
    HubClosed,
    LayerNotFound,
    ServerUnavailable,
)
from tests.support.processes.server import ServerProcess, server_process, stopped

TRANSPORTS = ("shm", "direct", "grpc")
BIG = (1 << 23, 4)  # 128 MiB, far more than the socket buffers and flow control let through


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(listen=f"unix:{tmp_path}/s.sock") as process:
        yield process


def seconds(function: Callable[[], object]) -> float:
    start = time.monotonic()
    function()
    return time.monotonic() - start


def in_flight(call: Callable[[], object]) -> Future[object]:
    """Begin a call on another thread, and give it the time to come to where it has to wait for the server."""
    pool = ThreadPoolExecutor(1)
    future: Future[object] = pool.submit(call)
    pool.shutdown(wait=False)
    time.sleep(0.5)
    assert not future.done()
    return future


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shape", [(64, 4), BIG], ids=["small", "large"])
def test_a_server_that_is_killed_in_the_middle_of_a_call(
    server: ServerProcess, shape: tuple[int, ...], transport: str
) -> None:
    with sharednorm.connect(server.address, transport=transport, timeout=3) as hub:
        layer = hub.BatchNorm(4, name="x")
        x = np.ones(shape, np.float32)
        x[0] = 0
        with stopped(server.pid):
            call = in_flight(lambda: layer(x))
            os.kill(server.pid, signal.SIGKILL)
            start = time.monotonic()
            with pytest.raises(ServerUnavailable, match=r"is the server running"):
                call.result(10)
            assert time.monotonic() - start < 5
        with pytest.raises(ServerUnavailable):
            layer(x[:8])


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_that_hangs_costs_the_timeout_and_serves_again_when_it_wakes_up(
    server: ServerProcess, transport: str
) -> None:
    with (
        sharednorm.connect(server.address, timeout=1.0, transport=transport) as hub,
        sharednorm.connect(server.address) as patient,
    ):
        x, big = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32), np.ones(BIG, np.float32)
        patient.BatchNorm(4, name="x")(x)  # what a server loads at its first step may take longer than a second
        layer = hub.layer("x")
        layer(x)

        def expect_deadline(call: Callable[[], object]) -> Callable[[], object]:
            def attempt() -> None:
                with pytest.raises(DeadlineExceeded, match="did not answer within 1 s"):
                    call()

            return attempt

        with stopped(server.pid):
            assert 0.9 < seconds(expect_deadline(lambda: layer(x))) < 2
            assert 0.9 < seconds(expect_deadline(lambda: layer(big))) < 2
            assert 0.9 < seconds(expect_deadline(lambda: layer.mean)) < 2
            assert 0.9 < seconds(expect_deadline(lambda: layer.backward(x))) < 2
            assert 0.9 < seconds(expect_deadline(lambda: sharednorm.connect(server.address, timeout=1.0))) < 2
        again = patient.layer("x")
        before = again.version
        again(x)
        assert again.version == before + 1
        layer(x)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_no_call_that_was_given_up_is_applied_later(server: ServerProcess, transport: str) -> None:
    with (
        sharednorm.connect(server.address, timeout=0.5, transport=transport) as hub,
        sharednorm.connect(server.address) as patient,
    ):
        x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
        patient.BatchNorm(4, name="x")(x)
        layer = hub.layer("x")
        with stopped(server.pid):
            for _ in range(3):
                with pytest.raises(DeadlineExceeded):
                    layer(x)
        time.sleep(0.5)
        assert patient.layer("x").version == 1


def test_a_restarted_server_is_found_again_and_has_forgotten_its_layers(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/s.sock"
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    with server_process(listen=listen) as first:
        hub = sharednorm.connect(listen)
        layer = hub.BatchNorm(4, name="x")
        layer(x)
        os.kill(first.pid, signal.SIGKILL)
    with server_process(listen=listen), hub:
        with pytest.raises(LayerNotFound, match="was restarted, and with state memory: it forgets its layers") as error:
            layer(x)
        assert "hub.BatchNorm(...)" in str(error.value)
        with pytest.raises(LayerNotFound, match="was restarted"):
            layer.backward(x)
        with pytest.raises(LayerNotFound, match="was restarted"):
            layer.mean  # noqa: B018 - reading it is the call
        with pytest.raises(LayerNotFound, match="was restarted"):
            layer.updateParams(0.1)
        fresh = hub.BatchNorm(4, name="x")
        fresh(x)
        with pytest.raises(LayerNotFound, match="another one has its name now"):
            layer(x)
        assert fresh.version == 1


def test_a_deleted_layer_is_not_found_and_a_new_one_of_its_name_is(server: ServerProcess) -> None:
    with sharednorm.connect(server.address) as hub:
        layer = hub.BatchNorm(4, name="x")
        hub.delete("x")
        for call in (lambda: layer.mean, lambda: layer.train, layer.zeroGradParams, lambda: hub.delete("x")):
            with pytest.raises(LayerNotFound, match="'x'"):
                call()
        with pytest.raises(LayerNotFound) as caught:
            hub.layer("x")
        assert "when this handle was made" not in str(caught.value)


@pytest.mark.parametrize("rows", [64, 400_000], ids=["unary", "stream"])
def test_an_evicted_input_is_sent_again_and_gives_the_same_gradients(rows: int) -> None:
    random = np.random.default_rng(0)
    x, grad = (random.normal(size=(rows, 4)).astype(np.float32) for _ in range(2))
    results = []
    for size in ("1", "1GiB"):
        with server_process("--activation-cache-bytes", size) as server, sharednorm.connect(server.address) as hub:
            layer = hub.BatchNorm(4, name="x", sscale=0.0)
            layer(x)
            layer(x)
            layer.backward(grad, scale=0.5)
            layer.backward(grad, scale=0.5, momentum=0.25)
            results.append([layer.grad, layer.vars["scale"].grad, layer.vars["bias"].grad, layer.mean])
            assert layer.version == 2
    for evicted, kept in zip(*results, strict=True):
        np.testing.assert_array_equal(evicted, kept)
    assert results[0][0] is not None
    np.testing.assert_allclose(results[0][0], expected_gradient(x, grad), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [64, 400_000], ids=["unary", "stream"])
def test_an_input_that_was_kept_and_then_pushed_out_is_sent_again(rows: int) -> None:
    random = np.random.default_rng(0)
    x, other, grad = (random.normal(size=(rows, 4)).astype(np.float32) for _ in range(3))
    room = str(x.nbytes + 1000)  # for one input
    with server_process("--activation-cache-bytes", room) as server, sharednorm.connect(server.address) as hub:
        first, second = (hub.BatchNorm(4, name=name) for name in "ab")
        for pushed_out in (False, True):
            first.scale = used = np.array([1.0, -2.0, 3.0, 0.5], np.float32)
            first(x)
            if pushed_out:
                second(other)
            first.scale = -used  # backward belongs to the forward, and so does its scale
            first.backward(grad)
            assert first.grad is not None
            np.testing.assert_allclose(first.grad, expected_gradient(x, grad) * used, rtol=0, atol=1e-5)
            np.testing.assert_allclose(first.vars["bias"].grad.ravel(), grad.sum(0, np.float64), rtol=1e-5, atol=1e-3)
        second.backward(grad)
        assert second.grad is not None
        np.testing.assert_allclose(second.grad, expected_gradient(other, grad) * second.scale.ravel(), atol=1e-5)
        assert (first.version, second.version) == (2, 1)


def expected_gradient(x: Array, grad: Array) -> Array:
    """The gradient of a scale of 1, in float64."""
    wide, g = x.astype(np.float64), grad.astype(np.float64)
    inverse = 1 / np.sqrt(wide.var(0) + 1e-5)
    hat = (wide - wide.mean(0)) * inverse
    result: Array = (g - g.mean(0) - hat * (g * hat).mean(0)) * inverse
    return result


def test_a_forward_releases_the_input_of_the_one_before() -> None:
    x, grad = (np.random.default_rng(seed).normal(size=(1000, 4)).astype(np.float32) for seed in (0, 1))
    # Room for three inputs, since a new one comes before the one that it replaces goes: without the release, the
    # second layer's would push the first one's out.
    with (
        server_process("--activation-cache-bytes", str(3 * x.nbytes + 1000)) as server,
        sharednorm.connect(server.address) as hub,
    ):
        kept, busy = hub.BatchNorm(4, name="kept", sscale=0.0), hub.BatchNorm(4, name="busy")
        given = x.copy()
        kept(given)
        for _ in range(5):
            busy(x)
        given[:] = 0  # what would be sent again is another input, with another gradient
        kept.backward(grad)
        assert kept.grad is not None
        np.testing.assert_allclose(kept.grad, expected_gradient(x, grad), rtol=0, atol=1e-5)


def test_a_closed_hub_says_so_for_every_call(server: ServerProcess) -> None:
    hub = sharednorm.connect(server.address)
    layer = hub.BatchNorm(4, name="x")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    layer(x)
    hub.close()
    hub.close()
    assert hub.closed
    assert "closed" in repr(hub)
    for call in (
        lambda: layer(x),
        lambda: layer.backward(x),
        lambda: layer.mean,
        lambda: layer(np.ones(BIG, np.float32)),
        hub.layers,
        lambda: hub.info,
        lambda: hub.layer("x"),
        lambda: hub.BatchNorm(4, name="y"),
        lambda: hub.delete("x"),
        lambda: hub.set_train("x", True),
    ):
        with pytest.raises(HubClosed, match="connect again"):
            call()


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_a_hub_that_nobody_closes_lets_go_of_its_sockets(where: str, tmp_path: Path) -> None:
    # Also one in a cycle, of which nobody knows what goes first: a socket that does says so with a ResourceWarning.
    with server_process(listen="127.0.0.1:0" if where == "tcp" else f"unix:{tmp_path}/s") as process:
        for _ in range(10):
            lost: dict[str, object] = {"hub": sharednorm.connect(process.address)}
            lost["itself"] = lost
            del lost
        gc.collect()


def test_a_hub_closes_at_once_though_a_server_that_hangs_has_not_taken_what_was_sent(server: ServerProcess) -> None:
    hub = sharednorm.connect(server.address, timeout=0.5)
    layer = hub.BatchNorm(4, name="x")
    with stopped(server.pid):
        with pytest.raises(DeadlineExceeded):
            layer(np.ones(BIG, np.float32))
        assert seconds(hub.close) < 3


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shape", [(64, 4), BIG], ids=["small", "large"])
def test_closing_a_hub_ends_its_running_calls(server: ServerProcess, shape: tuple[int, ...], transport: str) -> None:
    hub = sharednorm.connect(server.address, transport=transport)
    layer = hub.BatchNorm(4, name="x")
    x = np.ones(shape, np.float32)
    with stopped(server.pid):
        call = in_flight(lambda: layer(x))
        assert seconds(hub.close) < 3
        with pytest.raises(HubClosed, match="closed during the call"):
            call.result(5)


def test_calls_that_fail_leave_no_thread_behind(server: ServerProcess) -> None:
    with sharednorm.connect(server.address, timeout=0.5) as hub:
        layer, big = hub.BatchNorm(4, name="x"), np.ones(BIG, np.float32)
        before = threading.active_count()
        with stopped(server.pid):
            for _ in range(4):
                with pytest.raises(DeadlineExceeded):
                    layer(big)
        end = time.monotonic() + 5
        while threading.active_count() > before and time.monotonic() < end:
            time.sleep(0.02)
        assert threading.active_count() <= before
