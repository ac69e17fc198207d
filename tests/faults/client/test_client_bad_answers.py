"""A server whose answers contradict the calls: each is a typed error, and nothing of it reaches the caller's arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

import sharednorm
from sharednorm.codec import convert, wire
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments
from sharednorm.core.types import Array, LayerKind
from sharednorm.errors import MalformedMessage
from sharednorm.transport.channel import SERVICE
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2

MAPS = 3
SMALL = (4, MAPS)
LARGE = (500_000, MAPS)
CONFIG = LayerConfig(LayerKind.BATCH_NORM, MAPS)

Answers = Callable[[Array], Sequence[bytes]]
"""What a server sends back for an input: one message, or those of a stream."""


def layer() -> layer_pb2.Layer:
    ref = convert.ref_to_proto("default", "x")
    config = convert.config_to_proto(CONFIG)
    return layer_pb2.Layer(ref=ref, config=config, default_mode=layer_pb2.MODE_TRAIN, initialized=True)


def forward_header(x: Array) -> service_pb2.ForwardResponse:
    """A right answer to a training forward."""
    moments = Moments(len(x), np.zeros(MAPS), np.ones(MAPS))
    return service_pb2.ForwardResponse(
        output=wire.spec_of(x),
        mode=layer_pb2.MODE_TRAIN,
        version=1,
        num_of_props=1,
        saved_input="token",
        moments=convert.moments_to_proto(moments),
        scale=convert.vector_to_proto(np.ones(MAPS)),
    )


def answered(x: Array, change: Callable[[service_pb2.ForwardResponse], object] = id, cut: int = 0) -> Sequence[bytes]:
    """An answer whose header was changed, and whose data lacks so many bytes at the end (or has so many more)."""
    header = forward_header(x)
    change(header)
    data = memoryview((bytes(wire.payload(x)) + bytes(64))[: x.nbytes - cut])
    if x.nbytes <= wire.MAX_UNARY_BYTES:
        return [wire.encode(header, data)]
    first = service_pb2.ForwardStreamResponse(header=header).SerializeToString()
    return [first, *(wire.encode_chunk(*chunk) for chunk in wire.chunks([data], 1 << 20))]


@contextmanager
def liar(answers: Answers) -> Iterator[sharednorm.Hub]:
    """A hub of a real gRPC server whose forwards are answered so, whatever came."""
    info = service_pb2.GetServerInfoResponse(
        protocol=wire.PROTOCOL, max_unary_bytes=wire.MAX_UNARY_BYTES, chunk_bytes=1 << 20
    )
    found = service_pb2.GetLayerResponse(layer=layer())

    def forward(data: bytes, _: grpc.ServicerContext) -> bytes:
        request, _data = wire.decode(service_pb2.ForwardRequest, data)
        return answers(np.zeros(tuple(request.input.shape), np.float32))[0]

    def forward_stream(messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        request = service_pb2.ForwardStreamRequest.FromString(next(messages)).header
        for _chunk in messages:
            pass
        yield from answers(np.zeros(tuple(request.input.shape), np.float32))

    session = service_pb2.OpenSessionResponse(session=bytes(8)).SerializeToString()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "OpenSession": grpc.unary_unary_rpc_method_handler(lambda *_: session),
        "GetServerInfo": grpc.unary_unary_rpc_method_handler(lambda *_: info.SerializeToString()),
        "GetLayer": grpc.unary_unary_rpc_method_handler(lambda *_: found.SerializeToString()),
        "Forward": grpc.unary_unary_rpc_method_handler(forward),
        "ForwardStream": grpc.stream_stream_rpc_method_handler(forward_stream),
    }
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with sharednorm.connect(f"127.0.0.1:{port}", timeout=10) as hub:
            yield hub
    finally:
        server.stop(0).wait(5)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["unary", "stream"])
def test_the_right_answer_is_taken(shape: tuple[int, ...]) -> None:
    with liar(answered) as hub:
        result = hub.layer("x")(np.ones(shape, np.float32))
        np.testing.assert_array_equal(result, np.zeros(shape))
        assert result.flags.writeable


def other_shape(header: service_pb2.ForwardResponse) -> None:
    header.output.shape[0] -= 1


def other_dtype(header: service_pb2.ForwardResponse) -> None:
    header.output.dtype = tensor_pb2.DATA_TYPE_FLOAT16


BAD: dict[str, Answers] = {
    "one byte less": lambda x: answered(x, cut=1),
    "one byte more": lambda x: answered(x, cut=-1),
    "no data": lambda x: answered(x, cut=x.nbytes),
    "another shape": lambda x: answered(x, other_shape),
    "another type": lambda x: answered(x, other_dtype),
    "no shape": lambda x: answered(x, lambda header: header.ClearField("output")),
    "eval instead of train": lambda x: answered(x, lambda header: setattr(header, "mode", layer_pb2.MODE_EVAL)),
    "no mode": lambda x: answered(x, lambda header: header.ClearField("mode")),
    "an unknown mode": lambda x: answered(x, lambda header: setattr(header, "mode", 77)),
    "no moments": lambda x: answered(x, lambda header: header.ClearField("moments")),
    "moments of another layer": lambda x: answered(x, lambda header: header.moments.mean.append(0)),
    "no scale": lambda x: answered(x, lambda header: header.ClearField("scale")),
    "bytes that are no message": lambda _: [b"\xff\xff\xff"],
}

BAD_STREAMS: dict[str, Answers] = {
    "nothing": lambda _: [],
    "no header": lambda x: answered(x)[1:],
    "two headers": lambda x: [answered(x)[0], *answered(x)],
    "a chunk twice": lambda x: [*answered(x)[:2], *answered(x)[1:]],
    "a chunk left out": lambda x: [answered(x)[0], *answered(x)[2:]],
    "chunks in another order": lambda x: [answered(x)[0], *answered(x)[:0:-1]],
    "a chunk after the last": lambda x: [*answered(x), wire.encode_chunk(x.nbytes, memoryview(b"x"))],
    "an empty chunk": lambda x: [answered(x)[0], b"", *answered(x)[1:]],
}


def refused(answers: Answers, shape: tuple[int, ...]) -> None:
    with liar(answers) as hub:
        handle = hub.layer("x")
        handle.trainMode()
        with pytest.raises(MalformedMessage):
            handle(np.ones(shape, np.float32))
        assert handle.data is None


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["unary", "stream"])
@pytest.mark.parametrize("what", BAD)
def test_an_answer_that_contradicts_the_call(what: str, shape: tuple[int, ...]) -> None:
    refused(BAD[what], shape)


@pytest.mark.parametrize("what", BAD_STREAMS)
def test_a_stream_that_is_none(what: str) -> None:
    refused(BAD_STREAMS[what], LARGE)


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["unary", "stream"])
@pytest.mark.parametrize("cut", [1, -1])
def test_in_place_the_input_stays_as_it_was_until_the_whole_answer_is_here(shape: tuple[int, ...], cut: int) -> None:
    def answers(x: Array) -> Sequence[bytes]:
        return answered(x, lambda header: setattr(header, "mode", layer_pb2.MODE_EVAL), cut)

    with liar(answers) as hub:
        handle = hub.layer("x")
        handle.inplace = True
        handle.evalMode()
        x = np.ones(shape, np.float32)
        with pytest.raises(MalformedMessage):
            handle(x)
        np.testing.assert_array_equal(x, np.ones(shape))
