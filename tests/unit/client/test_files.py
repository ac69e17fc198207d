"""The file formats, byte by byte: PuzzleLib's layout, whole replacement, damage."""

from __future__ import annotations

import io
import json
import os
import resource
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import LayerState, StateUpdate, blank_state, updated
from sharednorm.core.types import LayerKind
from sharednorm.errors import InvalidConfiguration, InvalidFile, InvalidName
from sharednorm.files import state_file

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 3)
SCALE, BIAS, MEAN, VAR = ([n + 0.5, n + 1.5, n + 2.5] for n in (1, -3, 5, 7))
STATE = updated(blank_state(CONFIG), CONFIG, StateUpdate(SCALE, BIAS, MEAN, VAR, num_of_props=17))
FORMATS = ("h5", "npz", "safetensors")


def saved(extension: str, folder: Path, layer: str = "stem", state: LayerState = STATE) -> Path:
    path = folder / f"layer.{extension}"
    assert state_file.save(path, layer, CONFIG, state) is None
    return path


def assert_loads(source: Any, layer: str = "stem", steps: int = 17, config: LayerConfig = CONFIG) -> None:
    after = updated(blank_state(config), config, state_file.load(source, layer, config))
    for name, wanted in (("scale", SCALE), ("bias", BIAS), ("mean", MEAN), ("var", VAR)):
        assert getattr(after, name).tolist() == wanted
    assert after.num_of_props == steps


def puzzlelib_file(layer: str = "", config: LayerConfig = CONFIG, **changes: Any) -> bytes:
    """Return what PuzzleLib's save writes, written by plain h5py from the description of its layout."""
    values = {"scale": SCALE, "bias": BIAS, "mean": MEAN, "var": VAR, **changes}
    stream = io.BytesIO()
    with h5py.File(stream, "w", libver="earliest") as file:
        params, links, attrs = (file.require_group(name) for name in ("params", "links", "attrs"))
        for index, name in enumerate(("scale", "bias")):
            array = np.array(values[name], np.float32).reshape(config.state_shape)
            params.create_dataset(str(index), data=array, compression="gzip")
            links[f"{layer}.{name}"] = index
        for name in ("mean", "var"):
            array = np.array(values[name], np.float32).reshape(config.state_shape)
            attrs.create_dataset(f"{layer}.{name}", data=array, compression="gzip")
    return stream.getvalue()


@pytest.mark.parametrize("layer", ["", "bn", "stem/bn", "net.block.bn"])
def test_plain_h5py_reads_our_file_as_puzzlelib_does(layer: str, tmp_path: Path) -> None:
    with h5py.File(saved("h5", tmp_path, layer), "r") as file:
        for name, wanted in (("scale", SCALE), ("bias", BIAS)):
            index = str(file["links"][f"{layer}.{name}"][()])
            param = np.array(file["params"][index])
            assert (param.shape, param.dtype.name, param.ravel().tolist()) == ((1, 3, 1, 1), "float32", wanted)
            assert file["params"][index].compression == "gzip"
            assert file["links"][f"{layer}.{name}"].shape == ()
        for name, wanted in (("mean", MEAN), ("var", VAR)):
            attr = np.array(file["attrs"][f"{layer}.{name}"])
            # PuzzleLib converts to its own type with casting="safe".
            assert (attr.astype(np.float32, casting="safe").ravel().tolist(), attr.shape) == (wanted, (1, 3, 1, 1))
        assert int(file["attrs"][f"{layer}.numOfProps"][()]) == 17
        assert (sorted(file), sorted(file["params"])) == (["attrs", "links", "params"], ["0", "1"])


@pytest.mark.parametrize("kind", list(LayerKind))
@pytest.mark.parametrize("layer", ["", "bn", "stem/bn"])
def test_a_file_of_puzzlelib_loads(kind: LayerKind, layer: str) -> None:
    config = LayerConfig(kind, 3)
    assert_loads(puzzlelib_file(layer, config), layer, steps=10, config=config)


@pytest.mark.parametrize(
    ("init_factor", "min_factor", "steps"),
    [(1.0, 0.1, 10), (1.0, 0.25, 4), (0.5, 0.1, 5), (1.0, 0.3, 4), (1.0, 1.0, 1), (1.0, 0.0, 10), (0.0, 0.1, 0),
     (1.0, 5e-324, 2**53)],
)  # fmt: skip
def test_without_a_number_of_steps_the_average_counts_as_settled(
    init_factor: float, min_factor: float, steps: int
) -> None:
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 3, init_factor=init_factor, min_factor=min_factor)
    assert_loads(puzzlelib_file(), "", steps, config)
    # The next batch counts as a late one.
    assert config.factor(steps + 1) == pytest.approx(max(min_factor, init_factor / (steps + 1)))


