"""docker/: what `make up` starts, by the compose file and the Dockerfiles; `make image-check` builds and runs them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sharednorm_server.cli import DEVICE_LOST
from sharednorm_server.config import ServerConfig
from tests.support.make import make
from tests.support.server import run

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
    assert seconds > ServerConfig().grace


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_nothing_is_published_beyond_this_machine_unless_asked_for(name: str) -> None:
    assert [defaults(port) for port in SERVICES[name]["ports"]] == [
        "127.0.0.1:50051:50051",
        "127.0.0.1:50052:50052",
    ]


def test_the_gpu_service_reserves_gpus() -> None:
    (device,) = SERVICES["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert defaults(str(device["count"])) == "all"
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in SERVICES["cpu"]


def test_each_service_has_a_profile_of_its_name() -> None:
    assert {name: service["profiles"] for name, service in SERVICES.items()} == {"cuda": ["cuda"], "cpu": ["cpu"]}


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_the_servers_understand_their_commands(name: str) -> None:
    composed = [defaults(word) for word in SERVICES[name]["command"]]
    built = next(rest for word, rest in instructions(name) if word == "CMD")
    for words in (composed, re.findall(r'"([^"]*)"', built)):
        assert words[0] == "serve"
        # `--workers 0` is refused when everything else has been understood.
        done = run([*words, "--workers", "0"])
        assert (done.returncode, done.stderr) == (2, "sharednorm: workers is 0 (expected: 1 to 1024)\n")
        assert any("cuda" in word for word in words) == (name == "cuda")


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_an_image_is_two_stages_not_root_and_asks_for_its_health(name: str) -> None:
    found = instructions(name)
    stages = [rest.split() for word, rest in found if word == "FROM"]
    assert len(stages) == 2
    arguments = {rest.partition("=")[0] for word, rest in found if word == "ARG"}
    assert all(stage[0].strip("${}") in arguments for stage in stages)  # base images are build arguments
    assert [rest for word, rest in found if word == "USER"] == ["10001:10001"]
    health = next(rest for word, rest in found if word == "HEALTHCHECK")
    assert 'CMD ["sharednorm", "doctor", "--server", "127.0.0.1:50051"]' in health


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_make_and_compose_pass_every_build_argument_on(name: str) -> None:
    arguments = {rest.partition("=")[0] for word, rest in instructions(name) if word == "ARG"}
    assert set(SERVICES[name]["build"]["args"]) == arguments
    planned = make("--dry-run", "images").stdout.replace("\\\n", " ")
    (line,) = [line for line in planned.splitlines() if f"docker/{name}.Dockerfile" in line]
    assert set(re.findall(r"--build-arg (\w+)", line)) == arguments


def test_make_says_what_is_missing(tmp_path: Path) -> None:
    for target in ("images", "up", "down"):
        done = make(target, path=str(tmp_path))
        assert done.returncode != 0
        assert "docker is not installed: install Docker Engine" in done.stderr
