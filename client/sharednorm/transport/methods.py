"""The methods that carry tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from sharednorm.codec import frames
from sharednorm.v1 import service_pb2

R = TypeVar("R", service_pb2.ForwardRequest, service_pb2.BackwardRequest)
T = TypeVar("T", service_pb2.ForwardResponse, service_pb2.BackwardResponse)


@dataclass(frozen=True)
class TensorMethod(Generic[R, T]):
    """A method with a tensor in and a tensor out, which exists whole (`name`) and in chunks (`name`Stream).

    Attributes:
        name: Of the unary method.
        number: Of the method on a direct connection.
        answer: Class of its answer, which also stands in the first message of the stream's.
        stream_header: Makes the first message of the stream.
        stream_answer: Class of the messages that come back on the stream.
    """

    name: str
    number: int
    answer: type[T]
    stream_header: Callable[[R], Message]
    stream_answer: type[service_pb2.ForwardStreamResponse | service_pb2.BackwardStreamResponse]


FORWARD: TensorMethod[service_pb2.ForwardRequest, service_pb2.ForwardResponse] = TensorMethod(
    "Forward",
    frames.FORWARD,
    service_pb2.ForwardResponse,
    lambda header: service_pb2.ForwardStreamRequest(header=header),
    service_pb2.ForwardStreamResponse,
)
BACKWARD: TensorMethod[service_pb2.BackwardRequest, service_pb2.BackwardResponse] = TensorMethod(
    "Backward",
    frames.BACKWARD,
    service_pb2.BackwardResponse,
    lambda header: service_pb2.BackwardStreamRequest(header=header),
    service_pb2.BackwardStreamResponse,
)
