"""The API of a layer as a type: what local and remote layers both are."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sharednorm.core.state import LayerState
from sharednorm.core.types import Array, Vector
from sharednorm.files.state_file import Source, Target
from sharednorm.layers.statistics import StatisticsDelta
from sharednorm.layers.variable import Variable


@runtime_checkable
class Layer(Protocol):
    """A batch-normalization layer, wherever it lives. `BatchNormND` documents each member."""

    name: str | None
    inplace: bool

    @property
    def maps(self) -> int:
        """Channels, C."""
        ...

    @property
    def size(self) -> int:
        """Channels, C, as `BatchNorm` calls them."""
        ...

    @property
    def epsilon(self) -> float:
        """What is added to the variance before the square root."""
        ...

    @property
    def initFactor(self) -> float:
        """Numerator of the averaging factor f = max(initFactor / numOfProps, minFactor)."""
        ...

    @property
    def minFactor(self) -> float:
        """Lower bound of the averaging factor."""
        ...

    @property
    def affine(self) -> bool:
        """Whether scale and bias are parameters; otherwise they are fixed at 1 and 0."""
        ...

    @property
    def averaging(self) -> str:
        """How the running statistics take in a batch: "standard" or "printed"."""
        ...

    @property
    def nonfinite(self) -> str:
        """What a training batch with a NaN or an infinity does: "refuse" or "allow"."""
        ...

    @property
    def calctype(self) -> np.dtype[Any] | None:
        """The one element type that the handle takes; None for any of the three."""
        ...

    @property
    def train(self) -> bool:
        """The handle's mode; the layer's default while it has not chosen. Assigning is `trainMode` or `evalMode`."""
        ...

    @train.setter
    def train(self, train: bool) -> None: ...

    @property
    def numOfProps(self) -> int:
        """Steps that the running statistics have taken in; saved and restored. May be set."""
        ...

    @numOfProps.setter
    def numOfProps(self, steps: int) -> None: ...

    @property
    def version(self) -> int:
        """Steps that the layer has applied since it was created; never decreases."""
        ...

    @property
    def scale(self) -> Vector:
        """Multiplier of the normalized value. Raises LayerEmpty before an empty layer is loaded."""
        ...

    @scale.setter
    def scale(self, values: npt.ArrayLike) -> None: ...

    @property
    def bias(self) -> Vector:
        """Added after the multiplication. Raises LayerEmpty before an empty layer is loaded."""
        ...

    @bias.setter
    def bias(self, values: npt.ArrayLike) -> None: ...

    @property
    def mean(self) -> Vector:
        """Running mean. Raises LayerEmpty before an empty layer is loaded."""
        ...

    @mean.setter
    def mean(self, values: npt.ArrayLike) -> None: ...

    @property
    def var(self) -> Vector:
        """Running variance, unbiased. Raises LayerEmpty before an empty layer is loaded."""
        ...

    @var.setter
    def var(self, values: npt.ArrayLike) -> None: ...

    @property
    def vars(self) -> Mapping[str, Variable]:
        """The parameters, "scale" and "bias"; also of a layer that is not affine, where they are fixed."""
        ...

    @property
    def attrs(self) -> Mapping[str, Vector]:
        """The statistics, "mean" and "var", both of one moment."""
        ...

    @property
    def inData(self) -> Array | None:
        """The last forward's input itself; None before a forward and after `reset`."""
        ...

    @property
    def data(self) -> Array | None:
        """The last forward's output; None before a forward and after `reset`."""
        ...

    @property
    def grad(self) -> Array | None:
        """The last backward's gradient with respect to the input; None if it was not asked for."""
        ...

    @property
    def savemean(self) -> Vector | None:
        """Mean of the last forward's batch, of the state's shape; None unless it trained."""
        ...

    @property
    def saveinvvar(self) -> Vector | None:
        """1 / sqrt(biased variance + epsilon) of the last forward's batch, like `savemean`."""
        ...

    @property
    def scalegrad(self) -> Vector | None:
        """The last backward's own gradient of the scale, of the state's shape; None if not affine."""
        ...

    @property
    def biasgrad(self) -> Vector | None:
        """The last backward's own gradient of the bias, of the state's shape; None if not affine."""
        ...

    def __call__(self, data: Array, out: Array | None = None) -> Array:
        """Normalize a batch, into `out` if given, and remember it for `backward`."""
        ...

    def forward_async(self, data: Array, out: Array | None = None) -> Future[Array]:
        """Begin to normalize a batch, behind what was begun on this layer before; return a future of the output."""
        ...

    def flush(self) -> None:
        """Wait until every step of this handle has been taken; raise what one has ended with, if nobody has yet."""
        ...

    def backward(
        self,
        grad: Array,
        updParamGrads: bool = True,
        updGrad: bool = True,
        scale: float = 1.0,
        momentum: float = 0.0,
    ) -> None:
        """Differentiate the last forward, which must have trained, and leave the result in `grad`."""
        ...

    @property
    def statsFrozen(self) -> bool:
        """Whether training steps leave mean, var and numOfProps as they are."""
        ...

    @property
    def domain(self) -> str:
        """Whose running statistics this handle uses; "" for the layer's own."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that the layer keeps statistics of beside its own, in the order of their names."""
        ...

    def inDomain(self, domain: str) -> Layer:
        """Return another handle of the layer, which uses the running statistics of a domain."""
        ...

    def deleteDomain(self, domain: str) -> None:
        """Forget a domain and its statistics, for all handles of the layer."""
        ...

    def freezeStats(self) -> None:
        """Keep the running statistics as they are, apart from the mode."""
        ...

    def unfreezeStats(self) -> None:
        """Have training steps taken into the running statistics again."""
        ...

    def mergeStats(self, delta: StatisticsDelta) -> bool:
        """Take statistics that were gathered elsewhere into the running ones, once; return whether it was now."""
        ...

    def resetStats(self) -> None:
        """Set mean, var and numOfProps to 0, 1 and 0."""
        ...

    def zeroGradParams(self) -> None:
        """Set the accumulated gradients of scale and bias to zero."""
        ...

    def updateParams(self, learnRate: float) -> None:
        """Add `learnRate` times the accumulated gradients to scale and bias."""
        ...

    def trainMode(self) -> None:
        """Set this handle to train mode and forget the last forward."""
        ...

    def evalMode(self) -> None:
        """Set this handle to eval mode and forget the last forward."""
        ...

    def reset(self) -> None:
        """Forget the last forward and its gradients; the mode and the layer stay as they are."""
        ...

    def calcMode(self, T: npt.DTypeLike) -> None:
        """Take tensors of one element type only: float32, float16 or bfloat16."""
        ...

    def snapshot(self) -> LayerState:
        """Return parameters, statistics, gradients and counters, all of one moment, as arrays of shape (C,)."""
        ...

    def getVar(self, name: str) -> Variable:
        """Return `vars[name]`; the name is "scale" or "bias"."""
        ...

    def numOfParams(self) -> int:
        """Return the number of values of scale and bias together."""
        ...

    def paramSize(self, unit: str | None = None) -> float:
        """Return the size of scale and bias in bytes, or in units of 1024 ("kb") or 1024**2 bytes ("mb")."""
        ...

    def dataShapeFrom(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for an input of that shape: the same."""
        ...

    def gradShapeFrom(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input's gradient for an output's gradient of that shape: the same."""
        ...

    def save(self, hdf: Target | None = None, *, name: str | None = None) -> bytes | None:
        """Save scale, bias, mean, var and numOfProps. `sharednorm.files.state_file` describes the formats."""
        ...

    def load(self, hdf: Source, *, name: str | None = None) -> None:
        """Load what `save` or PuzzleLib wrote, all at once."""
        ...
