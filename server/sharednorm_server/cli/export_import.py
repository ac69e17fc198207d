"""`sharednorm export` and `sharednorm import`: layers of a server as files in a directory, and back.

A directory has a file for each layer and each of its domains, as `layer.save` writes them, and `layers.json`, which
says what each is of, and how the layers are configured. So it can be read without this program, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import blank_state
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.core.validation import check_name
from sharednorm.errors import ConfigurationMismatch, InvalidFile, LayerNotFound
from sharednorm.files.state_file import save, write_whole
from sharednorm_server.cli.output import FAILED, Commands, add_json, add_server, connect, say, shown, telling_of_files

if TYPE_CHECKING:
    from sharednorm import Hub, Layer, LayerInfo

MANIFEST = "layers.json"
_VERSION = 1
# By the names of what saves and loads them; torch's state_dict has all layers in one file.
_EXTENSIONS = {"npz": ".npz", "safetensors": ".safetensors", "hdf5": ".hdf5"}
_TORCH = "state_dict.pt"
_TORCH_NAMES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def add_export(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm export`."""
    parser = commands.add_parser(
        "export",
        help="write layers to files",
        description="Write layers of a namespace, with their domains, to files in a directory, which `import` reads.",
        epilog="example: sharednorm export layers/ stem/bn --format safetensors",
    )
    parser.set_defaults(run=_export, failure=FAILED)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="where; it must not have an export already")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which layers; default: all of the namespace")
    parser.add_argument(
        "--format",
        choices=(*_EXTENSIONS, "torch"),
        default="npz",
        help="hdf5 is PuzzleLib's layout; torch is one state_dict with all layers; default %(default)s",
    )
    add_json(parser)
    add_server(parser)


