"""Many steps in one call, by the contract alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from sharednorm.core.limits import MAX_BATCH_ENTRIES, MAX_BATCH_MAPS
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm_server.server import RunningServer
from tests.support.processes.server import in_process
from tests.support.stock import MAPS, SECONDS, StockClient, channel_to, code_of, detail_of, ref


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with in_process() as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[StockClient]:
    with channel_to(server.address) as channel:
        made = StockClient.on(channel)
        for name in ("one", "two"):
            made.create(name)
        yield made
        for name in ("one", "two"):
            made.stub.DeleteLayer(service_pb2.DeleteLayerRequest(ref=ref(name)), timeout=SECONDS)


def push(name: str, mode: layer_pb2.Mode.ValueType = layer_pb2.MODE_TRAIN, **changes: Any) -> Any:
    moments = tensor_pb2.Moments(**{"count": [4], "mean": [1.0, 2.0, 3.0], "m2": [3.0, 6.0, 9.0], **changes})
    return service_pb2.PushMomentsRequest(ref=ref(name), mode=mode, moments=moments)


def push_many(client: StockClient, *pushes: service_pb2.PushMomentsRequest) -> list[service_pb2.BatchPushMomentsResult]:
    request = service_pb2.BatchPushMomentsRequest(pushes=pushes)
    return list(client.stub.BatchPushMoments(request, timeout=SECONDS).results)


def test_a_stock_client_pushes_many(client: StockClient) -> None:
    found = push_many(client, push("one"), push("two", mean=[5.0, 6.0, 7.0]), push("one", mean=[3.0, 4.0, 5.0]))
    assert [result.moments.version for result in found] == [1, 1, 2]
    assert [list(result.moments.scale.values) for result in found] == [[1.0] * MAPS] * 3
    assert list(client.stats("two").state.mean.values) == [5.0, 6.0, 7.0]
    assert list(client.stats("one").state.mean.values) == [2.0, 3.0, 4.0]  # the second weighs a half
    assert push_many(client) == []


def test_a_push_that_is_refused_takes_the_later_ones_of_its_layer_with_it(client: StockClient) -> None:
    found = push_many(
        client,
        push("one"),
        push("one", m2=[1.0, 2.0, float("nan")]),
        push("two"),
        push("one"),
        push("nobody"),
        push("two", mean=[1.0]),
        push(""),
        push("two", layer_pb2.MODE_EVAL),
    )
    assert [result.error.reason for result in found] == [
        "", "NON_FINITE_INPUT", "", "CANCELLED", "LAYER_NOT_FOUND", "MALFORMED_MESSAGE", "INVALID_NAME", "CANCELLED",
    ]  # fmt: skip
    assert [client.stats(name).layer.version for name in ("one", "two")] == [1, 1]


def test_a_push_that_is_refused_takes_none_of_another_domain_with_it(client: StockClient) -> None:
    found = [push("one") for _ in range(4)]
    for each, domain in zip(found, ("lost", "", "there", "lost"), strict=True):
        each.ref.domain = domain
    client.stub.CreateDomain(service_pb2.CreateDomainRequest(ref=found[2].ref), timeout=SECONDS)
    results = push_many(client, *found)
    assert [result.error.reason for result in results] == ["LAYER_NOT_FOUND", "", "", "CANCELLED"]
    assert client.stats("one").layer.num_of_props == 1
    assert client.stats("one").layer.version == 2


def test_a_push_that_follows_the_layers_default(client: StockClient) -> None:
    client.stub.SetTrain(service_pb2.SetTrainRequest(ref=ref("one"), train=False), timeout=SECONDS)
    (result,) = push_many(client, push("one", layer_pb2.MODE_UNSPECIFIED))
    assert result.moments.mode == layer_pb2.MODE_EVAL
    assert list(result.moments.var.values) == [1.0] * MAPS
    assert client.stats("one").layer.version == 0


def test_more_pushes_than_a_call_takes(client: StockClient) -> None:
    wide = service_pb2.PushMomentsRequest(ref=ref("one"), moments=tensor_pb2.Moments(mean=[0.0] * MAX_BATCH_MAPS))
    for pushes, limit, value in (
        ([push("one")] * (MAX_BATCH_ENTRIES + 1), "max_batch_entries", MAX_BATCH_ENTRIES + 1),
        ([push("one"), wide], "max_batch_maps", MAX_BATCH_MAPS + MAPS),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            push_many(client, *pushes)
        assert code_of(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
        detail = detail_of(caught.value)
        assert detail.reason == "LIMIT_EXCEEDED"
        assert (detail.metadata["limit"], detail.metadata["value"]) == (limit, str(value))
    assert client.stats("one").layer.version == 0
    assert push_many(client, *[push("one")] * MAX_BATCH_ENTRIES)[-1].moments.version == MAX_BATCH_ENTRIES
