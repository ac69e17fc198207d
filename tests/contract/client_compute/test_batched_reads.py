"""Reading many layers in one call, and only what has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm.coordination.batching import grouped, require_results
from sharednorm.coordination.state_cache import StateCache
from sharednorm.core.limits import MAX_BATCH_ENTRIES, MAX_BATCH_MAPS
from sharednorm.errors import InvalidConfiguration, LayerEmpty, LayerNotFound, LimitExceeded, MalformedMessage
from sharednorm.remote.handle import RemoteBatchNorm
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm_server.layers.requests import LayerRecord
from sharednorm_server.rpc import converters, servicer
from sharednorm_server.rpc.servicer import Servicer
from sharednorm_server.server import RunningServer
from tests.support import oracle
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process, server_process
from tests.support.stock import MAPS, SECONDS, StockClient, channel_to, code_of, detail_of, doubles, ref, vector

SHAPE = (8, 5, 7, 3)
LONG = 1e6


class Reads:
    """What the server was asked for, by whichever way, and what it answered."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.one: list[service_pb2.GetStatsResponse] = []  # by itself, or as one of many
        self.many: list[int] = []

    def unchanged(self) -> list[bool]:
        return [answer.unchanged for answer in self.one]


READS = Reads()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    one, many = converters.stats_of, Servicer.get_many_stats

    def get_stats(record: LayerRecord, request: service_pb2.GetStatsRequest) -> service_pb2.GetStatsResponse:
        READS.one.append(one(record, request))
        return READS.one[-1]

    def get_many_stats(self: Servicer, request: service_pb2.BatchGetStatsRequest) -> service_pb2.BatchGetStatsResponse:
        READS.many.append(len(request.reads))
        return many(self, request)

    # Before it starts, since gRPC is given the methods then.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servicer, "stats_of", get_stats)
        patch.setattr(Servicer, "get_many_stats", get_many_stats)
        with in_process() as running:
            yield running


@pytest.fixture
def reads(server: RunningServer) -> Reads:
    READS.forget()
    return READS


@pytest.fixture(params=["direct", "grpc"])
def hub(server: RunningServer, request: pytest.FixtureRequest) -> Iterator[sharednorm.Hub]:
    space = request.node.name[:128]
    with sharednorm.connect(server.address, namespace=space, transport=request.param) as opened:
        yield opened


def evaluator(hub: sharednorm.Hub, name: str, max_staleness: float = LONG) -> RemoteBatchNorm:
    bn = hub.layer(name, compute="client", max_staleness=max_staleness)
    bn.evalMode()
    return bn


def test_a_network_is_read_in_one_call_and_then_evaluated_without_any(hub: sharednorm.Hub, reads: Reads) -> None:
    layers, models = [], []
    for number in range(50):
        trainer, model, x = (
            hub.BatchNorm2D(5, name=f"{number}", sscale=0.0),
            oracle.Model(5),
            random_tensor(number, SHAPE),
        )
        trainer(x)
        model.train(x)
        layers.append(evaluator(hub, f"{number}"))
        models.append(model)
    hub.refresh(*layers)
    x = random_tensor(99, SHAPE)
    for bn, model in zip(layers, models, strict=True):
        np.testing.assert_allclose(bn(x), model.evaluate(x), rtol=1e-5, atol=2e-6)
    assert (reads.many, len(reads.one)) == ([50], 50)


def test_a_read_of_what_has_not_changed_brings_no_vectors(hub: sharednorm.Hub, reads: Reads) -> None:
    trainer = hub.BatchNorm2D(5, name="bn", sscale=0.0)
    bn, x = evaluator(hub, "bn", 0.02), random_tensor(1, SHAPE)
    first = bn(x)
    for _ in range(2):
        time.sleep(0.03)
        assert bn(x).tobytes() == first.tobytes()
    hub.refresh(bn)
    assert reads.unchanged() == [False, True, True, True]
    assert not reads.one[-1].HasField("state")
    trainer(x)
    hub.refresh(bn)
    assert reads.unchanged()[4:] == [False]
    assert bn(x).tobytes() != first.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda bn: setattr(bn, "bias", np.ones(5)), id="parameters"),
        pytest.param(lambda bn: setattr(bn, "mean", np.ones(5)), id="statistics"),
        pytest.param(lambda bn: bn.updateParams(1.0), id="optimizer"),
    ],
)
def test_a_change_that_is_no_step_is_seen(hub: sharednorm.Hub, change: Callable[[sharednorm.Layer], object]) -> None:
    other, x = hub.BatchNorm2D(5, name="bn"), random_tensor(1, SHAPE)
    other(x)
    other.backward(x)
    bn = evaluator(hub, "bn")
    before, version = bn(x), bn.version
    change(other)
    hub.refresh(bn)
    assert bn.version == version
    assert bn(x).tobytes() != before.tobytes()
    other.evalMode()
    assert bn(x).tobytes() == other(x).tobytes()


