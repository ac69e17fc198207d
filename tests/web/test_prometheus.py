"""A real Prometheus reads /metrics, and what the dashboard and the alerts ask of it is there."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sharednorm
from docker.monitoring import dashboard
from sharednorm_server.config.options import ServerConfig
from tests.support.oracle import random_tensor
from tests.support.processes.programs import program
from tests.support.processes.server import in_process
from tests.support.web import get

MONITORING = Path(__file__).parents[2] / "docker" / "monitoring"
DASHBOARD = json.loads((MONITORING / "sharednorm.json").read_text(encoding="utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
ALERTS = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
SHAPE = (4, 3, 5, 2)


def asked(address: str, query: str) -> list[dict[str, Any]]:
    """Return what Prometheus finds now."""
    where = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    with urllib.request.urlopen(where, timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return found


@contextlib.contextmanager
def prometheus(directory: Path, target: str) -> Iterator[str]:
    """Run a Prometheus that asks a server twice a second, as the file says that is for the containers."""
    binary = program("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    assert config["scrape_configs"][0].pop("dns_sd_configs") == [{"names": ["server"], "type": "A", "port": 50080}]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        binary, f"--config.file={file}", f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}",
    ]  # fmt: skip
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=5):
                    break
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_query_of_the_dashboard_finds_something(tmp_path: Path) -> None:
    """Also those that are of what seldom happens: all of it happens here."""
    config = ServerConfig(
        listen=f"unix:{tmp_path}/socket",
        http_listen="127.0.0.1:0",
        state=f"sqlite://{tmp_path}/state",
        activation_cache_bytes=1000,
    )
    with in_process(config) as server, sharednorm.connect(server.address) as hub:
        assert server.http is not None
        with prometheus(tmp_path, server.http) as address:
            plain, here = hub.BatchNorm2D(3, name="a"), hub.BatchNorm2D(3, name="b", compute="client")
            alone = hub.BatchNorm2D(3, name="c", compute="client", group=sharednorm.Group("run", size=1))
            late = hub.BatchNorm2D(3, name="d", compute="client", group=sharednorm.Group("late", size=2, timeout=0.3))
            queries = [query.replace("$__rate_interval", "5s") for query in QUERIES]
            missing, end, step = queries, time.monotonic() + 90, 0
            while missing:
                assert time.monotonic() < end, missing
                for layer in (plain, here, alone):
                    layer(random_tensor(step, SHAPE))
                with pytest.raises(sharednorm.GroupAborted):
                    late(random_tensor(step, SHAPE))
                step += 1
                missing = [query for query in missing if not fine(asked(address, query))]
            targets = asked(address, 'up{job="sharednorm"}')
            assert [target["value"][1] for target in targets] == ["1"]
            # What the server says is what Prometheus has.
            steps = float(asked(address, "sharednorm_steps_total")[0]["value"][1])
            assert 0 < steps <= plain.version + here.version + alone.version


def fine(found: list[dict[str, Any]]) -> bool:
    """Return whether there is a number among what was found."""
    return any(each["value"][1] != "NaN" for each in found)


def test_the_alerts_are_rules_whose_metrics_there_are() -> None:
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(MONITORING / "alerts.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as server:
        text = get(server, "/metrics").text
        known = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)) | {"up"}
    for rule in ALERTS:
        for name in re.findall(r"\b(sharednorm_\w+|up)\b(?=[\[{])", rule["expr"]):
            assert name.removesuffix("_bucket") in known, name
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert {"summary", "description"} == rule["annotations"].keys()


def test_the_alerts_are_explained() -> None:
    page = (MONITORING.parents[1] / "docs" / "operating.md").read_text(encoding="utf-8")
    for rule in ALERTS:
        assert f"`{rule['alert']}`" in page


def test_the_dashboard_is_what_its_program_writes() -> None:
    written = (MONITORING / "sharednorm.json").read_text(encoding="utf-8")
    assert dashboard.text() == written, "python -m docker.monitoring.dashboard writes it"
