"""Saved inputs stay within their budget; the least recently used leave first, and nobody sees another layer's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments, initial_state
from sharednorm.core.types import LayerKind
from sharednorm.errors import InputEvicted
from sharednorm_server.device.cpu import CpuTensor
from sharednorm_server.layers.activation_cache import ActivationCache, SavedInput
from sharednorm_server.layers.idempotency import IdempotencyTable
from sharednorm_server.layers.layer import Layer
from sharednorm_server.layers.stored_layer import ExclusiveLayer
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.idempotency import SessionNumbers
from sharednorm_server.store.memory import MemoryStore
from sharednorm_server.store.snapshots import SnapshotPolicy

CONFIG = LayerConfig(LayerKind.BATCH_NORM, 2)


def layer(name: str) -> Layer:
    state = initial_state(CONFIG, 0.0, np.random.default_rng(0))
    return ExclusiveLayer(
        LayerRecord(LayerKey("default", name), CONFIG, state),
        MemoryStore(),
        IdempotencyTable(1, SessionNumbers(1).given),
        SnapshotPolicy(),
    )


A, B = layer("a"), layer("b")


def entry(owner: Layer, nbytes: int = 40) -> SavedInput:
    x = np.zeros((nbytes // 8, 2), np.float32)
    return SavedInput(owner, CpuTensor(x, "float32"), Moments(len(x), np.zeros(2), np.ones(2)), np.ones(2, np.float32))


def test_an_input_comes_back_as_often_as_it_is_asked_for() -> None:
    saved = ActivationCache(100)
    kept = entry(A)
    token = saved.put(kept)
    assert saved.get(token, A) is kept
    assert saved.get(token, A) is kept
    assert (len(saved), saved.nbytes) == (1, 40)


def test_names_cannot_be_guessed() -> None:
    saved = ActivationCache(1 << 20)
    tokens = {saved.put(entry(A, 8)) for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(len(token) == 32 for token in tokens)


def test_the_oldest_leaves_when_the_budget_is_used_up() -> None:
    saved = ActivationCache(100)
    first, second, third = (saved.put(entry(A)) for _ in range(3))
    with pytest.raises(InputEvicted, match="saved_forward"):
        saved.get(first, A)
    assert saved.get(second, A)
    assert saved.get(third, A)
    assert saved.nbytes == 80


def test_what_was_used_lately_stays() -> None:
    saved = ActivationCache(100)
    first, second = saved.put(entry(A)), saved.put(entry(A))
    saved.get(first, A)
    saved.put(entry(A))
    assert saved.get(first, A)
    with pytest.raises(InputEvicted):
        saved.get(second, A)


def test_a_large_one_may_drive_out_several() -> None:
    saved = ActivationCache(100)
    for _ in range(2):
        saved.put(entry(A))
    saved.put(entry(A, 96))
    assert (len(saved), saved.nbytes) == (1, 96)


def test_one_of_exactly_the_budget_is_kept() -> None:
    saved = ActivationCache(96)
    assert saved.get(saved.put(entry(A, 96)), A)


def test_one_beyond_the_budget_is_not_kept_and_drives_nothing_out() -> None:
    saved = ActivationCache(100)
    kept = saved.put(entry(A))
    assert saved.put(entry(A, 104)) == ""
    assert saved.get(kept, A)


def test_no_budget_keeps_nothing() -> None:
    saved = ActivationCache(0)
    assert saved.put(entry(A)) == ""
    assert len(saved) == 0


@pytest.mark.parametrize("token", ["", "x", "0" * 32])
def test_an_unknown_name(token: str) -> None:
    with pytest.raises(InputEvicted):
        ActivationCache(100).get(token, A)


def test_another_layers_input_is_not_there() -> None:
    saved = ActivationCache(100)
    token = saved.put(entry(A))
    with pytest.raises(InputEvicted):
        saved.get(token, B)
    saved.release(token, B)
    assert saved.get(token, A)


def test_release_drops_one() -> None:
    saved = ActivationCache(100)
    token, other = saved.put(entry(A)), saved.put(entry(A))
    saved.release(token, A)
    saved.release(token, A)
    with pytest.raises(InputEvicted):
        saved.get(token, A)
    assert saved.get(other, A)
    assert saved.nbytes == 40


def test_release_if_drops_all_of_a_layer() -> None:
    saved = ActivationCache(1000)
    token = saved.put(entry(B))
    for _ in range(3):
        saved.put(entry(A))
    saved.release_if(lambda entry: entry.layer is A)
    assert (len(saved), saved.nbytes) == (1, 40)
    assert saved.get(token, B)


def test_the_budget_holds_under_many_threads() -> None:
    saved = ActivationCache(200)

    def work(_: int) -> None:
        for _ in range(300):
            token = saved.put(entry(A))
            assert saved.nbytes <= 200
            saved.release(token, A)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert (len(saved), saved.nbytes) == (0, 0)
