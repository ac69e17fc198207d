"""Layers whose tensors stay with the client: the same bits, and nothing but moments on the wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm.errors import (
    InvalidConfiguration,
    LayerEmpty,
    LayerNotFound,
    NonFiniteInput,
    SharedNormError,
    TooFewValues,
)
from sharednorm.transport.direct import DirectLink
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm_server.server import RunningServer
from tests.support import oracle
from tests.support.oracle import DTYPES, random_tensor
from tests.support.processes.server import in_process
from tests.support.stock import MAPS, SECONDS, StockClient, channel_to, code_of, detail_of, ref, vector

SHAPE = (8, 5, 37, 11)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with in_process() as running:
        yield running


@pytest.fixture
def hub(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[sharednorm.Hub]:
    with sharednorm.connect(server.address, namespace=request.node.name[:128]) as opened:
        yield opened


class Wire:
    """What travels on direct connections."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []  # method, bytes there, bytes back


@pytest.fixture
def on_the_wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    seen, original = Wire(), DirectLink.call

    def call(self: DirectLink, method: int, message: bytes, data: Any, answer: memoryview, *rest: Any) -> bytes:
        result = original(self, method, message, data, answer, *rest)
        there = len(message) + sum(part.nbytes for part in data)
        seen.calls.append((method, there + 24, len(result) + answer.nbytes + 16))
        return result

    monkeypatch.setattr(DirectLink, "call", call)
    return seen


def all_of(layer: sharednorm.Layer) -> tuple[bytes, ...]:
    state = layer.snapshot()
    arrays = (state.scale, state.bias, state.mean, state.var, state.scale_grad, state.bias_grad)
    return (*(array.tobytes() for array in arrays), bytes([state.version, state.num_of_props]))


@pytest.mark.parametrize("name", DTYPES)
def test_the_bits_are_those_of_a_server_that_computes(hub: sharednorm.Hub, name: str) -> None:
    pair = [hub.BatchNorm2D(5, name=compute, sscale=0.0, compute=compute) for compute in ("server", "client")]
    for bn in pair:
        bn.bias = np.linspace(-1, 1, 5)
    for seed in range(5):
        x, grad = random_tensor(seed, SHAPE, name), random_tensor(100 + seed, SHAPE, name)
        outputs, gradients = [], []
        for bn in pair:
            outputs.append(bn(x).tobytes())
            bn.backward(grad, scale=0.5, momentum=0.9)
            assert bn.grad is not None
            gradients.append(bn.grad.tobytes())
            bn.updateParams(-0.1)
        assert len(set(outputs)) == len(set(gradients)) == 1
        assert all_of(pair[0]) == all_of(pair[1])
    for bn in pair:
        bn.evalMode()
    assert pair[0](x).tobytes() == pair[1](x).tobytes()


@pytest.mark.parametrize("maps", [1, 64, 2048])
def test_only_moments_travel(hub: sharednorm.Hub, on_the_wire: Wire, maps: int) -> None:
    bn = hub.BatchNorm2D(maps, name="a layer of a network", compute="client")
    x = random_tensor(1, (4, maps, 8, 8))
    bn(x)
    bn.backward(x)
    assert [method for method, *_ in on_the_wire.calls] == [3, 4]
    for _, there, back in on_the_wire.calls:
        assert there <= 32 * maps + 512
        assert back <= 32 * maps + 512


def test_evaluation_needs_no_call_while_what_was_read_is_fresh(hub: sharednorm.Hub, monkeypatch: Any) -> None:
    trainer = hub.BatchNorm2D(5, name="bn", sscale=0.0)
    bn = hub.layer("bn", compute="client", max_staleness=0.3)
    bn.evalMode()
    x = random_tensor(1, SHAPE)
    reads: list[str] = []
    original = type(hub._connection).call

    def call(self: Any, method: str, *rest: Any, **named: Any) -> Any:
        reads.append(method)
        return original(self, method, *rest, **named)

    trainer(random_tensor(2, SHAPE))  # which opens its session
    monkeypatch.setattr(type(hub._connection), "call", call)
    first = bn(x)
    trainer(x)
    assert bn(x).tobytes() == first.tobytes()  # as it was a moment ago
    assert reads == ["GetStats"]
    time.sleep(0.35)
    assert bn(x).tobytes() != first.tobytes()
    assert reads == ["GetStats"] * 2
    bn.bias = np.ones(5)  # its own change shows at once
    assert bn(x).mean() > 0.9
    always = hub.layer("bn", compute="client")
    always.evalMode()
    before = always(x)
    trainer(2 * x)
    assert always(x).tobytes() != before.tobytes()


