"""What the contract has and this release does not serve is refused when it is set, and then nothing has changed."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from sharednorm.codec.protobuf_wire import field_header
from sharednorm.errors import MalformedMessage, NotSupported
from sharednorm.v1 import direct_pb2, layer_pb2, service_pb2, tensor_pb2
from sharednorm_server.direct import connection as direct
from sharednorm_server.rpc import unserved
from sharednorm_server.server import RunningServer
from tests.support import lane as lanes
from tests.support import oracle
from tests.support.lane import RawLane, connected, lane_to, offer
from tests.support.processes import server
from tests.support.stock import (
    MAPS,
    StockClient,
    channel_to,
    code_of,
    config,
    detail_of,
    raw,
    raw_stream,
    ref,
    spec,
    vector,
)

SHAPE = (4, MAPS, 5, 2)
REF = ref("bn")
MOMENTS = tensor_pb2.Moments(count=[4], mean=[1.0, 2.0, 3.0], m2=[3.0, 6.0, 9.0])
SERVICE = service_pb2.DESCRIPTOR.services_by_name["BatchNormService"]
METHODS = {method.name: method for method in SERVICE.methods if method.name not in unserved.METHODS}

# Good requests, but for what a test adds. Of other methods the empty message will do: they are refused before it is
# looked at.
GOOD: dict[str, Message] = {
    "CreateLayer": service_pb2.CreateLayerRequest(ref=ref("another"), config=config()),
    "Forward": service_pb2.ForwardRequest(ref=REF, input=spec(SHAPE), data=bytes(oracle.random_tensor(1, SHAPE))),
    "ForwardStream": service_pb2.ForwardStreamRequest(header=service_pb2.ForwardRequest(ref=REF, input=spec(SHAPE))),
    "PushMoments": service_pb2.PushMomentsRequest(ref=REF, mode=layer_pb2.MODE_TRAIN, moments=MOMENTS),
    "BatchPushMoments": service_pb2.BatchPushMomentsRequest(
        pushes=[service_pb2.PushMomentsRequest(ref=REF, mode=layer_pb2.MODE_TRAIN, moments=MOMENTS)] * 2
    ),
    "BatchGetStats": service_pb2.BatchGetStatsRequest(reads=[service_pb2.GetStatsRequest(ref=REF)] * 2),
    "MergeStatistics": service_pb2.MergeStatisticsRequest(ref=REF, delta=b"delta", moments=MOMENTS),
    "SetState": service_pb2.SetStateRequest(ref=REF, state=layer_pb2.LayerState(scale=vector([4, 5, 6]))),
    "SetTrain": service_pb2.SetTrainRequest(ref=REF),
    "UpdateParams": service_pb2.UpdateParamsRequest(ref=REF, learn_rate=1.0),
    "DeleteLayer": service_pb2.DeleteLayerRequest(ref=REF),
    "CreateDomain": service_pb2.CreateDomainRequest(ref=layer_pb2.LayerRef(name="bn", domain="d")),
}

# Every other field of a request: a new one is in neither table until a release says what it does with it.
SERVED = {
    "BackwardRequest": "ref grad saved_input saved_forward update_param_grads update_grad scale momentum key data",
    "BackwardStreamRequest": "header offset chunk",
    "BackupRequest": "",
    "BatchGetStatsRequest": "reads",
    "BatchPushMomentsRequest": "pushes",
    "CreateDomainRequest": "ref initial_state",
    "CreateLayerRequest": "ref config initial_state sscale empty",
    "DeleteDomainRequest": "ref",
    "DeleteLayerRequest": "ref",
    "DoubleVector": "values",
    "FieldMask": "paths",
    "FloatVector": "values",
    "ForwardRequest": "ref mode input keep_input release_input key data",
    "ForwardStreamRequest": "header offset chunk",
    "GetLayerRequest": "ref read_mask",
    "GetServerInfoRequest": "protocol",
    "GetStatsRequest": "ref include_gradients unless_tag",
    "GradientSums": "grad product",
    "Hello": "protocol instance purpose session",
    "IdempotencyKey": "session seq",
    "JoinGroupRequest": "namespace group member size min_members timeout rank",
    "LayerConfig": "kind maps epsilon init_factor min_factor affine averaging nonfinite",
    "LayerRef": "namespace name uid domain seen_version strong",
    "LayerState": "scale bias scale_grad bias_grad num_of_props stats_frozen mean var",
    "LeaveGroupRequest": "ticket",
    "ListDomainsRequest": "ref",
    "ListLayersRequest": "namespace page_size page_token",
    "ListSnapshotsRequest": "ref",
    "MergeStatisticsRequest": "ref delta moments",
    "Moments": "count mean m2",
    "OpenSessionRequest": "",
    "PushGradientsRequest": "ref scale_grad bias_grad scale momentum key",
    "PushMomentsRequest": "ref mode moments key want_statistics",
    "RollbackRequest": "ref version key",
    "SavedForward": "input moments scale",
    "SetStateRequest": "ref state key",
    "SetTrainRequest": "ref train key",
    "SynchronizeGradientsRequest": "ref ticket step sums moments update_param_grads scale momentum",
    "SynchronizeMomentsRequest": "ref ticket step moments",
    "TensorSpec": "dtype shape",
    "UpdateParamsRequest": "ref learn_rate key",
}


@pytest.fixture(scope="module")
def running() -> Iterator[RunningServer]:
    with server.in_process() as started:
        yield started


@pytest.fixture(scope="module")
def channel(running: RunningServer) -> Iterator[grpc.Channel]:
    with channel_to(running.address) as opened:
        StockClient.on(opened).create("bn")
        yield opened


@pytest.fixture
def client(channel: grpc.Channel) -> Iterator[StockClient]:
    """Give a client; afterwards everything is as it was."""
    made = StockClient.on(channel)

    def state() -> tuple[Message, ...]:
        return made.stats("bn"), made.stub.ListLayers(service_pb2.ListLayersRequest())

    before = state()
    yield made
    assert state() == before


def refusal(channel: grpc.Channel, method: str, request: bytes) -> service_pb2.ErrorDetail:
    """Make a call by gRPC that is refused as one that is not served."""
    streams = method in METHODS and METHODS[method].client_streaming
    with pytest.raises(grpc.RpcError) as caught:
        list(raw_stream(channel, method, iter([request]))) if streams else raw(channel, method, request)
    assert code_of(caught.value) is grpc.StatusCode.UNIMPLEMENTED
    return detail_of(caught.value)


def direct_refusal(connection: RawLane, method: str, request: bytes) -> service_pb2.ErrorDetail:
    """Make the same call by a direct connection."""
    (number,) = (number for number, name in direct.METHODS.items() if name == method)
    connection.request(number, request, 0)
    reply = connection.reply()
    assert reply.status == lanes.ERROR, method
    return service_pb2.ErrorDetail.FromString(reply.message)


def request_of(method: str) -> Any:
    """Return a request of a method that is good, if it matters."""
    cls: Any = getattr(service_pb2, METHODS[method].input_type.name)
    request = cls()
    if method in GOOD:
        request.CopyFrom(GOOD[method])
    return request


def routes(descriptor: Any, wanted: str, behind: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the ways from a message to a field, as names of the fields that lead there."""
    for field in descriptor.fields:
        if f"{descriptor.name}.{field.name}" == wanted:
            yield (*behind, field.name)
        elif field.message_type is not None and f"{descriptor.name}.{field.name}" not in unserved.FIELDS:
            yield from routes(field.message_type, wanted, (*behind, field.name))


