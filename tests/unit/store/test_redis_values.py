"""What Redis keeps of records, changes and snapshots is read back as it was."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from sharednorm.core.domains import DomainStatistics
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments, initial_state
from sharednorm.core.types import LayerKind
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import LastChange, TakenStep
from sharednorm_server.store.redis.codec import (
    change_from_bytes,
    change_to_bytes,
    snapshot_from_bytes,
    snapshot_to_bytes,
    to_fields,
    to_record,
)

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 3, epsilon=1e-3, affine=True)
KEY = LayerKey("a:b", "層/{1}", "uid")


def vector(seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=3).astype(np.float32)
    made.setflags(write=False)
    return made


def make() -> LayerRecord:
    state = initial_state(CONFIG, 0.1, np.random.default_rng(1))
    state = replace(
        state, mean=vector(1), var=vector(2) ** 2, scale_grad=vector(3), num_of_props=7, version=2**40,
        stats_frozen=True, merged=(b"one", b"", b"x" * 255),
    )  # fmt: skip
    domains = {"é": DomainStatistics(vector(4), vector(5) ** 2, 2**53, False, (b"d",))}
    return LayerRecord(KEY, CONFIG, state, False, domains)


def same(found: LayerRecord, expected: LayerRecord) -> None:
    assert (found.key, found.key.uid, found.config, found.train) == (KEY, "uid", expected.config, expected.train)
    for each in fields(expected.state):
        np.testing.assert_array_equal(getattr(found.state, each.name), getattr(expected.state, each.name), each.name)
    assert found.domains.keys() == expected.domains.keys()
    for name, one in expected.domains.items():
        for each in fields(one):
            np.testing.assert_array_equal(getattr(found.domains[name], each.name), getattr(one, each.name))


def test_a_record() -> None:
    record = make()
    found, gone = to_fields(record)
    again = to_record(KEY, found)
    same(again, record)
    assert (again.mark, again.tag, gone) == (record.mark, record.tag, [])
    assert not again.state.mean.flags.writeable


def test_only_what_has_changed_is_written() -> None:
    before = make()
    found, gone = to_fields(before.with_state(replace(before.state, version=1)), before)
    assert (sorted(found), gone) == ([b"mark", b"version"], [])
    found, gone = to_fields(before.with_state(replace(before.state, mean=vector(9))), before)
    assert sorted(found) == [b"mark", b"statistics:", b"version"]
    found, gone = to_fields(before.with_state(replace(before.state, bias=vector(9), initialized=False)), before)
    assert sorted(found) == [b"bias", b"initialized", b"mark", b"version"]
    found, gone = to_fields(replace(before, train=True, domains={}), before)
    assert (sorted(found), gone) == ([b"mark", b"train", b"version"], ["statistics:é".encode()])


def test_what_is_written_of_each_change_adds_up_to_the_record() -> None:
    kept: dict[bytes, bytes] = {}
    before: LayerRecord | None = None
    for record in (
        make(),
        replace(make(), train=True),
        make().with_state(replace(make().state, mean=vector(7), num_of_props=8)),
        replace(make(), domains={}),
        replace(make(), domains={"z": DomainStatistics(vector(1), vector(2), 1)}),
    ):
        found, gone = to_fields(record, before)
        kept.update(found)
        for name in gone:
            del kept[name]
        same(to_record(KEY, kept), record)
        before = record


def test_a_vector_of_another_size_is_refused() -> None:
    found, _ = to_fields(make())
    for name in (b"scale", b"statistics:"):
        with pytest.raises(ValueError, match="of a layer of 3 maps"):
            to_record(KEY, {**found, name: found[name] + b"\0\0\0\0"})


def test_a_statistic_that_is_no_float32_is_not_rounded() -> None:
    found, _ = to_fields(make())
    wide = np.array([0.1, 1e300, 1]).tobytes() + np.ones(3).tobytes()
    assert len(found[b"statistics:"][-48:]) == len(wide)
    for value in (wide, np.array([1, np.nan, np.inf]).tobytes() + np.array([0.5, 1e-45, 2]).tobytes()):
        with pytest.raises(ValueError, match="which a newer release has written"):
            to_record(KEY, {**found, b"statistics:": found[b"statistics:"][:-48] + value})
    good = np.array([[np.nan, np.inf, -0.0], [0.5, 2**-149, 2]])
    again = to_record(KEY, {**found, b"statistics:": found[b"statistics:"][:-48] + good.tobytes()})
    np.testing.assert_array_equal([again.state.mean, again.state.var], good)
    assert np.signbit(again.state.mean[2])


def test_a_count_that_this_release_does_not_know_is_refused() -> None:
    found, _ = to_fields(make())
    with pytest.raises(ValueError, match="statistics of 56 bytes, of a layer of 3 maps"):
        to_record(KEY, {**found, b"statistics:": found[b"statistics:"] + np.ones(1).tobytes()})


def test_a_snapshot_is_the_record_without_gradients() -> None:
    record = make()
    again = snapshot_from_bytes(KEY, snapshot_to_bytes(record))
    zeros = np.zeros(3, np.float32)
    same(again, record.with_state(replace(record.state, scale_grad=zeros, bias_grad=zeros)))
    assert len(again.mark) == len(record.mark)
    assert again.mark != record.mark


@pytest.mark.parametrize("step", [True, False])
@pytest.mark.parametrize("sums", [True, False])
def test_a_change(step: bool, sums: bool) -> None:
    wide = np.random.default_rng(5).normal(size=(2, 3))
    change = LastChange(
        2**60, b"\0content", 2**41, 2**53,
        TakenStep(Moments(12345, wide[0], wide[1] ** 2), vector(1), vector(2)) if step else None,
        wide * 3 if sums else None,
    )  # fmt: skip
    again = change_from_bytes(change_to_bytes(change))
    assert (again.seq, again.content, again.version, again.num_of_props) == (2**60, b"\0content", 2**41, 2**53)
    if change.step is None:
        assert again.step is None
    else:
        assert again.step is not None
        assert again.step.moments.count == 12345
        for name in ("mean", "m2"):
            np.testing.assert_array_equal(getattr(again.step.moments, name), getattr(change.step.moments, name))
        np.testing.assert_array_equal(again.step.scale, change.step.scale)
        np.testing.assert_array_equal(again.step.bias, change.step.bias)
    if change.sums is None:
        assert again.sums is None
    else:
        np.testing.assert_array_equal(again.sums, change.sums)
