"""The file formats: entries of one layer to bytes and back. `files` says what the entries are.

A decoder returns the layer's entries as they stand in the file, never more than a few values too many, and
raises InvalidFile for anything that is not as it should be.
"""

from __future__ import annotations

import ast
import io
import sys
import zipfile
import zlib
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from sharednorm.core.state import SAVED_FIELDS
from sharednorm.errors import InvalidConfiguration, InvalidFile

if TYPE_CHECKING:
    import h5py

Entries: TypeAlias = dict[str, npt.NDArray[Any]]
"""scale, bias, mean, var, and numOfProps where the file has it."""

_LINKED = ("scale", "bias")
_ATTRIBUTES = ("mean", "var", "numOfProps")

# More than the header of any array with a handful of axes.
_NPY_HEADER_BYTES = 1 << 12
_NAMES = (*SAVED_FIELDS, "numOfProps")

# What the libraries raise on files that are damaged or made to harm.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError, EOFError, SyntaxError, OverflowError,
           MemoryError, zipfile.BadZipFile, zlib.error)  # fmt: skip


class Format(Protocol):
    """One file format."""

    @property
    def extensions(self) -> tuple[str, ...]:
        """Those that `save` knows it by, with the dot."""
        ...

    def matches(self, start: bytes) -> bool:
        """Return whether a file that starts with these 16 bytes is of this format."""
        ...

    def encode(self, layer: str, entries: Entries) -> bytes:
        """Return the bytes of a file with one layer."""
        ...

    def decode(self, stream: IO[bytes], layer: str, maps: int) -> Entries:
        """Return a layer's entries; arrays of another size than `maps` may be refused already."""
        ...


class _Hdf5:
    extensions = (".hdf", ".hdf5", ".h5")

    def matches(self, start: bytes) -> bool:
        return start.startswith(b"\x89HDF\r\n\x1a\n")

    def encode(self, layer: str, entries: Entries) -> bytes:
        stream = io.BytesIO()
        # The earliest version of the format, which every reader knows.
        with _h5py().File(stream, "w", libver="earliest") as file:
            add_to_group(file, layer, entries)
        return stream.getvalue()

    def decode(self, stream: IO[bytes], layer: str, maps: int) -> Entries:
        library = _h5py()
        try:
            with library.File(stream, "r") as file:
                return read_group(file, layer, maps)
        except InvalidFile:
            raise
        except _DAMAGE as error:
            raise _damaged("HDF5", error) from error


class _Npz:
    extensions = (".npz",)

    def matches(self, start: bytes) -> bool:
        return start.startswith(b"PK")

    def encode(self, layer: str, entries: Entries) -> bytes:
        stream = io.BytesIO()
        # Without allow_pickle, which NumPy before 2.1 would take for one more array: numbers are never pickled.
        arrays: dict[str, Any] = {f"{layer}.{name}": array for name, array in entries.items()}
        np.savez(stream, **arrays)
        return stream.getvalue()

    def decode(self, stream: IO[bytes], layer: str, maps: int) -> Entries:
        try:
            with zipfile.ZipFile(stream) as archive:
                members = {name.removesuffix(".npy"): name for name in archive.namelist()}
                _require(layer, members)
                wanted = {name: f"{layer}.{name}" for name in _NAMES if f"{layer}.{name}" in members}
                return {name: _npy(archive, members[key], maps) for name, key in wanted.items()}
        except InvalidFile:
            raise
        except _DAMAGE as error:
            raise _damaged(".npz", error) from error


class _Safetensors:
    extensions = (".safetensors",)

    def matches(self, start: bytes) -> bool:
        # Eight bytes of the header's length, then the header, which is JSON.
        return start[8:9] == b"{"

    def encode(self, layer: str, entries: Entries) -> bytes:
        content: bytes = _safetensors()[0].save({f"{layer}.{name}": array for name, array in entries.items()})
        return content

    def decode(self, stream: IO[bytes], layer: str, maps: int) -> Entries:
        library, its_error = _safetensors()
        try:
            tensors = library.load(stream.read())
        except (*_DAMAGE, its_error) as error:
            raise _damaged(".safetensors", error) from error
        _require(layer, tensors)
        # The library has checked what the header declares against the file's size; nothing larger was allocated.
        del maps
        return {name: tensors[f"{layer}.{name}"] for name in _NAMES if f"{layer}.{name}" in tensors}


HDF5: Format = _Hdf5()
FORMATS: tuple[Format, ...] = (HDF5, _Npz(), _Safetensors())


def is_hdf5_group(value: object) -> TypeGuard[h5py.Group]:
    """Return whether a value is an open h5py file or group, without importing h5py."""
    library = sys.modules.get("h5py")
    return library is not None and isinstance(value, library.Group)