def test_statistics_that_have_taken_in_nothing_begin_anew() -> None:
    update = state_file.load(puzzlelib_file(mean=[0, 0, 0], var=[1, 1, 1]), "", CONFIG)
    assert update.num_of_props == 0


def test_parameters_of_half_precision_load() -> None:
    stream = io.BytesIO(puzzlelib_file())
    with h5py.File(stream, "r+") as file:
        del file["params/0"]
        file["params/0"] = np.array(SCALE, np.float16).reshape(1, 3, 1, 1)
    assert_loads(stream.getvalue(), "", 10)


def test_parameters_may_be_shared_and_in_any_order() -> None:
    stream = io.BytesIO(puzzlelib_file())
    with h5py.File(stream, "r+") as file:
        file.move("params/0", "params/41")
        del file["links/.scale"]
        file["links/.scale"] = np.uint8(41)
    assert_loads(stream.getvalue(), "", 10)


@pytest.mark.parametrize("extension", FORMATS)
def test_npz_and_safetensors_are_read_by_their_own_libraries(extension: str, tmp_path: Path) -> None:
    path = saved(extension, tmp_path)
    if extension == "npz":
        with np.load(path, allow_pickle=False) as archive:
            found = dict(archive)
    elif extension == "safetensors":
        found = safetensors.numpy.load_file(path)
    else:
        with h5py.File(path) as file:
            found = {f"stem.{n}": file[f"attrs/stem.{n}"][()] for n in ("mean", "var", "numOfProps")}
            found |= {f"stem.{n}": file[f"params/{i}"][()] for i, n in enumerate(("scale", "bias"))}
    assert sorted(found) == ["stem.bias", "stem.mean", "stem.numOfProps", "stem.scale", "stem.var"]
    assert (found["stem.numOfProps"].item(), found["stem.var"].tolist()) == (17, [[[[v]] for v in VAR]])


@pytest.mark.parametrize("extension", FORMATS)
def test_reading_goes_by_the_content(extension: str, tmp_path: Path) -> None:
    path = saved(extension, tmp_path)
    for name in ("layer", "layer.bin", "layer.npz", "layer.h5"):
        other = tmp_path / "others" / name
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(path.read_bytes())
        assert_loads(other)
    for content in (path.read_bytes(), bytearray(path.read_bytes()), memoryview(path.read_bytes())):
        assert_loads(content)


def test_the_same_state_gives_the_same_hdf5_bytes() -> None:
    assert state_file.save(None, "stem", CONFIG, STATE) == state_file.save(None, "stem", CONFIG, STATE)


def test_a_group_inside_a_file_will_do(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "model.h5", "w") as file:
        group = file.create_group("encoder")
        state_file.save(group, "stem", CONFIG, STATE)
        assert_loads(group)
        state_file.save(file, "other", CONFIG, STATE)
        with pytest.raises(InvalidFile, match=r"has no stem\.scale"):
            state_file.load(file, "stem", CONFIG)


def test_an_open_file_keeps_what_it_has_when_a_layer_cannot_be_added(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "model.h5", "w") as file:
        state_file.save(file, "stem", CONFIG, STATE)
        with pytest.raises(InvalidFile, match="has a layer 'stem' already"):
            state_file.save(file, "stem", CONFIG, STATE)
        # "stem.mean" is an array: nothing can be inside it.
        with pytest.raises(InvalidFile, match="cannot add layer"):
            state_file.save(file, "stem.mean/x", CONFIG, STATE)
        assert_loads(file)
    with h5py.File(tmp_path / "model.h5", "r") as file, pytest.raises(InvalidFile, match="cannot add layer 'other'"):
        state_file.save(file, "other", CONFIG, STATE)
    with pytest.raises(InvalidFile):
        state_file.load(file, "stem", CONFIG)  # closed


@pytest.mark.parametrize("layer", ["a\x00b", "x" * 513, "a\nb"])
def test_names_that_no_layer_can_have(layer: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidName):
        state_file.save(tmp_path / "layer.h5", layer, CONFIG, STATE)
    with pytest.raises(InvalidName):
        state_file.load(puzzlelib_file(), layer, CONFIG)
    assert list(tmp_path.iterdir()) == []


def rewritten(**changes: Any) -> bytes:
    stream = io.BytesIO(puzzlelib_file())
    with h5py.File(stream, "r+") as file:
        for path, value in changes.items():
            del file[path]
            if value is not None:
                file[path] = value
    return stream.getvalue()


