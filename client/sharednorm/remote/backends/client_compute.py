"""Layers whose state is on a server, and whose tensors stay here: only moments and gradients of parameters travel."""

from __future__ import annotations

import numpy as np

from sharednorm.arithmetic.select import arithmetic
from sharednorm.codec import convert, frames
from sharednorm.coordination.state_cache import StateCache
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, StateUpdate
from sharednorm.core.types import Array, Vector
from sharednorm.errors import InplaceInTraining, SharedNormError
from sharednorm.layers.backend import ForwardResult, Gradients, Parameters, SavedForward
from sharednorm.layers.statistics import StatisticsDelta
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.context import HubContext
from sharednorm.v1 import layer_pb2, service_pb2


class ClientComputeBackend(RemoteBackend):
    """`RemoteBackend`, whose forwards and backwards are computed in this process.

    A step takes the moments of its batch here, the server takes them into the layer's statistics, and answers with the
    parameters that the step is made with: one small call a step, and the bits that a server's processor gives.

    Args:
        context: What the hub's handles share.
        ref: The layer.
        config: The layer's, as the server confirmed it.
        max_staleness: Seconds for which evaluation may use a cached state.
    """

    def __init__(self, context: HubContext, ref: layer_pb2.LayerRef, config: LayerConfig, max_staleness: float) -> None:
        super().__init__(context, ref, config)
        self._arithmetic = arithmetic()
        self._copy = StateCache(self._ref, max_staleness)

    def _of(self, ref: layer_pb2.LayerRef) -> RemoteBackend:
        """Return a backend like this one of another domain."""
        return ClientComputeBackend(self._context, ref, self._config, self._copy.max_staleness)

    @property
    def how(self) -> str:
        """How tensors are dealt with, for people."""
        return ", computed here"

    @property
    def copy(self) -> StateCache:
        """What evaluation uses of the layer, for as long as it may."""
        return self._copy

    def is_of(self, context: HubContext) -> bool:
        """Return whether this handle is the hub's."""
        return self._context is context

    def refused(self, error: SharedNormError) -> SharedNormError:
        """Return an error that the server has given for this layer, with what may have happened to it."""
        try:
            with self._explained():
                raise error
        except SharedNormError as explained:
            return explained

    def forward(
        self,
        x: Array,
        *,
        train: bool | None,
        release: str,
        out: Array | None,
        parameters: Parameters | None = None,
    ) -> ForwardResult:
        """Normalize a batch here; in training, have the server take its moments in.

        `parameters` take the place of the layer's scale and bias, where somebody else has those.
        """
        del release  # no input is kept there
        if train is False:
            return ForwardResult(self._evaluate(x, self._state(), out, parameters), None)
        if out is not None and np.may_share_memory(out, x):
            # The mode must not change on the way, or a step would be taken that the handle refuses.
            train = self.default_train() if train is None else train
            if train:
                raise InplaceInTraining("a training forward cannot replace its input, which backward needs")
            return ForwardResult(self._evaluate(x, self._state(), out, parameters), None)
        batch = self._arithmetic.moments(x)
        request = service_pb2.PushMomentsRequest(
            ref=self._ref, mode=convert.mode_to_proto(train), moments=convert.moments_to_proto(batch)
        )
        try:
            with self._explained():
                answer = self._keys.once(
                    request,
                    self._connection.deadline(),
                    lambda attempts: self._exchange.plain(
                        "PushMoments", frames.PUSH_MOMENTS, request, service_pb2.PushMomentsResponse, attempts
                    ),
                    lambda answer: convert.is_train(answer.mode),
                )
        finally:
            self._forget()  # also if it cannot be known whether the step was taken
        self.told(answer.version)
        maps = self._config.maps
        scale, bias = parameters or (
            convert.vector_from_proto(answer.scale, maps),
            convert.vector_from_proto(answer.bias, maps),
        )
        epsilon = self._config.epsilon
        if not convert.is_train(answer.mode):
            mean, var = (convert.doubles_from_proto(vector, maps) for vector in (answer.mean, answer.var))
            return ForwardResult(self._arithmetic.normalize(x, mean, var, scale, bias, epsilon, out), None)
        result = self._arithmetic.normalize(x, batch.mean, batch.biased_var, scale, bias, epsilon, out)
        return ForwardResult(result, SavedForward(x, batch, scale, answer.version))

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Differentiate a training forward here, and have the server add the gradients of scale and bias."""
        result, scale_grad, bias_grad = self.gradients(saved, grad, input_grad=input_grad)
        if not self._config.affine:
            return Gradients(result, None, None)
        if param_grads:
            request = service_pb2.PushGradientsRequest(
                ref=self._ref,
                scale_grad=convert.vector_to_proto(scale_grad),
                bias_grad=convert.vector_to_proto(bias_grad),
                scale=float(scale),
                momentum=float(momentum),
            )
            with self._explained():
                self._keys.once(
                    request,
                    self._connection.deadline(),
                    lambda attempts: self._exchange.plain(
                        "PushGradients", frames.PUSH_GRADIENTS, request, service_pb2.PushGradientsResponse, attempts
                    ),
                )
        return Gradients(result, scale_grad, bias_grad)

    def gradients(self, saved: SavedForward, grad: Array, *, input_grad: bool) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward: of x (None unless `input_grad`), of scale, and of bias.

        Those of scale and bias are of this process's batch, and nobody is told them.
        """
        return self._arithmetic.backward(
            saved.x, grad, saved.moments, saved.scale, self._config.epsilon, input_grad=input_grad
        )

    def statistics(self) -> LayerState:
        """Return the layer's state, cached for up to `max_staleness` seconds."""
        return self._state()

    def update(self, update: StateUpdate) -> None:
        """Replace parts of the layer's state, all at once."""
        try:
            super().update(update)
        finally:
            self._forget()

    def merge(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, unless that was done before."""
        try:
            return super().merge(delta)
        finally:
            self._forget()

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias."""
        try:
            super().update_params(learn_rate)
        finally:
            self._forget()

    def _evaluate(self, x: Array, state: LayerState, out: Array | None, parameters: Parameters | None) -> Array:
        mean, var = state.mean.astype(np.float64), state.var.astype(np.float64)
        scale, bias = parameters or (state.scale, state.bias)
        return self._arithmetic.normalize(x, mean, var, scale, bias, self._config.epsilon, out)

    def _state(self) -> LayerState:
        return self._copy.current() or self._read_again()

    def _read_again(self) -> LayerState:
        reading = self._copy.ask()
        with self._explained():
            answer = self._idempotent("GetStats", reading.request, service_pb2.GetStatsResponse)
        state = self._copy.learn(reading, answer)
        self.told(state.version)
        return state

    def _forget(self) -> None:
        self._copy.changed()
