"""What a server may be told, and what it says to what it may not."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.config.options import ServerConfig, default_state, parse_devices, parse_size, parse_state
from sharednorm_server.errors import StartError
from sharednorm_server.rpc.endpoints import TcpEndpoint, UnixEndpoint, parse_endpoint
from sharednorm_server.server import start


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1KiB", 1024),
        ("64MiB", 64 << 20),
        ("64mib", 64 << 20),
        ("2 GiB", 2 << 30),
        (" 1TiB ", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.5GiB", "1GB", "1 G", "1e9", "٣", "9" * 30, "1GiB1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InvalidConfiguration, match="for example 1000, 64MiB or 2GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"compute_threads": 0},
        {"workers": 0},
        {"workers": 1025},
        {"max_tensor_bytes": 0},
        {"activation_cache_bytes": -1},
        {"shutdown_grace": -1.0},
        {"shutdown_grace": float("nan")},
        {"shutdown_grace": float("inf")},
        {"shutdown_grace": 1e10},
    ],
    ids=str,
)
def test_numbers_out_of_their_range(changes: dict[str, int]) -> None:
    name = next(iter(changes)).replace("_", "-")
    with pytest.raises(InvalidConfiguration, match=name):
        replace(ServerConfig(), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "host", "port", "private"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051, True),
        ("127.9.9.9:0", "127.9.9.9", 0, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:65535", "[::1]", 65535, True),
        ("0.0.0.0:50051", "0.0.0.0", 50051, False),
        ("[::]:50051", "[::]", 50051, False),
        ("192.168.0.7:1", "192.168.0.7", 1, False),
        ("gpu-box.example:1", "gpu-box.example", 1, False),
        ("localhost.evil.example:1", "localhost.evil.example", 1, False),
    ],
)
def test_tcp_addresses(text: str, host: str, port: int, private: bool) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint == TcpEndpoint(host, port)
    assert endpoint.private is private


def test_unix_addresses_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_endpoint("unix:s") == UnixEndpoint(tmp_path / "s")
    assert parse_endpoint("unix:/run/s") == UnixEndpoint(Path("/run/s"))
    assert parse_endpoint("unix:s").private


@pytest.mark.parametrize(
    "text",
    ["", "50051", ":50051", "localhost", "localhost:", "localhost:65536", "localhost:-1", "localhost:x", "::1:1",
     "http://localhost:1", "a b:1", "localhost:1 ", "unix:", "unix:a\0b", "unix:/" + "a" * 107],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidConfiguration):
        parse_endpoint(text)
    with pytest.raises(InvalidConfiguration):
        start(ServerConfig(listen=text))


def test_a_socket_path_of_the_longest_length_works(tmp_path: Path) -> None:
    path = tmp_path / ("s" * (107 - len(os.fsencode(tmp_path)) - 1))
    assert len(os.fsencode(path)) == 107
    server = start(ServerConfig(listen=f"unix:{path}"))
    assert path.is_socket()
    server.stop(1.0)


@pytest.mark.parametrize("name", ["a b", "100%", "%41", "é層", "a?b#c", "a:b"])
def test_a_socket_stands_where_it_was_asked_for(tmp_path: Path, name: str) -> None:
    server = start(ServerConfig(listen=f"unix:{tmp_path / name}"))
    try:
        assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.direct"]
        assert server.address == f"unix:{tmp_path / name}"
    finally:
        server.stop(1.0)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "gpu-box.example:0"])
def test_no_plaintext_where_others_can_listen(listen: str) -> None:
    with pytest.raises(StartError, match="--insecure"):
        start(ServerConfig(listen=listen))


def test_plaintext_elsewhere_for_those_who_insist() -> None:
    server = start(ServerConfig(listen="0.0.0.0:0", insecure=True))
    try:
        assert server.address.startswith("0.0.0.0:")
        assert not server.address.endswith(":0")
    finally:
        server.stop(1.0)


@pytest.mark.parametrize(
    "device", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "cpu,cuda:0", "cuda:0,cuda:0", "cuda,cuda:0"]
)
def test_what_is_no_device_has_no_substitute(device: str) -> None:
    with pytest.raises(InvalidConfiguration, match="expected: cpu, cuda, cuda:1, or several GPUs"):
        start(ServerConfig(listen="127.0.0.1:0", device=device))


@pytest.mark.parametrize(
    ("text", "ordinals"),
    [("cpu", ()), ("cuda", (0,)), ("cuda:1", (1,)), ("cuda:0,cuda:1", (0, 1)), ("cuda:1, cuda:0", (1, 0))],
)
def test_the_gpus_that_a_device_names(text: str, ordinals: tuple[int, ...]) -> None:
    assert parse_devices(text) == ordinals


@pytest.mark.parametrize(
    "state", ["postgres://x", "memory", "", "sqlite:", "sqlite://", "sqlite://host/x", "sqlite:a%00b"]
)
def test_a_store_that_is_not_there_has_no_substitute(state: str) -> None:
    with pytest.raises(InvalidConfiguration, match=r"is no state \(expected: memory:, sqlite:///DIRECTORY"):
        start(ServerConfig(listen="127.0.0.1:0", state=state))


@pytest.mark.parametrize(
    ("text", "directory"),
    [
        ("memory:", None),
        ("sqlite:///var/lib/x", Path("/var/lib/x")),
        ("sqlite:///a%20b/%E5%B1%A4", Path("/a b/層")),
        ("sqlite:x/y", Path.cwd() / "x/y"),
        ("sqlite:~/x", Path.home() / "x"),
        ("redis://box:6379/1", "redis://box:6379/1"),
        ("rediss://box", "rediss://box"),
    ],
)
def test_the_directory_that_a_state_names(text: str, directory: Path | None) -> None:
    assert parse_state(text) == directory


def test_the_state_of_a_server_that_is_told_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert parse_state(default_state()) == Path.home() / ".local/state/sharednorm"
    monkeypatch.setenv("XDG_STATE_HOME", "/home of/states")
    assert parse_state(default_state()) == Path("/home of/states/sharednorm")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/sharednorm:/var/lib/other")
    assert parse_state(default_state()) == Path("/var/lib/sharednorm")


def test_a_durability_that_there_is_not() -> None:
    with pytest.raises(InvalidConfiguration, match=r"durability is disk \(expected: os or fsync\)"):
        ServerConfig(durability="disk")


def test_an_address_of_another_machine() -> None:
    with pytest.raises(StartError, match=r"192\.0\.2\.1:0"):
        start(ServerConfig(listen="192.0.2.1:0", insecure=True))


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(StartError, match=r"nowhere\.invalid:0"):
        start(ServerConfig(listen="nowhere.invalid:0", insecure=True))


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.example"])
def test_a_host_that_cannot_exist(host: str) -> None:
    with pytest.raises(StartError, match="no host can have that name"):
        start(ServerConfig(listen=f"{host}:0", insecure=True))


def test_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=f"127.0.0.1:{port}: another program does already"):
            start(ServerConfig(listen=f"127.0.0.1:{port}"))


def test_a_socket_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"there is no directory {tmp_path}/nowhere$"):
        start(ServerConfig(listen=f"unix:{tmp_path}/nowhere/inner/s"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_directory_of_a_socket_is_made_for_this_user_alone(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        server = start(ServerConfig(listen=f"unix:{tmp_path}/made/s"))
    finally:
        os.umask(before)
    try:
        assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    finally:
        server.stop(0)


def test_a_directory_of_a_socket_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o750)
    start(ServerConfig(listen=f"unix:{tmp_path}/there/s")).stop(0)
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o750


def test_the_directory_of_a_socket_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"^cannot listen on unix:.*/file/s: File exists$"):
        start(ServerConfig(listen=f"unix:{tmp_path}/file/s"))


def test_a_place_where_no_socket_can_be() -> None:
    with pytest.raises(StartError, match=r"^cannot listen on unix:/proc/s: No such file or directory$"):
        start(ServerConfig(listen="unix:/proc/s"))


def test_a_socket_in_a_directory_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    tmp_path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may do anything
        os.seteuid(65534)
    try:
        for path in (tmp_path / "s", tmp_path / "inner" / "s"):
            with pytest.raises(StartError, match=r"Permission denied$"):
                start(ServerConfig(listen=f"unix:{path}"))
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_a_socket_whose_server_is_too_busy_to_accept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(path))
        listener.listen(0)
        first.connect(str(path))
        with pytest.raises(StartError, match="another server does already"):
            start(ServerConfig(listen=f"unix:{path}"))


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        (tmp_path / "target").write_text("precious")
        path.symlink_to(tmp_path / "target")
    with pytest.raises(StartError, match="not a socket"):
        start(ServerConfig(listen=f"unix:{path}"))
    assert path.exists()


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(StartError, match="another server does already"):
            start(ServerConfig(listen=f"unix:{path}"))
    assert path.is_socket()  # nobody listens any more
    server = start(ServerConfig(listen=f"unix:{path}"))
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(StartError, match="another server does already"):
            start(ServerConfig(listen=f"unix:{path}"))
    finally:
        server.stop(1.0)


def test_the_mask_for_new_files_is_what_it_was(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        start(ServerConfig(listen=f"unix:{tmp_path / 's'}")).stop(1.0)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
