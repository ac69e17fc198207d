"""The command line, `sharednorm`. Each command imports what it needs when it is run."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sharednorm._version import __version__
from sharednorm.errors import InvalidConfiguration, SharedNormError
from sharednorm_server.cli.bench import add_bench
from sharednorm_server.cli.credentials import add_certs, add_token
from sharednorm_server.cli.doctor import add_doctor
from sharednorm_server.cli.export_import import add_export, add_import
from sharednorm_server.cli.inspect import add_ls, add_snapshots, add_stats
from sharednorm_server.cli.maintain import add_backup, add_delete, add_rollback
from sharednorm_server.cli.migrate import add_migrate
from sharednorm_server.cli.output import FAILED, Commands, shown
from sharednorm_server.cli.watch import add_watch
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.config.sources import add_options, settle
from sharednorm_server.errors import StartError
from sharednorm_server.observability.logs import configure

if TYPE_CHECKING:
    from sharednorm_server.server import RunningServer

UNUSABLE = 2
DEVICE_LOST = 3
STORE_FAILED = 4
INTERRUPTED = 130

_log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: failed; 2: not possible like this; 3: a GPU was lost; 4: the state cannot be kept any more.

    Args:
        argv: The arguments; None for those of this process.
    """
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        code = run(arguments)
        print(end="", flush=True)
    except StartError as error:
        return _fail(error, UNUSABLE)
    except SharedNormError as error:
        return _fail(error, arguments.failure)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read this, `head` perhaps, has seen enough; nothing may be written any more, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return code


def _fail(error: Exception, code: int) -> int:
    print(f"sharednorm: {error}", file=sys.stderr)
    return code


# --- serve ----------------------------------------------------------------------------------------------


def _serve(arguments: argparse.Namespace) -> int:
    settings = settle(vars(arguments), os.environ, arguments.config)
    if arguments.print_config:
        print(settings.toml(), end="")
        return 0
    config = settings.config
    configure(config.log_level, config.log_format)
    stop = Stop()
    _allow_many_files()
    server = _start(config)
    server.on_device_lost(lambda _: stop.fail(DEVICE_LOST))
    server.on_store_failed(lambda _: stop.fail(STORE_FAILED))
    print(shown(server.banner), flush=True)
    failure = stop.wait()
    _log.info("stopping: no new calls, and %g s for those that are running", config.shutdown_grace)
    ended = server.stop(config.shutdown_grace)
    if failure is not None:
        return failure
    return 0 if ended else FAILED


def _allow_many_files() -> None:
    # A descriptor for each connection and each region of shared memory; the usual limit, 1024, is one for programs that
    # use select(), which this one does not.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _start(config: ServerConfig) -> RunningServer:
    try:
        from sharednorm_server import server  # noqa: PLC0415 - needs the extra
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in {"grpc_health", "grpc_reflection", "jinja2", "matplotlib", "prometheus_client"}:
            raise
        raise StartError(f"the server needs {package}: pip install 'sharednorm[server]'") from error
    return server.start(config)


class Stop:
    """What the main thread waits for: a signal to stop, or that the server has failed for good.

    By a pipe, to which the system's own handler writes at once (`set_wakeup_fd`). Handlers in Python run on the main
    thread, between two of its instructions: a signal that came right before that thread began to wait for a lock, in a
    queue say, would be seen when the next one comes.
    """

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._writer = writer
        self._code: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        signal.set_wakeup_fd(writer)

    def fail(self, code: int) -> None:
        """Say that the server has to stop by itself, with an exit code that says why; from any thread."""
        self._code = code
        os.write(self._writer, b"!")

    def wait(self) -> int | None:
        """Wait for either, once; return the exit code of a failure."""
        os.read(self._reader, 1)
        signal.set_wakeup_fd(-1)
        return self._code

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        # The next one ends the process as it stands.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


# --- Arguments ------------------------------------------------------------------------------------------


class _CommandParser(argparse.ArgumentParser):
    # An abbreviation would be another name of an option, and would mean another one when another option comes.
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharednorm",
        description="Batch-normalization layers that live on one server and behave like local ones in every process.",
        epilog="example: sharednorm serve --listen 127.0.0.1:50051",
    )
    parser.add_argument("--version", action="version", version=f"sharednorm {__version__}")
    commands: Commands[argparse.ArgumentParser] = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    _add_serve(commands)
    add_ls(commands)
    add_stats(commands)
    add_watch(commands)
    add_export(commands)
    add_import(commands)
    add_delete(commands)
    add_snapshots(commands)
    add_rollback(commands)
    add_backup(commands)
    add_migrate(commands)
    add_token(commands)
    add_certs(commands)
    add_bench(commands)
    add_doctor(commands)
    _add_completion(commands)
    return parser


def _add_serve(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve",
        help="run a server",
        description="Run a server until it gets SIGTERM or SIGINT; then running calls end, and no new ones begin. What "
        "no option says, the variable SHAREDNORM_ and its name says, then the file, then the default.",
        epilog="example: sharednorm serve --listen unix:/run/sharednorm.sock --workers 64 "
        "--activation-cache-bytes 4GiB",
    )
    parser.set_defaults(run=_serve, failure=UNUSABLE)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file with options; default: the one of $SHAREDNORM_CONFIG"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print what the server would be started with, and end"
    )
    add_options(parser)


def _add_completion(commands: Commands[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help="print what completes commands in a shell",
        description="Print a script that completes commands and options in a shell.",
        epilog="example: sharednorm completion bash > ~/.local/share/bash-completion/completions/sharednorm",
    )
    parser.set_defaults(run=lambda arguments: _completion(arguments.shell, _parser()), failure=FAILED)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def _completion(shell: str, parser: argparse.ArgumentParser) -> int:
    try:
        import shtab  # noqa: PLC0415 - needed here alone
    except ModuleNotFoundError as error:
        raise InvalidConfiguration("completion needs shtab: pip install 'sharednorm[server]'") from error
    print(shtab.complete(parser, shell=shell))
    return 0
