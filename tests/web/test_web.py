"""The edge for HTTP: what it answers to whom, and that it stays up."""

from __future__ import annotations

import base64
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import sharednorm
from sharednorm_server.auth.certificates import create
from sharednorm_server.auth.tokens import Right, append, new_token
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.errors import StartError
from sharednorm_server.server import RunningServer, start
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process
from tests.support.web import get

SHAPE = (4, 3, 5, 2)
PAGES = ["/", "/layer?name=bn", "/metrics"]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as running, sharednorm.connect(running.address) as hub:
        hub.BatchNorm2D(3, name="bn")(random_tensor(1, SHAPE))
        yield running


def test_the_banner_says_where_it_is(server: RunningServer) -> None:
    assert server.banner.endswith(f", http {server.http}")


@pytest.mark.parametrize("path", [*PAGES, "/healthz", "/readyz", "/?every=never"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_there_is(server: RunningServer, path: str, method: str) -> None:
    got = get(server, path, method=method)
    assert got.status == 200
    assert got.headers["Cache-Control"] == "no-store"
    assert got.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in got.headers["Content-Security-Policy"]
    assert int(got.headers["Content-Length"]) > 0
    assert bool(got.body) is (method == "GET")


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/nothing", 404, "there is no such page; there are: / /layer /metrics /healthz /readyz"),
        ("/layer", 404, "LAYER_NOT_FOUND: "),
        ("/layer?name=none", 404, "LAYER_NOT_FOUND: "),
        ("/layer?name=bn&domain=none", 404, "LAYER_NOT_FOUND: "),
        ("/?namespace=" + "x" * 300, 400, "INVALID_NAME: "),
        ("/?page=zzz", 400, "INVALID_PAGE_TOKEN: "),
        ("/?" + "x" * 9000, 414, "too long"),
    ],
)
def test_what_there_is_not(server: RunningServer, path: str, status: int, words: str) -> None:
    got = get(server, path)
    assert (got.status, words in got.text) == (status, True), got.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(server: RunningServer, method: str) -> None:
    assert get(server, "/", method=method).status == 501


