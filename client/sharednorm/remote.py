"""Layers that live on a server: a handle is a local layer whose backend asks the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from sharednorm import convert, wire
from sharednorm._calls import BACKWARD, FORWARD, Connection, Deadline
from sharednorm._seam import ForwardResult, Gradients, SavedForward
from sharednorm.config import Array, LayerConfig, NonFinitePolicy
from sharednorm.errors import InplaceInTraining, InputEvicted, LayerNotFound, MalformedMessage
from sharednorm.layers import BatchNormND
from sharednorm.state import LayerState, StateUpdate
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2


class RemoteBackend:
    """What a layer on a server does, as `LayerBackend` asks for it. Keeps nothing that could become stale.

    Args:
        connection: To the server.
        ref: The layer.
        config: The layer's, as the server confirmed it.

    Every method raises what `Connection` raises, and LayerNotFound once the layer is gone.
    """

    def __init__(self, connection: Connection, ref: layer_pb2.LayerRef, config: LayerConfig) -> None:
        self._connection = connection
        self._ref = ref
        self._config = config

    @property
    def config(self) -> LayerConfig:
        """The layer's configuration, which never changes."""
        return self._config

    @property
    def connection(self) -> Connection:
        """To the server."""
        return self._connection

    def read(self) -> LayerState:
        """Return the layer's state of one moment, gradients included."""
        request = service_pb2.GetStatsRequest(ref=self._ref, include_gradients=True)
        with self._explained():
            answer = self._connection.call("GetStats", request, service_pb2.GetStatsResponse)
        return convert.state_from_proto(answer.layer, answer.state)

    def default_train(self) -> bool:
        """Return whether calls that do not choose a mode train the layer."""
        with self._explained():
            answer = self._connection.call(
                "GetLayer", service_pb2.GetLayerRequest(ref=self._ref), service_pb2.GetLayerResponse
            )
        return is_train(answer.layer.default_mode)

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        """Normalize a batch on the server. `out` is written once the whole answer is here."""
        if out is not None and train is None:
            # The mode must not change on the way, or a step would be taken that the handle refuses.
            train = self.default_train()
        if out is not None and train:
            raise InplaceInTraining("a training forward cannot replace its input, which backward needs")
        request = service_pb2.ForwardRequest(
            ref=self._ref,
            mode=convert.mode_to_proto(train),
            input=wire.spec_of(x),
            keep_input=train is not False,
            release_input=release,
        )
        deadline = self._connection.deadline()
        with self._explained():
            answer, data = self._connection.call_tensor(FORWARD, request, [wire.payload(x)], x.nbytes, deadline)
        if train not in {None, is_train(answer.mode)}:
            raise MalformedMessage("the answer to Forward is of another mode than the call")
        result = _tensor("output", answer.output, request.input, data, out)
        return ForwardResult(result, self._saved(x, answer) if is_train(answer.mode) else None)

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Return the gradients of a forward; its input is sent again if the server no longer keeps it."""
        request = service_pb2.BackwardRequest(
            ref=self._ref,
            grad=wire.spec_of(grad),
            update_param_grads=param_grads,
            update_grad=input_grad,
            scale=float(scale),
            momentum=float(momentum),
        )
        deadline = self._connection.deadline()
        if saved.token:
            request.saved_input = saved.token
            try:
                return self._differentiate(request, [wire.payload(grad)], grad, deadline)
            except InputEvicted:
                request.ClearField("saved_input")
        request.saved_forward.CopyFrom(_saved_to_proto(saved))
        return self._differentiate(request, [wire.payload(grad), wire.payload(saved.x)], grad, deadline)

    def update(self, update: StateUpdate) -> None:
        """Replace parts of the layer's state, all at once."""
        request = service_pb2.SetStateRequest(ref=self._ref, state=convert.update_to_proto(update))
        with self._explained():
            self._connection.call("SetState", request, service_pb2.SetStateResponse)

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias."""
        request = service_pb2.UpdateParamsRequest(ref=self._ref, learn_rate=float(learn_rate))
        with self._explained():
            self._connection.call("UpdateParams", request, service_pb2.UpdateParamsResponse)

    def _differentiate(
        self, request: service_pb2.BackwardRequest, payloads: list[memoryview], grad: Array, deadline: Deadline
    ) -> Gradients:
        answer_bytes = grad.nbytes if request.update_grad else 0
        with self._explained():
            answer, data = self._connection.call_tensor(BACKWARD, request, payloads, answer_bytes, deadline)
        affine, maps = self._config.affine, self._config.maps
        if answer.HasField("scale_grad") != affine or answer.HasField("bias_grad") != affine:
            raise MalformedMessage(f"the answer to Backward and the layer disagree on affine={affine}")
        return Gradients(
            _tensor("grad", answer.grad, request.grad, data, None) if request.update_grad else None,
            convert.vector_from_proto(answer.scale_grad, maps) if affine else None,
            convert.vector_from_proto(answer.bias_grad, maps) if affine else None,
        )

    def _saved(self, x: Array, answer: service_pb2.ForwardResponse) -> SavedForward:
        moments = convert.moments_from_proto(
            answer.moments, self._config.maps, allow_nonfinite=self._config.nonfinite is NonFinitePolicy.ALLOW
        )
        scale = convert.vector_from_proto(answer.scale, self._config.maps)
        return SavedForward(x, moments, scale, answer.version, answer.saved_input)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except LayerNotFound as error:
            info = self._connection.info
            forgets = info is not None and info.store.startswith("memory:")
            restarted = ", or the server was restarted, and with state memory: it forgets its layers then"
            raise LayerNotFound(
                f"{error.message}. It was there when this handle was made: somebody deleted it"
                f"{restarted if forgets else ''}. Create it again with hub.{self._config.kind.label}(...)",
                error.metadata,
            ) from error


class RemoteBatchNorm(BatchNormND):
    """A handle of a layer on a server, which any number of handles in any number of processes share.

    It has the whole API of a local layer. Mode, saved input and gradient w.r.t. the input belong to the
    handle; parameters, statistics and their gradients to the layer. `Hub` makes them.
    """

    def __init__(self, backend: RemoteBackend, name: str, inplace: bool, train: bool | None) -> None:
        super().__init__(backend, name, inplace, train)
        self._address = backend.connection.address.text

    def __repr__(self) -> str:
        """Name the layer and its server."""
        config = self._backend.config
        return f"<RemoteBatchNorm {self.name!r}: {config.kind.label}({config.maps}) on {self._address}>"


def is_train(number: layer_pb2.Mode.ValueType) -> bool:
    """Return whether an answer's mode is train.

    Raises:
        MalformedMessage: It is neither train nor eval.
    """
    if number not in {layer_pb2.MODE_TRAIN, layer_pb2.MODE_EVAL}:
        raise MalformedMessage(f"the answer's mode is {int(number)} (expected: train or eval)")
    return number == layer_pb2.MODE_TRAIN


def _tensor(
    what: str, got: tensor_pb2.TensorSpec, wanted: tensor_pb2.TensorSpec, data: memoryview, out: Array | None
) -> Array:
    if got != wanted:
        raise MalformedMessage(f"the answer's {what} is {_words(got)} (expected: {_words(wanted)})")
    array = wire.as_array(wire.layout_of(got, data.nbytes), data)
    if out is not None:
        np.copyto(out, array)
        return out
    return array if array.flags.writeable else array.copy()


def _words(spec: tensor_pb2.TensorSpec) -> str:
    return f"type {int(spec.dtype)}, shape {tuple(spec.shape[:8])}"


def _saved_to_proto(saved: SavedForward) -> service_pb2.SavedForward:
    return service_pb2.SavedForward(
        input=wire.spec_of(saved.x),
        moments=convert.moments_to_proto(saved.moments),
        scale=convert.vector_to_proto(saved.scale),
    )
