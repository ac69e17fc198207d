"""The contract's methods: convert, call the service, convert.

Every method takes bytes and gives bytes; `wire` has the tensors, `convert` everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from sharednorm import convert, wire
from sharednorm.config import Array, NonFinitePolicy, check_namespace
from sharednorm.errors import MalformedMessage
from sharednorm.v1 import layer_pb2, service_pb2
from sharednorm_server.calls import CallPool, Stream, StreamCall, Unary, UnaryCall, method_handler
from sharednorm_server.requests import (
    BackwardAnswer,
    BackwardCall,
    ForwardAnswer,
    ForwardCall,
    ForwardFacts,
    LayerKey,
    LayerRecord,
    Wanted,
)
from sharednorm_server.service import LayerService

SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["BatchNormService"].full_name

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        max_tensor_bytes: Largest tensor.
        max_unary_bytes: Largest tensor in one message.
        chunk_bytes: Size of the chunks that it sends.
    """

    max_tensor_bytes: int
    max_unary_bytes: int = wire.MAX_UNARY_BYTES
    chunk_bytes: int = wire.DEFAULT_CHUNK_BYTES


@dataclass(frozen=True)
class _BackwardPlan:
    # A backward's header, and the tensors that its data holds: the gradient, and perhaps the input.
    call: BackwardCall
    grad: wire.TensorLayout
    x: wire.TensorLayout | None

    @property
    def nbytes(self) -> int:
        return self.grad.nbytes + (self.x.nbytes if self.x else 0)

    def tensors(self, data: memoryview) -> tuple[Array, Array | None]:
        if data.nbytes != self.nbytes:
            raise MalformedMessage(f"the message carries {data.nbytes} bytes of data (expected: {self.nbytes})")
        grad = wire.as_array(self.grad, data[: self.grad.nbytes])
        return grad, wire.as_array(self.x, data[self.grad.nbytes :]) if self.x else None


