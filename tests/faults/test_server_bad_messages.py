"""Bytes that no honest client sends: each gets a typed error, changes nothing, and leaves a server that serves."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Iterator

import grpc
import numpy as np
import pytest

from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.rpc import unserved
from tests.support import oracle
from tests.support.processes import server
from tests.support.stock import (
    MAPS,
    SECONDS,
    StockClient,
    channel_to,
    code_of,
    config,
    detail_of,
    raw,
    raw_stream,
    ref,
    spec,
)

SHAPE = (4, MAPS, 5, 2)
NAME = "bn"
NBYTES = 4 * 4 * MAPS * 5 * 2
LIMIT = 64 << 20

UNARY = [
    method.name
    for method in service_pb2.DESCRIPTOR.services_by_name["BatchNormService"].methods
    if not method.client_streaming and method.name not in unserved.METHODS
]
STREAMS = ["ForwardStream", "BackwardStream"]

Part = bytes | service_pb2.ForwardStreamRequest | service_pb2.BackwardStreamRequest


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    with (
        server.in_process(ServerConfig(max_tensor_bytes=LIMIT)) as running,
        channel_to(running.address) as opened,
    ):
        StockClient.on(opened).create(NAME)
        yield opened


@pytest.fixture
def client(channel: grpc.Channel) -> Iterator[StockClient]:
    """Give a client, and check that the layer is afterwards what it was before."""
    made = StockClient.on(channel)
    before = made.stats(NAME)
    yield made
    assert made.stats(NAME) == before


def refused(call: grpc.RpcError, code: grpc.StatusCode, reason: str) -> service_pb2.ErrorDetail:
    detail = detail_of(call)
    assert (code_of(call), detail.reason) == (code, reason), detail.message
    assert "Traceback" not in detail.message
    assert len(detail.message.encode()) <= 4096
    return detail


def send_parts(channel: grpc.Channel, method: str, parts: Iterable[Part]) -> list[bytes]:
    return list(
        raw_stream(channel, method, (part if isinstance(part, bytes) else part.SerializeToString() for part in parts))
    )


def bytes_field(data: bytes) -> bytes:
    """Return field 15 with some data: tag, length as a varint of two bytes, bytes."""
    assert len(data) < 1 << 14
    return b"\x7a" + bytes([0x80 | (len(data) & 0x7F), len(data) >> 7]) + data


def forward(**changes: object) -> service_pb2.ForwardRequest:
    fields = {"ref": ref(NAME), "mode": layer_pb2.MODE_TRAIN, "input": spec(SHAPE), **changes}
    return service_pb2.ForwardRequest(**fields)  # type: ignore[arg-type]


def header(**changes: object) -> service_pb2.ForwardStreamRequest:
    return service_pb2.ForwardStreamRequest(header=forward(**changes))


def chunk(offset: int, size: int) -> service_pb2.ForwardStreamRequest:
    return service_pb2.ForwardStreamRequest(offset=offset, chunk=bytes(size))


# --- random bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", UNARY)
@pytest.mark.parametrize("request_bytes", [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x00" * 9, b"\x0a\x02\x12"])
def test_bytes_that_are_no_message(
    client: StockClient, channel: grpc.Channel, method: str, request_bytes: bytes
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, method, request_bytes)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


@pytest.mark.parametrize("method", UNARY + STREAMS)
def test_random_bytes_never_break_the_server(client: StockClient, channel: grpc.Channel, method: str) -> None:
    source = random.Random(method)
    known = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED}
    if method == "Backup":
        known.add(grpc.StatusCode.FAILED_PRECONDITION)  # to a good message: of memory there is none
    for _ in range(200):
        noise = source.randbytes(source.choice([0, 1, 3, 17, 200, 5000]))
        try:
            if method in STREAMS:
                send_parts(channel, method, [noise, source.randbytes(9)])
            else:
                raw(channel, method, noise)
        except grpc.RpcError as error:
            assert code_of(error) in known  # noqa: PT017
            assert detail_of(error).reason  # noqa: PT017


@pytest.mark.parametrize("method", ["Forward", "ForwardStream"])
def test_damaged_messages_never_break_the_server(channel: grpc.Channel, method: str) -> None:
    """Each is a good message with a byte changed, cut off, or put in; most are refused, some are still good."""
    StockClient.on(channel).create("damaged")
    source = random.Random(7)
    good = forward(ref=ref("damaged")).SerializeToString()
    data = oracle.random_tensor(3, SHAPE).tobytes()
    if method == "Forward":
        good += bytes_field(data)
    else:
        good = b"\x0a" + bytes([len(good)]) + good
    for _ in range(300):
        place = source.randrange(min(len(good), 60))
        damaged = source.choice(
            [
                good[:place] + source.randbytes(1) + good[place + 1 :],
                good[:place],
                good[:place] + source.randbytes(2) + good[place:],
            ]
        )
        try:
            if method == "Forward":
                raw(channel, method, damaged)
            else:
                send_parts(channel, method, [damaged, service_pb2.ForwardStreamRequest(chunk=data)])
        except grpc.RpcError as error:
            assert code_of(error) in _REFUSALS, detail_of(error)  # noqa: PT017


_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


# --- a header and its payload ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, NBYTES - 1, NBYTES + 1, 2 * NBYTES])
def test_a_payload_of_another_size_than_declared(client: StockClient, size: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(forward(data=bytes(size)), timeout=SECONDS)
    detail = refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
    assert str(size) in detail.message
    assert str(NBYTES) in detail.message


SHAPES = {
    "negative": ((4, MAPS, -5, 2), "INVALID_SHAPE"),
    "two negatives": ((-4, MAPS, -5, 2), "INVALID_SHAPE"),
    "zero": ((0, MAPS, 5, 2), "INVALID_SHAPE"),
    "the smallest number": ((-(1 << 63), MAPS, 1, 1), "INVALID_SHAPE"),
    "huge": ((1 << 40, MAPS, 5, 2), "LIMIT_EXCEEDED"),
    "product of 2**64": ((1 << 31, 1 << 31, 1, 4), "LIMIT_EXCEEDED"),
    "product overflows to the right size": ((1 << 32, 1 << 32, 1 << 32, 1 << 32), "LIMIT_EXCEEDED"),
    "no axes": ((), "INVALID_SHAPE"),
    "many axes": ((1,) * 1000, "INVALID_SHAPE"),
    "rank": ((4, MAPS, 10), "INVALID_SHAPE"),
    "maps": ((4, MAPS + 1, 5, 2), "INVALID_SHAPE"),
    "one value a map": ((1, MAPS, 1, 1), "TOO_FEW_VALUES"),
}
CODES = {"LIMIT_EXCEEDED": grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("method", ["Forward", "ForwardStream", "Backward", "BackwardStream"])
def test_impossible_shapes(client: StockClient, channel: grpc.Channel, method: str, case: str) -> None:
    shape, reason = SHAPES[case]
    data = bytes(4 * int(np.prod(shape))) if reason == "TOO_FEW_VALUES" or case in {"rank", "maps"} else b"1234"
    backward = service_pb2.BackwardRequest(ref=ref(NAME), grad=spec(shape), saved_input="x")
    attempts: dict[str, Callable[[], object]] = {
        "Forward": lambda: client.stub.Forward(forward(input=spec(shape), data=data), timeout=SECONDS),
        "ForwardStream": lambda: send_parts(channel, method, [header(input=spec(shape))]),
        "Backward": lambda: raw(channel, method, backward.SerializeToString() + bytes_field(data)),
        "BackwardStream": lambda: send_parts(channel, method, [service_pb2.BackwardStreamRequest(header=backward)]),
    }
    with pytest.raises(grpc.RpcError) as caught:
        attempts[method]()
    refused(caught.value, CODES.get(reason, grpc.StatusCode.INVALID_ARGUMENT), reason)


@pytest.mark.parametrize("dtype", [0, 4, 77, -1])
def test_unknown_element_types(client: StockClient, dtype: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(forward(input=spec(SHAPE, dtype), data=bytes(NBYTES)), timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_DTYPE")


def test_an_absent_tensor(client: StockClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(service_pb2.ForwardRequest(ref=ref(NAME)), timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_DTYPE")


def test_an_unknown_mode(client: StockClient, channel: grpc.Channel) -> None:
    request = forward(data=bytes(NBYTES)).SerializeToString() + b"\x10\x63"  # mode = 99
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "Forward", request)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONFIGURATION")


def test_a_tensor_that_is_too_large_for_one_message(client: StockClient) -> None:
    shape = (1, MAPS, 400, 400)
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(forward(input=spec(shape), data=bytes(4 * MAPS * 400 * 400)), timeout=SECONDS)
    detail = refused(caught.value, grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")
    assert dict(detail.metadata) == {"limit": "max_unary_bytes", "value": str(1 << 20)}


def test_the_largest_tensor_of_one_message_is_accepted(channel: grpc.Channel) -> None:
    client = StockClient.on(channel)
    client.create("large", maps=1)
    x = oracle.random_tensor(1, (1, 1, 512, 512))
    assert x.nbytes == 1 << 20
    assert client.forward("large", x).version == 1


def test_a_message_beyond_grpcs_limit(client: StockClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(forward(data=bytes(8 << 20)), timeout=SECONDS)
    assert code_of(caught.value) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_tensor_beyond_the_servers_limit(client: StockClient, channel: grpc.Channel) -> None:
    shape = (LIMIT // 4 // MAPS + 1, MAPS, 1, 1)
    with pytest.raises(grpc.RpcError) as caught:
        send_parts(channel, "ForwardStream", [header(input=spec(shape))])
    detail = refused(caught.value, grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_EXCEEDED")
    assert dict(detail.metadata) == {"limit": "max_tensor_bytes", "value": str(LIMIT)}


def test_a_compressed_message_is_refused(client: StockClient) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Forward(forward(data=bytes(NBYTES)), timeout=SECONDS, compression=grpc.Compression.Gzip)
    assert code_of(caught.value) is grpc.StatusCode.UNIMPLEMENTED


# --- streams --------------------------------------------------------------------------------------------

BROKEN_STREAMS: dict[str, list[Part]] = {
    "nothing": [],
    "an empty message": [b""],
    "chunks without a header": [chunk(0, NBYTES)],
    "a header alone": [header()],
    "ends early": [header(), chunk(0, NBYTES - 4)],
    "too much": [header(), chunk(0, NBYTES + 1)],
    "more behind the end": [header(), chunk(0, NBYTES), chunk(NBYTES, 1)],
    "a gap": [header(), chunk(0, 100), chunk(101, NBYTES - 101)],
    "an overlap": [header(), chunk(0, 100), chunk(99, NBYTES - 99)],
    "a repeat": [header(), chunk(0, 100), chunk(0, 100)],
    "from behind": [header(), chunk(100, NBYTES - 100), chunk(0, 100)],
    "an offset beyond all bounds": [header(), chunk((1 << 64) - 1, 4)],
    "an empty chunk": [header(), chunk(0, 100), service_pb2.ForwardStreamRequest(offset=100)],
    "two headers": [header(), header()],
    "a header between chunks": [header(), chunk(0, 100), header(), chunk(100, NBYTES - 100)],
    "a header beside the second chunk": [
        header(),
        chunk(0, 100),
        service_pb2.ForwardStreamRequest(header=forward(), offset=100, chunk=bytes(NBYTES - 100)),
    ],
    "a header with data": [header(data=bytes(NBYTES))],
    "a header with a chunk": [
        service_pb2.ForwardStreamRequest(header=forward(), chunk=bytes(4)),
        chunk(4, NBYTES - 4),
    ],
    "a header with an offset": [service_pb2.ForwardStreamRequest(header=forward(), offset=4), chunk(0, NBYTES)],
    "noise for a chunk": [header(), chunk(0, 100), b"\xff\xff"],
    "noise for a header": [b"\xff\xff"],
}


@pytest.mark.parametrize("case", BROKEN_STREAMS)
def test_broken_streams(client: StockClient, channel: grpc.Channel, case: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        send_parts(channel, "ForwardStream", BROKEN_STREAMS[case])
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


def test_a_bad_header_is_refused_before_any_chunk_is_asked_for(client: StockClient, channel: grpc.Channel) -> None:
    """The client sends no chunk until it has the answer, so that a server that waited for one would hang."""

    def messages() -> Iterator[bytes]:
        yield header(input=spec((4, MAPS + 1, 5, 2))).SerializeToString()
        done.wait(SECONDS)

    done = threading.Event()
    call = raw_stream(channel, "ForwardStream", messages())
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    done.set()
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_SHAPE")


# --- names ----------------------------------------------------------------------------------------------

BAD_NAMES = {
    "empty": "",
    "blank": " \u3000 ",
    "10 kB": "a" * 10_000,
    "513 bytes": "é" * 256 + "a",
    "a zero": "a\0b",
    "a line break": "a\nb",
    "an escape": "\x1b[31m",
    "delete": "a\x7f",
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_bad_names(client: StockClient, case: str) -> None:
    for attempt in (
        lambda: client.create(BAD_NAMES[case]),
        lambda: client.stats(BAD_NAMES[case]),
        lambda: client.forward(BAD_NAMES[case], oracle.random_tensor(1, SHAPE)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            attempt()
        refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NAME")


@pytest.mark.parametrize("namespace", ["a" * 129, "a\tb", "\0"])
def test_bad_namespaces(client: StockClient, namespace: str) -> None:
    for attempt in (
        lambda: client.stub.GetLayer(service_pb2.GetLayerRequest(ref=ref(NAME, namespace)), timeout=SECONDS),
        lambda: client.stub.ListLayers(service_pb2.ListLayersRequest(namespace=namespace), timeout=SECONDS),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            attempt()
        refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_NAME")


def test_a_name_that_is_not_utf8(client: StockClient, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "GetLayer", b"\x0a\x04\x12\x02\xff\xfe")
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


GOOD_NAMES = ["a", "a/b/c", "стем/bn", "層.1", "😀", "a b", "..", "é" * 256, "%2F?#&", "'\"\\", "\u200b\u202e!"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_good_names(client: StockClient, name: str) -> None:
    assert client.create(name).layer.ref.name == name
    assert client.forward(name, oracle.random_tensor(1, SHAPE)).version == 1
    client.stub.DeleteLayer(service_pb2.DeleteLayerRequest(ref=ref(name)), timeout=SECONDS)


def test_an_error_about_a_long_name_reaches_the_client(client: StockClient) -> None:
    """Trailing metadata is limited; what an error says about a name of three bytes a letter must fit."""
    with pytest.raises(grpc.RpcError) as caught:
        client.stats("層" * 170)
    refused(caught.value, grpc.StatusCode.NOT_FOUND, "LAYER_NOT_FOUND")


# --- the other messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["x", "garbage" * 100, "é", "AAAA"])
def test_garbage_page_tokens(client: StockClient, token: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.ListLayers(service_pb2.ListLayersRequest(page_token=token), timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PAGE_TOKEN")


@pytest.mark.parametrize("size", [1001, (1 << 32) - 1])
def test_page_sizes_out_of_range(client: StockClient, size: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.ListLayers(service_pb2.ListLayersRequest(page_size=size), timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONFIGURATION")


BAD_CONFIGS = [
    {"kind": 0},
    {"kind": 9},
    {"maps": 0},
    {"maps": (1 << 32) - 1},
    {"epsilon": 0.0},
    {"epsilon": float("nan")},
    {"init_factor": -1.0},
    {"min_factor": 2.0},
    {"averaging": 7},
    {"nonfinite": 7},
]


@pytest.mark.parametrize("changes", BAD_CONFIGS, ids=str)
def test_bad_configurations(client: StockClient, changes: dict[str, float]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.CreateLayer(
            service_pb2.CreateLayerRequest(ref=ref("new"), config=config(**{"maps": MAPS, **changes})),  # type: ignore[arg-type]
            timeout=SECONDS,
        )
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONFIGURATION")


BAD_STATES = {
    "too short": (layer_pb2.LayerState(mean=tensor_pb2.DoubleVector(values=[1, 2])), "INVALID_SHAPE"),
    "empty vector": (layer_pb2.LayerState(mean=tensor_pb2.DoubleVector()), "INVALID_SHAPE"),
    "negative variance": (
        layer_pb2.LayerState(var=tensor_pb2.DoubleVector(values=[1, -1, 1])),
        "INVALID_CONFIGURATION",
    ),
    "a step beyond counting": (layer_pb2.LayerState(num_of_props=(1 << 64) - 1), "INVALID_CONFIGURATION"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_bad_states(client: StockClient, case: str) -> None:
    state, reason = BAD_STATES[case]
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.SetState(service_pb2.SetStateRequest(ref=ref(NAME), state=state), timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, reason)


def saved_forward(**changes: object) -> service_pb2.SavedForward:
    moments = tensor_pb2.Moments(count=[40], mean=[0.0] * MAPS, m2=[1.0] * MAPS)
    fields = {
        "input": spec(SHAPE),
        "moments": moments,
        "scale": tensor_pb2.FloatVector(values=[1.0] * MAPS),
        **changes,
    }
    return service_pb2.SavedForward(**fields)  # type: ignore[arg-type]


def moments(count: int, mean: list[float], m2: list[float]) -> tensor_pb2.Moments:
    return tensor_pb2.Moments(count=[count], mean=mean, m2=m2)


BAD_FORWARDS = {
    "nothing": (service_pb2.SavedForward(), "UNSUPPORTED_DTYPE"),
    "another shape": (saved_forward(input=spec((4, MAPS, 2, 5))), "INVALID_SHAPE"),
    "another type": (saved_forward(input=spec(SHAPE, tensor_pb2.DATA_TYPE_FLOAT16)), "UNSUPPORTED_DTYPE"),
    "huge": (saved_forward(input=spec((1 << 50, MAPS, 5, 2))), "LIMIT_EXCEEDED"),
    "another count": (saved_forward(moments=moments(41, [0] * MAPS, [1] * MAPS)), "MALFORMED_MESSAGE"),
    "no count": (saved_forward(moments=moments(0, [0] * MAPS, [1] * MAPS)), "MALFORMED_MESSAGE"),
    "too few means": (saved_forward(moments=moments(40, [0], [1] * MAPS)), "MALFORMED_MESSAGE"),
    "negative m2": (saved_forward(moments=moments(40, [0] * MAPS, [1, -1, 1])), "MALFORMED_MESSAGE"),
    "NaN": (saved_forward(moments=moments(40, [float("nan")] * MAPS, [1] * MAPS)), "MALFORMED_MESSAGE"),
    "too few scales": (saved_forward(scale=tensor_pb2.FloatVector(values=[1])), "MALFORMED_MESSAGE"),
}


def send(channel: grpc.Channel, request: service_pb2.BackwardRequest) -> None:
    raw(channel, "Backward", request.SerializeToString() + bytes_field(bytes(2 * NBYTES)))


def send_stream(channel: grpc.Channel, request: service_pb2.BackwardRequest) -> None:
    send_parts(channel, "BackwardStream", [service_pb2.BackwardStreamRequest(header=request)])


@pytest.mark.parametrize("case", BAD_FORWARDS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_saved_forwards(client: StockClient, channel: grpc.Channel, case: str, stream: bool) -> None:
    saved, reason = BAD_FORWARDS[case]
    request = service_pb2.BackwardRequest(ref=ref(NAME), grad=spec(SHAPE), saved_forward=saved)
    with pytest.raises(grpc.RpcError) as caught:
        (send_stream if stream else send)(channel, request)
    refused(caught.value, CODES.get(reason, grpc.StatusCode.INVALID_ARGUMENT), reason)


@pytest.mark.parametrize("size", [0, NBYTES, 2 * NBYTES - 1, 2 * NBYTES + 1])
def test_a_gradient_and_an_input_of_another_size(client: StockClient, size: int) -> None:
    request = service_pb2.BackwardRequest(
        ref=ref(NAME), grad=spec(SHAPE), saved_forward=saved_forward(), data=bytes(size)
    )
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Backward(request, timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


def test_an_unknown_saved_input(client: StockClient) -> None:
    request = service_pb2.BackwardRequest(ref=ref(NAME), grad=spec(SHAPE), saved_input="0" * 32, data=bytes(NBYTES))
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Backward(request, timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.FAILED_PRECONDITION, "INPUT_EVICTED")


def test_a_backward_of_nothing(client: StockClient) -> None:
    request = service_pb2.BackwardRequest(ref=ref(NAME), grad=spec(SHAPE), data=bytes(NBYTES))
    with pytest.raises(grpc.RpcError) as caught:
        client.stub.Backward(request, timeout=SECONDS)
    refused(caught.value, grpc.StatusCode.FAILED_PRECONDITION, "BACKWARD_WITHOUT_FORWARD")


def test_an_unknown_method(client: StockClient, channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        raw(channel, "Frobnicate", b"")
    assert code_of(caught.value) is grpc.StatusCode.UNIMPLEMENTED
