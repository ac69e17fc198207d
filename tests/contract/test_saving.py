"""Save and load, by path and by bytes, in every format."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from sharednorm import InvalidFile, Layer
from tests.support.making import MakeLayer
from tests.support.oracle import KINDS, random_tensor, shape_of
from tests.support.unchanged import unchanged

FORMATS = ["hdf", "hdf5", "h5", "npz", "safetensors", "H5"]


def trained(make_layer: MakeLayer, kind: str = "BatchNorm2D", maps: int = 3) -> Layer:
    bn = make_layer(kind, maps, sscale=0.5)
    bn.bias = np.linspace(-1, 1, maps)
    for seed in range(3):
        bn(random_tensor(seed, shape_of(kind, maps)))
    return bn


def assert_same(one: Layer, other: Layer) -> None:
    for name in ("scale", "bias", "mean", "var", "numOfProps"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(make_layer: MakeLayer, tmp_path: Path, kind: str, extension: str) -> None:
    bn = trained(make_layer, kind)
    path = tmp_path / "new" / "folder" / f"layer.{extension}"
    assert bn.save(path) is None
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    for source in (path, str(path), path.read_bytes()):
        other = make_layer(kind, 3, empty=True)
        other.load(source, name=bn.name)
        assert_same(bn, other)
        # What comes next is what would have come without the file.
        x = random_tensor(9, shape_of(kind, 3))
        expected = make_layer(kind, 3)
        expected.load(path, name=bn.name)
        np.testing.assert_array_equal(other(x), expected(x))
        assert_same(expected, other)
        assert other.numOfProps == 4


def test_a_layer_loads_its_own_file_by_its_name(make_layer: MakeLayer, tmp_path: Path) -> None:
    bn = trained(make_layer)
    bn.save(tmp_path / "layer.h5")
    before = bn.snapshot()
    bn(random_tensor(7, (4, 3, 5, 5)))
    bn.load(tmp_path / "layer.h5")
    after = bn.snapshot()
    assert (after.num_of_props, after.version) == (3, 4)
    np.testing.assert_array_equal(after.mean, before.mean)


def test_the_bytes_are_an_hdf5_file(make_layer: MakeLayer) -> None:
    bn = trained(make_layer)
    content = bn.save(None)
    assert content is not None
    assert content.startswith(b"\x89HDF")
    assert bn.save() == content
    other = make_layer("BatchNorm2D", 3, empty=True)
    other.load(content, name=bn.name)
    assert_same(bn, other)


def test_several_layers_share_one_open_file(make_layer: MakeLayer, tmp_path: Path) -> None:
    layers = [trained(make_layer, kind) for kind in KINDS]
    with h5py.File(tmp_path / "model.h5", "w") as file:
        for layer in layers:
            layer.save(file)
        with pytest.raises(InvalidFile, match="already"):
            layers[0].save(file)
        for layer, kind in zip(layers, KINDS, strict=True):
            other = make_layer(kind, 3, empty=True)
            other.load(file, name=layer.name)
            assert_same(layer, other)
        assert sorted(file["params"]) == [str(number) for number in range(8)]
    for layer, kind in zip(layers, KINDS, strict=True):
        other = make_layer(kind, 3, empty=True)
        other.load(tmp_path / "model.h5", name=layer.name)
        assert_same(layer, other)


@pytest.mark.parametrize("extension", ["h5", "npz", "safetensors"])
def test_files_that_do_not_fit_change_nothing(make_layer: MakeLayer, tmp_path: Path, extension: str) -> None:
    bn = trained(make_layer)
    path = tmp_path / f"layer.{extension}"
    trained(make_layer, maps=4).save(path, name=bn.name)
    content = path.read_bytes()
    noise = np.random.default_rng(1).bytes(2000)
    for bad in (
        path,
        content,
        content[: len(content) // 2],
        content[:-1],
        content[:9],
        b"",
        noise,
        content[:16] + noise,
    ):
        with pytest.raises(InvalidFile), unchanged(bn):
            bn.load(bad)


def test_a_file_without_the_layer_names_those_that_it_has(make_layer: MakeLayer, tmp_path: Path) -> None:
    bn = trained(make_layer)
    for extension in ("h5", "npz", "safetensors"):
        path = tmp_path / f"layer.{extension}"
        bn.save(path, name="stem/first")
        with pytest.raises(InvalidFile, match=r"layers in the file are: 'stem/first'; pass name="), unchanged(bn):
            bn.load(path, name="stem/second")


def test_a_file_of_a_layer_with_parameters_does_not_fit_one_without(make_layer: MakeLayer) -> None:
    content = trained(make_layer).save(None, name="a")
    assert content is not None
    fixed = make_layer("BatchNorm2D", 3, affine=False)
    with pytest.raises(InvalidFile, match="not affine"), unchanged(fixed):
        fixed.load(content, name="a")


def test_a_missing_file_and_a_name_without_a_format(make_layer: MakeLayer, tmp_path: Path) -> None:
    bn = trained(make_layer)
    with pytest.raises(FileNotFoundError), unchanged(bn):
        bn.load(tmp_path / "nothing.h5")
    for name in ("layer", "layer.txt", "layer.h5.gz"):
        with pytest.raises(InvalidFile, match=r"expected: \.hdf, \.hdf5, \.h5, \.npz, \.safetensors"):
            bn.save(tmp_path / name)
    for wrong in (3, None, ["layer.h5"]):
        with pytest.raises(InvalidFile, match="expected: a path"), unchanged(bn):
            bn.load(wrong)
    assert list(tmp_path.iterdir()) == []
