"""The contract's methods: convert, call the service, convert.

Every method takes bytes and gives bytes; `wire` has the tensors, `convert` everything else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, TypeVar

import grpc
from google.protobuf.message import Message

from sharednorm.codec import convert, wire
from sharednorm.core.types import NonFinitePolicy
from sharednorm.errors import InvalidConfiguration, MalformedMessage
from sharednorm.v1 import service_pb2
from sharednorm_server.auth.tokens import Right, TokenFile, require
from sharednorm_server.device.tensor_io import Output
from sharednorm_server.layers.requests import BackwardCall, ForwardFacts, LayerKey, Wanted
from sharednorm_server.layers.service import LayerService
from sharednorm_server.observability.instrumentation import Watcher
from sharednorm_server.rpc import unserved
from sharednorm_server.rpc.batch_methods import get_many_stats, push_many
from sharednorm_server.rpc.call_pool import CallPool
from sharednorm_server.rpc.converters import (
    backward_response,
    call_of,
    forward_call,
    forward_response,
    key_of,
    layer_of,
    layer_response,
    namespace_of,
    stats_of,
)
from sharednorm_server.rpc.group_methods import GroupCalls
from sharednorm_server.rpc.handlers import MethodTable, Stream, StreamCall, Unary, UnaryCall
from sharednorm_server.rpc.tensor_io import Arriving, Here, InChunks, InMessage
from sharednorm_server.rpc.transfer_scheduler import TransferScheduler

SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["BatchNormService"].full_name

M = TypeVar("M", bound=Message)

_log = logging.getLogger(__name__)


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


T = TypeVar("T", bound=Message)


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a call with tensors gives: the answer without its data, and the tensor that is its data."""

    response: T
    output: Output | None


@dataclass(frozen=True)
class _BackwardPlan:
    # A backward's header, and the tensors that its data holds: the gradient, and perhaps the input.
    call: BackwardCall
    grad: wire.TensorLayout
    x: wire.TensorLayout | None

    @property
    def layouts(self) -> list[wire.TensorLayout]:
        return [self.grad] if self.x is None else [self.grad, self.x]

    @property
    def nbytes(self) -> int:
        return sum(layout.nbytes for layout in self.layouts)