class Servicer:
    """Serves one `LayerService` over gRPC.

    Args:
        service: What the requests mean.
        limits: What is accepted.
    """

    def __init__(self, service: LayerService, limits: Limits) -> None:
        self._service = service
        self._limits = limits

    def handlers(self, pool: CallPool) -> grpc.GenericRpcHandler:
        """Return the methods for a gRPC server; they run on the threads of a pool."""
        unary: dict[str, Unary] = {
            "GetServerInfo": _plain(service_pb2.GetServerInfoRequest, self._get_server_info),
            "CreateLayer": _plain(service_pb2.CreateLayerRequest, self._create_layer),
            "GetLayer": _plain(service_pb2.GetLayerRequest, self._get_layer),
            "ListLayers": _plain(service_pb2.ListLayersRequest, self._list_layers),
            "DeleteLayer": _plain(service_pb2.DeleteLayerRequest, self._delete_layer),
            "Forward": self._forward,
            "Backward": self._backward,
            "GetStats": _plain(service_pb2.GetStatsRequest, self._get_stats),
            "SetTrain": _plain(service_pb2.SetTrainRequest, self._set_train),
            "SetState": _plain(service_pb2.SetStateRequest, self._set_state),
            "UpdateParams": _plain(service_pb2.UpdateParamsRequest, self._update_params),
        }
        streams: dict[str, Stream] = {"ForwardStream": self._forward_stream, "BackwardStream": self._backward_stream}
        handlers = {name: method_handler(UnaryCall(name, behaviour, pool)) for name, behaviour in unary.items()}
        handlers |= {name: method_handler(StreamCall(name, behaviour, pool)) for name, behaviour in streams.items()}
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    # --- Layers -------------------------------------------------------------------------------------

    def _get_server_info(self, _: service_pb2.GetServerInfoRequest) -> service_pb2.GetServerInfoResponse:
        info = self._service.info
        return service_pb2.GetServerInfoResponse(
            version=info.version,
            protocol=wire.PROTOCOL,
            device=info.device,
            store=info.store,
            max_unary_bytes=self._limits.max_unary_bytes,
            max_tensor_bytes=self._limits.max_tensor_bytes,
            chunk_bytes=self._limits.chunk_bytes,
        )

    def _create_layer(self, request: service_pb2.CreateLayerRequest) -> service_pb2.CreateLayerResponse:
        record, created = self._service.create_layer(
            _key(request.ref),
            convert.config_from_proto(request.config),
            convert.update_from_proto(request.initial_state),
            sscale=request.sscale,
            empty=request.empty,
        )
        return service_pb2.CreateLayerResponse(layer=_layer(record), created=created)

    def _get_layer(self, request: service_pb2.GetLayerRequest) -> service_pb2.GetLayerResponse:
        return service_pb2.GetLayerResponse(layer=_layer(self._service.get_layer(_key(request.ref))))

    def _list_layers(self, request: service_pb2.ListLayersRequest) -> service_pb2.ListLayersResponse:
        records, token = self._service.list_layers(
            check_namespace(request.namespace), request.page_size, request.page_token
        )
        return service_pb2.ListLayersResponse(layers=map(_layer, records), next_page_token=token)

    def _delete_layer(self, request: service_pb2.DeleteLayerRequest) -> service_pb2.DeleteLayerResponse:
        self._service.delete_layer(_key(request.ref))
        return service_pb2.DeleteLayerResponse()

    def _get_stats(self, request: service_pb2.GetStatsRequest) -> service_pb2.GetStatsResponse:
        record = self._service.get_layer(_key(request.ref))
        state = convert.state_to_proto(record.state, request.include_gradients)
        return service_pb2.GetStatsResponse(layer=_layer(record), state=state)

    def _set_train(self, request: service_pb2.SetTrainRequest) -> service_pb2.SetTrainResponse:
        return service_pb2.SetTrainResponse(layer=_layer(self._service.set_train(_key(request.ref), request.train)))

    def _set_state(self, request: service_pb2.SetStateRequest) -> service_pb2.SetStateResponse:
        record = self._service.set_state(_key(request.ref), convert.update_from_proto(request.state))
        return service_pb2.SetStateResponse(layer=_layer(record))

    def _update_params(self, request: service_pb2.UpdateParamsRequest) -> service_pb2.UpdateParamsResponse:
        record = self._service.update_params(_key(request.ref), request.learn_rate)
        return service_pb2.UpdateParamsResponse(layer=_layer(record))

    # --- Forward ------------------------------------------------------------------------------------

    def _forward(self, buffer: bytes, wanted: Wanted) -> bytes:
        request, data = wire.decode(service_pb2.ForwardRequest, buffer)
        layout = wire.layout_of(request.input, self._limits.max_unary_bytes, limit="max_unary_bytes")
        call = _forward_call(request)
        self._service.check_forward(call, layout.shape)
        answer = self._service.forward(call, wire.as_array(layout, data), wanted)
        return wire.encode(_forward_response(answer), wire.payload(answer.output))

    def _forward_stream(self, messages: Iterator[bytes], wanted: Wanted) -> Iterator[bytes]:
        header = _header(service_pb2.ForwardStreamRequest, messages).header
        layout = wire.layout_of(header.input, self._limits.max_tensor_bytes)
        call = _forward_call(header)
        self._service.check_forward(call, layout.shape)
        data = _receive(service_pb2.ForwardStreamRequest, messages, layout.nbytes)
        answer = self._service.forward(call, wire.as_array(layout, data), wanted)
        yield service_pb2.ForwardStreamResponse(header=_forward_response(answer)).SerializeToString()
        yield from self._chunks(answer.output)

    # --- Backward -----------------------------------------------------------------------------------

    def _backward(self, buffer: bytes, wanted: Wanted) -> bytes:
        request, data = wire.decode(service_pb2.BackwardRequest, buffer)
        plan = self._backward_plan(request, self._limits.max_unary_bytes, "max_unary_bytes")
        self._service.check_backward(plan.call, plan.grad.shape, plan.grad.dtype_name)
        grad, x = plan.tensors(data)
        answer = self._service.backward(plan.call, grad, x, wanted)
        payloads = [] if answer.grad is None else [wire.payload(answer.grad)]
        return wire.encode(_backward_response(answer), *payloads)

    def _backward_stream(self, messages: Iterator[bytes], wanted: Wanted) -> Iterator[bytes]:
        header = _header(service_pb2.BackwardStreamRequest, messages).header
        plan = self._backward_plan(header, self._limits.max_tensor_bytes, "max_tensor_bytes")
        self._service.check_backward(plan.call, plan.grad.shape, plan.grad.dtype_name)
        grad, x = plan.tensors(_receive(service_pb2.BackwardStreamRequest, messages, plan.nbytes))
        answer = self._service.backward(plan.call, grad, x, wanted)
        yield service_pb2.BackwardStreamResponse(header=_backward_response(answer)).SerializeToString()
        if answer.grad is not None:
            yield from self._chunks(answer.grad)

    def _backward_plan(self, request: service_pb2.BackwardRequest, max_bytes: int, limit: str) -> _BackwardPlan:
        key = _key(request.ref)
        grad = wire.layout_of(request.grad, max_bytes, limit=limit)
        x, facts = None, None
        if request.HasField("saved_forward"):
            x = wire.layout_of(request.saved_forward.input, max_bytes, limit=limit)
            facts = self._facts(key, request.saved_forward, x)
        call = BackwardCall(
            key,
            saved_input=request.saved_input,
            forward=facts,
            param_grads=request.update_param_grads if request.HasField("update_param_grads") else True,
            input_grad=request.update_grad if request.HasField("update_grad") else True,
            scale=request.scale if request.HasField("scale") else 1.0,
            momentum=request.momentum,
        )
        return _BackwardPlan(call, grad, x)

    def _facts(self, key: LayerKey, saved: service_pb2.SavedForward, x: wire.TensorLayout) -> ForwardFacts:
        config = self._service.get_layer(key).config
        allow = config.nonfinite is NonFinitePolicy.ALLOW
        moments = convert.moments_from_proto(saved.moments, config.maps, allow_nonfinite=allow)
        return ForwardFacts(x.shape, x.dtype_name, moments, convert.vector_from_proto(saved.scale, config.maps))

    def _chunks(self, tensor: Array) -> Iterator[bytes]:
        for offset, chunk in wire.chunks([wire.payload(tensor)], self._limits.chunk_bytes):
            yield wire.encode_chunk(offset, chunk)


