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
from typing import TYPE_CHECKING

from sharednorm._version import __version__
from sharednorm.errors import SharedNormError
from sharednorm_server.bench import add_bench
from sharednorm_server.commands import FAILED, add_backup, add_ls, add_rollback, add_snapshots, add_stats, shown
from sharednorm_server.config import (
    DEFAULT_LISTEN,
    ServerConfig,
    StartError,
    default_state,
    parse_port,
    parse_size,
)
from sharednorm_server.doctor.command import add_doctor
from sharednorm_server.keys import add_certs, add_token

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
    config = ServerConfig(
        listen=arguments.listen,
        device=arguments.device,
        state=default_state() if arguments.state is None else arguments.state,
        durability=arguments.durability,
        snapshot_every=arguments.snapshot_every,
        snapshot_count=arguments.snapshot_count,
        snapshot_age=arguments.snapshot_age,
        max_sessions=arguments.max_sessions,
        max_layers=arguments.max_layers,
        max_calls=arguments.max_calls,
        max_connections=arguments.max_connections,
        threads=arguments.threads,
        workers=arguments.workers,
        max_tensor_bytes=parse_size(arguments.max_tensor_bytes),
        saved_input_bytes=parse_size(arguments.saved_input_bytes),
        device_memory_bytes=None
        if arguments.device_memory_bytes is None
        else parse_size(arguments.device_memory_bytes),
        in_flight_bytes=parse_size(arguments.in_flight_bytes),
        shared_memory_bytes=parse_size(arguments.shared_memory_bytes),
        session_memory_bytes=parse_size(arguments.session_memory_bytes),
        direct_port=parse_port(arguments.direct_port),
        grace=arguments.grace,
        insecure=arguments.insecure,
        tokens=arguments.tokens,
        tls_cert=arguments.tls_cert,
        tls_key=arguments.tls_key,
        tls_client_ca=arguments.tls_client_ca,
    )
    logging.basicConfig(
        stream=sys.stderr, level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    stop = Stop()
    _allow_many_files()
    server = _start(config)
    server.on_device_lost(lambda _: stop.fail(DEVICE_LOST))
    server.on_store_failed(lambda _: stop.fail(STORE_FAILED))
    print(shown(server.banner), flush=True)
    failure = stop.wait()
    _log.info("stopping: no new calls, and %g s for those that are running", config.grace)
    ended = server.stop(config.grace)
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
        if package not in {"grpc_health", "grpc_reflection"}:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sharednorm",
        description="Batch-normalization layers that live on one server and behave like local ones in every process.",
        epilog="example: sharednorm serve --listen 127.0.0.1:50051",
    )
    parser.add_argument("--version", action="version", version=f"sharednorm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    add_ls(commands)
    add_stats(commands)
    add_snapshots(commands)
    add_rollback(commands)
    add_backup(commands)
    add_token(commands)
    add_certs(commands)
    add_bench(commands)
    add_doctor(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = ServerConfig()
    parser = commands.add_parser(
        "serve",
        help="run a server",
        description="Run a server until it gets SIGTERM or SIGINT; then running calls end, and no new ones begin.",
        epilog="example: sharednorm serve --listen unix:/run/sharednorm.sock --workers 64 --saved-input-bytes 4GiB",
    )
    parser.set_defaults(run=_serve, failure=UNUSABLE)
    add = parser.add_argument
    add("--listen", metavar="ADDRESS", default=DEFAULT_LISTEN,
        help="HOST:PORT (port 0: any that is free) or unix:PATH; default %(default)s")  # fmt: skip
    add(
        "--device",
        default=defaults.device,
        help="what computes: cpu, cuda, cuda:1, or cuda:0,cuda:1 for layers spread over several; default %(default)s",
    )
    add("--state", help="what remembers: sqlite:///DIRECTORY, or memory: (until the server ends); default: a directory "
        "of $STATE_DIRECTORY or $XDG_STATE_HOME, or ~/.local/state/sharednorm")  # fmt: skip
    add("--durability", choices=("os", "fsync"), default=defaults.durability,
        help="what an answered change survives: os, the end of the process, kill -9 included; fsync, loss of power; "
        "default %(default)s")  # fmt: skip
    add("--snapshot-every", type=float, metavar="SECONDS", default=defaults.snapshot_every,
        help="time between two snapshots of a layer that changes; 0: none; default %(default)g")  # fmt: skip
    add("--snapshot-count", type=int, metavar="N", default=defaults.snapshot_count,
        help="snapshots of a layer that are kept; default %(default)s")  # fmt: skip
    add("--snapshot-age", type=float, metavar="SECONDS", default=defaults.snapshot_age,
        help="how old one gets; the newest always stays; default %(default)g")  # fmt: skip
    add("--max-sessions", type=int, metavar="N", default=defaults.max_sessions,
        help="clients whose last changes each layer remembers, so that what is sent twice is done once; "
        "default %(default)s")  # fmt: skip
    add("--max-layers", type=int, metavar="N", default=defaults.max_layers,
        help="layers of a namespace; default %(default)s")  # fmt: skip
    add("--max-calls", type=int, metavar="N", default=defaults.max_calls,
        help="calls by gRPC that run or wait at a time; others are told to try again; default %(default)s")  # fmt: skip
    add("--max-connections", type=int, metavar="N", default=defaults.max_connections,
        help="direct connections at a time; who gets none uses gRPC; default %(default)s")  # fmt: skip
    add("--threads", type=int, metavar="N", help="threads of one computation; default: one a CPU")
    add("--workers", type=int, metavar="N", default=defaults.workers,
        help="calls that run at a time by gRPC, and as many on direct connections; default %(default)s")  # fmt: skip
    add("--max-tensor-bytes", metavar="SIZE", default="8GiB", help="largest tensor; default %(default)s")
    add("--saved-input-bytes", metavar="SIZE", default="1GiB",
        help="inputs kept for backwards, in all; default %(default)s")  # fmt: skip
    add("--device-memory-bytes", metavar="SIZE",
        help="most of a GPU's memory to use; default: nine tenths of what is free at the start")  # fmt: skip
    add("--in-flight-bytes", metavar="SIZE", default="8GiB",
        help="large tensors on their way at a time, in all; default %(default)s")  # fmt: skip
    add("--direct-port", metavar="PORT", default="0",
        help="TCP port for tensors, beside gRPC's; 0: any that is free, off: none; default %(default)s")  # fmt: skip
    add("--shared-memory-bytes", metavar="SIZE", default="8GiB",
        help="memory shared with clients on this machine, over a unix socket, in all; default %(default)s")  # fmt: skip
    add("--session-memory-bytes", metavar="SIZE", default="4GiB",
        help="most of that for one client; default %(default)s")  # fmt: skip
    add("--grace", type=float, metavar="SECONDS", default=defaults.grace,
        help="time that running calls are given at the end; default %(default)s")  # fmt: skip
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default %(default)s")
    add("--tokens", type=Path, metavar="FILE",
        help="tokens that clients have to show, as `sharednorm token create` writes them; default: none")  # fmt: skip
    add("--tls-cert", type=Path, metavar="FILE", help="the server's certificate, PEM; default: nothing is encrypted")
    add("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    add("--tls-client-ca", type=Path, metavar="FILE",
        help="authorities of certificates that clients have to show, PEM; default: they need none")  # fmt: skip
    add("--insecure", action="store_true",
        help="listen without encryption where other machines can reach it")  # fmt: skip
