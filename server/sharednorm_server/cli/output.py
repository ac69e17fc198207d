"""What the commands have in common: their options, and how they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import sharednorm
from sharednorm.errors import InvalidConfiguration, InvalidFile, SharedNormError
from sharednorm_server.config.options import DEFAULT_LISTEN

if TYPE_CHECKING:
    from sharednorm import Hub, LayerInfo

FAILED = 1

Commands = argparse._SubParsersAction  # the type that argparse gives to what add_subparsers returns


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which server, whose layers, and how long to wait."""
    parser.add_argument(
        "--server",
        metavar="ADDRESS",
        default=DEFAULT_LISTEN,
        help="HOST:PORT or unix:PATH of the server; default %(default)s",
    )
    parser.add_argument(
        "--tls-ca",
        metavar="FILE",
        help="authority of the server's certificate, PEM; default: the file that $SHAREDNORM_TLS_CA names, or no "
        "encryption. A token is taken from $SHAREDNORM_TOKEN",
    )
    parser.add_argument("--namespace", default="default", help="whose layers; default %(default)s")
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="longest wait for the server; default %(default)s",
    )


def connect(arguments: argparse.Namespace) -> Hub:
    """Return the hub that a command line asks for."""
    return sharednorm.connect(
        arguments.server, namespace=arguments.namespace, timeout=arguments.timeout, tls=arguments.tls_ca
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how to print."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


@contextmanager
def telling_of_files() -> Iterator[None]:
    """Have files that cannot be read or written told in one line, like everything else.

    Raises:
        InvalidFile: One cannot be.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, SharedNormError):  # some of ours are such, too
            raise
        raise InvalidFile(f"{error.filename or 'a file'}: {error.strerror or error}") from error


def say(arguments: argparse.Namespace, text: str, found: object) -> None:
    """Print what has been done: a line for people, or JSON."""
    print(json.dumps(found, indent=1) if arguments.json else text)


def layer_to_json(layer: LayerInfo) -> dict[str, object]:
    """Return what is known of a layer, as JSON has it."""
    return {
        "name": layer.name, "kind": layer.config.kind.label, "maps": layer.config.maps, "train": layer.train,
        "initialized": layer.initialized, "frozen": layer.stats_frozen, "version": layer.version,
        "numOfProps": layer.num_of_props, "domains": layer.domains,
    }  # fmt: skip


def table_of(layers: Sequence[LayerInfo]) -> list[tuple[str, ...]]:
    """Return layers as a table, its head first."""
    head = ("NAME", "KIND", "MAPS", "MODE", "STEPS", "NUMOFPROPS", "DOMAINS")
    rows = [
        (
            shown(layer.name),
            layer.config.kind.label,
            str(layer.config.maps),
            mode_of(layer.train, layer.stats_frozen) if layer.initialized else "empty",
            str(layer.version),
            str(layer.num_of_props),
            str(layer.domains),
        )
        for layer in layers
    ]
    return [head, *rows]


def mode_of(train: bool, frozen: bool) -> str:
    """Return a layer's mode, as people read it."""
    return ("train" if train else "eval") + (", frozen" if frozen else "")


def drawing() -> ModuleType:
    """Return what draws pictures.

    Raises:
        InvalidConfiguration: It is not installed.
    """
    try:
        from sharednorm_server.http import charts  # noqa: PLC0415 - needs the extra, and takes a moment
    except ModuleNotFoundError as error:
        raise InvalidConfiguration(f"--plot needs {error.name}: pip install 'sharednorm[server]'") from error
    return charts


def shown(text: str) -> str:
    """Return a name or a path as it may be printed: on one line, in the characters that stdout has.

    Those that turn a terminal's line around, and all others that are not printable, are escaped.
    """
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # stdout is None in a process started without one
    return printable.encode(encoding, "backslashreplace").decode(encoding)


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print rows of cells, each column as wide as its widest cell."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
