"""A client that meets no server, or one that is not ours: a typed error within the deadline that says what to do."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from sharednorm.errors import (
    DeadlineExceeded,
    IncompatibleServer,
    MalformedMessage,
    ServerUnavailable,
    SharedNormError,
)
from sharednorm.remote.connect import connect
from sharednorm.transport.channel import SERVICE
from sharednorm.v1 import service_pb2


def seconds(function: Callable[[], object]) -> float:
    start = time.monotonic()
    function()
    return time.monotonic() - start


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def silent_listener() -> Iterator[str]:
    """Accepts connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        accepted: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    accepted.append(sock.accept()[0])
            except OSError:
                return

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"127.0.0.1:{sock.getsockname()[1]}"
        sock.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in accepted:
            connection.close()


@contextmanager
def grpc_server(**methods: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
    """A real gRPC server with some methods under our service's name, which take and give bytes."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(5)


def test_nobody_listens() -> None:
    address = f"127.0.0.1:{closed_port()}"

    def attempt() -> None:
        with pytest.raises(ServerUnavailable, match="is the server running") as caught:
            connect(address)
        assert address in str(caught.value)
        assert f"sharednorm serve --listen {address}" in str(caught.value)
        assert isinstance(caught.value, ConnectionError)

    assert seconds(attempt) < 5


@pytest.mark.parametrize("what", ["nothing", "file", "stale socket", "directory that is missing"])
def test_no_unix_socket(what: str, tmp_path: Path) -> None:
    path = tmp_path / ("missing/s.sock" if "missing" in what else "s.sock")
    if what == "file":
        path.write_text("")
    elif what == "stale socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.fspath(path))

    def attempt() -> None:
        with pytest.raises(ServerUnavailable, match="is the server running"):
            connect(f"unix:{path}")

    assert seconds(attempt) < 5


def test_a_host_that_does_not_exist() -> None:
    def attempt() -> None:
        with pytest.raises((ServerUnavailable, DeadlineExceeded)):
            connect("no-such-host.invalid:50051", timeout=5.0)

    assert seconds(attempt) < 6


def test_a_listener_that_says_nothing() -> None:
    with silent_listener() as address:

        def attempt() -> None:
            with pytest.raises(DeadlineExceeded, match=r"did not answer within 1 s") as caught:
                connect(address, timeout=1.0)
            assert isinstance(caught.value, TimeoutError)

        assert 0.9 < seconds(attempt) < 2.0


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Knows no method, and keeps no log."""

    def log_message(self, *_: object) -> None:
        """Keep silent."""


def test_a_web_server() -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), QuietHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:

        def attempt() -> None:
            with pytest.raises((ServerUnavailable, IncompatibleServer, DeadlineExceeded)):
                connect(f"127.0.0.1:{server.server_port}", timeout=2.0)

        assert seconds(attempt) < 3
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_a_server_of_another_protocol() -> None:
    answer = service_pb2.GetServerInfoResponse(version="42.0.0", protocol=99).SerializeToString()
    with (
        grpc_server(GetServerInfo=lambda *_: answer) as address,
        pytest.raises(IncompatibleServer, match=r"release 42\.0\.0\) speaks protocol 99.*speaks protocol 3: install"),
    ):
        connect(address)


def test_a_server_from_before_there_were_protocols() -> None:
    with grpc_server(GetServerInfo=lambda *_: b"") as address, pytest.raises(IncompatibleServer, match="protocol 0"):
        connect(address)


def test_a_grpc_server_without_our_service() -> None:
    with grpc_server() as address, pytest.raises(IncompatibleServer, match="is it a sharednorm server"):
        connect(address)


def test_a_server_that_answers_with_bytes_that_are_no_message() -> None:
    with (
        grpc_server(GetServerInfo=lambda *_: b"\xff\xff\xff") as address,
        pytest.raises(MalformedMessage, match="cannot be parsed"),
    ):
        connect(address)


def test_a_server_that_cuts_the_call_off() -> None:
    def cut(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.CANCELLED, "going away")

    with grpc_server(GetServerInfo=cut) as address, pytest.raises(ServerUnavailable, match="cut the call off"):
        connect(address, timeout=5)


def test_a_failed_connect_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(SharedNormError):
            connect(f"127.0.0.1:{closed_port()}")
    assert threading.active_count() <= before