def add_to_group(group: h5py.Group, layer: str, entries: Entries) -> None:
    """Add a layer to an open HDF5 file or group.

    Raises:
        InvalidFile: It has a layer of that name already, or cannot be written to.
    """
    try:
        params, links, attrs = (group.require_group(name) for name in ("params", "links", "attrs"))
        _require_absent(layer, [name for name in _NAMES for place in (links, attrs) if f"{layer}.{name}" in place])
        free = 1 + max((int(index) for index in params if index.isdecimal()), default=-1)
        for index, name in enumerate(_LINKED, free):
            params.create_dataset(str(index), data=entries[name], compression="gzip")
            links[f"{layer}.{name}"] = index
        for name in _ATTRIBUTES:
            scalar = entries[name].ndim == 0
            attrs.create_dataset(f"{layer}.{name}", data=entries[name], compression=None if scalar else "gzip")
    except InvalidFile:
        raise
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise InvalidFile(f"cannot add layer {layer!r} to the HDF5 file: {error}") from error


def read_group(group: h5py.Group, layer: str, maps: int) -> Entries:
    """Return a layer's entries from an open HDF5 file or group.

    Raises:
        InvalidFile: The layer is not there, or an entry is damaged or of another size.
    """
    try:
        params, links, attrs = (group[name] for name in ("params", "links", "attrs"))
        present = [f"{layer}.{name}" for name in _LINKED if f"{layer}.{name}" in links]
        present += [f"{layer}.{name}" for name in _ATTRIBUTES if f"{layer}.{name}" in attrs]
        links.visit(present.append)
        _require(layer, present)
        entries: Entries = {}
        for name in _LINKED:
            index = _values(links, f"{layer}.{name}", 1)
            entries[name] = _values(params, str(index.item()), maps)
        for name in _ATTRIBUTES:
            if f"{layer}.{name}" in attrs:
                entries[name] = _values(attrs, f"{layer}.{name}", maps)
    except InvalidFile:
        raise
    except _DAMAGE as error:
        raise _damaged("HDF5", error) from error
    return entries


def _values(group: h5py.Group, name: str, most: int) -> npt.NDArray[Any]:
    library, what = _h5py(), f"{group.name.strip('/')}/{name}"
    elsewhere = isinstance(group.get(name, getlink=True), library.ExternalLink)  # to be opened by nobody
    dataset = None if elsewhere else group[name]
    if not isinstance(dataset, library.Dataset) or dataset.external or dataset.is_virtual:
        raise InvalidFile(f"{what} is not an array inside the file")
    # The declared size is checked before anything of that size is allocated.
    if dataset.size > most:
        raise InvalidFile(f"{what} has {dataset.size} values (expected: {most})")
    return np.asarray(dataset[()])


def _npy(archive: zipfile.ZipFile, member: str, maps: int) -> npt.NDArray[Any]:
    # np.load would allocate whatever the header declares. The format: numpy.org/neps/nep-0001-npy-format.html
    if archive.getinfo(member).compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise InvalidFile(f"{member} is compressed in a way that NumPy does not use")
    most = _NPY_HEADER_BYTES + 8 * maps
    with archive.open(member) as stream:
        content = stream.read(most + 1)
    if len(content) > most or not content.startswith(b"\x93NUMPY"):
        raise InvalidFile(f"{member} is not an array of {maps} floats")
    start = 10 if content[6] == 1 else 12
    end = start + int.from_bytes(content[8:start], "little")
    header = ast.literal_eval(content[start:end].decode("latin-1"))
    array: npt.NDArray[Any] = np.frombuffer(content[end:], np.dtype(header["descr"])).reshape(header["shape"])
    return array


def _require(layer: str, present: Iterable[str]) -> None:
    names = set(present)
    missing = [f"{layer}.{name}" for name in SAVED_FIELDS if f"{layer}.{name}" not in names]
    if missing:
        layers = sorted(name.removesuffix(".scale") for name in names if name.endswith(".scale"))
        listed = ", ".join(map(repr, layers[:8])) + (", ..." if len(layers) > 8 else "")
        raise InvalidFile(
            f"the file has no {', '.join(missing)} (expected: an entry for each; the layers in the file are: "
            f"{listed or 'none'}; pass name=... to load one of them)"
        )


def _require_absent(layer: str, present: list[str]) -> None:
    if present:
        raise InvalidFile(f"the file has a layer {layer!r} already (expected: another name=, or a new file)")


def _damaged(kind: str, error: BaseException) -> InvalidFile:
    return InvalidFile(f"damaged, or not a {kind} file of a layer: {type(error).__name__}: {error}")


def _h5py() -> Any:
    try:
        import h5py  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise InvalidConfiguration("HDF5 files need the package h5py: pip install 'sharednorm[hdf5]'") from error
    return h5py


def _safetensors() -> tuple[Any, type[Exception]]:
    try:
        import safetensors.numpy  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise InvalidConfiguration(
            ".safetensors files need the package safetensors: pip install 'sharednorm[safetensors]'"
        ) from error
    return safetensors.numpy, safetensors.SafetensorError
