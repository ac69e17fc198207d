"""The ways that tensors travel: what they have in common, and what each of them promises."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm import Progress
from sharednorm.errors import (
    DeadlineExceeded,
    InvalidConfiguration,
    InvalidShape,
    LimitExceeded,
    NonFiniteInput,
    ServerBusy,
    ServerUnavailable,
    UnsupportedDType,
)
from sharednorm.transport.shared_memory import SharedRegions
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.server import RunningServer
from tests.support import oracle
from tests.support.inside import exchange_of
from tests.support.oracle import Array, random_tensor
from tests.support.processes.server import in_process

SHAPE = (8, 3, 256, 192)  # 4.7 MB
WAYS = ("shm", "direct", "grpc")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("server") / "s.sock"
    with in_process(ServerConfig(listen=f"unix:{path}")) as running:
        yield running


@pytest.fixture(params=WAYS)
def hub(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[sharednorm.Hub]:
    with sharednorm.connect(server.address, namespace=request.node.name[:128], transport=request.param) as opened:
        assert opened.transport == request.param
        yield opened


def regions_of(hub: sharednorm.Hub) -> SharedRegions | None:
    way = exchange_of(hub)._ways._way
    return None if way is None else way.regions


# --- Which way ------------------------------------------------------------------------------------------


def test_the_best_way_is_taken(server: RunningServer, tmp_path: Path) -> None:
    with sharednorm.connect(server.address) as hub:
        assert hub.transport == "shm"
        assert "tensors by shm" in repr(hub)
    with in_process() as tcp, sharednorm.connect(tcp.address) as hub:
        assert hub.transport == "direct"
    listen = f"unix:{tmp_path}/s.sock"
    with in_process(ServerConfig(listen=listen, shared_memory_bytes=0)) as other:
        with sharednorm.connect(other.address) as hub:
            assert hub.transport == "direct"
        with pytest.raises(ServerUnavailable, match="shares no memory there"):
            sharednorm.connect(other.address, transport="shm")
    with in_process(ServerConfig(direct_port=None)) as other:
        with sharednorm.connect(other.address) as hub:
            assert hub.transport == "grpc"
        for way in ("shm", "direct"):
            with pytest.raises(ServerUnavailable, match=r'takes no direct connections \(pass transport="auto"'):
                sharednorm.connect(other.address, transport=way)


def test_shared_memory_needs_a_unix_socket() -> None:
    with in_process() as tcp, pytest.raises(ServerUnavailable, match="it does on a unix socket"):
        sharednorm.connect(tcp.address, transport="shm")


@pytest.mark.parametrize("transport", ["tcp", "", "SHM", None, 3])
def test_a_way_that_there_is_not(transport: object) -> None:
    with pytest.raises(InvalidConfiguration, match=r"transport is .* \(expected: one of auto, shm, direct, grpc"):
        sharednorm.connect("localhost:1", transport=transport)  # type: ignore[arg-type]


def test_all_ways_give_the_same_bits(server: RunningServer) -> None:
    x, grad = random_tensor(1, SHAPE), random_tensor(2, SHAPE)
    found = set()
    for way in WAYS:
        with sharednorm.connect(server.address, transport=way) as hub:
            bn = hub.BatchNorm2D(3, name=f"bits/{way}", sscale=0.0)
            bn.trainMode()
            y = bn(x)
            bn.backward(grad)
            assert bn.grad is not None
            hub.layer(f"bits/{way}")
            found.add((y.tobytes(), bn.grad.tobytes(), bn.mean.tobytes(), bn.vars["scale"].grad.tobytes()))
    assert len(found) == 1


# --- Arrays ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", oracle.DTYPES)
def test_an_empty_array_is_one_to_write_to(hub: sharednorm.Hub, name: str) -> None:
    x = hub.empty(SHAPE, name)
    assert (x.shape, x.dtype, x.flags.c_contiguous, x.flags.writeable) == (SHAPE, oracle.dtype(name), True, True)
    x[...] = random_tensor(1, SHAPE, name)
    ordinary = x.copy()
    one, other = hub.BatchNorm2D(3, name="a", sscale=0.0), hub.BatchNorm2D(3, name="b", sscale=0.0)
    assert one(x).tobytes() == other(ordinary).tobytes()
    one.backward(x)
    other.backward(ordinary)
    assert one.grad is not None
    assert other.grad is not None
    assert one.grad.tobytes() == other.grad.tobytes()


def test_shapes_and_types_of_empty_arrays(hub: sharednorm.Hub) -> None:
    assert hub.empty(7).shape == (7,)
    assert hub.empty([2, np.int64(3)]).dtype == np.float32
    assert hub.empty((0, 3)).size == 0
    for shape in ((-1,), (2.5, 3), "ab", None):
        with pytest.raises(InvalidShape):
            hub.empty(shape)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedDType):
        hub.empty((2, 3), np.float64)


def test_results_stay_what_they_are(hub: sharednorm.Hub) -> None:
    bn = hub.BatchNorm2D(3, name="bn", sscale=0.0)
    bn.evalMode()
    batches = [random_tensor(seed, SHAPE) for seed in range(6)]
    results = [bn(x) for x in batches]
    for x, y in zip(batches, results, strict=True):
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
        np.add(y, 1, out=y)  # an ordinary array
    hub.close()
    np.testing.assert_allclose(results[0], batches[0] / np.sqrt(1 + 1e-5) + 1, rtol=1e-5, atol=1e-6)


def test_a_network_of_layers_passes_its_tensors_on(hub: sharednorm.Hub) -> None:
    layers = [hub.BatchNorm2D(3, name=f"bn{i}", sscale=0.0) for i in range(4)]
    x = hub.empty(SHAPE)
    x[...] = random_tensor(1, SHAPE)
    expected: Array = x.copy()
    for i, layer in enumerate(layers):
        local = sharednorm.BatchNorm2D(3, sscale=0.0)
        expected = local(expected)
        x = layer(x)
        np.testing.assert_array_equal(x, expected, err_msg=str(i))
    for layer in reversed(layers):  # each with the input that it was given
        layer.backward(x)


def test_a_backward_finds_its_input_though_other_layers_have_used_the_memory(hub: sharednorm.Hub) -> None:
    # What was copied into shared memory for the first layer must not be given to the second while the server keeps it.
    x, grad = random_tensor(1, SHAPE), random_tensor(2, SHAPE)
    first, local = hub.BatchNorm2D(3, name="first", sscale=0.0), sharednorm.BatchNorm2D(3, sscale=0.0)
    first(x)
    local(x)
    second = hub.BatchNorm2D(3, name="second")
    for seed in range(4):
        second(random_tensor(10 + seed, SHAPE))
    first.backward(grad)
    local.backward(grad)
    assert first.grad is not None
    assert local.grad is not None
    np.testing.assert_array_equal(first.grad, local.grad)


def test_memory_is_used_again(server: RunningServer) -> None:
    with sharednorm.connect(server.address, transport="shm") as hub:
        bn, x = hub.BatchNorm2D(3, name="again"), random_tensor(1, SHAPE)
        regions = regions_of(hub)
        assert regions is not None
        for _ in range(20):
            bn(x)
        gc.collect()
        assert len(regions._regions) <= 6
        y = bn(x)
        assert regions.find(y) is not None
        assert regions.find(y[2:5]) == (regions.find(y)[0], regions.find(y)[1] + 2 * y[0].nbytes)  # type: ignore[index]
        assert regions.find(y[:, 1:]) is None
        assert regions.find(x) is None


def test_more_than_a_session_may_have(tmp_path: Path) -> None:
    config = ServerConfig(listen=f"unix:{tmp_path}/s.sock", shared_memory_bytes_per_client=12 << 20)
    with in_process(config) as server:
        x = random_tensor(1, SHAPE)  # 4.7 MB, and as much for the output
        with sharednorm.connect(server.address, transport="shm") as hub:
            held = [hub.empty(SHAPE), hub.empty(SHAPE)]
            bn = hub.BatchNorm2D(3, name="bn", sscale=0.0)
            with pytest.raises(LimitExceeded, match=r"shared_memory_bytes_per_client = 12582912"):
                bn(x)
            with pytest.raises(LimitExceeded, match="shared_memory_bytes_per_client"):
                hub.empty(SHAPE)
            assert bn.numOfProps == 0
            held.clear()
            bn(x)
        with sharednorm.connect(server.address) as hub:  # which may go another way
            held = [hub.empty(SHAPE) for _ in range(4)]
            again = hub.layer("bn")
            again(x)
            assert again.numOfProps == 2
            assert hub.transport == "shm"


# --- Half the bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(4, 3, 6, 5), SHAPE], ids=["small", "large"])
def test_float32_that_travels_in_16_bits(hub: sharednorm.Hub, shape: tuple[int, ...], name: str) -> None:
    x, grad = random_tensor(1, shape), random_tensor(2, shape)
    bn = hub.BatchNorm2D(3, name="narrow", sscale=0.0, wire_dtype=name)
    plain = hub.BatchNorm2D(3, name="plain", sscale=0.0)
    assert name in repr(bn)
    out = np.empty_like(x)
    assert bn(x, out) is out
    kind = oracle.dtype(name)
    expected = plain(x.astype(kind))  # what arrived, computed with by the server
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected.astype(np.float32))
    assert bn.mean.tobytes() == plain.mean.tobytes()
    bn.backward(grad)
    plain.backward(grad.astype(kind))
    assert bn.grad is not None
    assert plain.grad is not None
    assert bn.grad.dtype == np.float32
    np.testing.assert_array_equal(bn.grad, plain.grad.astype(np.float32))
    np.testing.assert_allclose(out, oracle.Model(3).train(x), atol=0.03 if name == "bfloat16" else 4e-3)
    again = hub.layer("narrow", wire_dtype=name)
    again.evalMode()
    assert again(x).dtype == np.float32


def test_other_types_travel_as_they_are(hub: sharednorm.Hub) -> None:
    bn = hub.BatchNorm2D(3, name="half", wire_dtype="bfloat16")
    x = random_tensor(1, (4, 3, 6, 5), "float16")
    assert bn(x).dtype == np.float16


def test_values_that_float16_has_not(hub: sharednorm.Hub) -> None:
    bn = hub.BatchNorm2D(3, name="range", wire_dtype="float16")
    x = random_tensor(1, (4, 3, 6, 5))
    x[1, 1, 1, 1] = 70_000
    with pytest.raises(NonFiniteInput, match="beyond 65504"):
        bn(x)
    bn.evalMode()
    with pytest.raises(NonFiniteInput, match="beyond 65504"):
        bn(x)
    x[1, 1, 1, 1] = np.inf  # which float16 has
    assert np.isinf(bn(x)).sum() == 1
    wide = hub.layer("range", wire_dtype="bfloat16")
    x[1, 1, 1, 1] = 1e30
    wide.evalMode()
    assert np.isfinite(wide(x)).all()


@pytest.mark.parametrize("given", ["float32", "half", 16, np.float16])
def test_a_wire_type_that_there_is_not(hub: sharednorm.Hub, given: object) -> None:
    with pytest.raises(InvalidConfiguration, match="wire_dtype is"):
        hub.BatchNorm2D(3, name="x", wire_dtype=given)  # type: ignore[arg-type]


# --- Progress -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_progress_is_told(server: RunningServer, way: str) -> None:
    told: list[Progress] = []
    with sharednorm.connect(server.address, transport=way, progress=told.append) as hub:
        bn, x = hub.BatchNorm2D(3, name="progress"), random_tensor(1, SHAPE)
        bn(x)
        assert {(each.method, each.to_send, each.to_receive) for each in told} == {("Forward", x.nbytes, x.nbytes)}
        assert [each.sent + each.received for each in told] == sorted(each.sent + each.received for each in told)
        assert (told[-1].sent, told[-1].received) == (x.nbytes, x.nbytes)
        assert way == "shm" or len(told) > 4
        told.clear()
        bn.backward(x)
        assert told[-1].method == "Backward"


class Enough(Exception):
    pass


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", ["sending", "receiving"])
def test_an_error_of_whoever_is_told_ends_the_call(server: RunningServer, way: str, when: str) -> None:
    def tell(progress: Progress) -> None:
        if (progress.received if when == "receiving" else progress.sent) >= 2 << 20:
            raise Enough

    with sharednorm.connect(server.address, transport=way, progress=tell) as hub:
        bn = hub.BatchNorm2D(3, name=f"enough/{when}/{way}")
        with pytest.raises(Enough):
            bn(random_tensor(1, SHAPE))
        assert bn.numOfProps == (1 if when == "receiving" else 0)  # the step was taken when its answer came
        assert bn(random_tensor(1, (4, 3, 5, 5))).shape == (4, 3, 5, 5)


def test_progress_is_a_function() -> None:
    with pytest.raises(InvalidConfiguration, match="progress is"):
        sharednorm.connect("localhost:1", progress=3)  # type: ignore[arg-type]


# --- A server that has enough to do -----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["direct", "grpc"])
def test_a_tensor_beyond_the_budget_is_refused_and_one_that_has_to_wait_waits(way: str) -> None:
    with (
        in_process(ServerConfig(max_inflight_bytes=6 << 20)) as server,
        sharednorm.connect(server.address, transport=way) as hub,
        sharednorm.connect(server.address, transport=way, timeout=2.0) as impatient,
    ):
        bn = hub.BatchNorm2D(3, name="bn")
        with pytest.raises(LimitExceeded, match="max_inflight_bytes = 6291456"):
            bn(random_tensor(1, (16, *SHAPE[1:])))
        futures = [hub.BatchNorm2D(3, name=f"bn{i}").forward_async(random_tensor(i, SHAPE)) for i in range(5)]
        assert {future.result(30).shape for future in futures} == {SHAPE}
        end = time.monotonic() + 10
        while server._service._in_flight.used:  # an answer is here a moment before its call is over there
            assert time.monotonic() < end
            time.sleep(0.01)
        with server._service.admitted(4 << 20), pytest.raises(ServerBusy, match="try again"):
            impatient.layer("bn")(random_tensor(1, SHAPE))
        assert bn.numOfProps == 0
        bn(random_tensor(1, SHAPE))


@pytest.mark.parametrize("way", ["direct", "grpc"])
def test_nothing_of_a_large_tensor_is_sent_before_its_turn(way: str) -> None:
    sent: list[int] = []

    def note(progress: sharednorm.Progress) -> None:
        sent.append(progress.sent)

    x = random_tensor(1, (12, 3, 256, 256))  # 9 MiB
    with (
        in_process(ServerConfig(max_inflight_bytes=32 << 20)) as server,
        sharednorm.connect(server.address, transport=way, progress=note) as hub,
        sharednorm.connect(server.address, transport=way, timeout=1.0, progress=note) as impatient,
    ):
        bn = hub.BatchNorm2D(3, name="bn")
        refused = impatient.layer("bn")
        with server._service.admitted(32 << 20), pytest.raises(ServerBusy):
            refused(x)
        assert not any(sent)
        movers = server._direct._servicer._movers
        with ExitStack() as turns, pytest.MonkeyPatch.context() as patch:
            patch.setattr(movers, "_clock", lambda: 0.0)  # so that nobody is slow
            for _ in range(movers._most):
                turns.enter_context(movers.turn(lambda: True))
            with pytest.raises(DeadlineExceeded):
                refused(x)
            assert not any(sent)
        assert bn.numOfProps == 0
        np.testing.assert_allclose(np.mean(bn(x), axis=(0, 2, 3)), 0, atol=1e-5)
        assert x.nbytes in sent
