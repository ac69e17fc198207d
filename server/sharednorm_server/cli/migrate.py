"""`sharednorm migrate`: a state to this release's layout; or all its layers into another, so that training goes on."""

from __future__ import annotations

import argparse
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.cli.output import FAILED, Commands, add_json, say
from sharednorm_server.config.options import parse_state, without_secrets
from sharednorm_server.errors import StartError

if TYPE_CHECKING:
    from sharednorm_server.store.base import LastingStore

_PAGE = 100


def add_migrate(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm migrate`."""
    parser = commands.add_parser(
        "migrate",
        help="copy all layers of one state into another, or bring one to the layout of this release",
        description="Bring a state that an earlier release has written to the layout of this one; or, with TO, copy "
        "all layers of one state into another: with their ids, versions, domains and snapshots, and "
        "what is known of the changes of clients. So these go on when a server with the new state has the address of "
        "the old one, and no step is lost or taken twice. Stop the servers of both first; clients wait for as long as "
        "their timeout. What is copied stays where it was. It can be done again: what is there already is left alone. "
        "A server brings a file to its layout by itself, and keeps a copy beside it; of a Redis keep one first.",
        epilog="examples: sharednorm migrate redis://box:6379; "
        "sharednorm migrate sqlite:///var/lib/sharednorm redis://box:6379",
    )
    parser.set_defaults(run=_migrate, failure=FAILED)
    parser.add_argument("source", metavar="FROM", help="a --state: sqlite:///DIRECTORY, or redis://HOST:PORT")
    parser.add_argument("target", metavar="TO", nargs="?", help="another one; default: FROM gets this release's layout")
    add_json(parser)


def _migrate(arguments: argparse.Namespace) -> int:
    if arguments.target is None:
        return _to_this_layout(arguments)
    source = _opened(arguments.source)
    try:
        target = _opened(arguments.target)
        try:
            copied, left = migrate(source, target, progress=sys.stderr.isatty() and not arguments.json)
        finally:
            target.close()
    finally:
        source.close()
    words = f"copied {copied} layer{'' if copied == 1 else 's'}" + (
        f"; {left} there already, and left alone" if left else ""
    )
    say(arguments, words, {"copied": copied, "left": left})
    return 0


def _to_this_layout(arguments: argparse.Namespace) -> int:
    place, shown = parse_state(arguments.source), without_secrets(arguments.source)
    if place is None:
        raise InvalidConfiguration(f"{shown} keeps nothing that could have another layout")
    if isinstance(place, Path):
        from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore  # noqa: PLC0415 - as below

        try:
            kind = (place / FILE_NAME).stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            kind = 0
        except OSError as error:
            raise StartError(f"the state in {place} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(kind):
            raise StartError(f"there is no state in {place}")
        store = SqliteStore(place)  # which does it
        store.close()
        copy = "" if store.earlier is None else f"; what it was before that is in {store.earlier}"
        found = {"backup": None if store.earlier is None else str(store.earlier)}
        say(arguments, f"{shown} has the layout of this release{copy}", found)
        return 0
    try:
        from sharednorm_server.store.redis.migration import migrate_layout  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise StartError(f"{shown} needs redis-py: pip install 'sharednorm[server,redis]'") from error
    layers = migrate_layout(place)
    words = f": {layers} layer{'' if layers == 1 else 's'} changed" if layers else ""
    say(arguments, f"{shown} has the layout of this release{words}", {"layers": layers})
    return 0


def migrate(source: LastingStore, target: LastingStore, *, progress: bool = False) -> tuple[int, int]:
    """Copy all layers; return how many were copied, and how many were there already."""
    target.begin_sessions_behind(source.last_session)
    from tqdm import tqdm  # noqa: PLC0415 - of the extra

    copied = left = 0
    bar = tqdm(total=sum(map(source.count, source.namespaces())), unit=" layers", disable=not progress)
    for namespace in source.namespaces():
        after = ""
        while page := source.page(namespace, after, _PAGE):
            for record in page:
                whole = source.whole(record.key)
                if whole is not None and target.take_in(whole):
                    copied += 1
                else:
                    left += 1
            after = page[-1].key.name
            bar.update(len(page))
    bar.close()
    return copied, left


def _opened(state: str) -> LastingStore:
    from sharednorm_server.server import open_store  # noqa: PLC0415 - needs the extra
    from sharednorm_server.store.base import LastingStore, SharedStore  # noqa: PLC0415 - as above

    store = open_store(state)
    if not isinstance(store, LastingStore):
        store.close()
        raise InvalidConfiguration(f"{without_secrets(state)} keeps nothing that could be copied")
    if isinstance(store, SharedStore) and (others := store.others()):
        store.close()
        raise StartError(
            f"the state in {without_secrets(state)} is used by {'; '.join(others)}: stop all servers that have it first"
        )
    return store