def test_handles_that_compute_here_and_there_share_a_layer(server: RunningServer) -> None:
    with sharednorm.connect(server.address, namespace="mixed") as hub:
        hub.BatchNorm2D(5, name="bn", minFactor=0.0)
        batches = [random_tensor(seed, SHAPE) for seed in range(80)]

        def train(numbers: range, compute: str) -> None:
            with sharednorm.connect(server.address, namespace="mixed") as mine:
                bn = mine.layer("bn", compute=compute)
                for number in numbers:
                    bn(batches[number])

        threads = [
            threading.Thread(target=train, args=(range(k, 80, 4), ("server", "client")[k % 2])) for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        bn = hub.layer("bn")
        assert (bn.version, bn.numOfProps) == (80, 80)
        expected = np.mean([x.mean((0, 2, 3), dtype=np.float64) for x in batches], axis=0)
        np.testing.assert_allclose(bn.mean.ravel(), expected, atol=1e-6)


def test_a_mode_that_the_layer_chooses(hub: sharednorm.Hub) -> None:
    bn, x = hub.BatchNorm2D(5, name="bn", sscale=0.0, compute="client"), random_tensor(1, SHAPE)
    bn(x)
    hub.set_train("bn", False)
    y = bn(x)
    assert bn.numOfProps == 1
    model = oracle.Model(5)
    model.train(x)
    np.testing.assert_allclose(y, model.evaluate(x), rtol=1e-5, atol=2e-6)
    with pytest.raises(sharednorm.BackwardInEval):
        bn.backward(x)


def test_what_the_server_refuses(hub: sharednorm.Hub) -> None:
    bn, x = hub.BatchNorm2D(5, name="bn", compute="client"), random_tensor(1, SHAPE)
    assert "computed here" in repr(bn)
    poisoned = x.copy()
    poisoned[0, 2, 0, 0] = np.nan
    with pytest.raises(NonFiniteInput, match=r"in 1 of 5 maps \(2\)"):
        bn(poisoned)
    with pytest.raises(TooFewValues):
        bn(x[:1, :, :1, :1])
    empty = hub.BatchNorm2D(5, name="empty", empty=True, compute="client")
    for mode in (True, False):
        empty.train = mode
        with pytest.raises(LayerEmpty):
            empty(x)
    hub.delete("bn")
    with pytest.raises(LayerNotFound, match="somebody deleted it"):
        bn(x)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compute": "gpu"}, "compute is 'gpu'"),
        ({"compute": None}, "compute is None"),
        ({"compute": "client", "max_staleness": -1}, "max_staleness is -1"),
        ({"compute": "client", "max_staleness": "1"}, "max_staleness is '1'"),
        ({"compute": "client", "max_staleness": float("nan")}, "max_staleness is nan"),
        ({"max_staleness": 1.0}, "compute='server' a handle caches nothing"),
        ({"compute": "client", "wire_dtype": "bfloat16"}, "no tensor travels"),
    ],
)
def test_options_that_contradict(hub: sharednorm.Hub, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfiguration, match=words):
        hub.BatchNorm2D(5, name="bn", **options)
    assert hub.layers() == []
    with pytest.raises(InvalidConfiguration, match=words):
        hub.layer("bn", **options)


@pytest.mark.parametrize("transport", ["grpc", "direct"])
def test_every_way_carries_moments(server: RunningServer, transport: str) -> None:
    with sharednorm.connect(server.address, namespace=transport, transport=transport) as hub:
        bn, local = hub.BatchNorm2D(5, name="bn", sscale=0.0, compute="client"), sharednorm.BatchNorm2D(5, sscale=0.0)
        x = random_tensor(1, SHAPE)
        assert bn(x).tobytes() == local(x).tobytes()
        bn.backward(x)
        local.backward(x)
        assert bn.vars["scale"].grad.tobytes() == local.vars["scale"].grad.tobytes()


