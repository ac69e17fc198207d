"""Records, changes and snapshots as what Redis keeps: fields of hashes, and bytes.

A layer is a hash. Its vectors are little-endian float32, its running statistics float64, so that `redis-cli` and NumPy
show them. Of a record that replaces another one only those fields are written whose values are other objects.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import numpy.typing as npt

from sharednorm.core.domains import Domains, DomainStatistics, statistics_of, with_statistics
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, Moments, blank_state
from sharednorm.core.types import Vector
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.codec import (
    config_from_text,
    config_to_text,
    names_from_bytes,
    names_to_bytes,
    statistics_from_bytes,
    statistics_to_bytes,
    widened,
)
from sharednorm_server.store.records import LastChange, TakenStep

Fields = dict[bytes, bytes]

MARK, UID, CONFIG, TRAIN, INITIALIZED, VERSION = b"mark", b"uid", b"config", b"train", b"initialized", b"version"
_VECTORS = ("scale", "bias", "scale_grad", "bias_grad")
_STATISTICS = b"statistics:"  # and the domain

_SET = struct.Struct("<QBI")  # steps, whether they are frozen, bytes of the names that were merged
_CHANGE = struct.Struct("<QQQBHI")  # number, version, steps, what follows, bytes of the content, channels
_STEP, _SUMS = 1, 2
_COUNT = struct.Struct("<Q")
_PART = struct.Struct("<II")  # bytes of a name and of a value
TAKEN = struct.Struct("<dQ")  # of a snapshot: when, and steps


def to_fields(record: LayerRecord, before: LayerRecord | None = None) -> tuple[Fields, list[bytes]]:
    """Return the fields of a record that another has not, and the names of those that it has no more."""
    state, old = record.state, None if before is None else before.state
    found: Fields = {MARK: record.mark, VERSION: b"%d" % state.version}
    if before is None or old is None:
        found[UID] = record.key.uid.encode()
        found[CONFIG] = config_to_text(record.config).encode()
    if before is None or record.train is not before.train:
        found[TRAIN] = b"%d" % record.train
    if old is None or state.initialized is not old.initialized:
        found[INITIALIZED] = b"%d" % state.initialized
    for name in _VECTORS:
        value = getattr(state, name)
        if old is None or value is not getattr(old, name):
            found[name.encode()] = _to_bytes(value)
    own = statistics_of(state)
    if old is None or not _same(own, statistics_of(old)):
        found[_STATISTICS] = _set_to_bytes(own)
    gone: list[bytes] = []
    domains: Domains = {} if before is None else before.domains
    if record.domains is not domains:
        gone = [_STATISTICS + domain.encode() for domain in domains.keys() - record.domains.keys()]
        for domain, each in record.domains.items():
            if domain not in domains or not _same(each, domains[domain]):
                found[_STATISTICS + domain.encode()] = _set_to_bytes(each)
    return found, gone


def to_record(key: LayerKey, found: Mapping[bytes, bytes]) -> LayerRecord:
    """Return the record of a layer's hash.

    Raises:
        KeyError, ValueError: It is none.
    """
    config = config_from_text(found[CONFIG])
    blank = blank_state(config)
    sets = {
        name[len(_STATISTICS) :].decode(): _set_from_bytes(value, config)
        for name, value in found.items()
        if name.startswith(_STATISTICS)
    }
    scale, bias, scale_grad, bias_grad = (_from_bytes(found[name.encode()], config) for name in _VECTORS)
    state = LayerState(
        scale, bias, blank.mean, blank.var, scale_grad, bias_grad,
        version=int(found[VERSION]), initialized=found[INITIALIZED] == b"1",
    )  # fmt: skip
    state = with_statistics(state, sets.pop(""))
    whole = LayerKey(key.namespace, key.name, found[UID].decode())
    return LayerRecord(whole, config, state, found[TRAIN] == b"1", sets).marked(found[MARK])


def snapshot_to_bytes(record: LayerRecord) -> bytes:
    """Return a record as one value, without gradients."""
    found, _ = to_fields(record)
    for name in (MARK, b"scale_grad", b"bias_grad"):
        del found[name]
    return _packed(found)


def snapshot_from_bytes(key: LayerKey, data: bytes) -> LayerRecord:
    """Return the record of such a value."""
    found = _unpacked(data)
    zeros = _to_bytes(blank_state(config_from_text(found[CONFIG])).scale_grad)
    record = to_record(key, {**found, MARK: b"", b"scale_grad": zeros, b"bias_grad": zeros})
    return replace(record)  # with a mark of its own


def widened_fields(found: Mapping[bytes, bytes]) -> Fields:
    """Return those fields of a layer whose running statistics are float32, as version 1 had them, as they are now."""
    new: Fields = {}
    for name, value in found.items():
        if name.startswith(_STATISTICS):
            at = _SET.size + _SET.unpack_from(value)[2]
            new[name] = value[:at] + widened(value[at:])
    return new


def widened_snapshot(data: bytes) -> bytes:
    """Return a snapshot of version 1 as it is now."""
    found = _unpacked(data)
    return _packed({**found, **widened_fields(found)})


def change_to_bytes(change: LastChange) -> bytes:
    """Return what is remembered of a session's last change, as one value."""
    step, sums = change.step, change.sums
    kind = (_STEP if step is not None else 0) | (_SUMS if sums is not None else 0)
    channels = 0 if step is None and sums is None else step.scale.size if step is not None else sums.shape[1]  # type: ignore[union-attr]
    parts = [
        _CHANGE.pack(change.seq, change.version, change.num_of_props, kind, len(change.content), channels),
        change.content,
    ]
    if step is not None:
        moments = step.moments
        parts += [_COUNT.pack(moments.count), _wide(moments.mean), _wide(moments.m2)]
        parts += [_to_bytes(step.scale), _to_bytes(step.bias)]
    if sums is not None:
        parts.append(_wide(sums))
    return b"".join(parts)


