"""The seam between a layer's API and what keeps its state and computes: this process, or a server.

`Layer` implements the API once, over a `LayerBackend`. `LocalBackend` and the remote backend implement
the seam, so that a local and a remote layer cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import FieldName, LayerState, Moments, StateFields, StateUpdate
from sharednorm.core.types import Array, Vector
from sharednorm.layers.call_queue import CallQueue
from sharednorm.layers.statistics import StatisticsDelta

Parameters: TypeAlias = tuple[Vector, Vector]
"""Scale and bias, float32 (C,) each."""


@dataclass(frozen=True, eq=False)
class SavedForward:
    """What a training forward leaves behind for its backward.

    Attributes:
        x: The input, referenced and not copied.
        moments: The batch's moments.
        scale: The scale that the forward used, float32 (C,).
        version: The layer's version with this step applied: the step's place in the order of all, from 1; 0 if the
            forward has not waited until it has one.
        token: The server's name for the input that it keeps; "" where there is none.
        held: Memory that the server reads that input in, if it is shared: nobody else gets it before this is gone.
    """

    x: Array
    moments: Moments
    scale: Vector
    version: int
    token: str = ""
    held: tuple[Array, ...] = ()


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """What a forward gives.

    Attributes:
        data: The output, shape and element type of the input.
        saved: What its backward needs; None for a forward in eval mode.
    """

    data: Array
    saved: SavedForward | None


@dataclass(frozen=True, eq=False)
class Gradients:
    """What a backward gives.

    Attributes:
        grad: Gradient with respect to the input; None if it was not asked for.
        scale_grad: This batch's gradient of the scale, float32 (C,); None if the layer is not affine.
        bias_grad: This batch's gradient of the bias, float32 (C,); None if the layer is not affine.
    """

    grad: Array | None
    scale_grad: Vector | None
    bias_grad: Vector | None


class LayerBackend(Protocol):
    """Keeps one layer's state and computes with it.

    Tensors that come here have been checked by the handle: rank, channels, sizes and element type, and, unless the
    batch is normalized `together` with others, two values a channel where the handle has chosen to train. Any strides
    and either byte order may come. A method that raises has changed nothing. Every method may be called from many
    threads at once.
    """

    @property
    def config(self) -> LayerConfig:
        """The layer's configuration."""
        ...

    @property
    def together(self) -> bool:
        """Whether a training batch is normalized with those of others, so that it may be empty or of one value."""
        ...

    @property
    def queue(self) -> CallQueue:
        """The calls of the layer that are made one after the other."""
        ...

    @property
    def domain(self) -> str:
        """Whose statistics these are; "": the layer's own."""
        ...

    def domains(self) -> tuple[str, ...]:
        """Return the names of the layer's domains, in their order."""
        ...

    def within(self, domain: str) -> LayerBackend:
        """Return the same layer with the statistics of a domain, which is made if it is not there."""
        ...

    def delete_domain(self, domain: str) -> None:
        """Forget a domain and its statistics."""
        ...

    def flush(self) -> None:
        """Wait until no step of this handle is on its way; raise what one has ended with, if no call has yet."""
        ...

    def read(self) -> LayerState:
        """Return the state of one moment, gradients included."""
        ...

    def read_fields(self, *names: FieldName) -> StateFields:
        """Return these fields of the state, all of one moment; a remote layer asks its server for no others."""
        ...

    def default_train(self) -> bool:
        """Return the mode of handles that have not chosen one."""
        ...

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        """Normalize a batch.

        Args:
            x: The batch.
            train: Whether to train; None for the layer's default.
            release: Token of a saved forward that no backward will ask for any more; "" if there is none.
            out: Where to write the output, of x's shape and type; it may overlap x in eval mode, and only there.
        """
        ...

    def backward(
        self, saved: SavedForward, grad: Array, *, param_grads: bool, input_grad: bool, scale: float, momentum: float
    ) -> Gradients:
        """Differentiate a training forward.

        Args:
            saved: What the forward left behind.
            grad: Gradient with respect to its output, of the input's shape and type.
            param_grads: Whether to accumulate the gradients of scale and bias in the layer,
                `grad = scale * new + momentum * grad`.
            input_grad: Whether to return the gradient with respect to the input.
            scale: Multiplier of the new gradients.
            momentum: Multiplier of the old ones.
        """
        ...

    def update(self, update: StateUpdate) -> None:
        """Replace the parts of the state that an update sets, all at once."""
        ...

    def merge(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, unless that was done before."""
        ...

    def update_params(self, learn_rate: float) -> None:
        """Add `learn_rate` times the accumulated gradients to scale and bias."""
        ...