def test_what_cannot_be_read_is_told_once_the_others_have_been(hub: sharednorm.Hub, reads: Reads) -> None:
    for name in "abc":
        hub.BatchNorm2D(5, name=name)
    hub.BatchNorm2D(5, name="empty", empty=True)
    a, b, c, empty = (evaluator(hub, name) for name in ("a", "b", "c", "empty"))
    hub.delete("b")
    with pytest.raises(LayerNotFound, match=r"'b'.*somebody deleted it"):
        hub.refresh(a, b, c)
    with pytest.raises(LayerEmpty, match="empty was created"):
        hub.refresh(empty, a)
    assert len(reads.many) == 2
    before = len(reads.one)
    a(random_tensor(1, SHAPE))
    c(random_tensor(1, SHAPE))
    assert len(reads.one) == before


def test_more_than_one_call_takes(hub: sharednorm.Hub, reads: Reads) -> None:
    hub.BatchNorm2D(1, name="narrow")
    hub.BatchNorm2D(70_000, name="wide", sscale=0.0)
    narrow, wide = evaluator(hub, "narrow"), evaluator(hub, "wide")
    hub.refresh()
    assert reads.many == []
    hub.refresh(*[narrow] * 1025)
    assert reads.many == [1024, 1]
    hub.refresh(narrow, wide, wide, narrow)
    assert reads.many[2:] == [2, 2]


def test_only_handles_that_keep_something_can_be_refreshed(server: RunningServer, hub: sharednorm.Hub) -> None:
    hub.BatchNorm2D(5, name="bn")
    with sharednorm.connect(server.address, namespace=hub.namespace) as other:
        for layer in (
            hub.layer("bn"),
            hub.layer("bn", compute="client"),
            other.layer("bn", compute="client", max_staleness=1.0),
            sharednorm.BatchNorm2D(5),
            "bn",
        ):
            with pytest.raises(InvalidConfiguration, match="keeps nothing that could be read ahead"):
                hub.refresh(evaluator(hub, "bn"), layer)  # type: ignore[arg-type]


# --- What a handle keeps ----------------------------------------------------------------------------------


def answer(tag: bytes, *, unchanged: bool = False, mean: float = 0.0) -> service_pb2.GetStatsResponse:
    layer = layer_pb2.Layer(ref=ref("x"), config=layer_pb2.LayerConfig(maps=1), initialized=True)
    if unchanged:
        return service_pb2.GetStatsResponse(layer=layer, tag=tag, unchanged=True)
    state = layer_pb2.LayerState(scale=vector([1]), bias=vector([0]), mean=doubles([mean]), var=doubles([1]))
    return service_pb2.GetStatsResponse(layer=layer, tag=tag, state=state)


def test_an_answer_that_a_change_has_overtaken_is_not_kept() -> None:
    copy = StateCache(ref("x"), LONG)
    reading = copy.ask()
    copy.changed()
    assert copy.learn(reading, answer(b"1")).mean == [0.0]
    assert copy.current() is None
    assert copy.ask().request.unless_tag == b""


def test_an_older_answer_does_not_replace_a_newer_one() -> None:
    copy = StateCache(ref("x"), LONG)
    older, newer = copy.ask(), copy.ask()
    copy.learn(newer, answer(b"2", mean=2.0))
    copy.learn(older, answer(b"1", mean=1.0))
    state = copy.current()
    assert state is not None
    assert state.mean == [2.0]


def test_after_a_change_what_was_kept_is_asked_for_again_and_may_be_confirmed() -> None:
    copy = StateCache(ref("x"), LONG)
    copy.learn(copy.ask(), answer(b"1", mean=1.0))
    copy.changed()
    assert copy.current() is None
    reading = copy.ask()
    assert reading.request.unless_tag == b"1"
    assert copy.learn(reading, answer(b"1", unchanged=True)).mean == [1.0]
    assert copy.current() is not None


@pytest.mark.parametrize("tag", [b"", b"1", b"2"])
def test_a_confirmation_of_what_is_not_here(tag: bytes) -> None:
    copy = StateCache(ref("x"), LONG)
    with pytest.raises(MalformedMessage, match="of another tag"):
        copy.learn(copy.ask(), answer(tag, unchanged=True))
    copy.learn(copy.ask(), answer(b"3"))
    with pytest.raises(MalformedMessage, match="of another tag"):
        copy.learn(copy.ask(), answer(tag, unchanged=True))


def test_what_goes_into_one_call() -> None:
    assert list(grouped([], int)) == []
    assert [len(group) for group in grouped([1] * 2049, int)] == [1024, 1024, 1]
    widest = MAX_BATCH_MAPS
    assert list(grouped([widest, 1, widest - 1, 1], int)) == [[widest], [1, widest - 1], [1]]
    with pytest.raises(MalformedMessage, match=r"BatchPushMoments has 1 results \(expected: 2\)"):
        require_results("BatchPushMoments", 1, 2)


# --- By the contract alone --------------------------------------------------------------------------------


@pytest.fixture
def client(server: RunningServer) -> Iterator[StockClient]:
    with channel_to(server.address) as channel:
        made = StockClient.on(channel)
        made.create("stock")
        yield made


