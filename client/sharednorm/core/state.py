"""What a layer remembers, and how it changes: pure functions over immutable values.

A local layer and the server apply the same functions, so that one step means one thing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Averaging, NonFinitePolicy, Vector
from sharednorm.core.validation import check_flag, is_finite, is_integer
from sharednorm.errors import (
    InvalidConfiguration,
    InvalidShape,
    LayerEmpty,
    NonFiniteInput,
    TooFewValues,
    UnsupportedDType,
)


@dataclass(frozen=True, eq=False)
class Moments:
    """First two moments of a batch, per channel, over all axes but the channel's.

    Attributes:
        count: Values per channel: N times the spatial size.
        mean: Arithmetic mean, float64 (C,). Applied as a (hi, lo) pair of float32.
        m2: Sum of squared deviations from the mean, float64 (C,).
    """

    count: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @property
    def biased_var(self) -> npt.NDArray[np.float64]:
        """Variance that normalizes the batch, m2 / count, float64 (C,)."""
        return self.m2 / self.count

    @property
    def unbiased_var(self) -> npt.NDArray[np.float64]:
        """Variance that the running average takes in, m2 / (count - 1), float64 (C,)."""
        return self.m2 / (self.count - 1)


@dataclass(frozen=True, eq=False)
class RunningAverages:
    """Running mean and variance of a layer, float32 (C,), read-only."""

    mean: Vector
    var: Vector

    def __post_init__(self) -> None:
        """See that nobody can write to the arrays."""
        self.mean.setflags(write=False)
        self.var.setflags(write=False)


@dataclass(frozen=True, eq=False)
class LayerState:
    """Parameters, statistics and gradients of a layer at one version. Arrays are float32 (C,), read-only.

    Attributes:
        scale: Multiplier of the normalized value.
        bias: Added after the multiplication.
        mean: Running mean.
        var: Running variance, unbiased.
        scale_grad: Accumulated gradient of the scale.
        bias_grad: Accumulated gradient of the bias.
        num_of_props: Steps that the running statistics have taken in: the n of the averaging factor.
        version: Steps applied since the layer was created; never decreases.
        initialized: False for a layer made with `empty=True` that has not been loaded.
        stats_frozen: Whether steps leave the running statistics as they are.
        merged: Names of the deltas that were merged last, at most `MAX_MERGED`.
    """

    scale: Vector
    bias: Vector
    mean: Vector
    var: Vector
    scale_grad: Vector
    bias_grad: Vector
    num_of_props: int = 0
    version: int = 0
    initialized: bool = True
    stats_frozen: bool = False
    merged: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        """See that nobody can write to the arrays, which any number of states may share."""
        for name in ARRAY_FIELDS:
            getattr(self, name).setflags(write=False)

    def __reduce__(self) -> tuple[type[LayerState], tuple[object, ...]]:
        """Copy and pickle by the constructor: arrays forget on that way that they are read-only."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


class StateFields(TypedDict, total=False):
    """Those fields of a `LayerState` that were asked for, all of one moment."""

    scale: Vector
    bias: Vector
    mean: Vector
    var: Vector
    scale_grad: Vector
    bias_grad: Vector
    num_of_props: int
    version: int
    initialized: bool
    stats_frozen: bool


FieldName: TypeAlias = Literal[
    "scale", "bias", "mean", "var", "scale_grad", "bias_grad", "num_of_props", "version", "initialized", "stats_frozen"
]
"""A key of `StateFields`."""


@dataclass(frozen=True, eq=False)
class StateUpdate:
    """New values for parts of a state; None leaves a part as it is. Arrays hold C values, of any shape."""

    scale: npt.ArrayLike | None = None
    bias: npt.ArrayLike | None = None
    mean: npt.ArrayLike | None = None
    var: npt.ArrayLike | None = None
    scale_grad: npt.ArrayLike | None = None
    bias_grad: npt.ArrayLike | None = None
    num_of_props: int | None = None
    stats_frozen: bool | None = None


# Up to here every number of steps is a float64 of its own.
MAX_STEPS = 1 << 53
# So many deltas a layer knows again: 16 KiB of names.
MAX_MERGED = 1024
MAX_DELTA_NAME_BYTES = 64

