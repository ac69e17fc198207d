"""Layers on a server that also computes: tensors travel there and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import numpy as np
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from sharednorm.codec import convert, wire
from sharednorm.codec.half_precision import narrowed, widened
from sharednorm.coordination.idempotency import Keyed, Keys
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import FieldName, LayerState, StateFields, StateUpdate
from sharednorm.core.types import Array, NonFinitePolicy
from sharednorm.errors import InplaceInTraining, InputEvicted, LayerNotFound, MalformedMessage
from sharednorm.layers.backend import ForwardResult, Gradients, SavedForward
from sharednorm.layers.call_queue import CallQueue
from sharednorm.layers.statistics import StatisticsDelta
from sharednorm.remote.context import HubContext
from sharednorm.transport.base import RpcClient
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.methods import BACKWARD, FORWARD
from sharednorm.transport.retry import RetryPolicy
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2

A = TypeVar("A", bound=Message)
B = TypeVar("B")
KeyedMessage: TypeAlias = service_pb2.SetStateRequest | service_pb2.UpdateParamsRequest


class RemoteBackend:
    """What a layer on a server does, as `LayerBackend` asks for it. Keeps nothing that could become stale.

    Args:
        context: What the hub's handles share.
        ref: The layer.
        config: The layer's, as the server confirmed it.
        wire_dtype: What float32 tensors travel in; None: as they are.

    Every method raises what `Connection` raises, and LayerNotFound once the layer is gone.
    """

    def __init__(
        self,
        context: HubContext,
        ref: layer_pb2.LayerRef,
        config: LayerConfig,
        wire_dtype: np.dtype[Any] | None = None,
    ) -> None:
        self._context = context
        self._exchange = context.exchange.of("layer", ref.name)
        self._connection = self._exchange.connection
        self._wire_dtype = wire_dtype
        self._queue = context.queues.of(ref.uid)
        self._keys = Keys(context.session)
        # A copy of its own: what it was told is the handle's.
        self._ref = layer_pb2.LayerRef()
        self._ref.CopyFrom(ref)
        self._config = config

    @property
    def config(self) -> LayerConfig:
        """The layer's configuration, which never changes."""
        return self._config

    @property
    def connection(self) -> RpcClient:
        """To the server."""
        return self._connection

    @property
    def how(self) -> str:
        """How tensors are dealt with, for people, if not as usual."""
        return f", as {self._wire_dtype.name} on the wire" if self._wire_dtype else ""

    @property
    def together(self) -> bool:
        """Return False: a batch is normalized by itself."""
        return False

    @property
    def queue(self) -> CallQueue:
        """The calls of the layer, by whichever handle of this hub, that are made one after the other."""
        return self._queue

    @property
    def ref(self) -> layer_pb2.LayerRef:
        """Which layer it is, and which domain."""
        return self._ref

    def told(self, version: int) -> None:
        """Remember that the layer has come so far: a server that says less afterwards has lost something."""
        self._ref.seen_version = max(self._ref.seen_version, version)

    @property
    def domain(self) -> str:
        """Whose statistics these are; "": the layer's own."""
        return self._ref.domain

    def domains(self) -> tuple[str, ...]:
        """Return the names of the layer's domains, in their order."""
        request = service_pb2.ListDomainsRequest(ref=self._ref)
        with self._explained():
            answer = self._idempotent("ListDomains", request, service_pb2.ListDomainsResponse)
        return tuple(domain.name for domain in answer.domains)

    def within(self, domain: str) -> RemoteBackend:
        """Return the same layer with the statistics of a domain, which is made if it is not there."""
        ref = _with_domain(self._ref, domain)
        if domain:
            with self._explained():
                create_domain(self._connection, ref)
        return self._of(ref)

    def delete_domain(self, domain: str) -> None:
        """Forget a domain and its statistics."""
        self.flush()
        request = service_pb2.DeleteDomainRequest(ref=_with_domain(self._ref, domain))
        self._connection.call("DeleteDomain", request, service_pb2.DeleteDomainResponse)

    def _of(self, ref: layer_pb2.LayerRef) -> RemoteBackend:
        """Return a backend like this one of another domain."""
        return RemoteBackend(self._context, ref, self._config, self._wire_dtype)

    def read(self) -> LayerState:
        """Return the layer's state of one moment, gradients included."""
        request = service_pb2.GetStatsRequest(ref=self._ref, include_gradients=True)
        with self._explained():
            answer = self._idempotent("GetStats", request, service_pb2.GetStatsResponse)
        self.told(answer.layer.version)
        return convert.state_from_proto(answer.layer, answer.state)

    def read_fields(self, *names: FieldName) -> StateFields:
        """Return these fields of the state, all of one moment, which is all that the server sends."""
        answer = self._get_layer(convert.fields_to_paths(names))
        return convert.fields_from_proto(answer, names, self._config.maps)

    def default_train(self) -> bool:
        """Return whether calls that do not choose a mode train the layer."""
        return convert.is_train(self._get_layer(["layer.default_mode"]).layer.default_mode)

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        """Normalize a batch on the server.

        `out` is written when the answer comes; if it overlaps `x`, once all of it is here.
        """
        if out is not None and np.may_share_memory(out, x):
            if train is None:
                # The mode must not change on the way, or a step would be taken that the handle refuses.
                train = self.default_train()
            if train:
                raise InplaceInTraining("a training forward cannot replace its input, which backward needs")
        sent = self._sent(x)
        narrow = sent is not x
        request = service_pb2.ForwardRequest(
            ref=self._ref,
            mode=convert.mode_to_proto(train),
            input=wire.spec_of(sent),
            keep_input=train is not False,
            release_input=release,
        )
        deadline = self._connection.deadline()
        with self._explained():
            found = self._keyed(
                train is not False,
                request,
                deadline,
                lambda attempts: self._exchange.call(FORWARD, request, [sent], sent, None if narrow else out, attempts),
                lambda found: convert.is_train(found.message.mode),
            )
        answer, result = found.message, found.tensor
        self.told(answer.version)
        if train not in {None, convert.is_train(answer.mode)}:
            raise MalformedMessage("the answer to Forward is of another mode than the call")
        _require_spec("output", answer.output, request.input)
        assert result is not None, "a forward has an output"
        if narrow:
            result = widened(result, out)
        return ForwardResult(result, self._saved(x, answer, found.held) if convert.is_train(answer.mode) else None)

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Return the gradients of a forward; its input is sent again if the server no longer keeps it."""
        sent = self._sent(grad)
        request = service_pb2.BackwardRequest(
            ref=self._ref,
            grad=wire.spec_of(sent),
            update_param_grads=param_grads,
            update_grad=input_grad,
            scale=float(scale),
            momentum=float(momentum),
        )
        deadline = self._connection.deadline()
        if saved.token:
            request.saved_input = saved.token
            try:
                return self._differentiate(request, [sent], deadline, widen=sent is not grad)
            except InputEvicted:
                request.ClearField("saved_input")
        x = self._sent(saved.x)
        request.saved_forward.CopyFrom(_saved_to_proto(saved, x))
        return self._differentiate(request, [sent, x], deadline, widen=sent is not grad)

    def statistics(self) -> LayerState:
        """Return the layer's state, for somebody who evaluates with it."""
        return self.read()

    def update(self, update: StateUpdate) -> None:
        """Replace parts of the layer's state, all at once."""
        request = service_pb2.SetStateRequest(ref=self._ref, state=convert.update_to_proto(update))
        with self._explained():
            self._change("SetState", request, service_pb2.SetStateResponse)

    def merge(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, unless that was done before."""
        request = service_pb2.MergeStatisticsRequest(
            ref=self._ref, delta=delta.id, moments=convert.moments_to_proto(delta.moments)
        )
        with self._explained():
            # The delta has a name of its own, by which it is known again.
            answer = self._idempotent("MergeStatistics", request, service_pb2.MergeStatisticsResponse)
        return answer.merged

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias."""
        request = service_pb2.UpdateParamsRequest(ref=self._ref, learn_rate=float(learn_rate))
        with self._explained():
            self._change("UpdateParams", request, service_pb2.UpdateParamsResponse)

    def _differentiate(
        self, request: service_pb2.BackwardRequest, tensors: Sequence[Array], deadline: Deadline, *, widen: bool
    ) -> Gradients:
        like = tensors[0] if request.update_grad else None
        affine, maps = self._config.affine, self._config.maps
        with self._explained():
            found = self._keyed(
                affine and request.update_param_grads,
                request,
                deadline,
                lambda attempts: self._exchange.call(BACKWARD, request, tensors, like, None, attempts),
            )
        answer, result = found.message, found.tensor
        if answer.HasField("scale_grad") != affine or answer.HasField("bias_grad") != affine:
            raise MalformedMessage(f"the answer to Backward and the layer disagree on affine={affine}")
        if result is not None:
            _require_spec("grad", answer.grad, request.grad)
            if widen:
                result = widened(result, None)
        return Gradients(
            result,
            convert.vector_from_proto(answer.scale_grad, maps) if affine else None,
            convert.vector_from_proto(answer.bias_grad, maps) if affine else None,
        )

    def _get_layer(self, paths: Sequence[str]) -> service_pb2.GetLayerResponse:
        # With the version, which every answer tells the handle.
        request = service_pb2.GetLayerRequest(ref=self._ref, read_mask=FieldMask(paths=["layer.version", *paths]))
        with self._explained():
            answer = self._idempotent("GetLayer", request, service_pb2.GetLayerResponse)
        self.told(answer.layer.version)
        return answer

    def _idempotent(self, method: str, request: Message, answer: type[A]) -> A:
        """Make a call that changes nothing when it is made twice."""
        return self._connection.call(method, request, answer, self._connection.retrying())

    def _change(self, method: str, request: KeyedMessage, answer: type[A]) -> None:
        """Make a call that changes something, once."""
        self._keys.once(
            request,
            self._connection.deadline(),
            lambda attempts: self._connection.call(method, request, answer, attempts=attempts),
        )

    def _keyed(
        self,
        changes: bool,
        request: Keyed,
        left: Deadline,
        send: Callable[[RetryPolicy], B],
        changed: Callable[[B], bool] = lambda _: True,
    ) -> B:
        """Make a call that may change something; one that cannot needs no key to be made again."""
        return self._keys.once(request, left, send, changed) if changes else send(RetryPolicy(left))

    def _sent(self, x: Array) -> Array:
        # What travels of a tensor: itself, unless it is float32 and has to travel in fewer bits.
        if self._wire_dtype is None or x.dtype.newbyteorder("=") != np.float32:
            return x
        return narrowed(x, self._wire_dtype)

    def _saved(self, x: Array, answer: service_pb2.ForwardResponse, held: tuple[Array, ...]) -> SavedForward:
        moments = convert.moments_from_proto(
            answer.moments, self._config.maps, allow_nonfinite=self._config.nonfinite is NonFinitePolicy.ALLOW
        )
        scale = convert.vector_from_proto(answer.scale, self._config.maps)
        return SavedForward(x, moments, scale, answer.version, answer.saved_input, held if answer.saved_input else ())

    def flush(self) -> None:
        """Wait until no step is on its way: at once, since every call waits for its answer."""

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except LayerNotFound as error:
            if "domain" in error.metadata:
                raise LayerNotFound(
                    f"{error.message}. It was there when this handle was made: somebody deleted it",
                    error.metadata,
                ) from error
            info = self._connection.info
            forgets = info is not None and info.store.startswith("memory:")
            restarted = ", or the server was restarted, and with state memory: it forgets its layers then"
            raise LayerNotFound(
                f"{error.message}. It was there when this handle was made: somebody deleted it"
                f"{restarted if forgets else ''}. Create it again with hub.{self._config.kind.label}(...)",
                error.metadata,
            ) from error


def create_domain(
    connection: RpcClient, ref: layer_pb2.LayerRef, initial: StateUpdate | None = None
) -> layer_pb2.Layer:
    """Have a layer keep statistics of a domain; return the layer, seen there.

    Args:
        connection: To the server.
        ref: The layer, and the domain.
        initial: What a new domain's statistics begin with; None: as those of a new layer.

    Raises:
        LayerNotFound: There is no such layer.
        LimitExceeded: It has as many domains as it may have.
    """
    state = None if initial is None else convert.update_to_proto(initial)
    request = service_pb2.CreateDomainRequest(ref=ref, initial_state=state)
    answer = connection.call("CreateDomain", request, service_pb2.CreateDomainResponse, attempts=connection.retrying())
    return answer.layer


def _with_domain(ref: layer_pb2.LayerRef, domain: str) -> layer_pb2.LayerRef:
    changed = layer_pb2.LayerRef()
    changed.CopyFrom(ref)
    changed.domain = domain
    return changed


def _require_spec(what: str, got: tensor_pb2.TensorSpec, expected: tensor_pb2.TensorSpec) -> None:
    if got != expected:
        raise MalformedMessage(f"the answer's {what} is {_words(got)} (expected: {_words(expected)})")


def _words(spec: tensor_pb2.TensorSpec) -> str:
    return f"type {int(spec.dtype)}, shape {tuple(spec.shape[:8])}"


def _saved_to_proto(saved: SavedForward, sent: Array) -> service_pb2.SavedForward:
    return service_pb2.SavedForward(
        input=wire.spec_of(sent),
        moments=convert.moments_to_proto(saved.moments),
        scale=convert.vector_to_proto(saved.scale),
    )
