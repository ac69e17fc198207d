"""Messages of the contract to the library's own types and back, for the server and the client alike.

Whatever comes from the wire is checked here; after that it is right, or a typed error was raised.
Tensors are in `wire`, errors in `status`, whose functions are offered here too.
"""

from __future__ import annotations

import enum
import functools
import struct
from collections.abc import Collection, Iterable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from sharednorm.codec.protobuf_wire import field_header
from sharednorm.codec.status import ERROR_KEY, error_from_call, error_from_detail, error_to_detail, error_to_status
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import MAX_MAPS
from sharednorm.core.state import (
    ARRAY_FIELDS,
    SAVED_FIELDS,
    FieldName,
    LayerState,
    Moments,
    StateFields,
    StateUpdate,
    check_steps,
    one_axis,
)
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy, Vector
from sharednorm.core.validation import check_domain, check_flag, check_name, check_namespace
from sharednorm.errors import InvalidConfiguration, MalformedMessage, NotSupported
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2

__all__ = [
    "ERROR_KEY",
    "call_from_proto",
    "config_from_proto",
    "config_to_proto",
    "doubles_from_proto",
    "doubles_to_proto",
    "error_from_call",
    "error_from_detail",
    "error_to_detail",
    "error_to_status",
    "fields_from_proto",
    "fields_to_paths",
    "is_train",
    "mode_from_proto",
    "mode_to_proto",
    "moments_from_proto",
    "moments_to_proto",
    "ref_from_proto",
    "ref_to_proto",
    "state_from_proto",
    "state_part_to_proto",
    "state_to_proto",
    "sums_from_proto",
    "sums_to_proto",
    "update_from_proto",
    "update_to_proto",
    "vector_from_proto",
    "vector_to_proto",
]

CALL_SESSION_BYTES = 16
MAX_CALLS = 1 << 62

E = TypeVar("E", bound=enum.Enum)

_KINDS = {
    LayerKind.BATCH_NORM: layer_pb2.LAYER_KIND_BATCH_NORM,
    LayerKind.BATCH_NORM_1D: layer_pb2.LAYER_KIND_BATCH_NORM_1D,
    LayerKind.BATCH_NORM_2D: layer_pb2.LAYER_KIND_BATCH_NORM_2D,
    LayerKind.BATCH_NORM_3D: layer_pb2.LAYER_KIND_BATCH_NORM_3D,
}
_AVERAGING = {
    Averaging.STANDARD: layer_pb2.AVERAGING_STANDARD,
    Averaging.PRINTED: layer_pb2.AVERAGING_PRINTED,
}
_NONFINITE = {
    NonFinitePolicy.REFUSE: layer_pb2.NON_FINITE_POLICY_REFUSE,
    NonFinitePolicy.ALLOW: layer_pb2.NON_FINITE_POLICY_ALLOW,
}
_MODES = {None: layer_pb2.MODE_UNSPECIFIED, True: layer_pb2.MODE_TRAIN, False: layer_pb2.MODE_EVAL}
_TRAIN = {int(mode): train for train, mode in _MODES.items()}


_FLOAT32, _FLOAT64 = np.dtype("<f4"), np.dtype("<f8")
_NUMBERS = {field.name: field.number for field in layer_pb2.LayerState.DESCRIPTOR.fields}
# Of a state: statistics travel in float64, parameters and gradients in float32.
_STATISTICS = ("mean", "var")
_DTYPES = {name: _FLOAT64 if name in _STATISTICS else _FLOAT32 for name in ARRAY_FIELDS}

# Fields of a state that a `Layer` has in an answer, and no `LayerState`.
_OF_LAYER = {"version", "initialized"}

_COUNT = struct.Struct("<2sd")
_COUNT_HEADER = field_header(4, 8)  # of one count, packed
_MAX_COUNT = 1 << 53


# --- Names and configurations -----------------------------------------------------------------------


def ref_to_proto(namespace: str, name: str, uid: str = "", domain: str = "") -> layer_pb2.LayerRef:
    """Return the message that names a layer: the one of that `uid`, or whichever has the name; and whose statistics."""
    return layer_pb2.LayerRef(namespace=namespace, name=name, uid=uid, domain=domain)


def ref_from_proto(ref: layer_pb2.LayerRef) -> tuple[str, str, str, str, int, bool]:
    """Return namespace ("default" if not set), name, uid and domain ("" if not set), version seen, whether strong.

    Raises:
        InvalidName: One of them is not allowed.
    """
    return *_checked(ref.namespace, ref.name, ref.uid, ref.domain), ref.seen_version, ref.strong


