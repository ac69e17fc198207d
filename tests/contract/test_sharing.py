"""Several processes and threads share one layer: one set of statistics, one counter, no lost update."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.arithmetic.select import arithmetic
from sharednorm.codec import wire
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.limits import MAX_MAPS
from sharednorm.core.state import LayerState, step
from sharednorm.core.types import LayerKind
from sharednorm.errors import InvalidConfiguration, LayerNotFound
from tests.support.processes.server import ServerProcess, server_process
from tests.support.sharing import MAPS, NAME, Steps, batch, in_processes, read_statistics, train
from tests.support.unchanged import unchanged

PROCESSES = 4
STEPS = 200
CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, MAPS, min_factor=0.02)


@pytest.fixture(scope="module", params=["tcp", "unix"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    listen = "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path_factory.mktemp('sharing')}/s.sock"
    with server_process(listen=listen) as process:
        yield process


@pytest.fixture
def hub(server: ServerProcess) -> Iterator[sharednorm.Hub]:
    """A hub of a namespace of its own."""
    with sharednorm.connect(server.address, namespace=uuid.uuid4().hex) as connected:
        yield connected


def float64_replay(seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The running statistics after these batches, by the formula alone."""
    mean, var = np.zeros(MAPS), np.ones(MAPS)
    for number, seed in enumerate(seeds, start=1):
        x = batch(seed).astype(np.float64)
        f = max(1.0 / number, 0.02)
        mean = (1 - f) * mean + f * x.mean(axis=(0, 2, 3))
        var = (1 - f) * var + f * x.var(axis=(0, 2, 3), ddof=1)
    return mean, var


@pytest.mark.slow
def test_four_processes_of_200_steps_make_version_800_and_the_average_replays_exactly(hub: sharednorm.Hub) -> None:
    layer = hub.BatchNorm2D(MAPS, minFactor=0.02, name=NAME)
    state = layer.snapshot()
    work = [(hub.address, hub.namespace, CONFIG, 1000 * rank, STEPS) for rank in range(PROCESSES)]
    reports = in_processes(train, work, timeout=90)
    final = layer.snapshot()

    assert final.version == final.num_of_props == PROCESSES * STEPS
    seeds = one_order(reports)
    assert all(report.seen == sorted(set(report.seen)) for report in reports), "a counter went back or stood still"

    for seed in seeds:
        state = step(state, CONFIG, arithmetic().moments(batch(seed)))
    assert_same_bits(final, state)
    mean, var = float64_replay(seeds)
    np.testing.assert_allclose(final.mean, mean, rtol=0, atol=1e-5)
    np.testing.assert_allclose(final.var, var, rtol=1e-5)