def set_field(message: Any, route: tuple[str, ...]) -> None:
    """Set the field at the end of a route to something."""
    name, *rest = route
    field = message.DESCRIPTOR.fields_by_name[name]
    if rest:
        inner = getattr(message, name)
        if field.is_repeated:
            inner = inner[-1] if inner else inner.add()
        set_field(inner, tuple(rest))
    elif field.message_type is not None:
        getattr(message, name).SetInParent()
    else:
        setattr(message, name, {"string": "x", "bytes": b"x"}.get(_KINDS.get(field.type, ""), 1))


_KINDS = {9: "string", 12: "bytes"}


@pytest.mark.parametrize("path", sorted(path for path in unserved.FIELDS if not path.startswith("Hello.")))
def test_a_field_that_is_set_is_refused_wherever_it_can_be(
    client: StockClient, channel: grpc.Channel, path: str
) -> None:
    asked = 0
    with lane_to(client) as connection:
        for method, described in METHODS.items():
            for route in routes(described.input_type, path):
                request = request_of(method)
                set_field(request, route)
                found = [refusal(channel, method, request.SerializeToString())]
                if not described.client_streaming:
                    if method in {"Forward", "Backward"}:
                        request.ClearField("data")
                    found.append(direct_refusal(connection, method, request.SerializeToString()))
                for detail in found:
                    assert detail.reason == "NOT_SUPPORTED"
                    assert detail.message.startswith(f"{path} is not served by this release (")
                    assert dict(detail.metadata) == {"field": path}
                asked += 1
    assert asked, "nothing leads to that field"


