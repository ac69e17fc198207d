"""What the contract has and this release does not serve. It is refused wherever a request comes in, never ignored.

`parse` and `decode` read every request, by the messages of the contract without the fields of the table. To those, a
field of the table, of an earlier protocol or of a later release is unknown, which protobuf itself finds quickly,
however deep it is. Counts of `Moments` are refused where they are read, in `sharednorm.codec.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, TypeVar, cast

from google.protobuf import field_mask_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from sharednorm.codec import wire
from sharednorm.core.limits import MAX_BATCH_ENTRIES
from sharednorm.errors import IncompatibleServer, NotSupported, SharedNormError
from sharednorm.v1 import direct_pb2, layer_pb2, service_pb2, tensor_pb2

M = TypeVar("M", bound=Message)

_POOLED = "choose another averaging"
_SELECT = "leave it out, and select in the client"
_IN_GROUP = "use SynchronizeMoments and SynchronizeGradients, and normalize in the client"
_WEIGHTS = "push the moments of the values that count, and normalize in the client"
_EVALUATION = "differentiate the evaluation in the client"
_READ = "leave it out, and read them with GetStats"
_BY_GRPC = "make the call by gRPC"

FIELDS: Mapping[str, str] = {
    "LayerRef.seen_config_revision": "leave it out",
    **dict.fromkeys(("LayerConfig.prior_count", "LayerConfig.decay", "LayerConfig.count_limit"), _POOLED),
    **dict.fromkeys(("LayerState.count", "LayerState.m2"), _POOLED),
    "ListLayersRequest.filter": _SELECT,
    "ListLayersRequest.order": _SELECT,
    "ListLayersRequest.changed_since": _SELECT,
    **dict.fromkeys(
        ("ForwardRequest.ticket", "ForwardRequest.step", "BackwardRequest.ticket", "BackwardRequest.step"), _IN_GROUP
    ),
    **dict.fromkeys(("ForwardRequest.weights", "SavedForward.weights"), _WEIGHTS),
    **dict.fromkeys(("ForwardRequest.cuda", "BackwardRequest.cuda"), "send the data"),
    "ForwardRequest.want_statistics": _READ,
    "SynchronizeMomentsRequest.want_statistics": _READ,
    **dict.fromkeys(("SavedForward.mode", "SavedForward.mean", "SavedForward.var"), _EVALUATION),
    **dict.fromkeys(("Hello.namespace", "Hello.token"), _BY_GRPC),
}
"""Fields of requests, and what to do without them. A field that is on the wire is refused, whatever its value."""

METHODS: Mapping[str, str] = {
    "BatchCreateLayers": "use CreateLayer",
    "BatchSetState": "use SetState",
    "UpdateLayer": "choose the factors when the layer is created",
    "DeleteLayers": "use ListLayers and DeleteLayer",
    **dict.fromkeys(
        (
            "CreateRunningStatistics", "GetRunningStatistics", "PushRunningStatistics", "BatchPushRunningStatistics",
            "SetRunningStatistics", "FreezeRunningStatistics", "ListRunningStatistics", "DeleteRunningStatistics",
        ),
        "use the statistics of a layer",
    ),
}  # fmt: skip
"""Methods, and what to do without them."""

# So many there are in a full batch.
_MOST_MESSAGES = 4 * MAX_BATCH_ENTRIES
_RENAMED = {"PushMany": "BatchPushMoments", "GetManyStats": "BatchGetStats"}
_UPGRADE = (
    f"this server speaks protocol {wire.PROTOCOL}: install the same release on both sides, or generate the client's "
    "code anew"
)


def parse(cls: type[M], buffer: bytes) -> M:
    """Parse a request that carries no tensor.

    Raises:
        MalformedMessage: protobuf refuses the bytes.
        NotSupported: It sets something that this release does not serve or does not know.
        IncompatibleServer: It sets something that was in an earlier protocol.
    """
    served, require = _SERVED[cls]
    try:
        message: M = served.FromString(buffer)
    except (DecodeError, UnicodeDecodeError):  # the latter by protobuf's pure Python runtime
        wire.parse(cls, buffer)
        raise
    message.DiscardUnknownFields()
    known = message.SerializeToString()
    # Bytes that are not the same have something unknown, or are of an encoder that writes in a way of its own.
    if known != buffer and known != served.FromString(buffer).SerializeToString():
        raise _error_of(wire.parse(cls, buffer))
    if require is not None:
        require(message)
    return message


def decode(cls: type[M], buffer: bytes) -> tuple[M, memoryview]:
    """Parse a request whose field 15 has the bytes of tensors, as `wire.decode` does; raises what `parse` raises."""
    return wire.decode(cls, buffer, parse)


def method_error(name: str) -> SharedNormError:
    """Return the error of a method that this release does not serve, or does not know."""
    if name in METHODS:
        return NotSupported(f"{name} is not served by this release ({METHODS[name]})", {"method": name})
    if name in _RENAMED:
        return IncompatibleServer(f"{name} was of protocol 2, {_RENAMED[name]} is its new name, and {_UPGRADE}")
    return NotSupported(f"this release knows no method {ascii(name)[:80]} (expected: one of the contract's)")


def _error_of(request: Message) -> SharedNormError:
    # What of a request is in the way. A hostile one may have millions of messages, of which this looks at a few.
    left = [request]
    for _ in range(_MOST_MESSAGES):
        if not left:
            break
        message = left.pop()
        name = message.DESCRIPTOR.name
        for field, value in message.ListFields():
            path = f"{name}.{field.name}"
            if path in FIELDS:
                return NotSupported(f"{path} is not served by this release ({FIELDS[path]})", {"field": path})
            if field.message_type is not None:
                left += [value] if isinstance(value, Message) else islice(value, _MOST_MESSAGES)
        unknown = UnknownFieldSet(message)
        if len(unknown):
            number = unknown[0].field_number
            path = f"{name}.{number}"
            if any(number in numbers for numbers in _RESERVED[name]):
                return IncompatibleServer(
                    f"field {number} of {name} was of protocol 2, and {_UPGRADE}", {"field": path}
                )
            return NotSupported(
                f"this release knows no field {number} of {name} (leave it out, or use a newer server)", {"field": path}
            )
    return NotSupported("the request sets something that this release does not serve or does not know")


def _require_no_pooling(request: service_pb2.CreateLayerRequest) -> None:
    if request.config.averaging == layer_pb2.AVERAGING_POOLED:
        raise NotSupported(
            f"LayerConfig.averaging, AVERAGING_POOLED, is not served by this release ({_POOLED})",
            {"field": "LayerConfig.averaging"},
        )


def _require_no_kept_evaluation(request: service_pb2.ForwardRequest) -> None:
    if request.keep_input and request.mode == layer_pb2.MODE_EVAL:
        raise NotSupported(
            f"ForwardRequest.keep_input with MODE_EVAL is not served by this release ({_EVALUATION})",
            {"field": "ForwardRequest.keep_input"},
        )


_CONDITIONS: Mapping[type[Message], Callable[[Any], None]] = {
    service_pb2.CreateLayerRequest: _require_no_pooling,
    service_pb2.ForwardRequest: _require_no_kept_evaluation,
    service_pb2.ForwardStreamRequest: lambda message: _require_no_kept_evaluation(message.header),
}
_RESERVED: dict[str, list[range]] = {}


def _served_messages() -> dict[type[Message], tuple[type[Any], Callable[[Any], None] | None]]:
    # Of each message that which this release serves, and what its values must be besides.
    pool, found = DescriptorPool(), {}
    for module in (field_mask_pb2, tensor_pb2, layer_pb2, service_pb2, direct_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        for message in file.message_type:
            _RESERVED[message.name] = [range(each.start, each.end) for each in message.reserved_range]
            _remove_fields(message)
        pool.AddSerializedFile(file.SerializeToString())
        for message in file.message_type:
            cls = cast("type[Message]", getattr(module, message.name))
            served = GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{message.name}"))
            found[cls] = served, _CONDITIONS.get(cls)
    return found


def _remove_fields(message: DescriptorProto) -> None:
    for index in reversed(range(len(message.field))):
        if f"{message.name}.{message.field[index].name}" in FIELDS:
            del message.field[index]
    # A field that may be absent is in a oneof of its own, which goes with it.
    used = sorted({field.oneof_index for field in message.field if field.HasField("oneof_index")})
    for field in message.field:
        if field.HasField("oneof_index"):
            field.oneof_index = used.index(field.oneof_index)
    for index in reversed(range(len(message.oneof_decl))):
        if index not in used:
            del message.oneof_decl[index]


_SERVED = _served_messages()