def one_order(reports: list[Steps]) -> list[int]:
    """The seeds in the order of their steps' versions, each of which exactly one process must have made."""
    by_version = [item for report in reports for item in report.seeds.items()]
    assert sorted(version for version, _ in by_version) == list(range(1, PROCESSES * STEPS + 1))
    # Every process's own steps come in the order in which it took them.
    assert all(list(report.seeds) == sorted(report.seeds) for report in reports)
    seeds = [seed for _, seed in sorted(by_version)]
    turns = sum(one // 1000 != other // 1000 for one, other in pairwise(seeds))
    assert turns >= PROCESSES, "the processes came one after the other"
    return seeds


def assert_same_bits(one: LayerState, other: LayerState) -> None:
    for name in ("scale", "bias", "mean", "var", "scale_grad", "bias_grad"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert (one.version, one.num_of_props) == (other.version, other.num_of_props)


def test_processes_that_attach_by_name_see_one_set_of_statistics(hub: sharednorm.Hub) -> None:
    layer = hub.BatchNorm2D(MAPS, name=NAME)
    layer(batch(1))
    here = {"mean": layer.mean, "var": layer.var, "scale": layer.scale, "numOfProps": layer.numOfProps}
    for there in in_processes(read_statistics, [(hub.address, hub.namespace)] * 2, timeout=60):
        for name, value in here.items():
            np.testing.assert_array_equal(there[name], value)


def test_two_handles_of_one_layer_are_one_layer_with_two_modes(hub: sharednorm.Hub) -> None:
    trainer, evaluator = hub.BatchNorm2D(MAPS, name="x"), hub.layer("x")
    evaluator.evalMode()
    x = batch(3)
    trainer(x)
    before = evaluator.version
    # The first step's factor is 1: the running statistics are the batch's.
    wide = x.astype(np.float64)
    mean, var = wide.mean((0, 2, 3), keepdims=True), wide.var((0, 2, 3), ddof=1, keepdims=True)
    expected = (wide - mean) / np.sqrt(var + 1e-5) * evaluator.scale
    np.testing.assert_allclose(evaluator(x), expected, rtol=0, atol=1e-5)
    assert evaluator.version == before == 1
    assert trainer.train
    assert not evaluator.train


def test_the_layers_default_mode_is_for_handles_that_have_not_chosen(hub: sharednorm.Hub) -> None:
    undecided, decided = hub.BatchNorm2D(MAPS, name="x"), hub.layer("x")
    decided.trainMode()
    hub.set_train("x", False)
    undecided(batch(1))
    assert (undecided.train, decided.train, undecided.version) == (False, True, 0)
    decided(batch(1))
    assert undecided.version == 1
    hub.set_train("x", True)
    undecided(batch(1))
    assert undecided.version == 2


@pytest.mark.parametrize("value", ["eval", 0, None])
def test_the_layers_default_mode_is_true_or_false(hub: sharednorm.Hub, value: Any) -> None:
    layer = hub.BatchNorm2D(MAPS, name="x")
    for mode in (True, False):
        hub.set_train("x", mode)
        with pytest.raises(InvalidConfiguration, match=r"train is .*expected: True or False"):
            hub.set_train("x", value)
        assert layer.train is mode


def test_many_threads_on_one_handle_and_one_hub(hub: sharednorm.Hub) -> None:
    layer = hub.BatchNorm2D(MAPS, name="x", affine=False)
    threads, steps = 8, 25
    start = threading.Barrier(threads)

    def work(rank: int) -> None:
        start.wait(10)
        for seed in range(100 * rank, 100 * rank + steps):
            x = batch(seed)
            wide = x.astype(np.float64)
            expected = (wide - wide.mean((0, 2, 3), keepdims=True)) / np.sqrt(wide.var((0, 2, 3), keepdims=True) + 1e-5)
            np.testing.assert_allclose(layer(x), expected, rtol=0, atol=1e-5)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, rank) for rank in range(threads)]:
            future.result(60)
    assert layer.version == layer.numOfProps == threads * steps


def test_many_threads_with_tensors_that_travel_in_chunks(hub: sharednorm.Hub) -> None:
    maps, threads, steps = 4, 4, 3
    info = hub.info
    layer = hub.BatchNorm(maps, name="x", affine=False)

    def work(rank: int) -> None:
        random = np.random.default_rng(rank)
        for _ in range(steps):
            x = random.normal(rank, 2, (300_000, maps)).astype(np.float32)
            assert x.nbytes > info.max_unary_bytes
            np.testing.assert_allclose(layer(x), (x - x.mean(0, np.float64)) / x.std(0, dtype=np.float64), atol=1e-4)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, rank) for rank in range(threads)]:
            future.result(60)
    assert layer.version == threads * steps


def test_namespaces_do_not_see_each_others_layers(server: ServerProcess) -> None:
    with (
        sharednorm.connect(server.address, namespace="red") as red,
        sharednorm.connect(server.address, namespace="blue") as blue,
        sharednorm.connect(server.address, namespace="") as default,
    ):
        one, other = red.BatchNorm2D(MAPS, name="x"), blue.BatchNorm3D(7, name="x")
        one(batch(1))
        assert (one.version, other.version) == (1, 0)
        assert [info.name for info in red.layers()] == ["x"]
        assert [info.config.maps for info in blue.layers()] == [7]
        assert (default.namespace, default.layers()) == ("default", [])
        red.delete("x")
        assert blue.layer("x").maps == 7
        with pytest.raises(LayerNotFound):
            red.layer("x")