def test_every_field_of_a_request_is_served_or_in_the_table() -> None:
    found: dict[str, set[str]] = {}

    def look(descriptor: Any) -> None:
        if descriptor.name in found:
            return
        names = {field.name for field in descriptor.fields}
        found[descriptor.name] = names - {name for name in names if f"{descriptor.name}.{name}" in unserved.FIELDS}
        for name in found[descriptor.name]:
            if descriptor.fields_by_name[name].message_type is not None:
                look(descriptor.fields_by_name[name].message_type)

    for method in METHODS.values():
        look(method.input_type)
    look(direct_pb2.Hello.DESCRIPTOR)
    assert found == {name: set(fields.split()) for name, fields in SERVED.items()}
    there = {
        f"{message.name}.{field.name}"
        for module in (tensor_pb2, layer_pb2, service_pb2, direct_pb2)
        for message in module.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
    }
    assert unserved.FIELDS.keys() <= there
    assert unserved.METHODS.keys() <= {method.name for method in SERVICE.methods}


@pytest.mark.parametrize("method", sorted(unserved.METHODS))
def test_a_method_that_is_not_served(client: StockClient, channel: grpc.Channel, method: str) -> None:
    with lane_to(client) as connection:
        for detail in (refusal(channel, method, b""), direct_refusal(connection, method, b"")):
            assert detail.reason == "NOT_SUPPORTED"
            assert detail.message == f"{method} is not served by this release ({unserved.METHODS[method]})"


@pytest.mark.parametrize("method", ["Nothing", "", "Forward/", "\xe9"])
def test_a_method_that_is_unknown(client: StockClient, channel: grpc.Channel, method: str) -> None:
    detail = refusal(channel, method, b"whatever")
    assert (detail.reason, "this release knows no method" in detail.message) == ("NOT_SUPPORTED", True)


KEPT_EVALUATION = service_pb2.ForwardRequest(keep_input=True, mode=layer_pb2.MODE_EVAL)
# What is merged into a good request, and what the error is about.
VALUES: list[tuple[str, Message, str]] = [
    (
        "CreateLayer",
        service_pb2.CreateLayerRequest(config=layer_pb2.LayerConfig(averaging=layer_pb2.AVERAGING_POOLED)),
        "LayerConfig.averaging",
    ),
    ("Forward", KEPT_EVALUATION, "ForwardRequest.keep_input"),
    ("ForwardStream", service_pb2.ForwardStreamRequest(header=KEPT_EVALUATION), "ForwardRequest.keep_input"),
    # Behind the good count, 4.
    ("PushMoments", service_pb2.PushMomentsRequest(moments=tensor_pb2.Moments(count=[4.0, 4.0])), "Moments.count"),
    ("MergeStatistics", service_pb2.MergeStatisticsRequest(moments=tensor_pb2.Moments(count=[4, 4])), "Moments.count"),
]


@pytest.mark.parametrize(("method", "values", "path"), VALUES)
def test_a_value_that_is_not_served(
    client: StockClient, channel: grpc.Channel, method: str, values: Message, path: str
) -> None:
    request = request_of(method)
    request.MergeFrom(values)
    found = [refusal(channel, method, request.SerializeToString())]
    if not METHODS[method].client_streaming:
        if method == "Forward":
            request.ClearField("data")
        with lane_to(client) as connection:
            found.append(direct_refusal(connection, method, request.SerializeToString()))
    for detail in found:
        assert (detail.reason, detail.message.startswith(path)) == ("NOT_SUPPORTED", True), detail.message


def test_a_count_that_is_not_whole(client: StockClient, channel: grpc.Channel) -> None:
    request = request_of("PushMoments")
    request.moments.count[0] = 1.5
    detail = refusal(channel, "PushMoments", request.SerializeToString())
    assert (detail.reason, detail.message.startswith("Moments.count: 1.5 ")) == ("NOT_SUPPORTED", True)