# --- By the contract alone --------------------------------------------------------------------------------


@pytest.fixture
def client(server: RunningServer) -> Iterator[StockClient]:
    with channel_to(server.address) as channel:
        made = StockClient.on(channel)
        made.create("stock")
        yield made


def moments(**changes: Any) -> tensor_pb2.Moments:
    return tensor_pb2.Moments(**{"count": [4], "mean": [1.0, 2.0, 3.0], "m2": [3.0, 6.0, 9.0], **changes})


def push(client: StockClient, message: tensor_pb2.Moments, mode: int = layer_pb2.MODE_TRAIN) -> Any:
    request = service_pb2.PushMomentsRequest(ref=ref("stock"), moments=message)
    request.mode = mode  # type: ignore[assignment]
    return client.stub.PushMoments(request, timeout=SECONDS)


def test_a_stock_client_pushes_moments_and_gradients(client: StockClient) -> None:
    before = client.stats("stock").layer.version
    answer = push(client, moments())
    assert (answer.mode, answer.version) == (layer_pb2.MODE_TRAIN, before + 1)
    assert list(answer.scale.values) == [1.0] * MAPS
    assert not answer.HasField("mean")
    if before == 0:
        state = client.stats("stock").state
        assert list(state.mean.values) == [1.0, 2.0, 3.0]
        assert list(state.var.values) == [1.0, 2.0, 3.0]  # m2 / (count - 1)
    request = service_pb2.PushGradientsRequest(
        ref=ref("stock"), scale_grad=vector([1, 2, 3]), bias_grad=vector([4, 5, 6]), scale=2.0
    )
    client.stub.PushGradients(request, timeout=SECONDS)
    assert list(client.stats("stock").state.scale_grad.values) == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("message", "mode", "reason"),
    [
        (moments(count=[0]), layer_pb2.MODE_TRAIN, "MALFORMED_MESSAGE"),
        (moments(count=[1]), layer_pb2.MODE_TRAIN, "TOO_FEW_VALUES"),
        (moments(mean=[1.0, 2.0]), layer_pb2.MODE_TRAIN, "MALFORMED_MESSAGE"),
        (moments(m2=[1.0, 2.0, -1e-30]), layer_pb2.MODE_TRAIN, "MALFORMED_MESSAGE"),
        (moments(m2=[1.0, 2.0, float("nan")]), layer_pb2.MODE_TRAIN, "NON_FINITE_INPUT"),
        (moments(mean=[1.0, 2.0, float("inf")]), layer_pb2.MODE_TRAIN, "NON_FINITE_INPUT"),
        (moments(), layer_pb2.MODE_EVAL, "INVALID_CONFIGURATION"),
        (moments(), 7, "INVALID_CONFIGURATION"),
        (tensor_pb2.Moments(), layer_pb2.MODE_TRAIN, "MALFORMED_MESSAGE"),
    ],
    ids=str,
)
def test_moments_that_are_none(client: StockClient, message: tensor_pb2.Moments, mode: int, reason: str) -> None:
    before = client.stats("stock")
    with pytest.raises(grpc.RpcError) as caught:
        push(client, message, mode)
    assert detail_of(caught.value).reason == reason
    assert code_of(caught.value) is grpc.StatusCode.INVALID_ARGUMENT
    assert client.stats("stock") == before


def test_gradients_that_are_none(client: StockClient) -> None:
    before = client.stats("stock")
    for changes in ({"scale_grad": vector([1, 2])}, {"scale": float("nan")}, {"momentum": float("inf")}):
        fields: dict[str, Any] = {"scale_grad": vector([1, 2, 3]), "bias_grad": vector([1, 2, 3]), **changes}
        with pytest.raises(grpc.RpcError):
            client.stub.PushGradients(service_pb2.PushGradientsRequest(ref=ref("stock"), **fields), timeout=SECONDS)
    assert client.stats("stock") == before


def test_a_push_after_the_hub_was_closed(server: RunningServer) -> None:
    hub = sharednorm.connect(server.address, namespace="closed")
    bn = hub.BatchNorm2D(5, name="bn", compute="client")
    hub.close()
    with pytest.raises(SharedNormError, match="closed"):
        bn(random_tensor(1, SHAPE))