def test_all_layers_are_listed_in_the_order_of_their_names_over_many_pages(hub: sharednorm.Hub) -> None:
    names = [f"layer/{number:04}" for number in range(1100)]
    for name in reversed(names):
        hub.BatchNorm1D(2, name=name)
    infos = hub.layers()
    assert [info.name for info in infos] == names
    assert infos[0].config == LayerConfig(LayerKind.BATCH_NORM_1D, 2)
    assert (infos[0].train, infos[0].version, infos[0].num_of_props, infos[0].initialized) == (True, 0, 0, True)


def test_seeded_alike_a_remote_layer_begins_like_a_local_one(hub: sharednorm.Hub) -> None:
    np.random.seed(7)  # noqa: NPY002 - what the layers draw from
    remote = [hub.BatchNorm2D(MAPS, name="a", sscale=0.5), hub.BatchNorm2D(MAPS, name="b")]
    np.random.seed(7)  # noqa: NPY002 - what the layers draw from
    local = [sharednorm.BatchNorm2D(MAPS, sscale=0.5), sharednorm.BatchNorm2D(MAPS)]
    for one, other in zip(remote, local, strict=True):
        for name in ("scale", "bias", "mean", "var"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        np.testing.assert_array_equal(one(batch(1)), other(batch(1)))


@pytest.mark.parametrize("rows", [2, 4], ids=["in one message", "in chunks"])
def test_the_widest_layer(hub: sharednorm.Hub, rows: int) -> None:
    layer = hub.BatchNorm(MAX_MAPS, name="x", sscale=0.0)
    x = np.random.default_rng(0).normal(size=(rows, MAX_MAPS)).astype(np.float32)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(layer(x), (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5), rtol=0, atol=2e-6)
    layer.backward(x)
    np.testing.assert_allclose(layer.vars["bias"].grad.ravel(), wide.sum(0), rtol=0, atol=2e-6)
    np.testing.assert_allclose(layer.mean.ravel(), wide.mean(0), rtol=0, atol=1e-6)
    layer.load(layer.save())
    assert layer.numOfProps == 1


def test_the_widest_layer_when_the_server_keeps_no_inputs() -> None:
    x = np.random.default_rng(0).normal(size=(2, MAX_MAPS)).astype(np.float32)
    with server_process("--activation-cache-bytes", "0") as forgetful, sharednorm.connect(forgetful.address) as hub:
        layer = hub.BatchNorm(MAX_MAPS, name="x", sscale=0.0)
        layer(x)
        layer.backward(x)
        np.testing.assert_allclose(layer.vars["bias"].grad.ravel(), x.astype(np.float64).sum(0), rtol=0, atol=2e-6)


DIFFERENT: dict[str, dict[str, Any]] = {
    "kind": {},
    "maps": {"maps": MAPS + 1},
    "epsilon": {"epsilon": 0.5},
    "init_factor": {"initFactor": 0.5},
    "min_factor": {"minFactor": 0.5},
    "affine": {"affine": False},
    "averaging": {"averaging": "printed"},
    "nonfinite": {"nonfinite": "allow"},
}


def test_a_name_that_is_taken_by_another_configuration(hub: sharednorm.Hub) -> None:
    layer = hub.BatchNorm2D(MAPS, name="x")
    layer(batch(1))
    for field, changed in DIFFERENT.items():
        make = hub.BatchNorm3D if field == "kind" else hub.BatchNorm2D
        with pytest.raises(sharednorm.ConfigurationMismatch) as caught, unchanged(layer):
            make(**{"maps": MAPS, "name": "x", **changed})
        assert list(caught.value.metadata) == [field]
        argument = "BatchNorm3D" if field == "kind" else next(iter(changed))
        assert argument in str(caught.value)
        assert f"is {caught.value.metadata[field]}" in str(caught.value)
    with pytest.raises(sharednorm.ConfigurationMismatch) as caught:
        hub.BatchNorm3D(MAPS + 1, 0.5, 0.5, 0.5, affine=False, name="x", averaging="printed", nonfinite="allow")
    assert caught.value.metadata.keys() == DIFFERENT.keys()
    assert [info.name for info in hub.layers()] == ["x"]


def test_a_layer_that_nobody_has_made(hub: sharednorm.Hub) -> None:
    for call in (lambda: hub.layer("x"), lambda: hub.delete("x"), lambda: hub.set_train("x", True)):
        with pytest.raises(LayerNotFound, match="'x'"):
            call()
    assert hub.layers() == []


@pytest.mark.parametrize("name", [None, ""])
def test_a_remote_layer_needs_a_name(hub: sharednorm.Hub, name: str | None) -> None:
    with pytest.raises(sharednorm.InvalidName, match=r"pass name='\.\.\.'"):
        hub.BatchNorm2D(MAPS, name=name)
    assert hub.layers() == []


def test_the_threads_of_a_server_do_not_change_a_bit() -> None:
    random = np.random.default_rng(0)
    x, grad = (random.normal(3, 2, (9, 16, 65, 57)).astype(np.float32) for _ in range(2))
    found = set()
    for threads in ("1", "3"):
        with server_process("--compute-threads", threads) as server, sharednorm.connect(server.address) as hub:
            assert f"{threads} thread" in hub.info.device
            layer = hub.BatchNorm2D(16, name="x", sscale=0.0)
            y = layer(x)
            layer.backward(grad)
            assert layer.grad is not None
            state = layer.snapshot()
            results = (y, layer.grad, state.mean, state.var, state.scale_grad, state.bias_grad)
            found.add(tuple(each.tobytes() for each in results))
    assert len(found) == 1


def test_a_handle_does_not_pass_to_another_layer_of_its_name(hub: sharednorm.Hub) -> None:
    old = hub.BatchNorm2D(MAPS, name="x")
    old(batch(0))
    hub.delete("x")
    new = hub.BatchNorm2D(MAPS, name="x")
    for use in (lambda: old(batch(0)), lambda: old.backward(batch(0)), lambda: old.mean, lambda: old.updateParams(1.0)):
        with pytest.raises(sharednorm.LayerNotFound, match="another one has its name now"):
            use()
    assert new.numOfProps == 0
    new(batch(0))
    assert hub.layer("x").numOfProps == 1


def test_a_layer_that_exists_keeps_its_scale_when_another_handle_attaches(hub: sharednorm.Hub) -> None:
    scale = hub.BatchNorm2D(MAPS, name="x").scale
    np.testing.assert_array_equal(hub.BatchNorm2D(MAPS, name="x", sscale=3.0).scale, scale)


def test_the_hub_and_its_handles_say_what_they_are(hub: sharednorm.Hub, server: ServerProcess) -> None:
    layer = hub.BatchNorm2D(MAPS, name="stem/bn")
    assert server.address in repr(hub)
    assert repr(hub.namespace) in repr(hub)
    assert "memory:" in repr(hub)
    assert "BatchNorm2D" in repr(layer)
    assert "stem/bn" in repr(layer)
    assert server.address in repr(layer)
    assert hub.info.protocol == wire.PROTOCOL
    assert hub.info.version == sharednorm.__version__
    assert hub.info.device.startswith("cpu")


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    with sharednorm.connect(server.address) as hub:
        assert hub.info.protocol == wire.PROTOCOL


def test_a_relative_socket_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server_process(listen=f"unix:{tmp_path}/s.sock"):
        monkeypatch.chdir(tmp_path)
        with sharednorm.connect("unix:s.sock") as hub:
            monkeypatch.chdir("/")
            assert hub.layers() == []
