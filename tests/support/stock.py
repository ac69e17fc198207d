"""What a client in another language would use: the generated stubs and messages, and nothing of the library."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import numpy as np
import numpy.typing as npt

from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2
from sharednorm.v1.service_pb2_grpc import BatchNormServiceStub

SECONDS = 30.0
SERVICE = "sharednorm.v1.BatchNormService"
MAPS = 3

Floats = npt.NDArray[np.float32]


@contextmanager
def channel_to(address: str) -> Iterator[grpc.Channel]:
    """Open a channel that takes answers of any size."""
    with grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        yield channel


def ref(name: str, namespace: str = "") -> layer_pb2.LayerRef:
    """Name a layer."""
    return layer_pb2.LayerRef(namespace=namespace, name=name)


def config(maps: int = MAPS, **changes: float) -> layer_pb2.LayerConfig:
    """Configure a layer for images as PuzzleLib does by default."""
    message = layer_pb2.LayerConfig(
        kind=layer_pb2.LAYER_KIND_BATCH_NORM_2D, maps=maps, epsilon=1e-5, init_factor=1.0, min_factor=0.1, affine=True
    )
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def spec(shape: Iterable[int], dtype: int = tensor_pb2.DATA_TYPE_FLOAT32) -> tensor_pb2.TensorSpec:
    """Describe a tensor."""
    message = tensor_pb2.TensorSpec(shape=shape)
    message.dtype = dtype  # type: ignore[assignment]  # also numbers that no type has
    return message


def floats(data: bytes, shape: Iterable[int]) -> Floats:
    """Return a float32 tensor's elements."""
    return np.frombuffer(data, "<f4").reshape(tuple(shape))


def vector(values: Iterable[float]) -> tensor_pb2.FloatVector:
    """Return one value a map as a message."""
    return tensor_pb2.FloatVector(values=values)


def doubles(values: Iterable[float]) -> tensor_pb2.DoubleVector:
    """Return one statistic a map as a message."""
    return tensor_pb2.DoubleVector(values=values)


@dataclass(frozen=True)
class StockClient:
    """The stubs, and the few lines that any client writes around them."""

    stub: BatchNormServiceStub

    @classmethod
    def on(cls, channel: grpc.Channel) -> StockClient:
        """Return a client that uses a channel."""
        return cls(BatchNormServiceStub(channel))

    def create(self, name: str, maps: int = MAPS, **state: Iterable[float]) -> service_pb2.CreateLayerResponse:
        """Create a layer whose scale is 1, or what the keywords say."""
        initial = layer_pb2.LayerState()
        for key, values in state.items():
            getattr(initial, key).CopyFrom((doubles if key in {"mean", "var"} else vector)(values))
        request = service_pb2.CreateLayerRequest(ref=ref(name), config=config(maps), initial_state=initial)
        return self.stub.CreateLayer(request, timeout=SECONDS)

    def stats(self, name: str) -> service_pb2.GetStatsResponse:
        """Read a layer's state, gradients included."""
        return self.stub.GetStats(service_pb2.GetStatsRequest(ref=ref(name), include_gradients=True), timeout=SECONDS)

    def forward(
        self, name: str, x: Floats, mode: layer_pb2.Mode.ValueType = layer_pb2.MODE_TRAIN, *, keep: bool = False
    ) -> service_pb2.ForwardResponse:
        """Normalize a tensor in one message."""
        request = service_pb2.ForwardRequest(
            ref=ref(name), mode=mode, input=spec(x.shape), keep_input=keep, data=x.tobytes()
        )
        return self.stub.Forward(request, timeout=SECONDS)

    def forward_stream(
        self, name: str, x: Floats, chunk_bytes: int, *, keep: bool = False, seconds: float = SECONDS
    ) -> tuple[service_pb2.ForwardResponse, bytes]:
        """Train on a tensor in chunks; return the answer's header and its data."""
        header = service_pb2.ForwardRequest(
            ref=ref(name), mode=layer_pb2.MODE_TRAIN, input=spec(x.shape), keep_input=keep
        )
        data = x.tobytes()

        def messages() -> Iterator[service_pb2.ForwardStreamRequest]:
            yield service_pb2.ForwardStreamRequest(header=header)
            for offset in range(0, len(data), chunk_bytes):
                yield service_pb2.ForwardStreamRequest(offset=offset, chunk=data[offset : offset + chunk_bytes])

        answers = list(self.stub.ForwardStream(messages(), timeout=seconds))
        return answers[0].header, joined(answers[1:])

    def backward_stream(
        self, header: service_pb2.BackwardRequest, data: bytes, chunk_bytes: int
    ) -> tuple[service_pb2.BackwardResponse, bytes]:
        """Send a backward in chunks; return the answer's header and its data."""

        def messages() -> Iterator[service_pb2.BackwardStreamRequest]:
            yield service_pb2.BackwardStreamRequest(header=header)
            for offset in range(0, len(data), chunk_bytes):
                yield service_pb2.BackwardStreamRequest(offset=offset, chunk=data[offset : offset + chunk_bytes])

        answers = list(self.stub.BackwardStream(messages(), timeout=SECONDS))
        return answers[0].header, joined(answers[1:])


