"""Addresses and options of a connection; nothing here needs a server."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sharednorm.core.address import MAX_SOCKET_PATH_BYTES, parse_address
from sharednorm.errors import HubClosed, InvalidConfiguration, InvalidName
from sharednorm.remote.connect import connect
from sharednorm.transport.channel import SERVICE, channel_options, proxy_hint
from sharednorm.transport.deadline import Deadline
from sharednorm.transport.grpc import Connection
from sharednorm.v1 import service_pb2

PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "target", "local"),
    [
        ("gpu-box:50051", "dns:///gpu-box:50051", False),
        ("gpu_box.example.com:1", "dns:///gpu_box.example.com:1", False),
        ("example.com.:65535", "dns:///example.com.:65535", False),
        ("10.1.2.3:50051", "dns:///10.1.2.3:50051", False),
        ("[2001:db8::1]:50051", "dns:///[2001:db8::1]:50051", False),
        ("[::1]:50051", "dns:///[::1]:50051", True),
        ("127.0.0.1:50051", "dns:///127.0.0.1:50051", True),
        ("127.9.9.9:50051", "dns:///127.9.9.9:50051", True),
        ("0.0.0.0:50051", "dns:///0.0.0.0:50051", True),
        ("localhost:50051", "dns:///localhost:50051", True),
        ("dns:50051", "dns:///dns:50051", False),
        ("unix:/run/sharednorm.sock", "unix:/run/sharednorm.sock", True),
        ("unix:/tmp/a b%20#?.sock", "unix:/tmp/a%20b%2520%23%3F.sock", True),
        ("unix:/tmp/ä.sock", "unix:/tmp/%C3%A4.sock", True),
    ],
)
def test_addresses_and_what_grpc_is_told(text: str, target: str, local: bool) -> None:
    address = parse_address(text)
    assert (address.text, address.target, address.local) == (text, target, local)


def test_a_relative_socket_path_survives_a_change_of_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_address("unix:run/s.sock").target == f"unix:{tmp_path}/run/s.sock"


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ":", "localhost", "localhost:", ":50051", "localhost:0", "localhost:65536", "localhost:-1",
        "localhost:50051x", "localhost:5 0", "localhost: 50051", "lo calhost:50051", "::1:50051", "[::1]", "[::1:50051",
        "[127.0.0.1]:50051", "[]:50051", "http://localhost:50051", "dns:///localhost:50051", "ipv4:127.0.0.1:50051",
        "localhost:50051/path", "user@host:1", "-host:1", "host-:1", "a" * 254 + ":1", "localhost:٣",
        "unix:", "unix:/tmp/\0", None, 50051, b"localhost:50051", ("localhost", 50051),
    ],
)  # fmt: skip
def test_other_addresses_are_refused_with_the_expected_forms(text: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="host:port") as caught:
        connect(text)
    assert "unix:/path" in str(caught.value)


def test_a_socket_path_longer_than_the_system_allows_is_refused_with_the_limit() -> None:
    parse_address("unix:/" + "a" * (MAX_SOCKET_PATH_BYTES - 1))
    with pytest.raises(InvalidConfiguration, match=rf"108 bytes .*at most {MAX_SOCKET_PATH_BYTES}"):
        connect("unix:/" + "a" * MAX_SOCKET_PATH_BYTES)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, math.nan, math.inf, True, "30", None, np.float32(0), 1e10, 10**400])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidConfiguration, match="timeout"):
        connect("localhost:1", timeout=timeout)


@pytest.mark.parametrize("namespace", ["a\n", "x" * 129, 7, None])
def test_a_namespace_that_is_none_is_refused(namespace: Any) -> None:
    with pytest.raises(InvalidName):
        connect("localhost:1", namespace=namespace)


def test_a_proxy_is_never_on_the_way_to_this_machine() -> None:
    options = [dict(channel_options(parse_address(text))) for text in ("unix:/s", "localhost:1", "gpu-box:1")]
    assert [option["grpc.enable_http_proxy"] for option in options] == [0, 0, 1]


def test_only_the_first_call_is_retried_by_grpc_itself() -> None:
    config = json.loads(str(dict(channel_options(parse_address("localhost:1")))["grpc.service_config"]))
    (methods,) = config["methodConfig"]
    assert {name["service"] for name in methods["name"]} == {SERVICE}
    assert {name["method"] for name in methods["name"]} == {"GetServerInfo"}
    assert methods["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


def test_a_proxy_that_may_be_in_the_way_is_named_without_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = parse_address("gpu-box.lan:50051")
    assert proxy_hint(remote) == ""
    monkeypatch.setenv("http_proxy", "http://user:password@proxy:3128")
    assert "http_proxy" in proxy_hint(remote)
    assert "gpu-box.lan" in proxy_hint(remote)
    assert "password" not in proxy_hint(remote)
    assert proxy_hint(parse_address("localhost:50051")) == ""
    monkeypatch.setenv("no_proxy", "example.com, .lan")
    assert proxy_hint(remote) == ""


def test_a_closed_connection_says_so_and_closes_twice() -> None:
    connection = Connection(parse_address("localhost:1"), 1.0)
    connection.close()
    connection.close()
    assert connection.closed
    with pytest.raises(HubClosed, match="localhost:1 was closed: connect again"):
        connection.call("GetServerInfo", service_pb2.GetServerInfoRequest(), service_pb2.GetServerInfoResponse)


def test_a_connection_does_not_travel_and_says_what_does() -> None:
    connection = Connection(parse_address("localhost:1"), 1.0)
    with pytest.raises(TypeError, match="connect in the other process"):
        pickle.dumps(connection)
    connection.close()


def test_a_deadline_counts_down_and_stays_at_zero() -> None:
    assert 0.5 < Deadline(1.0).left() <= 1.0
    assert Deadline(1e-9).left() == 0.0