def test_noise_harms_nobody(server: RunningServer) -> None:
    assert server.http is not None
    host, _, port = server.http.rpartition(":")
    for noise in (b"\0" * 100, b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n", b"x" * 70_000, b""):
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(noise)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    assert get(server, "/healthz").status == 200


def test_many_who_say_nothing_keep_nobody_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharednorm_server.http.server._SILENCE_SECONDS", 0.5)
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as server:
        assert server.http is not None
        host, _, port = server.http.rpartition(":")
        socks = [socket.create_connection((host, int(port)), timeout=10) for _ in range(80)]
        try:
            end = time.monotonic() + 10
            while True:
                try:
                    assert get(server, "/healthz").status == 200
                    break
                except (ConnectionError, OSError):
                    assert time.monotonic() < end
                    time.sleep(0.1)
        finally:
            for sock in socks:
                sock.close()


def test_it_is_not_ready_while_it_stops() -> None:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as server:
        server._pools[0].close()
        got = get(server, "/readyz")
        assert (got.status, got.text) == (503, "the server is stopping\n")
        assert get(server, "/healthz").status == 200


@pytest.mark.parametrize(
    ("http", "words"),
    [
        ("0.0.0.0:0", "0.0.0.0:0 can be reached by other machines, and nothing would be encrypted"),
        ("unix:/tmp/x", "is no address for HTTP"),
    ],
)
def test_where_it_may_not_be(http: str, words: str) -> None:
    with pytest.raises(StartError, match=words):
        start(ServerConfig(listen="127.0.0.1:0", http_listen=http))


def test_a_port_that_is_taken() -> None:
    words = r"cannot listen on 127\.0\.0\.1:[0-9]+ for HTTP: Address already in use"
    with socket.socket() as free, socket.create_server(("127.0.0.1", 0)) as taken:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        for _ in range(2):  # what was opened before is closed again
            with pytest.raises(StartError, match=words):
                start(ServerConfig(listen=f"127.0.0.1:{port}", http_listen=f"127.0.0.1:{taken.getsockname()[1]}"))


def test_by_ipv6() -> None:
    with in_process(ServerConfig(http_listen="[::1]:0")) as server:
        assert server.http is not None
        assert server.http.startswith("[::1]:")
        with socket.create_connection(("::1", int(server.http.rpartition(":")[2])), timeout=10) as sock:
            sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")


# --- Tokens and encryption --------------------------------------------------------------------------------


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def password(token: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{token}".encode()).decode()}


@pytest.mark.parametrize("shown", [bearer, password])
def test_whoever_has_a_token_sees_what_it_is_for(tmp_path: Path, shown: object) -> None:
    assert callable(shown)
    file, tokens = tmp_path / "tokens", {}
    for name, right, namespaces in (
        ("all", Right.ADMIN, ("*",)),
        ("mine", Right.READ, ("mine",)),
        ("old", Right.READ, ("*",)),
    ):
        tokens[name], token = new_token(name, right, namespaces, time.time() - 1 if name == "old" else None)
        append(file, token)
    with in_process(ServerConfig(http_listen="127.0.0.1:0", tokens=file)) as server:
        for namespace in ("mine", "theirs"):
            with sharednorm.connect(server.address, namespace=namespace, token=tokens["all"]) as hub:
                hub.BatchNorm2D(3, name=f"of {namespace}")
        for path in PAGES:
            for headers in ({}, shown("sn_wrong"), shown(tokens["old"]), {"Authorization": "Basic !"}):
                got = get(server, path, headers=headers)
                assert (got.status, got.text.startswith("UNAUTHENTICATED: ")) == (401, True)
                assert got.headers["WWW-Authenticate"].startswith("Basic ")
        for path in ("/healthz", "/readyz"):
            assert get(server, path).status == 200
        assert get(server, "/metrics", headers=shown(tokens["mine"])).status == 200
        mine, theirs = quote("of mine"), quote("of theirs")
        seen = get(server, "/", headers=shown(tokens["mine"])).text
        assert "of mine" in seen
        assert "theirs" not in seen
        assert get(server, f"/layer?namespace=mine&name={mine}", headers=shown(tokens["mine"])).status == 200
        for path in ("/?namespace=theirs", f"/layer?namespace=theirs&name={theirs}", "/layer?namespace=theirs&name=x"):
            got = get(server, path, headers=shown(tokens["mine"]))
            assert (got.status, got.text.startswith("PERMISSION_DENIED: ")) == (403, True)
        everything = get(server, "/?namespace=theirs", headers=shown(tokens["all"])).text
        assert "of theirs" in everything
        assert "mine" in everything


def test_encrypted(tmp_path: Path) -> None:
    create(tmp_path, ["127.0.0.1"], 1)
    config = ServerConfig(
        listen="127.0.0.1:0", http_listen="0.0.0.0:0", tls_cert=tmp_path / "server.pem", tls_key=tmp_path / "server.key"
    )
    with in_process(config) as server:
        assert server.http is not None
        host, port = "127.0.0.1", int(server.http.rpartition(":")[2])
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        with (
            socket.create_connection((host, port), timeout=10) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as sock,
        ):
            sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        with socket.create_connection((host, port), timeout=10) as plain:
            plain.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            with suppress(ConnectionResetError):
                assert b"ok" not in plain.recv(4096)
        with socket.create_connection((host, port), timeout=10) as silent, pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(silent, server_hostname="127.0.0.1")


def test_pages_of_a_layer_that_is_deleted_meanwhile() -> None:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as server, sharednorm.connect(server.address) as hub:
        hub.BatchNorm2D(3, name="bn")(np.ones(SHAPE, np.float32))
        assert get(server, "/layer?name=bn").status == 200
        hub.delete("bn")
        assert get(server, "/layer?name=bn").status == 404
        assert get(server, "/").status == 200
