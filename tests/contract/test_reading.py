"""What is read of a layer one by one is what a snapshot has, on every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.errors import DataLoss, LayerEmpty, LayerNotFound
from sharednorm.remote.backends.server_compute import RemoteBackend
from tests.support import oracle
from tests.support.making import MakeLayer
from tests.support.members import Members, all_of
from tests.support.processes.server import in_process

SHAPE = (4, 3, 5, 2)
ARRAYS: dict[str, Callable[[sharednorm.Layer], Any]] = {
    "scale": lambda layer: layer.scale,
    "bias": lambda layer: layer.bias,
    "mean": lambda layer: layer.mean,
    "var": lambda layer: layer.var,
    "scale_grad": lambda layer: layer.vars["scale"].grad,
    "bias_grad": lambda layer: layer.vars["bias"].grad,
}
MORE_ARRAYS: dict[str, Callable[[sharednorm.Layer], Any]] = {
    "scale": lambda layer: layer.vars["scale"].data,
    "bias": lambda layer: layer.getVar("bias").data,
    "mean": lambda layer: layer.attrs["mean"],
    "var": lambda layer: layer.attrs["var"],
}
NUMBERS: dict[str, Callable[[sharednorm.Layer], int]] = {
    "num_of_props": lambda layer: layer.numOfProps,
    "version": lambda layer: layer.version,
    "stats_frozen": lambda layer: layer.statsFrozen,
}


ALL: list[Callable[[sharednorm.Layer], Any]] = [*ARRAYS.values(), *NUMBERS.values(), lambda layer: layer.train]


def assert_read_as_in_a_snapshot(layer: sharednorm.Layer) -> None:
    state = layer.snapshot()
    for arrays in (ARRAYS, MORE_ARRAYS):
        for name, read in arrays.items():
            found = read(layer)
            assert (found.dtype, found.shape, found.flags.writeable) == (np.float32, (1, 3, 1, 1), False), name
            np.testing.assert_array_equal(found.ravel(), getattr(state, name), err_msg=name)
    for name, number in NUMBERS.items():
        found = number(layer)
        assert (found, type(found)) == (getattr(state, name), type(getattr(state, name))), name
    six = [getattr(state, name).tobytes() for name in ARRAYS]
    assert len(set(six)) == len(six), "a test with equal arrays finds no confusion"


def trained(layer: sharednorm.Layer) -> sharednorm.Layer:
    layer.trainMode()
    for seed in range(3):
        layer(oracle.random_tensor(seed, SHAPE))
    layer.backward(oracle.random_tensor(9, SHAPE))
    layer.updateParams(0.25)
    return layer


def test_each_is_that_of_a_snapshot(make_layer: MakeLayer) -> None:
    layer = trained(make_layer("BatchNorm2D", 3, sscale=0.5))
    assert_read_as_in_a_snapshot(layer)
    layer.freezeStats()
    layer(oracle.random_tensor(4, SHAPE))
    assert (layer.version, layer.numOfProps, layer.statsFrozen) == (4, 3, True)
    assert_read_as_in_a_snapshot(layer)


def test_statistics_are_those_of_the_domain(make_layer: MakeLayer) -> None:
    own = trained(make_layer("BatchNorm2D", 3, sscale=0.5))
    inside = own.inDomain("site")
    inside.freezeStats()
    assert (inside.numOfProps, inside.statsFrozen, own.statsFrozen) == (0, True, False)
    inside.unfreezeStats()
    inside(oracle.random_tensor(5, SHAPE) + np.float32(3))
    assert (inside.numOfProps, inside.version, own.numOfProps) == (1, 4, 3)
    assert not np.array_equal(inside.mean, own.mean)
    for layer in (inside, own):
        assert_read_as_in_a_snapshot(layer)
    own.deleteDomain("site")
    with pytest.raises(LayerNotFound):
        inside.mean  # noqa: B018
    with pytest.raises(LayerNotFound):
        inside.version  # noqa: B018


def test_an_empty_layer_has_numbers_and_no_arrays(make_layer: MakeLayer) -> None:
    layer = make_layer("BatchNorm2D", 3, empty=True)
    assert [read(layer) for read in NUMBERS.values()] == [0, 0, False]
    for read in (*ARRAYS.values(), *MORE_ARRAYS.values()):
        with pytest.raises(LayerEmpty, match="was created with empty=True"):
            read(layer)


# --- On a server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[sharednorm.Hub]:
    with in_process() as server, sharednorm.connect(server.address) as opened:
        yield opened


def test_a_member_of_a_group_reads_the_same() -> None:
    with in_process() as server, Members(server.address, 2, "grpc", "reading") as members:
        layers = members.layers("BatchNorm2D", 3, name="bn", sscale=0.5)
        all_of(2, lambda rank: trained(layers[rank]))
        for layer in layers:
            assert_read_as_in_a_snapshot(layer)


@pytest.mark.parametrize("options", [{}, {"compute": "client"}, {"compute": "client", "push": "async"}], ids=str)
@pytest.mark.parametrize("name", [*ARRAYS, *NUMBERS, "train"])
def test_each_is_one_call_for_that_alone(
    hub: sharednorm.Hub, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str
) -> None:
    layer = hub.BatchNorm2D(3, name=f"one call/{options}", **options)
    calls: list[str] = []
    idempotent = RemoteBackend._idempotent

    def counted(self: RemoteBackend, method: str, request: Any, answer: Any) -> Any:
        found: Any = idempotent(self, method, request, answer)
        calls.append(method)
        paths = {f"layer.{field.name}" for field, _ in found.layer.ListFields()}
        paths |= {f"state.{field.name}" for field, _ in found.state.ListFields()}
        asked = {"train": "layer.default_mode", "version": "layer.version"}.get(name, f"state.{name}")
        assert paths <= {asked, "layer.version", "layer.initialized"}
        return found

    monkeypatch.setattr(RemoteBackend, "_idempotent", counted)
    if name == "train":
        assert layer.train is True or options.get("push") == "async"
    else:
        {**ARRAYS, **NUMBERS}[name](layer)
    assert calls == ([] if name == "train" and options.get("push") == "async" else ["GetLayer"])


def test_reads_learn_the_version_and_say_it(hub: sharednorm.Hub) -> None:
    reader, trainer = (hub.BatchNorm2D(3, name="learned") for _ in range(2))
    trainer.trainMode()
    for number, read in enumerate(ALL, 1):
        trainer(oracle.random_tensor(1, SHAPE))
        read(reader)
        assert reader._remote.ref.seen_version == number
    reader._remote.told(1000)
    for read in ALL:
        with pytest.raises(DataLoss):
            read(reader)
