"""The commands that make what clients and servers know each other by: tokens and certificates."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from sharednorm.core.validation import check_namespace
from sharednorm.errors import InvalidConfiguration
from sharednorm_server.auth.tokens import Right, append, new_token, parse_until

FAILED = 1

Commands = argparse._SubParsersAction  # the type that argparse gives to what add_subparsers returns


def add_token(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm token create`."""
    parser = commands.add_parser("token", help="make tokens, by which a server knows its clients")
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    create = inner.add_parser(
        "create",
        help="make a token",
        description="Print a new token, and write its hash to a file for `sharednorm serve --tokens`, which reads the "
        "file anew when it changes. The token itself is nowhere else. To revoke it, take its line away.",
        epilog="example: sharednorm token create --file tokens --name ana --right train --namespace 'exp-*'",
    )
    create.set_defaults(run=_create_token, failure=FAILED)
    add = create.add_argument
    add("--file", type=Path, required=True, help="the file, which is made if it is not there")
    add("--name", required=True, help="whose token it is, for whoever reads the file")
    add("--right", choices=[right.name.lower() for right in Right], default="train",
        help="read; eval, which includes it; train; or admin, which includes all; default %(default)s")  # fmt: skip
    add("--namespace", action="append", metavar="PATTERN",
        help="where it may be used, as 'default' or 'exp-*'; may be given again; default: default")  # fmt: skip
    add("--expires", metavar="TIME", default="never", help="for example 90d, 12h or 30m; default %(default)s")


def add_certs(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm certs create`."""
    parser = commands.add_parser("certs", help="make certificates for a first deployment")
    inner = parser.add_subparsers(metavar="COMMAND", required=True)
    create = inner.add_parser(
        "create",
        help="make an authority, and certificates of a server and of clients",
        description="Make an authority of your own (ca.pem, ca.key), and what it has signed: server.pem and server.key "
        "for `serve --tls-cert --tls-key`, client.pem and client.key for clients of servers with --tls-client-ca. "
        "Clients believe the server by ca.pem. Keep ca.key where nobody runs anything.",
        epilog="example: sharednorm certs create --directory certs --host gpu-box --host 10.0.0.7",
    )
    create.set_defaults(run=_create_certificates, failure=FAILED)
    add = create.add_argument
    add("--directory", type=Path, required=True, help="where; it is made if it is not there")
    add("--host", action="append", required=True, help="name or number of the server; may be given again")
    add("--days", type=int, default=365, help="how long they are valid; default %(default)s")


def _create_token(arguments: argparse.Namespace) -> int:
    namespaces = tuple(check_namespace(name) for name in arguments.namespace or ["default"])
    if not arguments.name.strip():
        raise InvalidConfiguration("the name is empty (expected: whose token it is)")
    expires = parse_until(arguments.expires, time.time())
    text, token = new_token(arguments.name, Right[arguments.right.upper()], namespaces, expires)
    try:
        append(arguments.file, token)
    except OSError as error:
        raise InvalidConfiguration(f"{arguments.file} cannot be written: {error.strerror}") from error
    print(text)
    return 0


def _create_certificates(arguments: argparse.Namespace) -> int:
    try:
        from sharednorm_server.auth.certificates import create  # noqa: PLC0415 - needs the server's extra
    except ImportError as error:
        raise InvalidConfiguration(
            "certs create needs the package cryptography: pip install 'sharednorm[server]'"
        ) from error
    try:
        paths = create(arguments.directory, arguments.host, arguments.days)
    except OSError as error:
        raise InvalidConfiguration(f"{arguments.directory} cannot be written: {error.strerror}") from error
    for path in paths:
        print(path)
    return 0
