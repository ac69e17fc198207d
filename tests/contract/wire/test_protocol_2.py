"""A client of protocol 2 gets a sentence, or what it would have got before: nothing that it says is ever misread."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

import sharednorm
from sharednorm.codec import wire
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from tests.support import oracle
from tests.support.lane import RawLane, connected, offer
from tests.support.processes import server
from tests.support.protocol2 import SERVICE, message
from tests.support.stock import MAPS, StockClient, channel_to, code_of, detail_of, raw, raw_stream

SHAPE = (4, MAPS, 5, 2)
X = oracle.random_tensor(1, SHAPE).tobytes()

REF = message("LayerRef")(name="bn")
SPEC = message("TensorSpec")(dtype=1, shape=SHAPE)
MOMENTS = message("Moments")(count=4, mean=[1.0] * MAPS, m2=[3.0] * MAPS)
VECTOR = message("FloatVector")(values=[1.0] * MAPS)
CONFIG = message("LayerConfig")(kind=3, maps=MAPS, epsilon=1e-5, init_factor=1.0, min_factor=0.1, affine=True)
SAVED = message("SavedForward")(input=SPEC, moments=MOMENTS, scale=VECTOR)
PUSH = message("PushMomentsRequest")(ref=REF, mode=1, moments=MOMENTS)
FORWARD = message("ForwardRequest")(ref=REF, mode=1, input=SPEC)


def state(**vectors: Any) -> Any:
    return message("LayerState")(**vectors)


# What a client of protocol 3 would say differently, and what of it is in the way.
REFUSED: list[tuple[str, Message, str]] = [
    ("PushMany", message("PushManyRequest")(pushes=[PUSH]), "PushMany was of protocol 2, BatchPushMoments is its new"),
    (
        "GetManyStats",
        message("GetManyStatsRequest")(reads=[message("GetStatsRequest")(ref=REF)]),
        "GetManyStats was of protocol 2, BatchGetStats is its new name",
    ),
    ("PushMoments", PUSH, "field 1 of Moments was of protocol 2"),
    ("MergeStatistics", message("MergeStatisticsRequest")(ref=REF, delta=b"d", moments=MOMENTS), "field 1 of Moments"),
    (
        "SynchronizeMoments",
        message("SynchronizeMomentsRequest")(ref=REF, ticket=b"t", step=1, moments=MOMENTS),
        "field 1 of Moments",
    ),
    (
        "SynchronizeGradients",
        message("SynchronizeGradientsRequest")(ref=REF, ticket=b"t", step=1, moments=MOMENTS),
        "field 1 of Moments",
    ),
    (
        "Backward",
        message("BackwardRequest")(ref=REF, grad=SPEC, saved_forward=SAVED, data=X + X),
        "field 1 of Moments",
    ),
    (
        "BackwardStream",
        message("BackwardStreamRequest")(header={"ref": REF, "saved_forward": SAVED}),
        "field 1 of Moments",
    ),
    ("SetState", message("SetStateRequest")(ref=REF, state=state(mean=VECTOR)), "field 3 of LayerState"),
    ("SetState", message("SetStateRequest")(ref=REF, state=state(scale=VECTOR, var=VECTOR)), "field 4 of LayerState"),
    (
        "CreateLayer",
        message("CreateLayerRequest")(ref={"name": "new"}, config=CONFIG, initial_state=state(var=VECTOR)),
        "field 4 of LayerState",
    ),
    (
        "CreateDomain",
        message("CreateDomainRequest")(ref={"name": "bn", "domain": "new"}, initial_state=state(mean=VECTOR)),
        "field 3 of LayerState",
    ),
    ("Forward", message("ForwardRequest")(ref=REF, mode=1, input=SPEC, data=X), "field 1 of ForwardRequest"),
    ("ForwardStream", message("ForwardStreamRequest")(header=FORWARD), "field 1 of ForwardRequest"),
    ("GetStats", message("GetStatsRequest")(ref=REF), "field 1 of GetStatsRequest"),
]

# What has stayed as it was, in requests and in answers.
SERVED: list[tuple[str, Message]] = [
    ("OpenSession", message("OpenSessionRequest")()),
    ("CreateLayer", message("CreateLayerRequest")(ref=REF, config=CONFIG, initial_state=state(scale=VECTOR))),
    ("GetLayer", message("GetLayerRequest")(ref=REF)),
    ("ListLayers", message("ListLayersRequest")()),
    ("SetState", message("SetStateRequest")(ref=REF, state=state(scale=VECTOR))),
    ("PushGradients", message("PushGradientsRequest")(ref=REF, scale_grad=VECTOR, bias_grad=VECTOR)),
    ("SetTrain", message("SetTrainRequest")(ref=REF, train=True)),
    ("UpdateParams", message("UpdateParamsRequest")(ref=REF, learn_rate=0.0)),
    ("ListSnapshots", message("ListSnapshotsRequest")(ref=REF)),
]


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with server.in_process() as running, channel_to(running.address) as opened:
        StockClient.on(opened).create("bn")
        yield opened


def test_a_client_that_asks_first_says_its_own_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with server.server_process() as process, channel_to(process.address) as channel:
        answer = raw(channel, "GetServerInfo", message("GetServerInfoRequest")().SerializeToString())
        assert message("GetServerInfoResponse").FromString(answer).protocol == 3
        monkeypatch.setattr(wire, "PROTOCOL", 2)
        with pytest.raises(sharednorm.IncompatibleServer, match=r"speaks protocol 3, and this library .* 2: "):
            sharednorm.connect(process.address)


@pytest.mark.parametrize(("method", "request_", "words"), REFUSED)
def test_one_that_does_not_ask_is_told_so(channel: grpc.Channel, method: str, request_: Message, words: str) -> None:
    client = StockClient.on(channel)
    before = client.stats("bn"), client.stub.ListLayers(service_pb2.ListLayersRequest())
    data, streams = request_.SerializeToString(), method.endswith("Stream")
    with pytest.raises(grpc.RpcError) as caught:
        list(raw_stream(channel, method, iter([data]))) if streams else raw(channel, method, data)
    detail = detail_of(caught.value)
    assert code_of(caught.value) is grpc.StatusCode.UNIMPLEMENTED
    assert detail.reason == "INCOMPATIBLE_SERVER"
    assert detail.message.startswith(words)
    assert "this server speaks protocol 3: install the same release on both sides" in detail.message
    assert (client.stats("bn"), client.stub.ListLayers(service_pb2.ListLayersRequest())) == before


@pytest.mark.parametrize(("method", "request_"), SERVED)
def test_what_is_the_same_in_both_is_done(channel: grpc.Channel, method: str, request_: Message) -> None:
    answer = message(SERVICE.methods_by_name[method].output_type.name)
    assert answer.FromString(raw(channel, method, request_.SerializeToString()))


def test_what_has_another_type_now_is_read_as_absent() -> None:
    wide = tensor_pb2.DoubleVector(values=[1.0] * MAPS)
    found = message("LayerState").FromString(layer_pb2.LayerState(mean=wide, var=wide).SerializeToString())
    assert not found.HasField("mean")
    assert not found.HasField("var")
    moments = tensor_pb2.Moments(count=[4], mean=[1.0], m2=[2.0])
    assert message("Moments").FromString(moments.SerializeToString()).count == 0
    assert not tensor_pb2.Moments.FromString(MOMENTS.SerializeToString()).count


def test_a_direct_connection_that_begins_as_before(channel: grpc.Channel) -> None:
    where = offer(StockClient.on(channel))
    with connected(where.port) as sock:
        sock.sendall(struct.pack("<16s16s16sHHI", b"sharednorm lane1", where.instance, bytes(16), 0, 0, 0))
        connection = RawLane(sock)
        magic, _, status, _, size = struct.unpack("<16s16sHHI", connection.read(40))
        assert (magic, status) == (b"sharednorm lane1", 1)  # which meant in a reply that an ErrorDetail follows
        detail = service_pb2.ErrorDetail.FromString(connection.read(size))
        assert detail.reason == "INCOMPATIBLE_SERVER"
        assert "begins as protocol 2 does, and this server speaks protocol 3" in detail.message
        assert connection.ended()