@functools.lru_cache(4096)
def _checked(namespace: str, name: str, uid: str, domain: str) -> tuple[str, str, str, str]:
    # The names of a few layers come again and again, and looking at each of their characters takes a while.
    return check_namespace(namespace), check_name(name), uid, check_domain(domain)


def call_from_proto(key: service_pb2.IdempotencyKey) -> tuple[bytes, int]:
    """Return the session and the number of a change.

    Raises:
        MalformedMessage: It is no key.
    """
    if len(key.session) != CALL_SESSION_BYTES or not 1 <= key.seq < MAX_CALLS:
        raise MalformedMessage(
            f"the key has a session of {len(key.session)} bytes and number {key.seq} (expected: {CALL_SESSION_BYTES} "
            f"bytes, the first 8 from OpenSession; and 1 or more, below {MAX_CALLS})"
        )
    return key.session, key.seq


def config_to_proto(config: LayerConfig) -> layer_pb2.LayerConfig:
    """Return a configuration as a message."""
    return layer_pb2.LayerConfig(
        kind=_KINDS[config.kind],
        maps=config.maps,
        epsilon=config.epsilon,
        init_factor=config.init_factor,
        min_factor=config.min_factor,
        affine=config.affine,
        averaging=_AVERAGING[config.averaging],
        nonfinite=_NONFINITE[config.nonfinite],
    )


def config_from_proto(message: layer_pb2.LayerConfig) -> LayerConfig:
    """Return a message's configuration. Averaging and the policy may be unset and mean their defaults.

    Raises:
        InvalidConfiguration: A value is out of its range, or a kind, average or policy is unknown.
    """
    return LayerConfig(
        kind=_member("kind", _KINDS, message.kind, None),
        maps=message.maps,
        epsilon=message.epsilon,
        init_factor=message.init_factor,
        min_factor=message.min_factor,
        affine=message.affine,
        averaging=_member("averaging", _AVERAGING, message.averaging, Averaging.STANDARD),
        nonfinite=_member("nonfinite", _NONFINITE, message.nonfinite, NonFinitePolicy.REFUSE),
    )


def mode_to_proto(train: bool | None) -> layer_pb2.Mode.ValueType:
    """Return the mode of a call; None is the layer's default."""
    return _MODES[train]


def is_train(number: layer_pb2.Mode.ValueType) -> bool:
    """Return whether an answer's mode is train.

    Raises:
        MalformedMessage: It is neither train nor eval.
    """
    if number not in {layer_pb2.MODE_TRAIN, layer_pb2.MODE_EVAL}:
        raise MalformedMessage(f"the answer's mode is {int(number)} (expected: train or eval)")
    return number == layer_pb2.MODE_TRAIN


def mode_from_proto(mode: int) -> bool | None:
    """Return whether a call trains; None is the layer's default.

    Raises:
        InvalidConfiguration: The mode is unknown.
    """
    if mode not in _TRAIN:
        raise InvalidConfiguration(f"mode is {mode} (expected: one of {sorted(_TRAIN)})")
    return _TRAIN[mode]


def _member(name: str, numbers: dict[E, Any], number: int, default: E | None) -> E:
    if number == 0 and default is not None:
        return default
    for member, known in numbers.items():
        if known == number:
            return member
    listed = ", ".join(f"{int(known)} for {member.name}" for member, known in numbers.items())
    raise InvalidConfiguration(f"{name} is {number} (expected: {listed})")


# --- Vectors and moments ----------------------------------------------------------------------------


def vector_to_proto(values: npt.ArrayLike) -> tensor_pb2.FloatVector:
    """Return values, rounded to float32 and in row-major order, as a message."""
    # The runtime takes arrays value by value, forty times slower than it parses the same bytes.
    return tensor_pb2.FloatVector.FromString(_packed(1, _float32(values)))


def vector_from_proto(message: tensor_pb2.FloatVector, maps: int) -> Vector:
    """Return a message's values, float32 (C,), read-only.

    Raises:
        MalformedMessage: There are not `maps` values.
    """
    return _vector("the vector", message, maps, _FLOAT32)


def doubles_to_proto(values: npt.ArrayLike) -> tensor_pb2.DoubleVector:
    """Return values, in float64 and in row-major order, as a message."""
    return tensor_pb2.DoubleVector.FromString(_packed(1, np.asarray(values, dtype=_FLOAT64)))