def change_from_bytes(data: bytes) -> LastChange:
    """Return the change of such a value."""
    seq, version, num_of_props, kind, size, channels = _CHANGE.unpack_from(data)
    at = _CHANGE.size + size
    content, step, sums = data[_CHANGE.size : at], None, None
    if kind & _STEP:
        (count,) = _COUNT.unpack_from(data, at)
        at += _COUNT.size
        mean, m2 = np.frombuffer(data, "<f8", 2 * channels, at).astype(np.float64).reshape(2, channels)
        at += 16 * channels
        scale, bias = np.frombuffer(data, "<f4", 2 * channels, at).astype(np.float32).reshape(2, channels)
        at += 8 * channels
        step = TakenStep(Moments(count, mean, m2), _frozen(scale), _frozen(bias))
    if kind & _SUMS:
        sums = np.frombuffer(data, "<f8", 2 * channels, at).astype(np.float64).reshape(2, channels)
    return LastChange(seq, content, version, num_of_props, step, sums)


def _packed(found: Fields) -> bytes:
    return b"".join(_PART.pack(len(name), len(value)) + name + value for name, value in found.items())


def _unpacked(data: bytes) -> Fields:
    found, at = {}, 0
    while at < len(data):
        names, values = _PART.unpack_from(data, at)
        at += _PART.size
        found[data[at : at + names]] = data[at + names : at + names + values]
        at += names + values
    return found


def _same(one: DomainStatistics, two: DomainStatistics) -> bool:
    return all(getattr(one, field.name) is getattr(two, field.name) for field in fields(one))


def _set_to_bytes(each: DomainStatistics) -> bytes:
    names = names_to_bytes(each.merged)
    head = _SET.pack(each.num_of_props, each.stats_frozen, len(names))
    return head + names + statistics_to_bytes(each.mean) + statistics_to_bytes(each.var)


def _set_from_bytes(data: bytes, config: LayerConfig) -> DomainStatistics:
    steps, is_frozen, size = _SET.unpack_from(data)
    at = _SET.size + size
    # Behind them is room for a count, one or one a channel, of which nothing is known here.
    if len(data) != at + 16 * config.maps:
        raise ValueError(f"statistics of {len(data) - at} bytes, of a layer of {config.maps} maps")
    mean, var = statistics_from_bytes(data[at:]).reshape(2, config.maps)
    return DomainStatistics(_frozen(mean), _frozen(var), steps, bool(is_frozen), names_from_bytes(data[_SET.size : at]))


def _to_bytes(vector: Vector) -> bytes:
    return vector.astype("<f4", copy=False).tobytes()


def _from_bytes(data: bytes, config: LayerConfig) -> Vector:
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    if vector.size != config.maps:
        raise ValueError(f"a vector of {vector.size} values, of a layer of {config.maps} maps")
    return _frozen(vector)


def _frozen(vector: Vector) -> Vector:
    vector.setflags(write=False)
    return vector


def _wide(values: npt.NDArray[np.float64]) -> bytes:
    return values.astype("<f8", copy=False).tobytes()