def read(client: StockClient, name: str, tag: bytes = b"") -> service_pb2.GetStatsResponse:
    return client.stub.GetStats(service_pb2.GetStatsRequest(ref=ref(name), unless_tag=tag), timeout=SECONDS)


def read_many(client: StockClient, *reads: service_pb2.GetStatsRequest) -> service_pb2.BatchGetStatsResponse:
    return client.stub.BatchGetStats(service_pb2.BatchGetStatsRequest(reads=reads), timeout=SECONDS)


def moments() -> tensor_pb2.Moments:
    return tensor_pb2.Moments(count=[4], mean=[1.0, 2.0, 3.0], m2=[3.0, 6.0, 9.0])


CHANGES: dict[str, Callable[[StockClient], object]] = {
    "step": lambda client: client.forward("stock", np.ones((2, MAPS, 1, 1), np.float32)),
    "moments": lambda client: client.stub.PushMoments(
        service_pb2.PushMomentsRequest(ref=ref("stock"), mode=layer_pb2.MODE_TRAIN, moments=moments())
    ),
    "gradients": lambda client: client.stub.PushGradients(
        service_pb2.PushGradientsRequest(
            ref=ref("stock"), scale_grad=vector([1] * MAPS), bias_grad=vector([1] * MAPS), momentum=1.0
        )
    ),
    "parameters": lambda client: client.stub.UpdateParams(
        service_pb2.UpdateParamsRequest(ref=ref("stock"), learn_rate=0.5)
    ),
    "state": lambda client: client.stub.SetState(
        service_pb2.SetStateRequest(ref=ref("stock"), state=layer_pb2.LayerState(num_of_props=3))
    ),
    "mode": lambda client: client.stub.SetTrain(service_pb2.SetTrainRequest(ref=ref("stock"), train=True)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_gives_another_tag_and_reading_does_not(
    client: StockClient, change: Callable[[StockClient], object]
) -> None:
    first = read(client, "stock")
    assert first.tag
    again = read(client, "stock", first.tag)
    assert (again.tag, again.unchanged, again.HasField("state")) == (first.tag, True, False)
    assert not again.HasField("layer")
    change(client)
    changed = read(client, "stock", first.tag)
    assert changed.tag != first.tag
    assert not changed.unchanged
    assert changed.HasField("state")


def test_a_layer_of_the_same_name_has_another_tag(client: StockClient) -> None:
    client.create("again")
    first = read(client, "again")
    client.stub.DeleteLayer(service_pb2.DeleteLayerRequest(ref=ref("again")), timeout=SECONDS)
    client.create("again")
    assert not read(client, "again", first.tag).unchanged


def test_a_server_that_was_started_anew_matches_nothing() -> None:
    tags: list[bytes] = []
    for _ in range(2):
        with server_process() as process, channel_to(process.address) as channel:
            client = StockClient.on(channel)
            client.create("bn")
            client.forward("bn", np.ones((2, MAPS, 1, 1), np.float32))
            found = read(client, "bn", tags[0] if tags else b"")
            assert found.layer.version == 1
            assert not found.unchanged
            tags.append(found.tag)
    assert tags[0] != tags[1]


def test_a_stock_client_reads_many(client: StockClient) -> None:
    client.create("other", 2, mean=[5.0, 6.0])
    tag = read(client, "stock").tag
    found = read_many(
        client,
        service_pb2.GetStatsRequest(ref=ref("other"), include_gradients=True),
        service_pb2.GetStatsRequest(ref=ref("nobody")),
        service_pb2.GetStatsRequest(ref=ref("")),
        service_pb2.GetStatsRequest(ref=ref("stock"), unless_tag=tag),
        service_pb2.GetStatsRequest(ref=ref("stock")),
    ).results
    assert [result.WhichOneof("result") for result in found] == ["stats", "error", "error", "stats", "stats"]
    assert list(found[0].stats.state.mean.values) == [5.0, 6.0]
    assert list(found[0].stats.state.bias_grad.values) == [0.0, 0.0]
    assert [found[1].error.reason, found[2].error.reason] == ["LAYER_NOT_FOUND", "INVALID_NAME"]
    assert found[3].stats.unchanged
    assert found[4].stats == read(client, "stock")
    assert list(read_many(client).results) == []


def test_more_reads_than_a_call_takes(client: StockClient) -> None:
    one = service_pb2.GetStatsRequest(ref=ref("stock"))
    assert len(read_many(client, *[one] * MAX_BATCH_ENTRIES).results) == MAX_BATCH_ENTRIES
    client.create("wide", MAX_BATCH_MAPS)
    for reads, limit, value in (
        ([one] * (MAX_BATCH_ENTRIES + 1), "max_batch_entries", MAX_BATCH_ENTRIES + 1),
        ([one, service_pb2.GetStatsRequest(ref=ref("wide"))], "max_batch_maps", MAX_BATCH_MAPS + MAPS),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            read_many(client, *reads)
        assert code_of(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
        detail = detail_of(caught.value)
        assert detail.reason == LimitExceeded.reason
        assert (detail.metadata["limit"], detail.metadata["value"]) == (limit, str(value))
        assert limit in detail.message
        assert str(value) in detail.message