def doubles_from_proto(message: tensor_pb2.DoubleVector, maps: int) -> npt.NDArray[np.float64]:
    """Return a message's values, float64 (C,), read-only.

    Raises:
        MalformedMessage: There are not `maps` values.
    """
    return _vector("the vector", message, maps, _FLOAT64)


def moments_to_proto(moments: Moments) -> tensor_pb2.Moments:
    """Return moments as a message, to the last bit."""
    mean, m2 = np.asarray(moments.mean, dtype=_FLOAT64), np.asarray(moments.m2, dtype=_FLOAT64)
    return tensor_pb2.Moments.FromString(_packed(2, mean) + _packed(3, m2) + _COUNT.pack(_COUNT_HEADER, moments.count))


def moments_from_proto(message: tensor_pb2.Moments, maps: int, *, allow_nonfinite: bool = False) -> Moments:
    """Return a message's moments. The arrays are float64 (C,), read-only.

    Args:
        message: What was received.
        maps: Channels of the layer.
        allow_nonfinite: Whether a mean or m2 may be NaN or infinite, as a layer with `nonfinite="allow"` may have it.

    Raises:
        MalformedMessage: There is no count, or it is below 1; there are not `maps` values, or an m2 is negative or not
            finite.
        NotSupported: There are several counts, or it is not whole.
    """
    count, both = _from_bytes(message, maps) or _by_field(message, maps)
    both.setflags(write=False)
    mean, m2 = both
    if not (m2 >= 0).all() and bool((m2 < 0).any()):
        raise MalformedMessage("the moments have a negative m2 (expected: sums of squares, each >= 0)")
    if not allow_nonfinite and not np.isfinite(both).all():
        raise MalformedMessage("the moments have a NaN or an infinity (expected: finite values)")
    return Moments(count, mean, m2)


def sums_to_proto(sums: npt.NDArray[np.float64]) -> tensor_pb2.GradientSums:
    """Return the two sums of a backward, float64 (2, C), as a message, to the last bit."""
    wide = np.asarray(sums, dtype=_FLOAT64)
    return tensor_pb2.GradientSums.FromString(_packed(1, wide[0]) + _packed(2, wide[1]))


def sums_from_proto(message: tensor_pb2.GradientSums, maps: int) -> npt.NDArray[np.float64]:
    """Return a message's sums, float64 (2, C).

    Raises:
        MalformedMessage: There are not `maps` values of each.
    """
    if len(message.grad) != maps or len(message.product) != maps:
        raise MalformedMessage(
            f"the sums have {len(message.grad)} and {len(message.product)} values (expected: {maps} of each)"
        )
    return np.array([message.grad, message.product], dtype=np.float64)


def _from_bytes(message: tensor_pb2.Moments, maps: int) -> tuple[int, npt.NDArray[np.float64]] | None:
    # The count, and mean and m2, (2, C). The runtime gives values one by one, and its bytes have them as they are: one
    # packed field behind the other, then the count. None: they are not as the most common moments have them.
    data, size = message.SerializeToString(), 8 * maps
    mean, m2 = field_header(2, size), field_header(3, size)
    head = len(mean)
    if len(data) != 2 * (head + size) + _COUNT.size:
        return None
    tag, count = _COUNT.unpack_from(data, len(data) - _COUNT.size)
    usual = tag == _COUNT_HEADER and data.startswith(mean) and data.startswith(m2, head + size)
    if not usual or not 1 <= count <= _MAX_COUNT or count % 1:
        return None
    both = np.empty((2, maps))
    both[0] = np.frombuffer(data, _FLOAT64, maps, head)
    both[1] = np.frombuffer(data, _FLOAT64, maps, 2 * head + size)
    return int(count), both


def _by_field(message: tensor_pb2.Moments, maps: int) -> tuple[int, npt.NDArray[np.float64]]:
    counts = message.count
    if not counts:
        raise MalformedMessage("the moments have no count (expected: one)")
    if len(counts) != 1:
        if len(counts) == maps:
            raise NotSupported(
                f"Moments.count: {maps} counts, one a map, are not served by this release (expected: one for all maps)"
            )
        raise MalformedMessage(f"the moments have {len(counts)} counts (expected: one)")
    count = counts[0]
    if 0 < count < _MAX_COUNT and count % 1:
        raise NotSupported(
            f"Moments.count: {count!r} is not served by this release (expected: a whole number; weights make others)"
        )
    if not 1 <= count <= _MAX_COUNT:
        raise MalformedMessage(f"the moments have count {count:g} (expected: 1 to 2**53)")
    if len(message.mean) != maps or len(message.m2) != maps:
        raise MalformedMessage(
            f"the moments have {len(message.mean)} means and {len(message.m2)} m2 (expected: {maps} of each)"
        )
    return int(count), np.array([message.mean, message.m2], dtype=np.float64)


