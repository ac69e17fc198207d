"""Local and remote layers are of one base class, `Layer`, and no class adds or changes a member."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import sharednorm
from sharednorm.layers.backend import LayerBackend
from sharednorm.layers.local_backend import LocalBackend
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.handle import RemoteBatchNorm
from tests.support.making import MakeLayer
from tests.support.oracle import KINDS, random_tensor, shape_of

IMPLEMENTATIONS = [
    sharednorm.BatchNorm, sharednorm.BatchNorm1D, sharednorm.BatchNorm2D, sharednorm.BatchNorm3D, RemoteBatchNorm,
]  # fmt: skip


# Which return something of the implementation's own kind.
OF_ITS_KIND = {"inDomain", "within"}


def members(cls: type[Any]) -> dict[str, Any]:
    names = {name for base in cls.__mro__ if base is not object for name in vars(base)}
    found = {
        name: inspect.getattr_static(cls, name) for name in names if not name.startswith("_") or name == "__call__"
    }
    return {name: value for name, value in found.items() if callable(value) or isinstance(value, property)}


def signature(function: Any) -> list[tuple[str, Any, Any, str]]:
    return [(p.name, p.kind, p.default, str(p.annotation)) for p in inspect.signature(function).parameters.values()]


def assert_same_members(protocol: type[Any], cls: type[Any]) -> None:
    wanted = members(protocol)
    assert wanted
    for name, value in wanted.items():
        found = inspect.getattr_static(cls, name)
        assert isinstance(found, property) == isinstance(value, property), name
        if isinstance(value, property):
            assert found.fget is not None
            assert value.fget is not None
            assert (found.fset is None) == (value.fset is None), name
            assert inspect.signature(found.fget).return_annotation == inspect.signature(value.fget).return_annotation
            if found.fset and value.fset:
                assert signature(found.fset) == signature(value.fset), name
        else:
            assert signature(found) == signature(value), name
            if name not in OF_ITS_KIND:
                assert inspect.signature(found).return_annotation == inspect.signature(value).return_annotation, name


@pytest.mark.parametrize("cls", IMPLEMENTATIONS)
def test_no_layer_changes_the_signature_of_a_member(cls: type[Any]) -> None:
    assert_same_members(sharednorm.Layer, cls)


@pytest.mark.parametrize("cls", IMPLEMENTATIONS)
def test_no_layer_has_members_of_its_own(cls: type[Any]) -> None:
    assert members(cls).keys() == members(sharednorm.Layer).keys()


@pytest.mark.parametrize("cls", [LocalBackend, RemoteBackend])
def test_both_backends_are_one_seam(cls: type[Any]) -> None:
    assert_same_members(LayerBackend, cls)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_an_instance_of_the_base_class(make_layer: MakeLayer, kind: str) -> None:
    bn = make_layer(kind, 3, inplace=False)
    assert isinstance(bn, sharednorm.Layer)


def run(layer: sharednorm.Layer, kind: str) -> list[bytes]:
    """Return the bits of everything that a layer computes."""
    layer.scale, layer.bias = np.linspace(0.5, 2, 31), np.linspace(-1, 1, 31)
    found: list[Any] = []
    for seed in range(3):
        found.append(layer(random_tensor(seed, shape_of(kind, 31, batch=9))))
        layer.backward(random_tensor(seed + 9, shape_of(kind, 31, batch=9)), momentum=0.5)
        found += [layer.grad, layer.vars["scale"].grad, layer.vars["bias"].grad, layer.mean, layer.var]
        layer.updateParams(-0.01)
    layer.evalMode()
    return [each.tobytes() for each in [*found, layer(random_tensor(5, shape_of(kind, 31))), layer.scale, layer.bias]]


@pytest.mark.parametrize("kind", KINDS)
def test_remote_layers_give_the_bits_of_local_ones(
    kind: str, grpc_hub: sharednorm.Hub, direct_hub: sharednorm.Hub, shm_hub: sharednorm.Hub
) -> None:
    expected = run(getattr(sharednorm, kind)(31), kind)
    for hub in (grpc_hub, direct_hub, shm_hub):
        assert run(getattr(hub, kind)(31, name=f"bits/{kind}"), kind) == expected