def test_a_field_of_a_later_release(client: StockClient, channel: grpc.Channel) -> None:
    later = field_header(1000, 3) + b"new"
    named = layer_pb2.LayerRef.FromString(REF.SerializeToString() + later)
    with lane_to(client) as connection:
        for method, described in METHODS.items():
            request = request_of(method).SerializeToString() + later
            words = f"this release knows no field 1000 of {described.input_type.name} "
            assert refusal(channel, method, request).message.startswith(words)
        push = service_pb2.PushMomentsRequest(ref=named, moments=MOMENTS)
        many = service_pb2.BatchPushMomentsRequest(pushes=[push])
        for method, message in (("PushMoments", push), ("BatchPushMoments", many)):
            for detail in (
                refusal(channel, method, message.SerializeToString()),
                direct_refusal(connection, method, message.SerializeToString()),
            ):
                assert detail.message.startswith("this release knows no field 1000 of LayerRef ")


def test_a_field_of_a_later_release_in_a_chunk(client: StockClient, channel: grpc.Channel) -> None:
    data = oracle.random_tensor(1, SHAPE).tobytes()
    chunk = service_pb2.ForwardStreamRequest(chunk=data).SerializeToString() + field_header(1000, 3) + b"new"
    parts = [request_of("ForwardStream").SerializeToString(), chunk]
    with pytest.raises(grpc.RpcError) as caught:
        list(raw_stream(channel, "ForwardStream", iter(parts)))
    assert detail_of(caught.value).reason == "NOT_SUPPORTED"


def test_encoders_may_write_a_message_as_they_like() -> None:
    push = GOOD["PushMoments"]
    first = service_pb2.PushMomentsRequest(ref=layer_pb2.LayerRef(name="before"), mode=layer_pb2.MODE_EVAL)
    twice = first.SerializeToString() + push.SerializeToString()  # the last counts
    unpacked = field_header(3, 9) + b"\x21" + struct.pack("<d", 4.0)  # Moments.count, a tag for each value
    for data, count in ((twice, [4.0]), (push.SerializeToString() + unpacked, [4.0, 4.0])):
        found = unserved.parse(service_pb2.PushMomentsRequest, data)
        assert (found.ref.name, found.mode, list(found.moments.count)) == ("bn", layer_pb2.MODE_TRAIN, count)
    with pytest.raises(NotSupported, match="no field 2000 of Moments"):
        unserved.parse(service_pb2.PushMomentsRequest, twice + field_header(3, 3) + b"\x80\x7d\x01")
    with pytest.raises(MalformedMessage, match="not a sharednorm"):
        unserved.parse(service_pb2.PushMomentsRequest, b"\xff")


def test_a_hostile_request_is_not_searched_for_long() -> None:
    many = b"\x0a\x00" * 1_000_000  # empty pushes
    began = time.perf_counter()
    with pytest.raises(NotSupported, match="no field 1000 of BatchPushMomentsRequest"):
        unserved.parse(service_pb2.BatchPushMomentsRequest, many + field_header(1000, 0))
    with pytest.raises(NotSupported, match="sets something that this release does not serve"):
        unserved.parse(service_pb2.BatchPushMomentsRequest, b"\x0a\x03" + field_header(1000, 0) + many)
    assert time.perf_counter() - began < 5  # some tenths, of which the parser needs most


# --- Direct connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token": "secret"}, "NOT_SUPPORTED"),
        ({"namespace": "default"}, "NOT_SUPPORTED"),
        ({"protocol": 4}, "INCOMPATIBLE_SERVER"),
        ({"protocol": 0}, "INCOMPATIBLE_SERVER"),
    ],
)
def test_a_hello_that_is_refused_says_why(client: StockClient, fields: dict[str, Any], reason: str) -> None:
    where = offer(client)
    with connected(where.port) as sock:
        sock.sendall(lanes.hello(where.instance, **fields))
        connection = RawLane(sock)
        welcome = connection.welcome()
        assert (welcome.protocol, welcome.status) == (3, direct_pb2.WELCOME_STATUS_REFUSED)
        assert welcome.error.reason == reason
        assert "secret" not in welcome.error.message
        assert connection.ended()


def test_flags_that_there_are_not(client: StockClient) -> None:
    with lane_to(client) as connection:
        connection.request(lanes.FORWARD, b"", 0, flags=4)
        assert connection.reply().reason == "NOT_SUPPORTED"
        assert connection.ended()