def _float32(values: npt.ArrayLike) -> npt.NDArray[Any]:
    if isinstance(values, np.ndarray) and values.dtype == _FLOAT32:
        return values
    with np.errstate(over="ignore"):
        return np.asarray(values, dtype=_FLOAT32)


def _packed(number: int, array: npt.NDArray[Any]) -> bytes:
    return field_header(number, array.nbytes) + array.tobytes()


def _vector(
    what: str, message: tensor_pb2.FloatVector | tensor_pb2.DoubleVector, maps: int, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    if len(message.values) != maps:
        raise MalformedMessage(f"{what} has {len(message.values)} values (expected: {maps}, one a map)")
    return _values(message, dtype)


def _values(message: tensor_pb2.FloatVector | tensor_pb2.DoubleVector, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # In the machine's order of bytes; `dtype` is that of the wire.
    data, count = message.SerializeToString(), len(message.values)
    size, native = dtype.itemsize * count, dtype.newbyteorder("=")
    if count and len(data) == len(field_header(1, size)) + size:  # as in `_from_bytes`
        array = np.frombuffer(data, dtype, count, len(data) - size).astype(native)
    else:
        array = np.array(message.values, dtype=native)
    array.setflags(write=False)
    return array


def _kept(values: npt.NDArray[Any]) -> Vector:
    # As a state keeps it, whose statistics are float32, too.
    with np.errstate(over="ignore"):
        array = values.astype(np.float32, copy=False)
    array.setflags(write=False)
    return array


# --- States -----------------------------------------------------------------------------------------


def state_to_proto(state: LayerState, gradients: bool) -> layer_pb2.LayerState:
    """Return a state as a message, with its accumulated gradients or without them."""
    arrays = ARRAY_FIELDS if gradients else SAVED_FIELDS
    return state_part_to_proto(state, {*arrays, "num_of_props", "stats_frozen"})


def state_part_to_proto(state: LayerState, names: Collection[str]) -> layer_pb2.LayerState:
    """Return those fields of a state, by their names in the message, that this release has."""
    parts = []
    for name in ARRAY_FIELDS:
        if name in names:
            vector = _packed(1, np.asarray(getattr(state, name), dtype=_DTYPES[name]))
            parts += [field_header(_NUMBERS[name], len(vector)), vector]
    message = layer_pb2.LayerState.FromString(b"".join(parts))
    if "num_of_props" in names:
        message.num_of_props = state.num_of_props
    if "stats_frozen" in names:
        message.stats_frozen = state.stats_frozen
    return message


def fields_to_paths(names: Iterable[FieldName]) -> list[str]:
    """Return what the read mask of GetLayer calls fields of a state."""
    return [f"layer.{name}" if name in _OF_LAYER else f"state.{name}" for name in names]


def fields_from_proto(message: service_pb2.GetLayerResponse, names: Iterable[FieldName], maps: int) -> StateFields:
    """Return the fields of a state that an answer was asked for.

    Raises:
        MalformedMessage: One is missing, or does not hold one value a map.
    """
    present, found = _present(message.state), dict[str, Any]()
    for name in names:
        if name in _OF_LAYER:
            found[name] = getattr(message.layer, name)
        elif name not in present:
            raise MalformedMessage(f"the layer's state has no {name}")
        elif name in _DTYPES:
            found[name] = _kept(_vector(name, present[name], maps, _DTYPES[name]))
        else:
            found[name] = present[name]
    return cast("StateFields", found)


def state_from_proto(layer: layer_pb2.Layer, message: layer_pb2.LayerState) -> LayerState:
    """Return the state that an answer describes. Gradients that it does not carry are 0.

    Raises:
        MalformedMessage: A parameter or statistic is missing, or does not hold one value a map.
    """
    maps = layer.config.maps
    vectors = _all_vectors(message, maps) or _each_vector(message, maps)
    scale, bias, mean, var, scale_grad, bias_grad = vectors
    return LayerState(
        scale,
        bias,
        mean,
        var,
        scale_grad,
        bias_grad,
        num_of_props=(message if message.HasField("num_of_props") else layer).num_of_props,
        version=layer.version,
        initialized=layer.initialized,
        stats_frozen=(message if message.HasField("stats_frozen") else layer).stats_frozen,
    )


def _all_vectors(message: layer_pb2.LayerState, maps: int) -> tuple[Vector, ...] | None:
    # As a server of this release sends them: in the runtime's bytes of the message, parameters and gradients are at the
    # begin and statistics at the end, one behind the other, with the same headers. None: something is different, as
    # another release may send it.
    if maps > MAX_MAPS or len(message.mean.values) != maps or len(message.var.values) != maps:
        return None
    data = message.SerializeToString()
    gradients = message.HasField("scale_grad") or message.HasField("bias_grad")
    names = ("scale", "bias", "scale_grad", "bias_grad") if gradients else ("scale", "bias")
    narrow, wide = _rows(data, names, maps, end=False), _rows(data, _STATISTICS, maps, end=True)
    if narrow is None or wide is None:
        return None
    mean, var = _kept(wide)
    zeros = _zeros(maps)
    return narrow[0], narrow[1], mean, var, *(narrow[2:] if gradients else (zeros, zeros))


def _rows(data: bytes, names: tuple[str, ...], maps: int, *, end: bool) -> npt.NDArray[Any] | None:
    # Vectors of one type that stand at the begin or at the end of a message's bytes, one a row.
    heads, step, dtype = _layout(names, maps)
    nbytes = len(heads) * step
    begin = len(data) - nbytes if end else 0
    if begin < 0 or len(data) < nbytes:
        return None
    for index, head in enumerate(heads):
        if not data.startswith(head, begin + index * step):
            return None
    rows = np.frombuffer(data, np.uint8, nbytes, begin).reshape(len(heads), step)[:, len(heads[0]) :]
    return np.ascontiguousarray(rows).view(dtype).astype(dtype.newbyteorder("="), copy=False)


@functools.lru_cache(64)
def _layout(names: tuple[str, ...], maps: int) -> tuple[list[bytes], int, np.dtype[Any]]:
    # What stands in front of each vector, how far they are apart, and their type on the wire.
    dtype = _DTYPES[names[0]]
    size = dtype.itemsize * maps
    inner = field_header(1, size)
    heads = [field_header(_NUMBERS[name], len(inner) + size) + inner for name in names]
    return heads, len(heads[0]) + size, dtype


def _each_vector(message: layer_pb2.LayerState, maps: int) -> tuple[Vector, ...]:
    present = _present(message)
    missing = [name for name in SAVED_FIELDS if name not in present]
    if missing:
        raise MalformedMessage(f"the layer's state has no {missing[0]}")
    return tuple(
        _kept(_vector(name, present[name], maps, _DTYPES[name])) if name in present else _zeros(maps)
        for name in ARRAY_FIELDS
    )


@functools.lru_cache(64)
def _zeros(maps: int) -> Vector:
    zeros = np.zeros(maps, np.float32)
    zeros.setflags(write=False)
    return zeros


def update_to_proto(update: StateUpdate) -> layer_pb2.LayerState:
    """Return an update as a message that sets what the update sets.

    Raises:
        InvalidShape: An array has more than one axis that is longer than 1.
        UnsupportedDType: An array does not hold real numbers.
        InvalidConfiguration: `num_of_props` is not an integer from 0 to 2**53.
    """
    message = layer_pb2.LayerState()
    if update.num_of_props is not None:
        message.num_of_props = check_steps(update.num_of_props)
    if update.stats_frozen is not None:
        message.stats_frozen = check_flag("stats_frozen", update.stats_frozen)
    for name in ARRAY_FIELDS:
        values = getattr(update, name)
        if values is not None:
            vector = one_axis(name, values)
            wide = name in _STATISTICS
            getattr(message, name).CopyFrom(doubles_to_proto(vector) if wide else vector_to_proto(vector))
    return message


def update_from_proto(message: layer_pb2.LayerState) -> StateUpdate:
    """Return the update that a message asks for, in float32. `state.updated` checks lengths and ranges."""
    present = _present(message)
    vectors = {name: _kept(_values(present[name], _DTYPES[name])) for name in ARRAY_FIELDS if name in present}
    return StateUpdate(**vectors, num_of_props=present.get("num_of_props"), stats_frozen=present.get("stats_frozen"))


def _present(message: layer_pb2.LayerState) -> dict[str, Any]:
    return {field.name: value for field, value in message.ListFields()}
