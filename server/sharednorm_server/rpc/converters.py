"""Messages of the contract to what the service takes, and what it answers to messages."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.field_mask_pb2 import FieldMask

from sharednorm.codec import convert, wire
from sharednorm.core.validation import check_namespace
from sharednorm.errors import InvalidConfiguration
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.auth.tokens import require_namespace
from sharednorm_server.layers.requests import BackwardAnswer, CallKey, ForwardAnswer, ForwardCall, LayerKey, LayerRecord

Keyed = (
    service_pb2.ForwardRequest
    | service_pb2.BackwardRequest
    | service_pb2.PushMomentsRequest
    | service_pb2.PushGradientsRequest
    | service_pb2.SetTrainRequest
    | service_pb2.SetStateRequest
    | service_pb2.UpdateParamsRequest
    | service_pb2.RollbackRequest
)


# What a read mask can name: the two parts of an answer, or fields of theirs.
_PARTS = {
    "layer": frozenset(layer_pb2.Layer.DESCRIPTOR.fields_by_name),
    "state": frozenset(layer_pb2.LayerState.DESCRIPTOR.fields_by_name),
}


def key_of(ref: layer_pb2.LayerRef) -> LayerKey:
    """Return the layer that a message names.

    Raises:
        PermissionDenied: It is in another namespace than the call was admitted in.
    """
    key = LayerKey(*convert.ref_from_proto(ref))
    require_namespace(key.namespace)
    return key


def namespace_of(text: str) -> str:
    """Return the namespace that a message names; raises what `key_of` raises."""
    namespace = check_namespace(text)
    require_namespace(namespace)
    return namespace


def call_of(request: Keyed) -> CallKey | None:
    """Return the key of a change, or None."""
    return CallKey(*convert.call_from_proto(request.key)) if request.HasField("key") else None


def stats_of(record: LayerRecord, request: service_pb2.GetStatsRequest) -> service_pb2.GetStatsResponse:
    """Return a layer's state as a message, unless the one who asks has it."""
    if request.unless_tag == record.tag:
        return service_pb2.GetStatsResponse(tag=record.tag, unchanged=True)
    state = convert.state_to_proto(record.state, request.include_gradients)
    return service_pb2.GetStatsResponse(layer=layer_of(record), state=state, tag=record.tag)


def layer_response(record: LayerRecord, mask: FieldMask) -> service_pb2.GetLayerResponse:
    """Return those parts of a layer that a mask names; without paths, all but its state.

    Raises:
        InvalidConfiguration: There is no such part.
    """
    asked = _parts(mask.paths or ("layer",))
    response = service_pb2.GetLayerResponse()
    if "layer" in asked:
        layer = layer_of(record)
        for name in _PARTS["layer"] - asked["layer"]:
            layer.ClearField(name)  # type: ignore[arg-type]  # the stubs know each name, and this is any of them
        response.layer.CopyFrom(layer)
    if "state" in asked:
        response.state.CopyFrom(convert.state_part_to_proto(record.state, asked["state"]))
    return response


def _parts(paths: Iterable[str]) -> dict[str, set[str]]:
    asked: dict[str, set[str]] = {}
    for path in paths:
        part, _, name = path.partition(".")
        fields = _PARTS.get(part, frozenset())
        if path != part:
            fields &= {name}
        if not fields:
            raise InvalidConfiguration(
                f"read_mask has the path {ascii(path)[:80]} (expected: layer, state, or a field of one of them, for "
                "example layer.version or state.mean)"
            )
        asked.setdefault(part, set()).update(fields)
    return asked


def layer_of(record: LayerRecord) -> layer_pb2.Layer:
    """Return a layer as a message."""
    return layer_pb2.Layer(
        ref=convert.ref_to_proto(record.key.namespace, record.key.name, record.key.uid, record.key.domain),
        config=convert.config_to_proto(record.config),
        default_mode=convert.mode_to_proto(record.train),
        version=record.state.version,
        num_of_props=record.state.num_of_props,
        initialized=record.state.initialized,
        stats_frozen=record.state.stats_frozen,
        domains=len(record.domains),
    )


def forward_call(request: service_pb2.ForwardRequest, keeper: str) -> ForwardCall:
    """Return a forward without its tensor."""
    train = convert.mode_from_proto(request.mode)
    return ForwardCall(key_of(request.ref), train, request.keep_input, request.release_input, keeper, call_of(request))


def forward_response(answer: ForwardAnswer) -> service_pb2.ForwardResponse:
    """Return what a forward did as a message, without its tensor."""
    return service_pb2.ForwardResponse(
        output=wire.spec(answer.output.dtype_name, answer.output.shape),
        mode=convert.mode_to_proto(answer.train),
        version=answer.version,
        num_of_props=answer.num_of_props,
        saved_input=answer.saved_input,
        moments=None if answer.moments is None else convert.moments_to_proto(answer.moments),
        scale=None if answer.scale is None else convert.vector_to_proto(answer.scale),
        replayed=answer.replayed,
    )


def backward_response(answer: BackwardAnswer) -> service_pb2.BackwardResponse:
    """Return what a backward did as a message, without its tensor."""
    return service_pb2.BackwardResponse(
        grad=None if answer.grad is None else wire.spec(answer.grad.dtype_name, answer.grad.shape),
        scale_grad=None if answer.scale_grad is None else convert.vector_to_proto(answer.scale_grad),
        bias_grad=None if answer.bias_grad is None else convert.vector_to_proto(answer.bias_grad),
        replayed=answer.replayed,
    )