GOOD_SHAPE = np.zeros((1, 3, 1, 1), np.float32)
BAD_HDF5: dict[str, tuple[dict[str, Any], str]] = {
    "no params": ({"params": None}, "KeyError"),
    "no links": ({"links": None}, "KeyError"),
    "no attrs": ({"attrs": None}, "KeyError"),
    "no scale": ({"links/.scale": None}, "has no .scale"),
    "no variance": ({"attrs/.var": None}, "has no .var"),
    "a link to nothing": ({"links/.scale": 7}, "KeyError"),
    "a link of two": ({"links/.scale": [0, 1]}, "links/.scale has 2 values"),
    "a link of text": ({"links/.scale": "zero"}, "damaged"),
    "a link to itself": ({"params/0": h5py.SoftLink("/params/0")}, "damaged"),
    "a link to another file": ({"params/0": h5py.ExternalLink("/etc/passwd", "/")}, "not an array inside the file"),
    "four maps": ({"attrs/.mean": np.zeros((1, 4, 1, 1), np.float32)}, "attrs/.mean has 4 values"),
    "two maps": ({"attrs/.mean": np.zeros((1, 2, 1, 1), np.float32)}, r"mean is float32 of shape \(1, 2, 1, 1\)"),
    "integers": ({"attrs/.mean": GOOD_SHAPE.astype(np.int32)}, "mean is int32"),
    "text": ({"attrs/.mean": ["a", "b", "c"]}, "mean is object"),
    "a negative variance": ({"attrs/.var": GOOD_SHAPE - 1}, "var has a negative value"),
}


@pytest.mark.parametrize("case", BAD_HDF5)
def test_hdf5_files_that_are_not_a_layers(case: str) -> None:
    changes, said = BAD_HDF5[case]
    with pytest.raises(InvalidFile, match=said):
        state_file.load(rewritten(**changes), "", CONFIG)


def test_a_group_where_an_array_should_be() -> None:
    stream = io.BytesIO(puzzlelib_file())
    with h5py.File(stream, "r+") as file:
        del file["params/0"]
        file.create_group("params/0")
    with pytest.raises(InvalidFile, match="params/0 is not an array inside the file"):
        state_file.load(stream.getvalue(), "", CONFIG)


def test_an_array_whose_values_are_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(12))
    stream = io.BytesIO(puzzlelib_file())
    with h5py.File(stream, "r+") as file:
        del file["params/0"]
        file.create_dataset("params/0", (1, 3, 1, 1), "f4", external=[(str(tmp_path / "secret"), 0, 12)])
    with pytest.raises(InvalidFile, match="params/0 is not an array inside the file"):
        state_file.load(stream.getvalue(), "", CONFIG)


def test_a_declared_size_is_refused_before_it_is_allocated() -> None:
    stream = io.BytesIO(puzzlelib_file())
    with h5py.File(stream, "r+") as file:
        del file["attrs/.mean"]
        file.create_dataset("attrs/.mean", shape=(1 << 50,), dtype="f4", chunks=(1 << 20,))
    with pytest.raises(InvalidFile, match="1125899906842624 values"):
        state_file.load(stream.getvalue(), "", CONFIG)


def npz(header: bytes, content: bytes) -> bytes:
    """Return an .npz file whose mean has that header and that content."""
    stream = io.BytesIO()
    ones: dict[str, Any] = {f"stem.{name}": np.ones((1, 3, 1, 1), np.float32) for name in ("scale", "bias", "var")}
    np.savez(stream, **ones)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
        archive.writestr("stem.mean.npy", start + header + content)
    return stream.getvalue()


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': ({},), }}"
BAD_NPZ = [
    (HEADER.format("<f4", 1 << 60).encode(), b""),
    (HEADER.format("<f4", -3).encode(), b""),
    (HEADER.format("|O", 3).encode(), b"cos\nsystem\n"),
    (HEADER.format("|V1000000000", 3).encode(), bytes(12)),
    (HEADER.format("nonsense", 3).encode(), bytes(12)),
    (HEADER.format("<f4", 3).encode(), bytes(11)),
    (HEADER.format("<f4", 3).encode(), bytes(1 << 22)),
    *(
        (header, bytes(12))
        for header in (b"", bytes(40), b"{", b"__import__('os')", b"{'descr': '<f4'}", b"3", b"(" * 5000)
    ),
]


@pytest.mark.parametrize(("header", "content"), BAD_NPZ)
def test_npz_files_that_are_not_a_layers(header: bytes, content: bytes) -> None:
    with pytest.raises(InvalidFile):
        state_file.load(npz(header, content), "stem", CONFIG)


def test_an_npz_file_made_by_hand() -> None:
    content = np.array(MEAN, ">f8").tobytes()
    update = state_file.load(npz(HEADER.format(">f8", 3).encode(), content), "stem", CONFIG)
    assert updated(blank_state(CONFIG), CONFIG, update).mean.tolist() == MEAN


