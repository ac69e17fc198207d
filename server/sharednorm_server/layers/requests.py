"""What the service is asked and what it answers, as plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sharednorm.core.state import Moments
from sharednorm.core.types import Vector
from sharednorm_server.device.tensor_io import Output
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import CallKey, LastChange, TakenStep
from sharednorm_server.store.snapshots import SnapshotInfo

__all__ = [
    "BackwardAnswer",
    "BackwardCall",
    "CallKey",
    "ForwardAnswer",
    "ForwardCall",
    "ForwardFacts",
    "LastChange",
    "LayerKey",
    "LayerRecord",
    "PushAnswer",
    "ServiceInfo",
    "SnapshotInfo",
    "TakenStep",
    "Together",
    "Wanted",
    "always",
]

Wanted = Callable[[], bool]
"""Whether somebody still waits for the answer. Asked once, right before a change is made."""


def always() -> bool:
    """Say that somebody waits."""
    return True


@dataclass(frozen=True)
class ServiceFigures:
    """What a service holds, and what it has done since it was made.

    Attributes:
        steps: Taken, of all layers.
        layers: That somebody has asked for.
        activation_cache_bytes: Of forward inputs that are cached for backwards.
        activation_cache_evictions: Cached inputs that were evicted to make room for others.
        in_flight_bytes: Of large tensors on their way.
        device_bytes: Of the memory of the devices that are held.
        store_commits: Transactions of the store.
        store_changes: What was in them.
        store_seconds: That they took together.
    """

    steps: int
    layers: int
    activation_cache_bytes: int
    activation_cache_evictions: int
    in_flight_bytes: int
    device_bytes: int
    store_commits: int
    store_changes: int
    store_seconds: float


@dataclass(frozen=True)
class ServiceInfo:
    """What the service is made of: for people its release, and descriptions of its device and store; the store's id."""

    version: str
    device: str
    store: str
    state_id: str


@dataclass(frozen=True)
class ForwardCall:
    """A forward, without its tensor.

    Attributes:
        key: The layer.
        train: Whether to train; None for the layer's default.
        keep_input: Whether to keep the input for a backward. Training only.
        release_input: Name of a kept input of this layer that is not needed any more, or "".
        keeper: Whose input it is that is kept, if it must not outlive them; "" if it may.
        call: By which a step is known again; None: it is not.
    """

    key: LayerKey
    train: bool | None = None
    keep_input: bool = False
    release_input: str = ""
    keeper: str = ""
    call: CallKey | None = None


@dataclass(frozen=True)
class ForwardAnswer:
    """What a forward did.

    Attributes:
        output: Shape and element type of the input.
        train: Whether it trained.
        version: Of the layer: after the step in training, as read in evaluation.
        num_of_props: At that version.
        saved_input: Name of the kept input, or "".
        moments: Training: of the batch.
        scale: Training: what the step used.
        replayed: Whether the step had been taken before.
    """

    output: Output
    train: bool
    version: int
    num_of_props: int
    saved_input: str = ""
    moments: Moments | None = None
    scale: Vector | None = None
    replayed: bool = False


@dataclass(frozen=True)
class PushAnswer:
    """What a step did whose tensor somebody else normalizes, and what with.

    Attributes:
        record: The layer: after the step; as it is now, if there was none or it was taken before.
        train: Whether there was a step.
        version: Of the layer: after the step, or as read.
        num_of_props: At that version.
        scale: To normalize with.
        bias: To normalize with.
        replayed: Whether the step had been taken before.
    """

    record: LayerRecord
    train: bool
    version: int
    num_of_props: int
    scale: Vector
    bias: Vector
    replayed: bool = False


@dataclass(frozen=True)
class ForwardFacts:
    """What a training forward computed with, as its client remembers it; the input comes beside it."""

    shape: tuple[int, ...]
    dtype_name: str
    moments: Moments
    scale: Vector


@dataclass(frozen=True)
class BackwardCall:
    """A backward, without its tensors.

    Attributes:
        key: The layer.
        saved_input: Name of the forward's kept input; not looked at if `forward` is there.
        forward: The forward, if its client sends the input again.
        param_grads: Whether to add to the layer's gradients.
        input_grad: Whether to answer with the gradient of the input.
        scale: Multiplier of the new gradients of scale and bias.
        momentum: Multiplier of the old ones.
        call: By which adding them is known again; None: it is not.
    """

    key: LayerKey
    saved_input: str = ""
    forward: ForwardFacts | None = None
    param_grads: bool = True
    input_grad: bool = True
    scale: float = 1.0
    momentum: float = 0.0
    call: CallKey | None = None


Sums = npt.NDArray[np.float64]
"""Of a backward: sums of `grad` and of `grad * (x - mean)`, of shape (2, C)."""


@dataclass(frozen=True)
class Together:
    """What is kept of a group's change of a layer, so that a member can ask another server for it.

    The group itself sees to it that the change is made once, so that the key need not be the next one of its session.

    Attributes:
        key: Under which it is kept.
        content: The step, and whose parts are in it.
    """

    key: CallKey
    content: bytes


@dataclass(frozen=True)
class BackwardAnswer:
    """Gradients of one forward: of the input, if asked for; of scale and bias, if the layer is affine.

    `replayed` says whether the latter had been added to the layer's before.
    """

    grad: Output | None
    scale_grad: Vector | None
    bias_grad: Vector | None
    replayed: bool = False
