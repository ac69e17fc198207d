"""Layers whose batches are normalized together with those of the other members of a group."""

from __future__ import annotations

import numpy as np

from sharednorm.arithmetic.formulas import input_gradient, parameter_gradients
from sharednorm.codec import convert
from sharednorm.coordination.group import Group
from sharednorm.core.arrays import output
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState
from sharednorm.core.types import Array, NonFinitePolicy, Vector, Wide
from sharednorm.layers.backend import ForwardResult, Gradients, Parameters, SavedForward
from sharednorm.remote.backends.client_compute import ClientComputeBackend
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.context import HubContext
from sharednorm.v1 import layer_pb2


class GroupComputeBackend(ClientComputeBackend):
    """`ClientComputeBackend`, whose training batch is one part of the union of all members' batches.

    A forward takes the moments of this process's part, and normalizes it by those of the union; a backward takes the
    two sums over this part, and differentiates by those over the union. So each costs one small call, and the results
    are those of one process that has all parts. Outside of training a member is by itself.

    Args:
        context: What the hub's handles share.
        ref: The layer.
        config: The layer's, as the server confirmed it.
        max_staleness: Seconds for which evaluation may use a cached state.
        group: This process's membership.
    """

    def __init__(
        self, context: HubContext, ref: layer_pb2.LayerRef, config: LayerConfig, max_staleness: float, group: Group
    ) -> None:
        super().__init__(context, ref, config, max_staleness)
        self._group = group

    def _of(self, ref: layer_pb2.LayerRef) -> RemoteBackend:
        """Return a backend like this one of another domain."""
        return GroupComputeBackend(self._context, ref, self._config, self._copy.max_staleness, self._group)

    @property
    def how(self) -> str:
        """How tensors are dealt with, for people."""
        return f", computed here, with the group {self._group.name!r}"

    @property
    def together(self) -> bool:
        """Return True: the others' parts are normalized with it."""
        return True

    def forward(
        self,
        x: Array,
        *,
        train: bool | None,
        release: str,
        out: Array | None,
        parameters: Parameters | None = None,
    ) -> ForwardResult:
        """Normalize this process's part of a batch by the moments of the whole."""
        if not train:  # a handle with a group has always chosen
            return super().forward(x, train=False, release=release, out=out, parameters=parameters)
        batch = None if x.size == 0 else self._arithmetic.moments(x)
        try:
            with self._explained():
                answer = self._group.moments(self._ref, batch)
        finally:
            self._forget()  # also if it cannot be known whether the step was taken
        self.told(answer.version)
        maps = self._config.maps
        allow = self._config.nonfinite is NonFinitePolicy.ALLOW
        union = convert.moments_from_proto(answer.moments, maps, allow_nonfinite=allow)
        scale, bias = parameters or (
            convert.vector_from_proto(answer.scale, maps),
            convert.vector_from_proto(answer.bias, maps),
        )
        if x.size == 0:
            result = output(x, out)
        else:
            epsilon = self._config.epsilon
            result = self._arithmetic.normalize(x, union.mean, union.biased_var, scale, bias, epsilon, out)
        return ForwardResult(result, SavedForward(x, union, scale, answer.version))

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Differentiate this process's part of a training forward by the sums over the whole.

        The gradients of scale and bias are those of the whole, and are added to the layer's once.
        """
        sums = self._sums(saved, grad)
        with self._explained():
            answer = self._group.gradients(
                self._ref,
                sums,
                saved.moments,
                param_grads=param_grads and self._config.affine,
                scale=scale,
                momentum=momentum,
            )
        total = convert.sums_from_proto(answer.sums, self._config.maps)
        result = self._input_gradient(saved, grad, total) if input_grad else None
        if not self._config.affine:
            return Gradients(result, None, None)
        return Gradients(result, *parameter_gradients(saved.moments, self._config.epsilon, total[0], total[1]))

    def gradients(self, saved: SavedForward, grad: Array, *, input_grad: bool) -> tuple[Array | None, Vector, Vector]:
        """Return the gradients of a training forward: of x (None unless `input_grad`), of scale, and of bias.

        That of x is of the whole; those of scale and bias are of this process's part alone, so that they may be added
        up, or averaged, over the processes by whoever trains with them.
        """
        sums = self._sums(saved, grad)
        with self._explained():
            answer = self._group.gradients(self._ref, sums, saved.moments, param_grads=False, scale=1.0, momentum=0.0)
        total = convert.sums_from_proto(answer.sums, self._config.maps)
        result = self._input_gradient(saved, grad, total) if input_grad else None
        own = np.zeros((2, self._config.maps)) if sums is None else sums
        return result, *parameter_gradients(saved.moments, self._config.epsilon, own[0], own[1])

    def _sums(self, saved: SavedForward, grad: Array) -> Wide | None:
        return np.stack(self._arithmetic.gradient_sums(saved.x, grad, saved.moments.mean)) if grad.size else None

    def _input_gradient(self, saved: SavedForward, grad: Array, total: Wide) -> Array:
        if not grad.size:
            return output(saved.x, None)
        by = input_gradient(saved.moments, saved.scale, self._config.epsilon, total[0], total[1])
        return self._arithmetic.differentiate(saved.x, grad, by)

    def _evaluate(self, x: Array, state: LayerState, out: Array | None, parameters: Parameters | None) -> Array:
        return output(x, out) if x.size == 0 else super()._evaluate(x, state, out, parameters)