def test_data_of_a_method_that_takes_none(client: StockClient) -> None:
    with lane_to(client) as connection:
        for nbytes in (4, 2 << 20):
            connection.request(3, GOOD["PushMoments"].SerializeToString(), nbytes)
            if nbytes < lanes.WAIT_BYTES:
                connection.sock.sendall(bytes(nbytes))
            assert connection.reply().reason == "MALFORMED_MESSAGE"


def ask(connection: RawLane, method: str, request: Message) -> bytes:
    (number,) = (number for number, name in direct.METHODS.items() if name == method)
    connection.request(number, request.SerializeToString(), 0)
    reply = connection.reply()
    assert reply.status == lanes.OK, reply.message
    return reply.message


def test_a_process_needs_nothing_but_a_direct_connection() -> None:
    """Of all that a client does, from the first question to the last."""
    with server.in_process() as running, channel_to(running.address) as channel:
        stock = StockClient.on(channel)
        with lane_to(stock) as connection:
            info = service_pb2.GetServerInfoResponse.FromString(
                ask(connection, "GetServerInfo", service_pb2.GetServerInfoRequest(protocol=3))
            )
            assert info == stock.stub.GetServerInfo(service_pb2.GetServerInfoRequest())
            session = service_pb2.OpenSessionResponse.FromString(
                ask(connection, "OpenSession", service_pb2.OpenSessionRequest())
            ).session
            created = service_pb2.CreateLayerResponse.FromString(ask(connection, "CreateLayer", GOOD["CreateLayer"]))
            push = service_pb2.PushMomentsRequest(ref=created.layer.ref, moments=MOMENTS)
            push.key.session, push.key.seq = session + b"mine 001", 1
            for replayed in (False, True):
                answer = service_pb2.PushMomentsResponse.FromString(ask(connection, "PushMoments", push))
                assert (answer.version, answer.replayed) == (1, replayed)
            listed = ask(connection, "ListLayers", service_pb2.ListLayersRequest())
            assert service_pb2.ListLayersResponse.FromString(listed).layers[0].version == 1
            ask(connection, "DeleteLayer", service_pb2.DeleteLayerRequest(ref=created.layer.ref))
        assert not stock.stub.ListLayers(service_pb2.ListLayersRequest()).layers


def test_members_of_a_group_join_by_direct_connections_however_many_they_are() -> None:
    size = 40  # more than may run a call at a time
    with server.in_process() as running, channel_to(running.address) as channel:
        stock = StockClient.on(channel)

        def join(rank: int) -> int:
            request = service_pb2.JoinGroupRequest(
                group="g", member=str(rank), size=size, min_members=size, timeout=30.0, rank=rank
            )
            with lane_to(stock) as connection:
                joined = service_pb2.JoinGroupResponse.FromString(ask(connection, "JoinGroup", request))
                ask(connection, "LeaveGroup", service_pb2.LeaveGroupRequest(ticket=joined.ticket))
                return joined.rank

        with ThreadPoolExecutor(size) as pool:
            assert list(pool.map(join, range(size))) == list(range(size))


# --- Statistics in the answer of a push -------------------------------------------------------------------


def test_the_answer_of_a_push_has_statistics_if_asked_for() -> None:
    with server.in_process() as running, channel_to(running.address) as channel:
        stock = StockClient.on(channel)
        stock.create("bn")
        request = service_pb2.PushMomentsRequest(ref=REF, moments=MOMENTS)
        plain = stock.stub.PushMoments(request)
        assert not plain.HasField("mean")
        assert plain.statistics_version == 0
        request.want_statistics = True
        request.key.session = stock.stub.OpenSession(service_pb2.OpenSessionRequest()).session + b"mine 001"
        request.key.seq = 1
        told = stock.stub.PushMoments(request)
        state = stock.stats("bn").state
        assert (told.version, told.statistics_version) == (2, 2)
        assert (told.mean, told.var) == (state.mean, state.var)
        stock.stub.PushMoments(service_pb2.PushMomentsRequest(ref=REF, moments=MOMENTS))
        again = stock.stub.PushMoments(request)
        state = stock.stats("bn").state
        assert (again.replayed, again.version, again.statistics_version) == (True, 2, 3)
        assert (again.mean, again.var) == (state.mean, state.var)
