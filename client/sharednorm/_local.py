"""The backend of a local layer: its state in this process."""

from __future__ import annotations

import threading

import numpy as np

from sharednorm._queue import CallQueue
from sharednorm._seam import ForwardResult, Gradients, SavedForward
from sharednorm.config import Array, LayerConfig
from sharednorm.errors import InplaceInTraining
from sharednorm.normalization import Arithmetic, arithmetic
from sharednorm.state import (
    LayerState,
    StateUpdate,
    accumulate_gradients,
    merge_delta,
    require_initialized,
    step,
    update_params,
    updated,
)
from sharednorm.statistics import StatisticsDelta


class LocalBackend:
    """Keeps a layer's state in this process and computes with the processor.

    The state is one immutable object, replaced under a lock: readers see one moment, and all changes have one
    order. Tensors are computed outside the lock, except for a step whose scale or bias another thread has
    replaced meanwhile: its output is made again with those that it is ordered behind.

    Args:
        config: The layer's configuration.
        state: The state to begin with.
        compute: The arithmetic; None for the default, see `sharednorm.normalization.arithmetic`.
    """

    def __init__(self, config: LayerConfig, state: LayerState, compute: Arithmetic | None = None) -> None:
        self._config = config
        self._state = state
        self._compute = arithmetic() if compute is None else compute
        self._lock = threading.Lock()
        self._queue = CallQueue()

    def __reduce__(self) -> tuple[type[LocalBackend], tuple[LayerConfig, LayerState]]:
        """Copy and pickle what the layer is; how it is computed is the other process's matter."""
        return type(self), (self._config, self._state)

    @property
    def config(self) -> LayerConfig:
        """The layer's configuration."""
        return self._config

    @property
    def together(self) -> bool:
        """Return False: a batch is normalized by itself."""
        return False

    @property
    def queue(self) -> CallQueue:
        """The calls of the layer that are made one after the other."""
        return self._queue

    def flush(self) -> None:
        """Wait until no step is on its way: at once, since none ever is."""

    def read(self) -> LayerState:
        """Return the state of one moment."""
        return self._state

    def default_train(self) -> bool:
        """Return True: a local layer starts in train mode, as PuzzleLib's do."""
        return True

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        """Normalize a batch; in training, take its moments into the statistics."""
        del release  # a local layer keeps no input but the handle's
        if train is None:
            train = self.default_train()
            self._config.check_shape(x.shape, train=train)
        state = self._state
        require_initialized(state, "the layer")
        if not train:
            return ForwardResult(self._evaluate(state, x, out), None)
        if out is not None and np.may_share_memory(out, x):
            raise InplaceInTraining("a training forward cannot replace its input, which backward needs")
        return self._step(state, x, out)

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Differentiate a training forward, and accumulate the gradients of scale and bias if asked to."""
        result, scale_grad, bias_grad = self._compute.backward(
            saved.x, grad, saved.moments, saved.scale, self._config.epsilon, input_grad=input_grad
        )
        if not self._config.affine:
            return Gradients(result, None, None)
        if param_grads:
            with self._lock:
                self._state = accumulate_gradients(self._state, scale_grad, bias_grad, scale=scale, momentum=momentum)
        return Gradients(result, scale_grad, bias_grad)

    def update(self, update: StateUpdate) -> None:
        """Replace the parts of the state that an update sets, all at once."""
        with self._lock:
            self._state = updated(self._state, self._config, update)

    def merge(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, unless that was done before."""
        with self._lock:
            require_initialized(self._state, "the layer")
            before, self._state = self._state, merge_delta(self._state, self._config, delta.id, delta.moments)
            return self._state is not before

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias."""
        with self._lock:
            require_initialized(self._state, "the layer")
            self._state = update_params(self._state, self._config, learn_rate)

    def _step(self, began: LayerState, x: Array, out: Array | None) -> ForwardResult:
        epsilon = self._config.epsilon
        data, batch = self._compute.forward(x, began.scale, began.bias, epsilon, out)
        with self._lock:
            now = self._state
            after = step(now, self._config, batch)
            if now.scale is not began.scale or now.bias is not began.bias:
                data = self._compute.normalize(x, batch.mean, batch.biased_var, now.scale, now.bias, epsilon, out)
            self._state = after
        return ForwardResult(data, SavedForward(x, batch, now.scale, after.version))

    def _evaluate(self, state: LayerState, x: Array, out: Array | None) -> Array:
        return self._compute.normalize(
            x,
            state.mean.astype(np.float64),
            state.var.astype(np.float64),
            state.scale,
            state.bias,
            self._config.epsilon,
            out,
        )