class SlowForward:
    """A training forward in chunks that stops half way, until it is told to go on.

    The first half is larger than what fits between a client and a server that does not read, so that the
    server is known to be in the middle of the call.
    """

    SHAPE = (16, MAPS, 512, 512)
    CHUNK_BYTES = 1 << 20

    def __init__(self, client: StockClient, name: str, seconds: float = SECONDS) -> None:
        self.x = np.random.default_rng(0).random(self.SHAPE, np.float32)
        self._half_way, self._go_on = threading.Event(), threading.Event()
        self._header = service_pb2.ForwardRequest(ref=ref(name), mode=layer_pb2.MODE_TRAIN, input=spec(self.SHAPE))
        self.call = client.stub.ForwardStream(self._messages(), timeout=seconds)
        assert self._half_way.wait(SECONDS)

    def go_on(self) -> None:
        """Send the second half."""
        self._go_on.set()

    def answer(self) -> tuple[service_pb2.ForwardResponse, bytes]:
        """Send what is left, and return the answer's header and its data."""
        self.go_on()
        answers = list(self.call)
        return answers[0].header, joined(answers[1:])

    def cancel(self) -> None:
        """Give the call up."""
        self.call.cancel()
        self._go_on.set()

    def _messages(self) -> Iterator[service_pb2.ForwardStreamRequest]:
        yield service_pb2.ForwardStreamRequest(header=self._header)
        data = self.x.data.cast("B")
        for offset in range(0, data.nbytes, self.CHUNK_BYTES):
            if offset * 2 == data.nbytes:
                self._half_way.set()
                self._go_on.wait(SECONDS)
            yield service_pb2.ForwardStreamRequest(offset=offset, chunk=bytes(data[offset : offset + self.CHUNK_BYTES]))


def joined(
    messages: Iterable[service_pb2.ForwardStreamResponse] | Iterable[service_pb2.BackwardStreamResponse],
) -> bytes:
    """Put chunks together, checking that each begins where the last one ended."""
    parts: list[bytes] = []
    for message in messages:
        assert not message.HasField("header")
        assert message.offset == sum(map(len, parts))
        parts.append(message.chunk)
    return b"".join(parts)


def raw(channel: grpc.Channel, method: str, request: bytes) -> bytes:
    """Send a unary method any bytes and return those of its answer."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{method}", _same, _same)
    return call(request, timeout=SECONDS)


def raw_stream(
    channel: grpc.Channel, method: str, requests: Iterator[bytes], seconds: float = SECONDS
) -> Iterator[bytes]:
    """Send a stream any bytes and give those of its answers."""
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/{method}", _same, _same)
    return iter(call(requests, timeout=seconds))


def _same(data: bytes) -> bytes:
    return data


def detail_of(error: grpc.RpcError) -> service_pb2.ErrorDetail:
    """Return the detail in a failed call's trailing metadata."""
    assert isinstance(error, grpc.Call)
    found = [value for key, value in error.trailing_metadata() or () if key == "sharednorm-error-bin"]
    assert len(found) == 1, f"{error.code()}: {error.details()}"
    return service_pb2.ErrorDetail.FromString(bytes(found[0]))


def code_of(error: grpc.RpcError) -> grpc.StatusCode:
    """Return a failed call's status code."""
    assert isinstance(error, grpc.Call)
    return error.code()