# --- Messages -------------------------------------------------------------------------------------------


def _plain(cls: type[M], behaviour: Callable[[M], Message]) -> Unary:
    # A method without a tensor. It is over at once, so that nobody is asked whether the answer is wanted.
    def call(buffer: bytes, _: Wanted) -> bytes:
        try:
            request = cls.FromString(buffer)
        except (DecodeError, UnicodeDecodeError) as error:
            raise MalformedMessage(f"the bytes are not a {cls.DESCRIPTOR.full_name}: {error}") from error
        return behaviour(request).SerializeToString()

    return call


S = TypeVar("S", service_pb2.ForwardStreamRequest, service_pb2.BackwardStreamRequest)


def _header(cls: type[S], messages: Iterator[bytes]) -> S:
    first = next(messages, None)
    if first is None:
        raise MalformedMessage("the stream has no message (expected: a header, then chunks)")
    message, chunk = wire.decode(cls, first)
    if not message.HasField("header") or message.offset or chunk.nbytes or message.header.data:
        raise MalformedMessage("the first message of a stream is not a header without data")
    return message


def _receive(cls: type[S], messages: Iterator[bytes], nbytes: int) -> memoryview:
    assembler = wire.Assembler(nbytes)
    for buffer in messages:
        message, chunk = wire.decode(cls, buffer)
        if message.HasField("header"):
            raise MalformedMessage("a stream has a second header (expected: chunks)")
        assembler.add(message.offset, chunk)
    return assembler.finish()


def _key(ref: layer_pb2.LayerRef) -> LayerKey:
    return LayerKey(*convert.ref_from_proto(ref))


def _layer(record: LayerRecord) -> layer_pb2.Layer:
    return layer_pb2.Layer(
        ref=convert.ref_to_proto(record.key.namespace, record.key.name, record.key.uid),
        config=convert.config_to_proto(record.config),
        default_mode=convert.mode_to_proto(record.train),
        version=record.state.version,
        num_of_props=record.state.num_of_props,
        initialized=record.state.initialized,
    )


def _forward_call(request: service_pb2.ForwardRequest) -> ForwardCall:
    train = convert.mode_from_proto(request.mode)
    return ForwardCall(_key(request.ref), train, request.keep_input, request.release_input)


def _forward_response(answer: ForwardAnswer) -> service_pb2.ForwardResponse:
    return service_pb2.ForwardResponse(
        output=wire.spec_of(answer.output),
        mode=convert.mode_to_proto(answer.train),
        version=answer.version,
        num_of_props=answer.num_of_props,
        saved_input=answer.saved_input,
        moments=None if answer.moments is None else convert.moments_to_proto(answer.moments),
        scale=None if answer.scale is None else convert.vector_to_proto(answer.scale),
    )


def _backward_response(answer: BackwardAnswer) -> service_pb2.BackwardResponse:
    return service_pb2.BackwardResponse(
        grad=None if answer.grad is None else wire.spec_of(answer.grad),
        scale_grad=None if answer.scale_grad is None else convert.vector_to_proto(answer.scale_grad),
        bias_grad=None if answer.bias_grad is None else convert.vector_to_proto(answer.bias_grad),
    )
