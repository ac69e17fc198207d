"""The command line of `sharednorm doctor`. What it needs to look at this machine is imported when it does."""

from __future__ import annotations

import argparse
import json

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.cli.output import FAILED, Commands, print_table, shown
from sharednorm_server.doctor.server_checks import SECONDS, ask

CPU, CUDA = "cpu", "cuda"


def add_doctor(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `sharednorm doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine lacks to run a server, or whether a server is well",
        description="Say what this machine has and lacks to run a server, and how to mend it; exit code 0 if a server "
        "could start with --device, else 1. With --server: ask a server whether it serves and what it is; exit code 0 "
        "if it does and speaks this release's protocol, else 1 with one line on stderr.",
        epilog="example: sharednorm doctor --server 127.0.0.1:50051 --timeout 2",
    )
    parser.set_defaults(run=_doctor, failure=FAILED)
    add = parser.add_argument
    add("--device", choices=(CPU, CUDA),
        help="what a server here would compute with; default: report on both, exit code for cpu")  # fmt: skip
    add("--server", metavar="ADDRESS", help="HOST:PORT or unix:PATH of a server to ask instead")
    add("--tls-ca", metavar="FILE", help="authority of the server's certificate, PEM; default: $SHAREDNORM_TLS_CA")
    add("--timeout", type=float, metavar="SECONDS", default=SECONDS,
        help="with --server: longest wait, in all; default %(default)s")  # fmt: skip
    add("--json", action="store_true", help="print one object in JSON instead of a table")


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.server is None:
        return _examine(arguments.device, arguments.json)
    if arguments.device is not None:
        raise InvalidConfiguration(
            "--server asks another process, and --device is about this machine (expected: one of the two)"
        )
    facts = ask(arguments.server, arguments.timeout, arguments.tls_ca)
    if arguments.json:
        print(json.dumps(facts))
    else:
        print_table([(name, shown(value)) for name, value in facts.items()])
    return 0


def _examine(device: str | None, as_json: bool) -> int:
    from sharednorm_server.doctor import report  # noqa: PLC0415 - a health check does without

    found = report.examine(cuda=device != CPU)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        rows = [(check.name, check.state, shown(check.detail)) for check in found.checks]
        print_table([("CHECK", "STATE", "DETAIL"), *rows])
        print()
        for name, why in found.verdicts.items():
            verdict = f"not possible: {shown(why)}" if why else "ready"
            print(f"serve --device {name}: {verdict}")
    return FAILED if found.verdicts[device or CPU] else 0
