"""Files of a layer: its scale, bias, mean, var and numOfProps.

Three formats hold the same five entries, named `<layer>.scale` and so on; a layer without a name is "".

- HDF5 (.hdf, .hdf5, .h5), in PuzzleLib's layout: it reads these files, and its files are read here.
  `params/0` and `params/1` are the arrays of scale and bias; `links/<layer>.scale` and `links/<layer>.bias` are
  scalar integers that say which is which; `attrs/<layer>.mean` and `attrs/<layer>.var` are arrays. All are float32 of
  shape (1, C, 1, 1) or (1, C, 1, 1, 1), compressed by gzip. `attrs/<layer>.numOfProps` is a scalar integer of our
  own, which PuzzleLib does not look for. Needs h5py.
- NumPy's .npz, never pickled. Needs nothing more.
- .safetensors. Needs safetensors.

Writing goes by the extension, reading by the content. A file is replaced whole or not at all. Several layers
share one HDF5 file by being saved into an open `h5py.File`; that takes the place of PuzzleLib's `varlinks`.
"""

from __future__ import annotations

import io
import math
import os
import secrets
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import MAX_STEPS, SAVED_FIELDS, LayerState, StateUpdate, blank_state, updated
from sharednorm.core.validation import check_name, is_integer
from sharednorm.errors import InvalidConfiguration, InvalidFile, InvalidShape, UnsupportedDType
from sharednorm.files import formats

if TYPE_CHECKING:
    import h5py

Target: TypeAlias = "str | os.PathLike[str] | h5py.Group"
"""Where a layer is saved: a path, or an open h5py file or group."""

Source: TypeAlias = "str | os.PathLike[str] | bytes | h5py.Group"
"""Where a layer is loaded from: a path, a file's bytes, or an open h5py file or group."""

STEPS = "numOfProps"


def save(target: Target | None, layer: str, config: LayerConfig, state: LayerState) -> bytes | None:
    """Save a layer's state.

    Args:
        target: A path, an open h5py file or group to add the layer to, or None for the bytes of an HDF5 file.
        layer: Name of the layer in the file; may be "".
        config: The layer's configuration.
        state: What to save.

    Returns:
        The bytes if `target` is None, otherwise None.

    Raises:
        InvalidFile: The path's extension names no format, or the h5py file has a layer of that name.
        InvalidName: The name is too long or has control characters.
        InvalidConfiguration: The format needs a package that is not installed.
        OSError: The file could not be written; one that was there before is as it was.
    """
    _check_layer(layer)
    entries: formats.Entries = {name: getattr(state, name).reshape(config.state_shape) for name in SAVED_FIELDS}
    entries[STEPS] = np.array(state.num_of_props, np.int64)
    if target is None:
        return formats.HDF5.encode(layer, entries)
    if formats.is_hdf5_group(target):
        formats.add_to_group(target, layer, entries)
        return None
    path = Path(_path(target))
    suffix = path.suffix.lower()
    known = {extension: each for each in formats.FORMATS for extension in each.extensions}
    if suffix not in known:
        raise InvalidFile(f"{path.name!r} has the extension {suffix!r} (expected: {', '.join(known)})")
    write_whole(path, known[suffix].encode(layer, entries))
    return None


def load(source: Source, layer: str, config: LayerConfig) -> StateUpdate:
    """Read a layer's state from what `save` or PuzzleLib wrote.

    A file of PuzzleLib has no numOfProps; `settled_steps` says what is taken for it.

    Args:
        source: A path, the file's bytes, or an open h5py file or group.
        layer: Name of the layer in the file; may be "".
        config: The configuration of the layer that is to be set, which the file must fit.

    Returns:
        An update that the layer accepts, with every saved part set.

    Raises:
        InvalidFile: Not such a file, damaged, without this layer, or of a layer of another size.
        InvalidName: The name is too long or has control characters.
        InvalidConfiguration: The format needs a package that is not installed.
        OSError: The file could not be opened.
    """
    _check_layer(layer)
    if formats.is_hdf5_group(source):
        return _update(formats.read_group(source, layer, config.maps), config)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(source), layer, config)
    with Path(_path(source)).open("rb") as stream:
        return _read(stream, layer, config)


def settled_steps(config: LayerConfig, entries: formats.Entries) -> int:
    """Return the step number to go on from, for a file that does not say.

    Statistics that still are what a new layer begins with, mean 0 and variance 1, have taken in nothing: 0.
    Others are taken as settled: the number at which f = max(initFactor / n, minFactor) has come down to
    minFactor, so that the next batch counts as much as a late one and cannot erase them. Where minFactor
    is 0, that never happens, and 0.1, PuzzleLib's default, stands in for it.
    """
    if not entries["mean"].any() and (entries["var"] == 1).all():
        return 0
    floor = config.min_factor or 0.1
    return math.ceil(min(config.init_factor / floor, float(MAX_STEPS)))


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file by one with that content, or leave it as it was. Missing folders are made.

    The content goes to a new file in the same folder, to the disk, and then takes the name. A symbolic
    link keeps pointing where it did.

    Raises:
        OSError: It could not be written, for example because the disk is full.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".sharednorm-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(stream: IO[bytes], layer: str, config: LayerConfig) -> StateUpdate:
    start = stream.read(16)
    stream.seek(0)
    for each in formats.FORMATS:
        if each.matches(start):
            return _update(each.decode(stream, layer, config.maps), config)
    raise InvalidFile("neither an HDF5, an .npz nor a .safetensors file (expected: what save() or PuzzleLib wrote)")


def _update(entries: formats.Entries, config: LayerConfig) -> StateUpdate:
    for name in SAVED_FIELDS:
        array = entries[name]
        if array.dtype.kind != "f" or array.size != config.maps:
            raise InvalidFile(f"{name} is {array.dtype} of shape {array.shape} (expected: {config.maps} floats)")
    steps = entries[STEPS].item() if STEPS in entries and entries[STEPS].size == 1 else None
    if STEPS not in entries:
        steps = settled_steps(config, entries)
    if not is_integer(steps):
        raise InvalidFile(f"numOfProps is not an integer but {entries[STEPS].dtype} of shape {entries[STEPS].shape}")
    saved: dict[str, Any] = {name: entries[name] for name in SAVED_FIELDS}
    update = StateUpdate(**saved, num_of_props=steps)
    try:
        updated(blank_state(config), config, update)
    except (InvalidShape, InvalidConfiguration, UnsupportedDType) as error:
        raise InvalidFile(f"the file does not fit the layer: {error}") from error
    return update


def _check_layer(layer: str) -> None:
    if layer != "":
        check_name(layer)


def _path(given: object) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise InvalidFile(
            f"a {type(given).__name__} is no file (expected: a path, bytes, or an open h5py file or group)"
        )
    return os.fsdecode(given)
