"""Where a server's configuration comes from, and what goes before what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from sharednorm.errors import InvalidConfiguration
from sharednorm_server.config.options import DEFAULTS, OPTIONS, ServerConfig, default_state, format_size, parse_size
from sharednorm_server.config.sources import add_options, settle
from sharednorm_server.errors import StartError

# A value of each option that is not its default, as text, and as a server gets it.
OTHERS: dict[str, tuple[str, Any]] = {
    "listen": ("unix:/tmp/s", "unix:/tmp/s"),
    "device": ("cuda:1", "cuda:1"),
    "state": ("memory:", "memory:"),
    "max_staleness": ("0.125", 0.125),
    "durability": ("fsync", "fsync"),
    "snapshot_interval": ("0.5", 0.5),
    "snapshot_retain": ("3", 3),
    "snapshot_max_age": ("7", 7.0),
    "max_idempotency_sessions": ("1", 1),
    "max_layers": ("2", 2),
    "max_concurrent_rpcs": ("3", 3),
    "max_connections": ("4", 4),
    "max_direct_connections": ("5", 5),
    "handshake_timeout": ("0.25", 0.25),
    "compute_threads": ("2", 2),
    "workers": ("1024", 1024),
    "max_tensor_bytes": ("5", 5),
    "activation_cache_bytes": ("0", 0),
    "device_memory_bytes": ("2 GiB", 2 << 30),
    "max_inflight_bytes": ("1TiB", 1 << 40),
    "direct_port": ("off", None),
    "shared_memory_bytes": ("3KiB", 3 << 10),
    "shared_memory_bytes_per_client": ("0", 0),
    "shutdown_grace": ("1.5", 1.5),
    "insecure": ("true", True),
    "tokens": ("/etc/tokens", Path("/etc/tokens")),
    "tls_cert": ("~/cert.pem", Path("~/cert.pem").expanduser()),
    "tls_key": ("key.pem", Path("key.pem")),
    "tls_client_ca": ("ca.pem", Path("ca.pem")),
    "http_listen": ("127.0.0.1:9090", "127.0.0.1:9090"),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
}
# Options that no server has without others.
BESIDE = {"tls_cert": ("tls_key",), "tls_key": ("tls_cert",), "tls_client_ca": ("tls_cert", "tls_key")}


def test_every_option_is_tried_below() -> None:
    assert OTHERS.keys() == OPTIONS.keys() == DEFAULTS.keys()
    assert all(DEFAULTS[name] != value for name, (_, value) in OTHERS.items() if name != "state")


def flags(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args(arguments))


@pytest.mark.parametrize("way", ["flag", "variable", "file", "file with a number"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_by_every_way(name: str, way: str, tmp_path: Path) -> None:
    arguments: list[str] = []
    environment: dict[str, str] = {}
    lines: list[str] = []
    for each in (name, *BESIDE.get(name, ())):
        text = OTHERS[each][0]
        if way == "flag":
            flag = f"--{each.replace('_', '-')}"
            arguments += [flag] if OPTIONS[each].flag else [flag, text]
        elif way == "variable":
            environment[f"SHAREDNORM_{each.upper()}"] = text
        else:
            bare = way == "file with a number" and (text.replace(".", "").isdigit() or OPTIONS[each].flag)
            lines.append(f"{each} = {text}" if bare else f'{each} = "{text}"')
    file = tmp_path / "server.toml"
    file.write_text("\n".join(lines))
    settings = settle(flags(*arguments), environment, file)
    for each in (name, *BESIDE.get(name, ())):
        assert getattr(settings.config, each) == OTHERS[each][1]
    others = {each: value for each, value in DEFAULTS.items() if each not in (name, *BESIDE.get(name, ()), "state")}
    assert {each: getattr(settings.config, each) for each in others} == others


def test_what_goes_before_what(tmp_path: Path) -> None:
    file, other = tmp_path / "server.toml", tmp_path / "other.toml"
    file.write_text("workers = 1\nmax_concurrent_rpcs = 1\nmax_layers = 1\n")
    other.write_text("workers = 9\nmax_idempotency_sessions = 9")
    environment = {"SHAREDNORM_WORKERS": "2", "SHAREDNORM_MAX_CONCURRENT_RPCS": "2", "SHAREDNORM_CONFIG": str(other)}
    given = flags("--workers", "3")
    settings = settle(given, environment, file)
    found = settings.config
    assert (found.workers, found.max_concurrent_rpcs) == (3, 2)
    assert (found.max_layers, found.max_idempotency_sessions) == (1, 1024)
    assert settings.sources == {
        "workers": "--workers", "max_concurrent_rpcs": "SHAREDNORM_MAX_CONCURRENT_RPCS", "max_layers": str(file)
    }  # fmt: skip
    found = settle(given, environment, None).config
    assert (found.workers, found.max_concurrent_rpcs) == (3, 2)
    assert (found.max_layers, found.max_idempotency_sessions) == (10_000, 9)


def test_without_anything_it_is_the_default_and_kept_in_a_file() -> None:
    settings = settle({}, {"PATH": "/bin"}, None)
    assert settings.config == ServerConfig(state=default_state())
    assert settings.sources == {}


def test_what_is_printed_is_a_file_that_gives_the_same(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    awkward = {name: text for name, (text, _) in OTHERS.items()} | {
        "tokens": 'a "quoted"\\path\twith 層',
        "shutdown_grace": "1e8",
    }
    for given in ({}, awkward):
        settings = settle(given, {}, None)
        text = settings.toml()
        file.write_text(text, encoding="utf-8")
        assert settle({}, {}, file).config == settings.config
        for name in OPTIONS:
            assert [line.removeprefix("# ").partition(" = ")[0] for line in text.splitlines()].count(name) == 1, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_layer = 5", r"server\.toml: there is no option 'max_layer' \(did you mean max_layers\?\)$"),
        ("'é' = 5", r"there is no option '\\xe9'$"),
        ("[limits]\nmax_layers = 5", "there is no option 'limits'$"),
        ("max_layers = [5]", r"max_layers is of a wrong type \(expected: a whole number, at least 1\)"),
        ("max_layers = true", r"max-layers is 'True' \(expected: a whole number, at least 1\)"),
        ("max_layers = 5.0", r"max-layers is '5\.0' \(expected: a whole number"),
        ("max_layers = 0", r"server\.toml: max-layers is 0 \(expected: a whole number, at least 1\)"),
        ("insecure = 'yes'", r"insecure is 'yes' \(expected: true, false, 1 or 0\)"),
        ("durability = 'none'", r"durability is none \(expected: os or fsync\)"),
        ("shutdown_grace = nan", r"shutdown-grace is nan \(expected: a number of seconds, 0 to 1e\+08\)"),
        ("activation_cache_bytes = -1", "is not a size"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidConfiguration, match=words):
        settle({}, {}, file)


def test_files_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    with pytest.raises(StartError, match=r"server\.toml cannot be read: .*No such file"):
        settle({}, {}, file)
    file.write_text("listen")
    with pytest.raises(StartError, match=r"server\.toml is no TOML: "):
        settle({}, {"SHAREDNORM_CONFIG": str(file)}, None)
    file.write_bytes(b"\xff")
    with pytest.raises(StartError, match="cannot be read"):
        settle({}, {}, file)


def test_variables_that_look_like_options() -> None:
    words = r"^the environment has SHAREDNORM_MAX_LAYER, which is no option \(did you mean SHAREDNORM_MAX_LAYERS\?\)$"
    with pytest.raises(InvalidConfiguration, match=words):
        settle({}, {"SHAREDNORM_MAX_LAYER": "5"}, None)
    others = {
        "SHAREDNORM_TOKEN": "x",
        "SHAREDNORM_TLS_CA": "y",
        "SHAREDNORM_PUBLISH": "z",
        "SHAREDNORM_SECRETS": "s",
        "sharednorm_workers": "0",
    }
    assert settle({}, others, None).sources == {}
    with pytest.raises(InvalidConfiguration, match=r"^SHAREDNORM_WORKERS: workers is 0 \(expected: a whole number"):
        settle({}, {"SHAREDNORM_WORKERS": "0"}, None)
    with pytest.raises(InvalidConfiguration, match=r"^--workers: workers is 'many' \(expected: a whole number"):
        settle(flags("--workers", "many"), {"SHAREDNORM_WORKERS": "0"}, None)


@pytest.mark.parametrize("changes", [{"tls_cert": Path("x")}, {"tls_key": Path("x")}, {"tls_client_ca": Path("x")}])
def test_files_that_belong_together(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfiguration, match="tls-"):
        ServerConfig(**changes)


@pytest.mark.parametrize("size", [0, 1, 1000, 1024, 1536, 1 << 20, (1 << 30) + 1, 3 << 40])
def test_sizes_are_told_as_they_are_read(size: int) -> None:
    assert parse_size(format_size(size)) == size
