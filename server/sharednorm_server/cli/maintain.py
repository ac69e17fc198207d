"""The commands that change a server's layers: `rollback`, `backup` and `delete`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sharednorm.errors import InvalidConfiguration, LayerNotFound
from sharednorm_server.cli.output import FAILED, Commands, add_json, add_server, connect, say, shown


def add_rollback(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm rollback`."""
    parser = commands.add_parser(
        "rollback",
        help="bring a layer back to an earlier state",
        description="Bring a layer back to a snapshot, for everybody: scale, bias, and the statistics of all domains. "
        "What it has now becomes a snapshot first. Its count of steps goes on.",
        epilog="example: sharednorm rollback stem/bn --to-version 12000",
    )
    parser.set_defaults(run=_rollback, failure=FAILED)
    parser.add_argument("name", metavar="NAME", help="the layer's name")
    parser.add_argument("--to-version", type=int, required=True, metavar="V", help="version of the snapshot")
    add_json(parser)
    add_server(parser)


def add_backup(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm backup`."""
    parser = commands.add_parser(
        "backup",
        help="copy a server's state to a file, while it works",
        description="Have a server copy all that it keeps to a file on its machine, and print the file's path. To use "
        "it, put it into an empty directory as sharednorm.sqlite3, and start a server with that as its --state.",
        epilog="example: sharednorm backup --server unix:/run/sharednorm.sock",
    )
    parser.set_defaults(run=_backup, failure=FAILED)
    add_json(parser)
    add_server(parser)


def add_delete(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm delete`."""
    parser = commands.add_parser(
        "delete",
        help="forget layers",
        description="Forget layers and all that they have learned, snapshots included, for everybody. It asks first.",
        epilog="example: sharednorm delete old/bn1 old/bn2 --yes",
    )
    parser.set_defaults(run=_delete, failure=FAILED)
    parser.add_argument("names", nargs="+", metavar="NAME", help="which")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add_json(parser)
    add_server(parser)


def _rollback(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        before = hub.layer(arguments.name).version
        hub.rollback(arguments.name, arguments.to_version)
    text = f"{shown(arguments.name)} is as it was at version {arguments.to_version}; what it was is version {before}"
    say(arguments, text, {"name": arguments.name, "version": arguments.to_version, "before": before})
    return 0


def _backup(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        path = hub.backup()
    say(arguments, path, {"path": path})
    return 0


def _delete(arguments: argparse.Namespace) -> int:
    with connect(arguments) as hub:
        known = {layer.name: layer.version for layer in hub.layers()}
        missing = [name for name in arguments.names if name not in known]
        if missing:
            raise LayerNotFound(f"there is no layer {missing[0]!r} in {hub.namespace!r}; nothing has been deleted")
        if not arguments.yes and not _sure(arguments.names, known):
            print("nothing has been deleted", file=sys.stderr)
            return FAILED
        for name in arguments.names:
            hub.delete(name)
    say(arguments, f"deleted: {', '.join(map(shown, arguments.names))}", {"deleted": arguments.names})
    return 0


def _sure(names: Sequence[str], known: dict[str, int]) -> bool:
    if not sys.stdin.isatty():
        raise InvalidConfiguration("nobody can be asked here whether to delete (expected: --yes)")
    listed = ", ".join(f"{shown(name)} ({known[name]} steps)" for name in names)
    print(f"Delete {listed}, for everybody? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}