class Servicer:
    """Serves one `LayerService` over gRPC.

    Args:
        service: What the requests mean.
        groups: The methods of groups.
        limits: What is accepted.
        movers: Whose turn it is to move large tensors.

    Attributes:
        groups: The methods of groups.
        plain: The methods without a tensor that wait for nothing, bytes in and bytes out.
    """

    def __init__(self, service: LayerService, groups: GroupCalls, limits: Limits, movers: TransferScheduler) -> None:
        self._service = service
        self._movers = movers
        self.groups = groups
        self._limits = limits
        self._direct: service_pb2.DirectEndpoint | None = None
        self.plain: dict[str, Unary] = {
            "OpenSession": _plain(service_pb2.OpenSessionRequest, self._open_session),
            "GetServerInfo": _plain(service_pb2.GetServerInfoRequest, self._get_server_info),
            "CreateLayer": _plain(service_pb2.CreateLayerRequest, self._create_layer),
            "GetLayer": _plain(service_pb2.GetLayerRequest, self._get_layer),
            "ListLayers": _plain(service_pb2.ListLayersRequest, self._list_layers),
            "DeleteLayer": _plain(service_pb2.DeleteLayerRequest, self._delete_layer),
            "CreateDomain": _plain(service_pb2.CreateDomainRequest, self._create_domain),
            "ListDomains": _plain(service_pb2.ListDomainsRequest, self._list_domains),
            "DeleteDomain": _plain(service_pb2.DeleteDomainRequest, self._delete_domain),
            "PushMoments": self._push_moments_message,
            "PushGradients": self._push_gradients_message,
            "BatchPushMoments": self._push_many_message,
            "BatchGetStats": _plain(service_pb2.BatchGetStatsRequest, self.get_many_stats),
            "GetStats": _plain(service_pb2.GetStatsRequest, self._get_stats),
            "SetTrain": _plain(service_pb2.SetTrainRequest, self._set_train),
            "SetState": _plain(service_pb2.SetStateRequest, self._set_state),
            "MergeStatistics": _plain(service_pb2.MergeStatisticsRequest, self._merge_statistics),
            "ListSnapshots": _plain(service_pb2.ListSnapshotsRequest, self._list_snapshots),
            "Rollback": _plain(service_pb2.RollbackRequest, self._rollback),
            "Backup": _plain(service_pb2.BackupRequest, self._backup),
            "UpdateParams": _plain(service_pb2.UpdateParamsRequest, self._update_params),
        }

    def offer_direct(self, port: int, socket: str, instance: bytes, shared_memory: bool) -> None:
        """Have clients told of direct connections from now on."""
        self._direct = service_pb2.DirectEndpoint(
            port=port, socket=socket, instance=instance, shared_memory=shared_memory, traces=True
        )

    def handlers(
        self, pool: CallPool, waiting: CallPool, watcher: Watcher, tokens: TokenFile | None = None
    ) -> grpc.GenericRpcHandler:
        """Return the methods for a gRPC server; they run on the threads of a pool, those of groups on another's.

        For the members of a group wait for each other, and would else wait for a thread that one of them has.
        """
        tensors: dict[str, Unary] = {"Forward": self._forward_message, "Backward": self._backward_message}
        streams: dict[str, Stream] = {"ForwardStream": self._forward_stream, "BackwardStream": self._backward_stream}
        calls: list[UnaryCall | StreamCall] = [
            *(UnaryCall(name, behaviour, pool, watcher, tokens) for name, behaviour in (tensors | self.plain).items()),
            *(UnaryCall(name, behaviour, waiting, watcher, tokens) for name, behaviour in self.groups.unary().items()),
            *(StreamCall(name, behaviour, pool, watcher, tokens) for name, behaviour in streams.items()),
        ]
        return MethodTable(SERVICE_NAME, calls, unserved.method_error, pool, watcher, tokens)

    # --- Layers -------------------------------------------------------------------------------------

    def _get_server_info(self, request: service_pb2.GetServerInfoRequest) -> service_pb2.GetServerInfoResponse:
        if request.protocol not in {0, wire.PROTOCOL}:
            _log.warning(
                "a client speaks protocol %d, and this server %d: it will stop there", request.protocol, wire.PROTOCOL
            )
        info = self._service.info
        return service_pb2.GetServerInfoResponse(
            version=info.version,
            protocol=wire.PROTOCOL,
            device=info.device,
            store=info.store,
            max_unary_bytes=self._limits.max_unary_bytes,
            max_tensor_bytes=self._limits.max_tensor_bytes,
            chunk_bytes=self._limits.chunk_bytes,
            direct=self._direct,
            signals_chunks=True,
            state_id=info.state_id,
        )

    def _open_session(self, _: service_pb2.OpenSessionRequest) -> service_pb2.OpenSessionResponse:
        return service_pb2.OpenSessionResponse(session=self._service.open_session())

    def _create_layer(self, request: service_pb2.CreateLayerRequest) -> service_pb2.CreateLayerResponse:
        record, created = self._service.create_layer(
            key_of(request.ref),
            convert.config_from_proto(request.config),
            convert.update_from_proto(request.initial_state),
            sscale=request.sscale,
            empty=request.empty,
        )
        return service_pb2.CreateLayerResponse(layer=layer_of(record), created=created)

    def _get_layer(self, request: service_pb2.GetLayerRequest) -> service_pb2.GetLayerResponse:
        return layer_response(self._service.get_layer(key_of(request.ref)), request.read_mask)

    def _list_layers(self, request: service_pb2.ListLayersRequest) -> service_pb2.ListLayersResponse:
        records, token = self._service.list_layers(
            namespace_of(request.namespace), request.page_size, request.page_token
        )
        return service_pb2.ListLayersResponse(layers=map(layer_of, records), next_page_token=token)

    def _delete_layer(self, request: service_pb2.DeleteLayerRequest) -> service_pb2.DeleteLayerResponse:
        self._service.delete_layer(key_of(request.ref))
        return service_pb2.DeleteLayerResponse()

    def _create_domain(self, request: service_pb2.CreateDomainRequest) -> service_pb2.CreateDomainResponse:
        initial = convert.update_from_proto(request.initial_state)
        record, created = self._service.create_domain(key_of(request.ref), initial)
        return service_pb2.CreateDomainResponse(layer=layer_of(record), created=created)

    def _list_domains(self, request: service_pb2.ListDomainsRequest) -> service_pb2.ListDomainsResponse:
        return service_pb2.ListDomainsResponse(
            domains=(
                service_pb2.Domain(name=name, num_of_props=each.num_of_props, stats_frozen=each.stats_frozen)
                for name, each in self._service.list_domains(key_of(request.ref))
            )
        )

    def _delete_domain(self, request: service_pb2.DeleteDomainRequest) -> service_pb2.DeleteDomainResponse:
        return service_pb2.DeleteDomainResponse(layer=layer_of(self._service.delete_domain(key_of(request.ref))))

    def _get_stats(self, request: service_pb2.GetStatsRequest) -> service_pb2.GetStatsResponse:
        return stats_of(self._service.get_layer(key_of(request.ref)), request)

    def get_many_stats(self, request: service_pb2.BatchGetStatsRequest) -> service_pb2.BatchGetStatsResponse:
        """Read many layers, each of a moment of its own."""
        return get_many_stats(request, lambda ref: self._service.get_layer(key_of(ref)), stats_of)

    def _set_train(self, request: service_pb2.SetTrainRequest) -> service_pb2.SetTrainResponse:
        record, replayed = self._service.set_train(key_of(request.ref), request.train, call_of(request))
        return service_pb2.SetTrainResponse(layer=layer_of(record), replayed=replayed)

    def _set_state(self, request: service_pb2.SetStateRequest) -> service_pb2.SetStateResponse:
        update = convert.update_from_proto(request.state)
        record, replayed = self._service.set_state(key_of(request.ref), update, call_of(request))
        return service_pb2.SetStateResponse(layer=layer_of(record), replayed=replayed)

    def _merge_statistics(self, request: service_pb2.MergeStatisticsRequest) -> service_pb2.MergeStatisticsResponse:
        key = key_of(request.ref)
        maps = self._service.layer_config(key).maps
        moments = convert.moments_from_proto(request.moments, maps, allow_nonfinite=True)
        record, merged = self._service.merge_statistics(key, request.delta, moments)
        return service_pb2.MergeStatisticsResponse(layer=layer_of(record), merged=merged)

    def _update_params(self, request: service_pb2.UpdateParamsRequest) -> service_pb2.UpdateParamsResponse:
        record, replayed = self._service.update_params(key_of(request.ref), request.learn_rate, call_of(request))
        return service_pb2.UpdateParamsResponse(layer=layer_of(record), replayed=replayed)

    def _list_snapshots(self, request: service_pb2.ListSnapshotsRequest) -> service_pb2.ListSnapshotsResponse:
        found = self._service.list_snapshots(key_of(request.ref))
        return service_pb2.ListSnapshotsResponse(
            snapshots=(
                service_pb2.Snapshot(version=each.version, taken=each.taken, num_of_props=each.num_of_props)
                for each in found
            )
        )

    def _rollback(self, request: service_pb2.RollbackRequest) -> service_pb2.RollbackResponse:
        record, replayed = self._service.roll_back(key_of(request.ref), request.version, call_of(request))
        return service_pb2.RollbackResponse(layer=layer_of(record), replayed=replayed)

    def _backup(self, _: service_pb2.BackupRequest) -> service_pb2.BackupResponse:
        path, size = self._service.back_up()
        return service_pb2.BackupResponse(path=path, bytes=size)

    # --- Forward and backward -------------------------------------------------------------------------

    def forward(
        self, request: service_pb2.ForwardRequest, tensors: Here | Arriving, wanted: Wanted
    ) -> Answer[service_pb2.ForwardResponse]:
        """Do a forward: the request without its data, and the tensor that belongs to it."""
        most, limit = self._most(tensors)
        layout = wire.layout_of(request.input, most, limit=limit)
        call = forward_call(request, tensors.keeper)
        if call.train is not False:
            require(Right.TRAIN)
        checked = self._service.check_forward(call, layout.shape)
        if isinstance(tensors, Arriving):
            tensors.hold(self._service.admitted(layout.nbytes))
            tensors.take_turn(self._movers, wanted)
            incoming = self._service.receive_forward(checked, layout.shape, layout.dtype_name)
            tensors.begin(layout.nbytes)
            tensors.fill(incoming)
            checked = self._service.arrived(checked)
            answer = self._service.checked_forward(checked, incoming.finish(), wanted)
            return Answer(forward_response(answer), tensors.leaving(answer.output))
        out = tensors.out(layout, over_input=call.train is False)
        (x,) = tensors.arrays([layout])
        answer = self._service.checked_forward(checked, x, wanted, out)
        return Answer(forward_response(answer), answer.output)

    def backward(
        self, request: service_pb2.BackwardRequest, tensors: Here | Arriving, wanted: Wanted
    ) -> Answer[service_pb2.BackwardResponse]:
        """Do a backward: the request without its data, and the tensors that belong to it."""
        plan = self._backward_plan(request, *self._most(tensors))
        call, shape, dtype_name = plan.call, plan.grad.shape, plan.grad.dtype_name
        checked = self._service.check_backward(call, shape, dtype_name)
        if isinstance(tensors, Arriving):
            tensors.hold(self._service.admitted(plan.nbytes))
            tensors.take_turn(self._movers, wanted)
            incoming = self._service.receive_gradient(checked, shape, dtype_name)
            tensors.begin(plan.nbytes)
            tensors.fill(incoming)
            grad, x = incoming.finish(), None
            if plan.x is not None:
                incoming = self._service.receive_input(checked, grad)
                tensors.fill(incoming)
                x = incoming.finish()
            answer = self._service.checked_backward(checked, grad, x, wanted)
            return Answer(backward_response(answer), tensors.leaving(answer.grad))
        out = tensors.out(plan.grad, over_input=False) if call.input_grad else None
        arrays = tensors.arrays(plan.layouts)
        answer = self._service.checked_backward(checked, arrays[0], arrays[1] if plan.x else None, wanted, out)
        return Answer(backward_response(answer), answer.grad)

    def push_moments(
        self, request: service_pb2.PushMomentsRequest, wanted: Wanted
    ) -> Answer[service_pb2.PushMomentsResponse]:
        """Take a step whose tensor stays with its client."""
        key, train = key_of(request.ref), convert.mode_from_proto(request.mode)
        if train is False:
            raise InvalidConfiguration("PushMoments is for training (expected: mode train, or the layer's default)")
        maps = self._service.layer_config(key).maps
        # What is not finite is for the step to refuse, or to take.
        batch = convert.moments_from_proto(request.moments, maps, allow_nonfinite=True)
        answer = self._service.push_moments(key, train, batch, wanted, call_of(request))
        response = service_pb2.PushMomentsResponse(
            mode=convert.mode_to_proto(answer.train),
            version=answer.version,
            num_of_props=answer.num_of_props,
            scale=convert.vector_to_proto(answer.scale),
            bias=convert.vector_to_proto(answer.bias),
            replayed=answer.replayed,
        )
        if not answer.train or request.want_statistics:
            state = answer.record.state
            response.mean.CopyFrom(convert.doubles_to_proto(state.mean))
            response.var.CopyFrom(convert.doubles_to_proto(state.var))
            response.statistics_version = state.version
        return Answer(response, None)

    def push_many(
        self, request: service_pb2.BatchPushMomentsRequest, wanted: Wanted
    ) -> service_pb2.BatchPushMomentsResponse:
        """Take many steps whose tensors stay with their client, one after the other."""
        return push_many(request, lambda each: self.push_moments(each, wanted).response)

    def push_gradients(
        self, request: service_pb2.PushGradientsRequest, wanted: Wanted
    ) -> Answer[service_pb2.PushGradientsResponse]:
        """Add gradients that a client has computed."""
        key = key_of(request.ref)
        maps = self._service.layer_config(key).maps
        scale = request.scale if request.HasField("scale") else 1.0
        call = BackwardCall(key, scale=scale, momentum=request.momentum, call=call_of(request))
        scale_grad, bias_grad = (
            convert.vector_from_proto(vector, maps) for vector in (request.scale_grad, request.bias_grad)
        )
        replayed = self._service.push_gradients(call, scale_grad, bias_grad, wanted)
        return Answer(service_pb2.PushGradientsResponse(replayed=replayed), None)

    def _push_moments_message(self, buffer: bytes, wanted: Wanted) -> bytes:
        request = unserved.parse(service_pb2.PushMomentsRequest, buffer)
        return self.push_moments(request, wanted).response.SerializeToString()

    def _push_many_message(self, buffer: bytes, wanted: Wanted) -> bytes:
        return self.push_many(unserved.parse(service_pb2.BatchPushMomentsRequest, buffer), wanted).SerializeToString()

    def _push_gradients_message(self, buffer: bytes, wanted: Wanted) -> bytes:
        request = unserved.parse(service_pb2.PushGradientsRequest, buffer)
        return self.push_gradients(request, wanted).response.SerializeToString()

    def _most(self, tensors: Here | Arriving) -> tuple[int, str]:
        # Of a tensor, and that limit's name; in one message also the other one counts.
        limits = self._limits
        if isinstance(tensors, InMessage) and limits.max_unary_bytes < limits.max_tensor_bytes:
            return limits.max_unary_bytes, "max_unary_bytes"
        return limits.max_tensor_bytes, "max_tensor_bytes"

    def _forward_message(self, buffer: bytes, wanted: Wanted) -> bytes:
        request, data = unserved.decode(service_pb2.ForwardRequest, buffer)
        return _whole(self.forward(request, InMessage(data), wanted))

    def _backward_message(self, buffer: bytes, wanted: Wanted) -> bytes:
        request, data = unserved.decode(service_pb2.BackwardRequest, buffer)
        return _whole(self.backward(request, InMessage(data), wanted))

    def _forward_stream(self, messages: Iterator[bytes], wanted: Wanted, go_on: Callable[[], None]) -> Iterator[bytes]:
        header = _header(service_pb2.ForwardStreamRequest, messages).header
        with ExitStack() as until_sent:
            chunks = InChunks(service_pb2.ForwardStreamRequest, messages, go_on)
            answer = self.forward(header, Arriving(chunks.begin, chunks.fill, until_sent), wanted)
            yield service_pb2.ForwardStreamResponse(header=answer.response).SerializeToString()
            yield from self._chunks(answer)

    def _backward_stream(self, messages: Iterator[bytes], wanted: Wanted, go_on: Callable[[], None]) -> Iterator[bytes]:
        header = _header(service_pb2.BackwardStreamRequest, messages).header
        with ExitStack() as until_sent:
            chunks = InChunks(service_pb2.BackwardStreamRequest, messages, go_on)
            answer = self.backward(header, Arriving(chunks.begin, chunks.fill, until_sent), wanted)
            yield service_pb2.BackwardStreamResponse(header=answer.response).SerializeToString()
            yield from self._chunks(answer)

    def _chunks(self, answer: Answer[T]) -> Iterator[bytes]:
        if answer.output is not None:
            offset = 0
            for part in answer.output.parts(self._limits.chunk_bytes):
                yield wire.encode_chunk(offset, part)
                offset += part.nbytes

    def _backward_plan(self, request: service_pb2.BackwardRequest, max_bytes: int, limit: str) -> _BackwardPlan:
        key = key_of(request.ref)
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
            call=call_of(request),
        )
        return _BackwardPlan(call, grad, x)

    def _facts(self, key: LayerKey, saved: service_pb2.SavedForward, x: wire.TensorLayout) -> ForwardFacts:
        config = self._service.layer_config(key)
        allow = config.nonfinite is NonFinitePolicy.ALLOW
        moments = convert.moments_from_proto(saved.moments, config.maps, allow_nonfinite=allow)
        return ForwardFacts(x.shape, x.dtype_name, moments, convert.vector_from_proto(saved.scale, config.maps))


# --- Messages -------------------------------------------------------------------------------------------


def _plain(cls: type[M], behaviour: Callable[[M], Message]) -> Unary:
    # A method without a tensor. It is over at once, so that nobody is asked whether the answer is wanted.
    return lambda buffer, _: behaviour(unserved.parse(cls, buffer)).SerializeToString()


S = TypeVar("S", service_pb2.ForwardStreamRequest, service_pb2.BackwardStreamRequest)


def _header(cls: type[S], messages: Iterator[bytes]) -> S:
    first = next(messages, None)
    if first is None:
        raise MalformedMessage("the stream has no message (expected: a header, then chunks)")
    message, chunk = unserved.decode(cls, first)
    if not message.HasField("header") or message.offset or chunk.nbytes or message.header.data:
        raise MalformedMessage("the first message of a stream is not a header without data")
    return message


def _whole(answer: Answer[T]) -> bytes:
    payloads = [] if answer.output is None else [wire.payload(answer.output.array())]
    return wire.encode(answer.response, *payloads)