ARRAY_FIELDS = ("scale", "bias", "mean", "var", "scale_grad", "bias_grad")
# What `load` restores, and what an empty layer needs before it can be used.
SAVED_FIELDS = ("scale", "bias", "mean", "var")


class NormalSampler(Protocol):
    """The part of `numpy.random` or of a `Generator` that draws the initial scale."""

    def normal(self, loc: float, scale: float, size: int) -> npt.NDArray[np.float64]:
        """Draw `size` samples of N(loc, scale)."""
        ...


def initial_state(config: LayerConfig, sscale: float, sampler: NormalSampler, *, empty: bool = False) -> LayerState:
    """Return the state of a new layer: scale ~ N(1, sscale), or 1 if not affine; bias 0, mean 0, variance 1.

    Args:
        config: The layer's.
        sscale: Standard deviation of the initial scale, >= 0.
        sampler: Where the scale is drawn from. One draw of C values, also if the layer is not affine,
            as PuzzleLib does; none if it is empty.
        empty: Whether the layer waits for `load`.

    Raises:
        InvalidConfiguration: `sscale` is negative or not finite, or `empty` neither True nor False.
    """
    if not isinstance(empty, bool):
        raise InvalidConfiguration(f"empty is {empty!r} (expected: True or False)")
    if not (is_finite(sscale) and sscale >= 0):
        raise InvalidConfiguration(f"sscale is {sscale!r} (expected: a finite number >= 0)")
    blank = blank_state(config)
    if empty:
        return replace(blank, initialized=False)
    return replace(blank, scale=_frozen(sampler.normal(1.0, float(sscale) if config.affine else 0.0, config.maps)))


def blank_state(config: LayerConfig) -> LayerState:
    """Return scale 1, bias 0, mean 0, variance 1, gradients 0, and no step."""
    ones, zeros = _frozen(np.ones(config.maps)), _frozen(np.zeros(config.maps))
    return LayerState(ones, zeros, zeros, ones, zeros, zeros)


def require_initialized(state: LayerState, layer: str) -> None:
    """Check that a layer has a state to compute with.

    Raises:
        LayerEmpty: It was created empty and has not been loaded yet.
    """
    if not state.initialized:
        raise empty_error(layer)


def empty_error(layer: str) -> LayerEmpty:
    """Return the error for a layer that was created empty and has not been loaded yet."""
    return LayerEmpty(f"{layer} was created with empty=True: call load() before using it")


def batch_weight(state: LayerState, config: LayerConfig) -> float:
    """Return what the next batch weighs in the running statistics, which keep the rest of 1.

    With n the step's number since the statistics began that is f = max(initFactor / n, minFactor), or 1 - f for
    `Averaging.PRINTED`.
    """
    factor = config.factor(state.num_of_props + 1)
    return factor if config.averaging is Averaging.STANDARD else 1.0 - factor


