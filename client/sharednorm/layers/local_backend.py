"""The backend of a local layer: its state in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import cast

import numpy as np

from sharednorm.arithmetic.base import Arithmetic
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.domains import Domains, blank_statistics, swapped, with_domain, without_domain
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import (
    FieldName,
    LayerState,
    StateFields,
    StateUpdate,
    accumulate_gradients,
    merge_delta,
    require_initialized,
    step,
    update_params,
    updated,
)
from sharednorm.core.types import Array
from sharednorm.errors import InplaceInTraining
from sharednorm.layers.backend import ForwardResult, Gradients, SavedForward
from sharednorm.layers.call_queue import CallQueue
from sharednorm.layers.statistics import StatisticsDelta


class _Kept:
    """What a layer remembers, for all its handles: its state, with its own statistics, and those of its domains.

    All is immutable, and replaced under a lock as a whole: readers see one moment, and all changes have one order.
    """

    def __init__(self, state: LayerState, domains: Domains) -> None:
        self.lock = threading.Lock()
        self.queue = CallQueue()
        self.now: tuple[LayerState, Domains] = state, domains

    def __reduce__(self) -> tuple[type[_Kept], tuple[LayerState, Domains]]:
        """Copy and pickle what is remembered."""
        return type(self), self.now

    def read(self, domain: str) -> LayerState:
        """Return the state with the statistics of a domain."""
        state, domains = self.now
        return swapped(state, domains, "", domain, "the layer")[0]

    def change(self, domain: str, change: Callable[[LayerState], LayerState]) -> tuple[LayerState, LayerState]:
        """Replace the state, seen in a domain, by what a function makes of it; return both. If that raises: nothing."""
        with self.lock:
            before, rest = swapped(*self.now, "", domain, "the layer")
            after = change(before)
            self.now = swapped(after, rest, domain, "", "the layer")
        return before, after


class LocalBackend:
    """Keeps a layer's state in this process and computes with the processor.

    Tensors are computed outside the state's lock, except for a step whose scale or bias another thread has replaced
    meanwhile: its output is made again with those that it is ordered behind.

    Args:
        config: The layer's configuration.
        state: The state to begin with.
        compute: The arithmetic; None for the default, see `sharednorm.arithmetic.select.arithmetic`.
    """

    def __init__(self, config: LayerConfig, state: LayerState, compute: Arithmetic | None = None) -> None:
        self._config = config
        self._kept = _Kept(state, {})
        self._domain = ""
        self._compute = arithmetic() if compute is None else compute

    def __getstate__(self) -> dict[str, object]:
        """Copy and pickle what the layer is; how it is computed is the other process's matter."""
        return {name: value for name, value in self.__dict__.items() if name != "_compute"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Compute as this process does."""
        self.__dict__.update(state)
        self._compute = arithmetic()

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
        return self._kept.queue

    @property
    def domain(self) -> str:
        """Whose statistics these are; "": the layer's own."""
        return self._domain

    def domains(self) -> tuple[str, ...]:
        """Return the names of the layer's domains, in their order."""
        return tuple(sorted(self._kept.now[1]))

    def within(self, domain: str) -> LocalBackend:
        """Return the same layer with the statistics of a domain, which is made if it is not there."""
        with self._kept.lock:
            state, domains = self._kept.now
            if domain and domain not in domains:
                blank = blank_statistics(self._config, StateUpdate())
                self._kept.now = state, with_domain(domains, domain, blank)
        inside = object.__new__(LocalBackend)
        inside.__dict__.update(self.__dict__, _domain=domain)
        return inside

    def delete_domain(self, domain: str) -> None:
        """Forget a domain and its statistics."""
        with self._kept.lock:
            state, domains = self._kept.now
            self._kept.now = state, without_domain(domains, domain, "the layer")

    def flush(self) -> None:
        """Wait until no step is on its way: at once, since none ever is."""

    def read(self) -> LayerState:
        """Return the state of one moment."""
        return self._kept.read(self._domain)

    def read_fields(self, *names: FieldName) -> StateFields:
        """Return these fields of the state, all of one moment."""
        state = self.read()
        return cast("StateFields", {name: getattr(state, name) for name in names})

    def default_train(self) -> bool:
        """Return True: a local layer starts in train mode, as PuzzleLib's do."""
        return True

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        """Normalize a batch; in training, take its moments into the statistics."""
        del release  # a local layer keeps no input but the handle's
        if train is None:
            train = self.default_train()
            self._config.check_shape(x.shape, train=train)
        state = self.read()
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
            self._change(
                lambda state: accumulate_gradients(state, scale_grad, bias_grad, scale=scale, momentum=momentum)
            )
        return Gradients(result, scale_grad, bias_grad)

    def update(self, update: StateUpdate) -> None:
        """Replace the parts of the state that an update sets, all at once."""
        self._change(lambda state: updated(state, self._config, update))

    def merge(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, unless that was done before."""

        def change(state: LayerState) -> LayerState:
            require_initialized(state, "the layer")
            return merge_delta(state, self._config, delta.id, delta.moments)

        before, after = self._change(change)
        return after is not before

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias."""

        def change(state: LayerState) -> LayerState:
            require_initialized(state, "the layer")
            return update_params(state, self._config, learn_rate)

        self._change(change)

    def _change(self, change: Callable[[LayerState], LayerState]) -> tuple[LayerState, LayerState]:
        return self._kept.change(self._domain, change)

    def _step(self, began: LayerState, x: Array, out: Array | None) -> ForwardResult:
        epsilon = self._config.epsilon
        data, batch = self._compute.forward(x, began.scale, began.bias, epsilon, out)

        def change(now: LayerState) -> LayerState:
            nonlocal data
            after = step(now, self._config, batch)
            if now.scale is not began.scale or now.bias is not began.bias:
                data = self._compute.normalize(x, batch.mean, batch.biased_var, now.scale, now.bias, epsilon, out)
            return after

        now, after = self._change(change)
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