def add_import(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm import`."""
    parser = commands.add_parser(
        "import",
        help="read layers from files",
        description="Make the layers of a directory that `export` wrote, with their statistics; or set the state of "
        "one layer that is there from one file, of any format; or those of several from a state_dict of torch.",
        epilog="example: sharednorm import layers/ --server other-box:50051",
    )
    parser.set_defaults(run=_import, failure=FAILED)
    parser.add_argument("source", type=Path, metavar="PATH", help="a directory, or a file")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which layers; default: all; of a file: the one")
    parser.add_argument("--replace", action="store_true", help="also set the state of layers that are there already")
    add_json(parser)
    add_server(parser)


# --- Export ---------------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.directory
    if os.path.lexists(directory / MANIFEST):
        raise InvalidFile(f"{directory} has an export already (expected: another directory)")
    with telling_of_files(), connect(arguments) as hub:
        known = {layer.name: layer for layer in hub.layers()}
        missing = [name for name in arguments.names if name not in known]
        if missing:
            raise LayerNotFound(f"there is no layer {missing[0]!r} in the namespace {hub.namespace!r}")
        names = arguments.names or list(known)
        directory.mkdir(parents=True, exist_ok=True)
        entries = [_write(hub, directory, number, known[name], arguments.format) for number, name in enumerate(names)]
        if arguments.format == "torch":
            _write_state_dict(hub, directory / _TORCH, [name for name in names if known[name].initialized])
        # Last: with it, the directory is complete.
        manifest = {"version": _VERSION, "layers": entries}
        write_whole(directory / MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
    say(arguments, f"{_layers(names)} in {shown(str(directory))}", {"directory": str(directory), "layers": names})
    return 0


def _write(hub: Hub, directory: Path, number: int, layer: LayerInfo, kind: str) -> dict[str, Any]:
    files: dict[str, str] = {}
    if kind != "torch" and layer.initialized:
        word = re.sub(r"[^A-Za-z0-9]+", "-", layer.name).strip("-")[:60]
        for place, domain in enumerate(("", *hub.layer(layer.name).domains)):
            files[domain] = f"{number:05}{f'-{place}' if domain else ''}{f'-{word}' if word else ''}{_EXTENSIONS[kind]}"
            hub.layer(layer.name, domain=domain).save(directory / files[domain])
    return {
        "name": layer.name,
        "train": layer.train,
        "empty": not layer.initialized,
        "config": _config_to_json(layer.config),
        "files": files,
    }


def _config_to_json(config: LayerConfig) -> dict[str, Any]:
    return {
        "kind": config.kind.label,
        "maps": config.maps,
        "epsilon": config.epsilon,
        "initFactor": config.init_factor,
        "minFactor": config.min_factor,
        "affine": config.affine,
        "averaging": config.averaging.value,
        "nonfinite": config.nonfinite.value,
    }


# --- Import ---------------------------------------------------------------------------------------------


def _import(arguments: argparse.Namespace) -> int:
    source: Path = arguments.source
    with telling_of_files(), connect(arguments) as hub:
        if _is(stat.S_IFREG, source / _TORCH):
            names = _read_directory(hub, source, arguments, _state_dict(source / _TORCH))
        elif _is(stat.S_IFDIR, source):
            names = _read_directory(hub, source, arguments, None)
        elif source.suffix in {".pt", ".pth"}:
            names = _set_from_state_dict(hub, _state_dict(source), arguments.names)
        else:
            names = _read_file(hub, source, arguments.names)
    say(arguments, f"{_layers(names)} from {shown(str(source))}", {"source": str(source), "layers": names})
    return 0


def _is(kind: int, path: Path) -> bool:
    """Whether a path leads to a file of a kind. If that cannot be seen, because a permission lacks, it is an `OSError`.

    `Path.is_file` and the like have said in that case, since Python 3.14, that there is no such file.
    """
    try:
        return stat.S_IFMT(path.stat().st_mode) == kind
    except (FileNotFoundError, NotADirectoryError):
        return False


def _layers(names: list[str]) -> str:
    return f"{len(names)} layer{'' if len(names) == 1 else 's'}"


def _read_file(hub: Hub, source: Path, names: list[str]) -> list[str]:
    if len(names) != 1:
        raise InvalidFile(f"{source} is of one layer (expected: its NAME on the server)")
    hub.layer(names[0]).load(source)
    return names


def _read_directory(
    hub: Hub, directory: Path, arguments: argparse.Namespace, tensors: Mapping[str, Any] | None
) -> list[str]:
    entries = _manifest(directory)
    unknown = [name for name in arguments.names if name not in entries]
    if unknown:
        raise InvalidFile(f"{directory} has no layer {unknown[0]!r} (expected: one of {', '.join(entries)})")
    chosen = {name: entries[name] for name in arguments.names or entries}
    there = {layer.name: layer.config for layer in hub.layers()}
    # All that can be seen before anything is changed.
    for name, (config, _, _, _) in chosen.items():
        if name in there and not arguments.replace:
            raise ConfigurationMismatch(
                f"the layer {name!r} is there already, and nothing has been changed (expected: --replace, another "
                "namespace, or the names of others)"
            )
        if name in there and there[name] != config:
            raise ConfigurationMismatch(
                f"the layer {name!r} is there with another configuration, and nothing has been changed"
            )
    for name, (config, train, empty, files) in chosen.items():
        layer = _made(hub, name, config, empty=empty)
        if tensors is not None and not empty:
            _set_from_tensors(layer, name, config, tensors)
        for domain, file in files.items():
            handle = _made(hub, name, config, domain) if domain else layer
            handle.load(directory / file)
        hub.set_train(name, train)
    return list(chosen)


def _made(hub: Hub, name: str, config: LayerConfig, domain: str = "", *, empty: bool = False) -> Layer:
    make = getattr(hub, config.kind.label)
    made: Layer = make(
        config.maps,
        epsilon=config.epsilon,
        initFactor=config.init_factor,
        minFactor=config.min_factor,
        affine=config.affine,
        name=name,
        averaging=config.averaging.value,
        nonfinite=config.nonfinite.value,
        domain=domain,
        empty=empty,
    )
    return made


Entry = tuple[LayerConfig, bool, bool, dict[str, str]]  # and whether it trains, whether it is empty, its files


def _manifest(directory: Path) -> dict[str, Entry]:
    path = directory / MANIFEST
    if not _is(stat.S_IFREG, path):
        raise InvalidFile(f"{directory} has no {MANIFEST} (expected: a directory that `sharednorm export` wrote)")
    text = path.read_bytes()
    try:
        document = json.loads(text)
        version = document["version"]
        if version != _VERSION:
            raise InvalidFile(f"{path} is of version {version!r} (expected: {_VERSION}; a newer release reads it)")
        return {each["name"]: _entry(each, directory) for each in document["layers"]}
    except OSError:  # of a file that it names; `InvalidFile` is a `ValueError`
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidFile):
            raise
        raise InvalidFile(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _entry(each: Mapping[str, Any], directory: Path) -> Entry:
    told = each["config"]
    kinds = {kind.label: kind for kind in LayerKind}
    config = LayerConfig(
        kinds[told["kind"]], told["maps"], told["epsilon"], told["initFactor"], told["minFactor"], told["affine"],
        Averaging(told["averaging"]), NonFinitePolicy(told["nonfinite"]),
    )  # fmt: skip
    check_name(each["name"])
    files = {str(domain): str(file) for domain, file in each["files"].items()}
    for file in files.values():
        if Path(file).name != file or not _is(stat.S_IFREG, directory / file):
            raise InvalidFile(f"{directory / MANIFEST} names {file!r}, which is no file beside it")
    return config, bool(each["train"]), bool(each["empty"]), files


# --- torch ------------------------------------------------------------------------------------------------


def _torch() -> Any:
    try:
        import torch  # noqa: PLC0415 - large, and an extra
    except ModuleNotFoundError as error:
        raise InvalidFile("a state_dict needs PyTorch: pip install 'sharednorm[torch]'") from error
    return torch


def _write_state_dict(hub: Hub, path: Path, names: list[str]) -> None:
    torch = _torch()
    tensors: dict[str, Any] = {}
    for name in names:
        state = hub.layer(name).snapshot()
        for theirs, ours in _TORCH_NAMES.items():
            tensors[f"{name}.{theirs}"] = torch.tensor(getattr(state, ours))
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(state.num_of_props)
    torch.save(tensors, path)


def _state_dict(path: Path) -> Mapping[str, Any]:
    torch = _torch()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:  # it cannot be read, whatever is in it
        raise
    except Exception as error:
        raise InvalidFile(f"{path} is no state_dict: {type(error).__name__}") from error
    if not isinstance(tensors, Mapping):
        raise InvalidFile(f"{path} is no state_dict but a {type(tensors).__name__}")
    return tensors


def _set_from_state_dict(hub: Hub, tensors: Mapping[str, Any], names: list[str]) -> list[str]:
    there = {layer.name: layer.config for layer in hub.layers()}
    inside = {key.removesuffix(".running_mean") for key in tensors if str(key).endswith(".running_mean")}
    chosen = names or sorted(there.keys() & inside)
    if not chosen:
        raise InvalidFile("the state_dict and the namespace have no layer of the same name")
    for name in chosen:
        if name not in inside:
            raise InvalidFile(f"the state_dict has no layer {name!r}")
        layer = hub.layer(name)
        _set_from_tensors(layer, name, there[name], tensors)
    return chosen


def _set_from_tensors(layer: Layer, name: str, config: LayerConfig, tensors: Mapping[str, Any]) -> None:
    try:
        values = {ours: tensors[f"{name}.{theirs}"].float().numpy() for theirs, ours in _TORCH_NAMES.items()}
        steps = int(tensors[f"{name}.num_batches_tracked"])
    except (KeyError, AttributeError, ValueError) as error:
        raise InvalidFile(f"the state_dict lacks parts of the layer {name!r}: {error}") from error
    if any(value.shape != (config.maps,) for value in values.values()):
        raise InvalidFile(f"the state_dict has another number of maps for the layer {name!r} (expected: {config.maps})")
    state = replace(blank_state(config), num_of_props=steps, **values)
    with TemporaryDirectory() as place:  # as a file it is set at once, and checked as every other is
        file = Path(place) / "layer.npz"
        save(file, name, config, state)
        layer.load(file)