def step(
    state: LayerState, config: LayerConfig, batch: Moments, statistics: RunningAverages | None = None
) -> LayerState:
    """Return the state after one training forward: its statistics have taken in a batch.

    `running = (1 - w) * running + w * batch` with w of `batch_weight`. The variance taken in is the unbiased one.
    Computed in float64, rounded once to float32. Where the statistics are frozen, they stay, and so does the number of
    steps that they have taken in.

    Args:
        state: The state before.
        config: The layer's.
        batch: Moments of the batch.
        statistics: What that formula gives for this state and this batch, where a device has computed it already.

    Raises:
        NonFiniteInput: The batch's moments are not finite, or do not fit float32, and the layer refuses that.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if config.nonfinite is NonFinitePolicy.REFUSE:
            refuse_nonfinite(batch)
        if state.stats_frozen:
            return replace(state, version=state.version + 1)
        if statistics is None:
            weight = batch_weight(state, config)
            statistics = RunningAverages(
                _average(state.mean, batch.mean, weight), _average(state.var, batch.unbiased_var, weight)
            )
    # All at once, and not by `replace`, which takes longer than the arithmetic of a few maps.
    return LayerState(
        state.scale,
        state.bias,
        statistics.mean,
        statistics.var,
        state.scale_grad,
        state.bias_grad,
        num_of_props=state.num_of_props + 1,
        version=state.version + 1,
        initialized=state.initialized,
        merged=state.merged,
    )


def merge_delta(state: LayerState, config: LayerConfig, name: bytes, batch: Moments) -> LayerState:
    """Return the state after a step whose batch was gathered elsewhere; the same state if it was merged before.

    Args:
        state: The state before.
        config: The layer's.
        name: The delta's, 1 to 64 bytes, by which it is known again.
        batch: Moments of all its values.

    Raises:
        InvalidConfiguration: The statistics are frozen, or the name is not one.
        TooFewValues: There is one value a map.
        NonFiniteInput: The moments are not finite, or do not fit float32, and the layer refuses that.
    """
    if not 1 <= len(name) <= MAX_DELTA_NAME_BYTES:
        raise InvalidConfiguration(
            f"the name of the delta has {len(name)} bytes (expected: 1 to {MAX_DELTA_NAME_BYTES})"
        )
    if name in state.merged:
        return state
    if state.stats_frozen:
        raise InvalidConfiguration("the layer's statistics are frozen (expected: unfreezeStats() before mergeStats())")
    require_two_values(batch)
    return replace(step(state, config, batch), merged=(*state.merged, name)[-MAX_MERGED:])


def require_two_values(batch: Moments) -> None:
    """Check that moments are of a batch that may train.

    Raises:
        TooFewValues: It has one value a map.
    """
    if batch.count < 2:
        raise TooFewValues(
            "Data has one value a map, of which no variance can be taken (expected: at least 2 in train mode; use "
            "evalMode() or a larger batch)"
        )


def accumulate_gradients(
    state: LayerState, scale_grad: Vector, bias_grad: Vector, *, scale: float, momentum: float
) -> LayerState:
    """Return the state with `grad = scale * new + momentum * grad` for scale and bias.

    Computed in float64, rounded once to float32. A multiplier of exactly 0 drops its side, whatever that holds.

    Raises:
        InvalidConfiguration: `scale` or `momentum` is not a finite number.
    """
    _check_finite("scale", scale)
    _check_finite("momentum", momentum)
    return replace(
        state,
        scale_grad=_weighted(scale, scale_grad, momentum, state.scale_grad),
        bias_grad=_weighted(scale, bias_grad, momentum, state.bias_grad),
    )


def update_params(state: LayerState, config: LayerConfig, learn_rate: float) -> LayerState:
    """Return the state after `param += learn_rate * grad`, PuzzleLib's sign. Not affine: unchanged.

    Raises:
        InvalidConfiguration: `learn_rate` is not a finite number.
    """
    _check_finite("learnRate", learn_rate)
    if not config.affine:
        return state
    return replace(
        state,
        scale=_weighted(1.0, state.scale, learn_rate, state.scale_grad),
        bias=_weighted(1.0, state.bias, learn_rate, state.bias_grad),
    )


def updated(state: LayerState, config: LayerConfig, update: StateUpdate) -> LayerState:
    """Return the state with the parts that an update sets.

    An empty layer becomes usable by an update that sets scale, bias, mean and var.

    Raises:
        InvalidShape: An array does not hold C values.
        UnsupportedDType: An array does not hold real numbers.
        InvalidConfiguration: A variance is negative, `num_of_props` is not an integer from 0 to 2**53, `stats_frozen`
            neither True nor False, or a layer that is not affine would get another scale than 1 or another bias than 0.
        LayerEmpty: The layer is empty and the update does not set all four.
    """
    arrays = {
        name: _vector(name, getattr(update, name), config.maps)
        for name in ARRAY_FIELDS
        if getattr(update, name) is not None
    }
    if not state.initialized and not set(SAVED_FIELDS) <= arrays.keys():
        raise LayerEmpty("the layer is empty: scale, bias, mean and var must be set together")
    if "var" in arrays and bool((arrays["var"] < 0).any()):
        raise InvalidConfiguration("var has a negative value (expected: variances, each >= 0)")
    if not config.affine and (
        bool((arrays.get("scale", np.float32(1)) != 1).any()) or bool((arrays.get("bias", np.float32(0)) != 0).any())
    ):
        raise InvalidConfiguration("the layer is not affine: its scale is 1 and its bias 0, fixed")
    number, frozen = update.num_of_props, update.stats_frozen
    return LayerState(
        **{name: arrays.get(name, getattr(state, name)) for name in ARRAY_FIELDS},
        num_of_props=state.num_of_props if number is None else check_steps(number),
        version=state.version,
        initialized=True,
        merged=state.merged,
        stats_frozen=state.stats_frozen if frozen is None else check_flag("stats_frozen", frozen),
    )


def one_axis(name: str, value: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return new values of a vector as an array of real numbers, of which at most one axis is longer than 1.

    Raises:
        InvalidShape: It is no array, or has two such axes.
        UnsupportedDType: It does not hold real numbers.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise InvalidShape(f"{name} is not an array: {error} (expected: one value a map)") from error
    # bfloat16 is a void type to NumPy.
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise UnsupportedDType(f"{name} holds {array.dtype} (expected: real numbers, one a map)")
    if array.ndim > 0 and max(array.shape) != array.size:
        raise InvalidShape(f"{name} has shape {array.shape} (expected: one value a map, on one axis)")
    return array


def check_steps(number: object) -> int:
    """Check a new number of steps and return it.

    Raises:
        InvalidConfiguration: It is not an integer from 0 to 2**53.
    """
    if not (is_integer(number) and 0 <= number <= MAX_STEPS):
        raise InvalidConfiguration(f"numOfProps is {number!r} (expected: an integer, 0 to 2**53)")
    return int(number)


def given(name: str, values: npt.ArrayLike | None) -> npt.ArrayLike:
    """Return what is to be assigned to a part of a state, which in a `StateUpdate` must not be None.

    Raises:
        InvalidShape: It is None.
    """
    if values is None:
        raise InvalidShape(f"{name} is None (expected: one value a map)")
    return values


def _average(running: Vector, batch: npt.NDArray[np.float64], weight: float) -> Vector:
    # A weight of exactly 0 or 1 must not let a non-finite value of the other side through.
    if weight == 0.0:
        return running
    if weight == 1.0:
        return _frozen(batch)
    return _frozen((1.0 - weight) * running.astype(np.float64) + weight * batch)


def refuse_nonfinite(batch: Moments) -> None:
    """Check that the statistics of a layer can take a batch in.

    Raises:
        NonFiniteInput: The batch's moments are not finite, or do not fit float32.
    """
    largest = float(np.finfo(np.float32).max)
    good = (np.abs(batch.mean) <= largest) & (batch.unbiased_var <= largest)
    if good.all():
        return
    bad = np.flatnonzero(~good)
    listed = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise NonFiniteInput(
        f"Data has a NaN, an infinity or a variance beyond float32 in {len(bad)} of {len(good)} maps ({listed}); "
        "the statistics stay as they were (expected: finite values; nonfinite='allow' turns this check off)",
        {"maps": listed},
    )


def _vector(name: str, value: npt.ArrayLike, maps: int) -> Vector:
    array = one_axis(name, value)
    if array.size != maps:
        raise InvalidShape(f"{name} has shape {array.shape} (expected: {maps} values, one a map)")
    return _frozen(array.reshape(maps))


def _check_finite(name: str, value: object) -> None:
    if not is_finite(value):
        raise InvalidConfiguration(f"{name} is {value!r} (expected: a finite number)")


def _weighted(first: float, a: Vector, second: float, b: Vector) -> Vector:
    with np.errstate(over="ignore", invalid="ignore"):
        left = first * a.astype(np.float64) if first != 0 else np.zeros(a.shape)
        return _frozen(left + second * b.astype(np.float64) if second != 0 else left)


def _frozen(values: npt.NDArray[Any]) -> Vector:
    # A copy of its own, so that nobody else can write to what a state holds.
    with np.errstate(over="ignore"):
        result = np.array(values, dtype=np.float32)
    result.setflags(write=False)
    return result
