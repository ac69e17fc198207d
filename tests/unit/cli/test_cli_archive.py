"""Layers of a server as files, and back: `sharednorm export` and `sharednorm import`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm_server.server import RunningServer
from tests.support.oracle import random_tensor
from tests.support.processes.commands import done, refused
from tests.support.processes.server import in_process

ODD = "a/b c.é層.." + "x" * 150
SHAPE = (4, 3, 5, 2)
FIELDS = ("scale", "bias", "mean", "var", "num_of_props", "initialized")


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with in_process() as running:
        yield running


@pytest.fixture
def hub(server: RunningServer) -> Iterator[sharednorm.Hub]:
    """Give a hub of a server with some layers."""
    with sharednorm.connect(server.address) as made:
        plain = made.BatchNorm2D(3, name="plain", epsilon=1e-3, minFactor=0.05, averaging="printed", nonfinite="allow")
        plain(random_tensor(1, SHAPE))
        odd = made.BatchNorm1D(3, name=ODD, affine=False)
        odd(random_tensor(2, (4, 3, 7)))
        made.BatchNorm1D(3, name=ODD, affine=False, domain="site/é")(random_tensor(3, (4, 3, 7)))
        made.set_train(ODD, False)
        made.BatchNorm3D(2, name="waiting", empty=True)
        yield made


def same(one: sharednorm.Hub, other: sharednorm.Hub, *, domains: bool = True) -> None:
    mine, theirs = one.layers(), other.layers()
    assert [(layer.name, layer.config, layer.train, layer.initialized) for layer in mine] == [
        (layer.name, layer.config, layer.train, layer.initialized) for layer in theirs
    ]
    for layer in mine:
        within = ("", *one.layer(layer.name).domains) if domains else ("",)
        for domain in within:
            states = [hub.layer(layer.name, domain=domain).snapshot() for hub in (one, other)]
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(states[0], name), getattr(states[1], name), err_msg=layer.name)


@pytest.mark.parametrize("kind", ["npz", "safetensors", "hdf5", pytest.param("torch", marks=pytest.mark.torch)])
def test_there_and_back(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "made" / "here"
    said = done(server, "export", str(directory), "--format", kind)
    assert said == f"3 layers in {directory}\n"
    with in_process() as other, sharednorm.connect(other.address) as there:
        assert done(other, "import", str(directory)) == f"3 layers from {directory}\n"
        same(hub, there, domains=kind != "torch")  # a state_dict has no domains
        assert "is there already, and nothing has been changed" in refused(other, "import", str(directory))
        there.layer("plain").resetStats()
        done(other, "import", str(directory), "--replace")
        same(hub, there, domains=kind != "torch")


def test_some_of_the_layers(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path) -> None:
    found = json.loads(done(server, "export", str(tmp_path / "one"), "plain", "--json"))
    assert found == {"directory": str(tmp_path / "one"), "layers": ["plain"]}
    done(server, "export", str(tmp_path / "all"))
    with in_process() as other, sharednorm.connect(other.address) as there:
        done(other, "import", str(tmp_path / "all"), ODD)
        assert [layer.name for layer in there.layers()] == [ODD]
        found = json.loads(done(other, "import", str(tmp_path / "one"), "--json"))
        assert found["layers"] == ["plain"]
        assert len(there.layers()) == 2
        assert f"has no layer {ODD!r}" in refused(other, "import", str(tmp_path / "one"), ODD)


def test_one_file_into_a_layer_that_is_there(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path) -> None:
    local = sharednorm.BatchNorm2D(3, name="plain")
    local(random_tensor(7, SHAPE))
    local.save(tmp_path / "x.npz")
    done(server, "import", str(tmp_path / "x.npz"), "plain")
    np.testing.assert_array_equal(hub.layer("plain").mean, local.mean)
    assert "is of one layer" in refused(server, "import", str(tmp_path / "x.npz"))
    assert "does not exist" in refused(server, "import", str(tmp_path / "x.npz"), "none")
    assert "No such file" in refused(server, "import", str(tmp_path / "y.npz"), "plain")


@pytest.mark.torch
def test_a_state_dict_of_torch(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path) -> None:
    import torch

    network = torch.nn.Sequential()
    network.add_module("plain", torch.nn.BatchNorm2d(3))
    network.add_module("other", torch.nn.Linear(2, 2))
    network.train()
    network[0](torch.tensor(random_tensor(5, SHAPE)))
    torch.save(network.state_dict(), tmp_path / "network.pt")
    done(server, "import", str(tmp_path / "network.pt"))
    layer = hub.layer("plain")
    np.testing.assert_array_equal(layer.mean.ravel(), network[0].running_mean.numpy())
    np.testing.assert_array_equal(layer.var.ravel(), network[0].running_var.numpy())
    assert layer.numOfProps == 1
    assert "has no layer 'none'" in refused(server, "import", str(tmp_path / "network.pt"), "none")
    done(server, "export", str(tmp_path / "back"), "plain", "--format", "torch")
    network.load_state_dict(torch.load(tmp_path / "back" / "state_dict.pt", weights_only=True), strict=False)
    np.testing.assert_array_equal(layer.mean.ravel(), network[0].running_mean.numpy())
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert "is no state_dict: " in refused(server, "import", str(tmp_path / "bad.pt"))


def test_what_cannot_be_exported(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path) -> None:
    assert "there is no layer 'none'" in refused(server, "export", str(tmp_path / "x"), "none")
    assert not (tmp_path / "x").exists()
    done(server, "export", str(tmp_path / "x"))
    assert "has an export already" in refused(server, "export", str(tmp_path / "x"))
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file: File exists" in refused(server, "export", str(tmp_path / "file"))


def broken(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"version": 1', '"version": 2', "is of version 2"),
        ('"maps": 3', '"maps": 0', "is damaged: "),
        ('"BatchNorm2D"', '"BatchNorm9D"', "is damaged: "),
        ('"files"', '"archives"', "is damaged: "),
        ("{", "[", "is damaged: "),
        ('"00000-', '"../00000-', "which is no file beside it"),
        ('"averaging": "printed"', '"averaging": 7', "is damaged: "),
    ],
)
def test_a_directory_that_is_damaged_changes_nothing(
    server: RunningServer, hub: sharednorm.Hub, tmp_path: Path, old: str, new: str, words: str
) -> None:
    done(server, "export", str(tmp_path))
    manifest = tmp_path / "layers.json"
    manifest.write_text(broken(manifest.read_text("utf-8"), old, new), "utf-8")
    with in_process() as other, sharednorm.connect(other.address) as there:
        assert words in refused(other, "import", str(tmp_path))
        assert there.layers() == []


def test_a_directory_without_an_export(server: RunningServer, tmp_path: Path) -> None:
    assert "has no layers.json" in refused(server, "import", str(tmp_path))


def test_layers_that_are_configured_otherwise(server: RunningServer, hub: sharednorm.Hub, tmp_path: Path) -> None:
    done(server, "export", str(tmp_path))
    with in_process() as other, sharednorm.connect(other.address) as there:
        there.BatchNorm2D(3, name="plain")
        said = refused(other, "import", str(tmp_path), "--replace")
        assert "is there with another configuration, and nothing has been changed" in said
        assert len(there.layers()) == 1
