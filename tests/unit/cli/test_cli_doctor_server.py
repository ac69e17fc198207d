"""`sharednorm doctor --server`: 0 for a server that serves, else 1 and one line that says what is wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sharednorm import __version__
from sharednorm.codec import wire
from sharednorm.v1 import service_pb2
from sharednorm_server.rpc.servicer import SERVICE_NAME
from tests.support.processes import server

ServingStatus = health_pb2.HealthCheckResponse.ServingStatus


def run(address: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    result = server.run(["doctor", "--server", address, *arguments], env={"PYTHONIOENCODING": "utf-8", **(env or {})})
    assert "Traceback" not in result.stdout + result.stderr
    return result


def refusal(address: str, *arguments: str) -> str:
    """Run it, expect that it fails, and return its one line."""
    result = run(address, *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("sharednorm: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@contextmanager
def stranger(
    statuses: dict[str, int] | None = None, info: service_pb2.GetServerInfoResponse | None = None, seconds: float = 0.0
) -> Iterator[str]:
    """Run a gRPC server that says of its health and of itself what it is told to, after so many seconds."""
    grpc_server = grpc.server(futures.ThreadPoolExecutor(4))
    if statuses is not None:
        status = health.HealthServicer()
        for service, value in statuses.items():
            status.set(service, value)
        health_pb2_grpc.add_HealthServicer_to_server(status, grpc_server)
    released = threading.Event()

    def get_server_info(_: bytes, __: grpc.ServicerContext) -> bytes:
        released.wait(seconds)
        return info.SerializeToString() if info is not None else b""

    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(get_server_info)
    grpc_server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(SERVICE_NAME, {"GetServerInfo": handler})]
    )
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        released.set()
        grpc_server.stop(0).wait(5)


def all_are(status: int) -> dict[str, int]:
    return {"": status, SERVICE_NAME: status}


def test_a_server_that_serves() -> None:
    with server.in_process() as running:
        result = run(running.address)
    assert (result.returncode, result.stderr) == (0, "")
    facts = dict(line.split(None, 1) for line in result.stdout.splitlines())
    assert facts["server"] == running.address
    assert (facts["health"], facts["release"], facts["protocol"]) == ("SERVING", __version__, str(wire.PROTOCOL))
    assert facts["device"] == running.banner.partition("device ")[2].partition(", state")[0]
    assert facts["store"] == "memory:"
    assert facts["limits"] == "8 GiB a tensor, 1 MiB in one message, else in chunks of 1 MiB"


def test_a_server_process_and_its_limits() -> None:
    with server.server_process("--max-tensor-bytes", "100MiB", env={"SHAREDNORM_ARITHMETIC": "numpy"}) as process:
        result = run(process.address, "--json")
        assert (result.returncode, result.stderr) == (0, "")
        facts = json.loads(result.stdout)
        assert facts["device"].startswith("cpu (numpy, ")
        assert facts["limits"].startswith("100 MiB a tensor")
        assert process.stop() == 0
        assert "is the server running" in refusal(process.address)


def test_a_unix_socket_with_a_name_of_any_script(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/层 100%.sock"
    with server.server_process(listen=address, env={"SHAREDNORM_ARITHMETIC": "numpy"}) as process:
        result = run(process.address)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines()[0] == f"server    {address}"
        ascii_only = run(process.address, env={"PYTHONIOENCODING": "ascii"})
        assert ascii_only.returncode == 0
        assert r"\u5c42" in ascii_only.stdout


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        began = time.monotonic()
        assert f"sharednorm serve --listen {address}" in refusal(address)
        assert time.monotonic() - began < 4.5  # refused, not timed out
    assert f"no answer from unix:{tmp_path}/none" in refusal(f"unix:{tmp_path}/none")


def test_a_port_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        began = time.monotonic()
        assert "did not answer within 1 s" in refusal(address, "--timeout", "1")
        assert time.monotonic() - began < 5


def test_a_server_process_that_hangs() -> None:
    with server.server_process(env={"SHAREDNORM_ARITHMETIC": "numpy"}) as process:
        process.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            assert "did not answer within 1 s" in refusal(process.address, "--timeout", "1")
        finally:
            process.process.send_signal(signal.SIGCONT)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("statuses", "message"),
    [
        pytest.param(all_are(ServingStatus.NOT_SERVING), "the server at {} is NOT_SERVING", id="not serving"),
        pytest.param(all_are(ServingStatus.UNKNOWN), "the server at {} is UNKNOWN", id="unknown"),
        pytest.param({"": ServingStatus.SERVING, SERVICE_NAME: ServingStatus.NOT_SERVING},
                     SERVICE_NAME + " at {} is NOT_SERVING", id="the layers alone are not served"),
        pytest.param({"": ServingStatus.SERVING}, "{} is not a sharednorm server", id="another service"),
        pytest.param(None, "{} has no health service", id="no health service"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_serve(statuses: dict[str, int] | None, message: str) -> None:
    info = service_pb2.GetServerInfoResponse(version=__version__, protocol=wire.PROTOCOL)
    with stranger(statuses, info) as address:
        assert message.format(address) in refusal(address)


def test_a_server_of_another_protocol() -> None:
    info = service_pb2.GetServerInfoResponse(version="9.0.0", protocol=9)
    with stranger(all_are(ServingStatus.SERVING), info) as address:
        assert "release 9.0.0) speaks protocol 9" in refusal(address)


def test_a_server_that_is_too_busy_to_say_what_it_is() -> None:
    with stranger(all_are(ServingStatus.SERVING), seconds=30.0) as address:
        began = time.monotonic()
        message = refusal(address, "--timeout", "1")
        assert "is SERVING, but did not say within 1 s what it is" in message
        assert time.monotonic() - began < 5


def test_what_a_server_says_of_itself_stays_on_its_line() -> None:
    info = service_pb2.GetServerInfoResponse(version="1\n2\x1b[2J", protocol=wire.PROTOCOL)
    with stranger(all_are(ServingStatus.SERVING), info) as address:
        result = run(address)
    assert result.returncode == 0
    assert r"release   1\n2\x1b[2J" in result.stdout.splitlines()


@pytest.mark.parametrize("timeout", ["0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none(timeout: str) -> None:
    assert "expected: a number of seconds > 0" in refusal("127.0.0.1:1", "--timeout", timeout)


def test_an_address_that_is_none() -> None:
    assert "'nonsense' has no port" in refusal("nonsense")


def test_a_client_without_the_extra_is_told_what_to_install() -> None:
    code = (
        "import sys; sys.modules.update(grpc_health=None); sys.stderr = sys.stdout; "
        "from sharednorm_server.cli.main import main; print(main(['doctor', '--server', '127.0.0.1:1']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "sharednorm: doctor --server needs grpc_health: pip install 'sharednorm[server]'\n1\n"


def test_nothing_that_computes_is_imported() -> None:
    code = (
        "import sys; from sharednorm_server.cli.main import main; print(main(['doctor', '--server', sys.argv[1]])); "
        "print(sorted({'numba', 'llvmlite', 'pycuda', 'ml_dtypes', 'h5py', 'torch'} & set(sys.modules)))"
    )
    with server.in_process() as running:
        done = subprocess.run(
            [sys.executable, "-c", code, running.address], capture_output=True, text=True, timeout=60, check=True
        )
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]