def test_a_safetensors_file_that_declares_more_than_it_has() -> None:
    header = json.dumps({"stem.scale": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    with pytest.raises(InvalidFile, match="damaged"):
        state_file.load(len(header).to_bytes(8, "little") + header, "stem", CONFIG)


@pytest.mark.parametrize("steps", [-1, 2**53 + 1])
def test_a_number_of_steps_out_of_range(steps: int) -> None:
    tensors = {f"stem.{name}": GOOD_SHAPE + 1 for name in ("scale", "bias", "mean", "var")}
    content = safetensors.numpy.save({**tensors, "stem.numOfProps": np.array(steps)})
    with pytest.raises(InvalidFile, match="numOfProps is"):
        state_file.load(content, "stem", CONFIG)
    for bad in (np.array(1.5), np.array([1, 2]), np.array([], np.int64)):
        content = safetensors.numpy.save({**tensors, "stem.numOfProps": bad})
        with pytest.raises(InvalidFile, match="numOfProps is not an integer"):
            state_file.load(content, "stem", CONFIG)


CONTENTS: dict[str, bytes] = {}


@pytest.fixture(scope="module", autouse=True)
def contents(tmp_path_factory: pytest.TempPathFactory) -> None:
    for extension in FORMATS:
        CONTENTS[extension] = saved(extension, tmp_path_factory.mktemp("contents")).read_bytes()


@given(extension=st.sampled_from(FORMATS), cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file(extension: str, cut: float) -> None:
    content = CONTENTS[extension]
    with pytest.raises(InvalidFile):
        state_file.load(content[: int(len(content) * cut)], "stem", CONFIG)


@given(
    content=st.binary(max_size=400), start=st.sampled_from([b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", bytes(8) + b"{"])
)
def test_random_bytes(content: bytes, start: bytes) -> None:
    with pytest.raises(InvalidFile):
        state_file.load(start + content, "stem", CONFIG)


@given(
    extension=st.sampled_from(("npz", "safetensors")),
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(1, 255),
)
def test_a_changed_byte_is_found_or_harmless(extension: str, place: float, value: int) -> None:
    content = bytearray(CONTENTS[extension])
    content[int(len(content) * place)] ^= value
    try:
        update = state_file.load(bytes(content), "stem", CONFIG)
    except InvalidFile:
        return
    # No checksum covers what was changed: then it still is a state that the layer takes.
    assert updated(blank_state(CONFIG), CONFIG, update).initialized


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    npz, hdf5, tensors = (saved(extension, tmp_path) for extension in ("npz", "h5", "safetensors"))
    for package in ("h5py", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: state_file.load(hdf5, "stem", CONFIG), lambda: state_file.save(None, "stem", CONFIG, STATE)):
        with pytest.raises(InvalidConfiguration, match=r"needs? the package h5py: pip install 'sharednorm\[hdf5\]'"):
            call()
    with pytest.raises(InvalidConfiguration, match=r"pip install 'sharednorm\[safetensors\]'"):
        state_file.load(tensors, "stem", CONFIG)
    assert_loads(npz)


def test_a_file_is_replaced_whole_and_keeps_its_link(tmp_path: Path) -> None:
    path = saved("npz", tmp_path)
    link = tmp_path / "link.npz"
    link.symlink_to(path.name)
    mask = os.umask(0o027)
    try:
        state_file.save(link, "stem", CONFIG, updated(STATE, CONFIG, StateUpdate(num_of_props=18)))
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert_loads(path, steps=18)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(each.name for each in tmp_path.iterdir()) == ["layer.npz", "link.npz"]


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
from sharednorm import BatchNorm2D
bn = BatchNorm2D(4096, name="stem")
try:
    bn.save(sys.argv[1])
except OSError as error:
    print(type(error).__name__, error.errno)
"""


@pytest.mark.parametrize("extension", FORMATS)
@pytest.mark.parametrize("room", [0, 1, 4096])
def test_a_full_disk_leaves_the_file_as_it_was(extension: str, room: int, tmp_path: Path) -> None:
    path = saved(extension, tmp_path)
    before = path.read_bytes()
    code = [sys.executable, "-c", FULL_DISK, str(path), str(room)]
    environment = {**os.environ, "SHAREDNORM_ARITHMETIC": "numpy"}
    result = subprocess.run(code, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (result.stdout.split()[:1], result.stderr) == (["OSError"], "")
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        state_file.save(tmp_path / "file" / "layer.npz", "stem", CONFIG, STATE)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(IsADirectoryError):
        state_file.save(tmp_path / "folder.npz", "stem", CONFIG, STATE)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.npz"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
