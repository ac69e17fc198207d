"""Layers whose tensors stay here, and whose training runs ahead of the server."""

from __future__ import annotations

import numpy as np

from sharednorm.codec import convert
from sharednorm.coordination.idempotency import Keys
from sharednorm.coordination.push_queue import PushStream
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import FieldName, LayerState, StateFields, StateUpdate, refuse_nonfinite
from sharednorm.core.types import Array, NonFinitePolicy, Vector
from sharednorm.layers.backend import ForwardResult, Gradients, Parameters, SavedForward
from sharednorm.layers.statistics import StatisticsDelta
from sharednorm.remote.backends.client_compute import ClientComputeBackend
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.context import HubContext
from sharednorm.v1 import layer_pb2, service_pb2


class AsyncComputeBackend(ClientComputeBackend):
    """`ClientComputeBackend`, whose training forwards do not wait for the server to take their steps.

    A forward normalizes by its batch's moments and by the parameters that this handle has heard of last. Whatever reads
    or changes the layer otherwise waits until all steps of the handle have been answered, so that a handle sees what
    it has done. A step that fails is told by the next call of the handle, once; those behind it are not sent.

    Args:
        context: What the hub's handles share.
        ref: The layer.
        config: The layer's, as the server confirmed it.
        max_staleness: Seconds for which evaluation may use a cached state.
        max_pending: Most steps that have not been answered.
    """

    def __init__(
        self,
        context: HubContext,
        ref: layer_pb2.LayerRef,
        config: LayerConfig,
        max_staleness: float,
        max_pending: int,
    ) -> None:
        super().__init__(context, ref, config, max_staleness)
        self._sender = context.sender
        self._line = PushStream(
            self._ref, config.maps, self.copy.changed, self.refused, Keys(context.session), max_pending
        )

    def _of(self, ref: layer_pb2.LayerRef) -> RemoteBackend:
        """Return a backend like this one of another domain."""
        return AsyncComputeBackend(self._context, ref, self._config, self.copy.max_staleness, self._line.max_pending)

    @property
    def how(self) -> str:
        """How tensors are dealt with, for people."""
        return f", computed here, at most {self._line.max_pending} steps ahead"

    def flush(self) -> None:
        """Wait until every step has been answered; raises what one has ended with, if no call has raised it yet."""
        self._sender.settle(self._line)

    def read(self) -> LayerState:
        """Return the layer's state of one moment behind this handle's steps, gradients included."""
        self.flush()
        return super().read()

    def read_fields(self, *names: FieldName) -> StateFields:
        """Return these fields of the layer's state, all of one moment behind this handle's steps."""
        self.flush()
        return super().read_fields(*names)

    def forward(
        self,
        x: Array,
        *,
        train: bool | None,
        release: str,
        out: Array | None,
        parameters: Parameters | None = None,
    ) -> ForwardResult:
        """Normalize a batch here; in training, have its moments sent in the background."""
        if not train:  # such a handle has always chosen
            self.flush()
            return super().forward(x, train=False, release=release, out=out, parameters=parameters)
        self._sender.check(self._line)
        batch = self._arithmetic.moments(x)
        if self._config.nonfinite is NonFinitePolicy.REFUSE:
            with np.errstate(over="ignore", invalid="ignore"):
                refuse_nonfinite(batch)
        known = self._parameters()  # of a layer that has some
        scale, bias = parameters or known
        epsilon = self._config.epsilon
        result = self._arithmetic.normalize(x, batch.mean, batch.biased_var, scale, bias, epsilon, out)
        request = service_pb2.PushMomentsRequest(
            ref=self._ref, mode=layer_pb2.MODE_TRAIN, moments=convert.moments_to_proto(batch)
        )
        self._sender.push(self._line, request)
        return ForwardResult(result, SavedForward(x, batch, scale, version=0))

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Differentiate a training forward here; gradients of scale and bias follow the steps of this handle."""
        if param_grads and self._config.affine:
            self.flush()
        return super().backward(
            saved, grad, param_grads=param_grads, input_grad=input_grad, scale=scale, momentum=momentum
        )

    def gradients(self, saved: SavedForward, grad: Array, *, input_grad: bool) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward, of which the server is told nothing."""
        self._sender.check(self._line)
        return super().gradients(saved, grad, input_grad=input_grad)

    def statistics(self) -> LayerState:
        """Return the layer's state behind this handle's steps, cached for up to `max_staleness` seconds."""
        self.flush()
        return super().statistics()

    def update(self, update: StateUpdate) -> None:
        """Replace parts of the layer's state, all at once, behind this handle's steps."""
        self.flush()
        try:
            super().update(update)
        finally:
            if update.scale is not None or update.bias is not None:
                self._sender.learn(self._line, None, 0)

    def merge(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, behind this handle's steps."""
        self.flush()
        return super().merge(delta)

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias, behind this handle's steps."""
        self.flush()
        try:
            super().update_params(learn_rate)
        finally:
            self._sender.learn(self._line, None, 0)

    def _parameters(self) -> Parameters:
        known, epoch = self._line.parameters, self._line.epoch
        if known is None:
            state = self._read_again()
            known = state.scale, state.bias
            self._sender.learn(self._line, known, epoch)
        return known
