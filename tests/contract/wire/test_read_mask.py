"""GetLayer answers what its mask names, for a client that knows the contract alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import grpc
import pytest

from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from tests.support.processes import server
from tests.support.stock import (
    MAPS,
    SECONDS,
    StockClient,
    channel_to,
    code_of,
    config,
    detail_of,
    doubles,
    ref,
    vector,
)

MOMENTS = tensor_pb2.Moments(count=[4], mean=[1.0, 2.0, 3.0], m2=[3.0, 6.0, 9.0])
LAYER = [field.name for field in layer_pb2.Layer.DESCRIPTOR.fields]
STATE = [field.name for field in layer_pb2.LayerState.DESCRIPTOR.fields]


@pytest.fixture(scope="module")
def client() -> Iterator[StockClient]:
    with server.in_process() as running, channel_to(running.address) as opened:
        made = StockClient.on(opened)
        made.create("bn", scale=[1, 2, 3], bias=[4, 5, 6], scale_grad=[7, 8, 9], bias_grad=[10, 11, 12])
        made.stub.SetTrain(service_pb2.SetTrainRequest(ref=ref("bn"), train=False))
        made.stub.CreateDomain(service_pb2.CreateDomainRequest(ref=layer_pb2.LayerRef(name="bn", domain="d")))
        for _ in range(2):
            made.stub.PushMoments(
                service_pb2.PushMomentsRequest(ref=ref("bn"), mode=layer_pb2.MODE_TRAIN, moments=MOMENTS)
            )
        yield made


def get(client: StockClient, *paths: str, name: str = "bn", **fields: Any) -> service_pb2.GetLayerResponse:
    request = service_pb2.GetLayerRequest(ref=layer_pb2.LayerRef(name=name, **fields))
    request.read_mask.paths.extend(paths)
    return client.stub.GetLayer(request, timeout=SECONDS)


def masked(whole: service_pb2.GetLayerResponse, *paths: str) -> service_pb2.GetLayerResponse:
    """Return what a mask leaves of an answer, as protobuf's own library has it."""
    request = service_pb2.GetLayerRequest()
    request.read_mask.paths.extend(paths)
    answer = service_pb2.GetLayerResponse()
    request.read_mask.MergeMessage(whole, answer)
    for path in paths:
        getattr(answer, path.partition(".")[0]).SetInParent()
    return answer


@pytest.fixture(scope="module")
def whole(client: StockClient) -> service_pb2.GetLayerResponse:
    stats = client.stats("bn")
    return service_pb2.GetLayerResponse(layer=stats.layer, state=stats.state)


def test_without_paths_it_describes_the_layer(client: StockClient, whole: service_pb2.GetLayerResponse) -> None:
    plain = client.stub.GetLayer(service_pb2.GetLayerRequest(ref=ref("bn")), timeout=SECONDS)
    assert plain == service_pb2.GetLayerResponse(layer=whole.layer)
    assert not plain.HasField("state")
    empty = service_pb2.GetLayerRequest(ref=ref("bn"))
    empty.read_mask.SetInParent()
    assert client.stub.GetLayer(empty, timeout=SECONDS) == plain
    assert get(client, "layer") == plain


@pytest.mark.parametrize("path", [*(f"layer.{name}" for name in LAYER), *(f"state.{name}" for name in STATE), "state"])
def test_a_path_is_what_is_answered(client: StockClient, whole: service_pb2.GetLayerResponse, path: str) -> None:
    answer = get(client, path)
    assert answer == masked(whole, path)
    assert (answer.HasField("layer"), answer.HasField("state")) == (path[:5] == "layer", path[:5] == "state")


def test_paths_add_up(client: StockClient, whole: service_pb2.GetLayerResponse) -> None:
    for paths in combinations(["layer.version", "layer.ref", "state.mean", "state.scale_grad", "layer", "state"], 2):
        assert get(client, *paths) == masked(whole, *paths)
        assert get(client, *reversed(paths), *paths) == masked(whole, *paths)
    assert get(client, "layer", "state") == whole


def test_statistics_are_those_of_the_domain(client: StockClient) -> None:
    answer = get(client, "state.mean", "state.bias", "layer.num_of_props", "layer.version", domain="d")
    assert answer.state == layer_pb2.LayerState(mean=doubles([0] * MAPS), bias=vector([4, 5, 6]))
    assert answer.layer == layer_pb2.Layer(version=2)


def test_a_layer_that_was_created_empty(client: StockClient) -> None:
    client.stub.CreateLayer(service_pb2.CreateLayerRequest(ref=ref("empty"), config=config(), empty=True))
    answer = get(client, "layer.initialized", "layer.config", "state.var", name="empty")
    assert answer.layer == layer_pb2.Layer(config=config(averaging=1, nonfinite=1))
    assert answer.state == layer_pb2.LayerState(var=doubles([1] * MAPS))


@pytest.mark.parametrize(
    "path",
    ["", "*", ".", "version", "layer.", "layer.nothing", "state.mean.values", "states", "layer.ref.name", "é" * 1000],
)
def test_other_paths_are_refused(client: StockClient, path: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        get(client, "layer.version", path)
    assert code_of(caught.value) is grpc.StatusCode.INVALID_ARGUMENT
    detail = detail_of(caught.value)
    assert detail.reason == "INVALID_CONFIGURATION"
    assert detail.message.startswith(f"read_mask has the path {ascii(path)[:80]} (expected: ")


def test_a_server_that_has_lost_steps_reads_nothing(client: StockClient) -> None:
    assert get(client, "layer.version", seen_version=2).layer.version == 2
    with pytest.raises(grpc.RpcError) as caught:
        get(client, "layer.version", seen_version=3)
    assert detail_of(caught.value).reason == "DATA_LOSS"
