"""docker/: what `make up` starts, by the compose file and the Dockerfiles; `make image-check` builds and runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sharednorm_server.cli.main import DEVICE_LOST
from sharednorm_server.config.options import ServerConfig
from tests.support.processes.make import make
from tests.support.processes.server import run

WORKERS = "sharednorm: --workers: workers is 0 (expected: a whole number, 1 to 1024)\n"
ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def defaults(text: str) -> str:
    """Return a text of the compose file as it is where nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def instructions(name: str) -> list[tuple[str, str]]:
    text = (DOCKER / f"{name}.Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_a_service_is_kept_running_and_keeps_its_state(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"  # whatever the exit code, also that of a lost GPU
    assert DEVICE_LOST not in {0, 1, 2}
    assert service["volumes"] == ["state:/var/lib/sharednorm"]
    assert "state" in COMPOSE["volumes"]
    assert (ROOT / "docker" / service["build"]["context"]).resolve() == ROOT
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds > ServerConfig().shutdown_grace


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_nothing_is_published_beyond_this_machine_unless_asked_for(name: str) -> None:
    assert [defaults(port) for port in SERVICES[name]["ports"]] == [
        "127.0.0.1:50051:50051",
        "127.0.0.1:50052:50052",
        "127.0.0.1:50080:50080",
    ]


def test_the_gpu_service_reserves_gpus() -> None:
    (device,) = SERVICES["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert defaults(str(device["count"])) == "all"
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["cpu"]


def test_each_service_has_its_profile() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items()} == {
        "cuda": ["cuda"], "cpu": ["cpu"], "prometheus": ["monitoring"], "grafana": ["monitoring"],
        "worker": ["example"], "neighbour-server": ["example"], "neighbour": ["example"],
        "one": ["scale"], "two": ["scale"], "redis": ["scale"],
    }  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp:size=64m,mode=1777"]
    assert service["mem_limit"]
    assert "privileged" not in service
    assert service.get("network_mode") is None
    for port in service.get("ports", ()):
        assert defaults(port).startswith("127.0.0.1:")
    assert service["image"].rpartition(":")[2] not in {"", "latest"}


def test_what_is_mounted_is_there() -> None:
    named = set(COMPOSE["volumes"])
    for service in SERVICES.values():
        for volume in service.get("volumes", ()):
            source, *_ = volume.split(":")
            assert source in named or (DOCKER / source).is_file(), volume


def test_the_workers_find_their_servers() -> None:
    assert SERVICES["worker"]["command"] == ["server:50051", "200"]
    assert SERVICES["cpu"]["networks"]["default"]["aliases"] == ["server"]
    for name in ("cuda", "one", "two"):
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["server"]
    listen = next(word for word in SERVICES["neighbour-server"]["command"] if word.startswith("--listen="))
    assert SERVICES["neighbour"]["command"][0] == listen.removeprefix("--listen=")
    assert SERVICES["neighbour"]["volumes"] == SERVICES["neighbour-server"]["volumes"]
    assert SERVICES["neighbour"]["depends_on"]["neighbour-server"]["condition"] == "service_healthy"


def test_servers_that_share_layers_are_told_apart_by_their_ports() -> None:
    for name, ports in (("one", ("50061:50051", "50062:50062")), ("two", ("50071:50051", "50072:50072"))):
        service = SERVICES[name]
        assert [defaults(port) for port in service["ports"]] == [f"127.0.0.1:{port}" for port in ports]
        assert f"--direct-port={ports[1].partition(':')[0]}" in service["command"]  # the one that it tells its clients
        assert "--state=redis://redis:6379" in service["command"]
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    words = [defaults(word) for word in SERVICES["redis"]["command"]]
    for option, value in (("--appendonly", "yes"), ("--maxmemory-policy", "noeviction")):
        assert words[words.index(option) + 1] == value
    assert "ports" not in SERVICES["redis"]
    planned = make("--dry-run", "up", "PROFILE=scale", "DOCKER=true").stdout
    assert "--profile 'scale'" in planned
    assert planned.rstrip().endswith("one two")


def test_with_secrets_nothing_is_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    secure = yaml.safe_load((DOCKER / "compose.secure.yaml").read_text(encoding="utf-8"))
    assert secure["services"].keys() == {"cpu", "cuda"}
    for name, service in secure["services"].items():
        words = [defaults(word) for word in service["command"]]
        assert "--insecure" not in words
        plain = [defaults(word) for word in SERVICES[name]["command"]]
        assert {*plain} - {*words} == {"--insecure", "--direct-port=50052"}  # tensors come by gRPC then
        for variable, value in service["environment"].items():
            monkeypatch.setenv(variable, value)
            if value.startswith("/run/secrets/"):
                assert value.rpartition("/")[2] in service["secrets"]
        assert secure["secrets"].keys() == set(service["secrets"])
        done = run([*words, "--print-config"])
        assert done.returncode == 0, done.stderr
        assert 'tls_cert = "/run/secrets/server.pem"' in done.stdout
        assert "insecure = false" in done.stdout


@pytest.mark.parametrize("name", ["cuda", "cpu", "one", "two"])
def test_the_servers_understand_their_commands(name: str) -> None:
    composed = [defaults(word) for word in SERVICES[name]["command"]]
    built = next(rest for word, rest in instructions("cuda" if name == "cuda" else "cpu") if word == "CMD")
    for words in (composed, re.findall(r'"([^"]*)"', built)):
        assert words[0] == "serve"
        # `--workers 0` is refused when everything else has been understood.
        done = run([*words, "--workers", "0"])
        assert (done.returncode, done.stderr) == (2, WORKERS)
        assert any("cuda" in word for word in words) == (name == "cuda")


@pytest.mark.parametrize("name", ["cuda", "cpu", "client"])
def test_an_image_is_two_stages_not_root_and_asks_for_its_health(name: str) -> None:
    found = instructions(name)
    stages = [rest.split() for word, rest in found if word == "FROM"]
    assert len(stages) == 2
    arguments = {rest.partition("=")[0] for word, rest in found if word == "ARG"}
    assert all(stage[0].strip("${}") in arguments for stage in stages)  # base images are build arguments
    assert [rest for word, rest in found if word == "USER"] == ["10001:10001"]
    assert any(
        "cyclonedx-py" in rest and "/opt/sharednorm/sbom.cdx.json" in rest for word, rest in found if word == "RUN"
    )
    health = next(rest for word, rest in found if word == "HEALTHCHECK")
    if name == "client":
        assert health == "NONE"
        return
    assert 'CMD ["sharednorm", "doctor", "--server", "127.0.0.1:50051"]' in health


@pytest.mark.parametrize("name", ["cuda", "cpu", "client"])
def test_make_and_compose_pass_every_build_argument_on(name: str) -> None:
    arguments = {rest.partition("=")[0] for word, rest in instructions(name) if word == "ARG"}
    assert set(SERVICES["worker" if name == "client" else name]["build"]["args"]) == arguments
    planned = make("--dry-run", "images").stdout.replace("\\\n", " ")
    (line,) = [line for line in planned.splitlines() if f"docker/{name}.Dockerfile" in line]
    assert set(re.findall(r"--build-arg (\w+)", line)) == arguments


def test_make_says_what_is_missing(tmp_path: Path) -> None:
    for target in ("images", "up", "down"):
        done = make(target, path=str(tmp_path))
        assert done.returncode != 0
        assert "docker is not installed: install Docker Engine" in done.stderr
