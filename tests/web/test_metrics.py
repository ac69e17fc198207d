"""What a server tells in /metrics is what has happened."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import sharednorm
from sharednorm.errors import NonFiniteInput
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.observability.metrics import Figure, Metrics
from sharednorm_server.server import RunningServer
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process
from tests.support.web import get

SHAPE = (4, 3, 5, 2)
LARGE = (8, 3, 256, 256)


def told(server: RunningServer, name: str, **labels: str) -> float:
    """Return a figure, the sum of its series with these labels."""
    total = 0.0
    for family in text_string_to_metric_families(get(server, "/metrics").text):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                total += sample.value
    return total


@contextlib.contextmanager
def served(transport: str, tmp_path: Path, **options: object) -> Iterator[tuple[RunningServer, sharednorm.Hub]]:
    config = ServerConfig(listen=f"unix:{tmp_path}/socket", http_listen="127.0.0.1:0", **options)  # type: ignore[arg-type]
    with in_process(config) as server, sharednorm.connect(server.address, transport=transport) as hub:
        yield server, hub


@pytest.mark.parametrize("transport", ["grpc", "direct", "shm"])
@pytest.mark.parametrize("shape", [SHAPE, LARGE], ids=["small", "large"])
def test_calls_and_their_bytes(transport: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with served(transport, tmp_path) as (server, hub):
        layer, x = hub.BatchNorm2D(3, name="bn"), random_tensor(1, shape)
        for _ in range(3):
            layer(x)
        bad = x.copy()
        bad[0] = np.nan
        with pytest.raises(NonFiniteInput):
            layer(bad)
        method = "ForwardStream" if transport == "grpc" and shape is LARGE else "Forward"
        used = "direct" if transport == "shm" and shape is SHAPE else transport
        about = {"method": method, "transport": used}
        end = time.monotonic() + 10
        # An answer is here before its call is over there.
        while told(server, "sharednorm_rpc_requests_total", **about) < 4:
            assert time.monotonic() < end
        assert told(server, "sharednorm_rpc_requests_total", **about, code="OK") == 3
        assert told(server, "sharednorm_rpc_requests_total", **about, code="INVALID_ARGUMENT") == 1
        assert told(server, "sharednorm_rpc_in_flight") == 0
        assert told(server, "sharednorm_rpc_duration_seconds_count", **about) == 4
        took, waited = (told(server, f"sharednorm_rpc_{name}_seconds_sum", **about) for name in ("duration", "queue"))
        assert 0 <= waited < took < 20
        assert told(server, "sharednorm_device_duration_seconds_count", **about) == 4
        assert 0 < told(server, "sharednorm_device_duration_seconds_sum", **about) < took - waited
        received, sent = (told(server, f"sharednorm_{name}_bytes_total", **about) for name in ("received", "sent"))
        if used == "shm":  # no tensor travels
            assert 0 < received < 4000
            assert 0 < sent < 4000
        else:
            assert 4 * x.nbytes < received < 4 * x.nbytes * 1.01 + 4000
            assert 3 * x.nbytes < sent < 3 * x.nbytes * 1.01 + 4000
        assert told(server, "sharednorm_steps_total") == 3


def test_what_the_server_holds(tmp_path: Path) -> None:
    state = f"sqlite://{tmp_path}/state"
    with served("direct", tmp_path, state=state, activation_cache_bytes=20 * 1000) as (server, hub):
        x = random_tensor(1, (10, 3, 10, 10))  # of 12,000 bytes one fits
        layers = [hub.BatchNorm2D(3, name=name) for name in "ab"]
        commits = told(server, "sharednorm_store_commits_total")
        for layer in layers:
            layer(x)
        assert told(server, "sharednorm_activation_cache_bytes") == x.nbytes
        assert told(server, "sharednorm_activation_cache_evictions_total") == 1
        assert told(server, "sharednorm_store_commits_total") == commits + 2
        assert told(server, "sharednorm_store_changes_total") >= commits + 2
        assert 0 < told(server, "sharednorm_store_seconds_total") < 20
        waited = told(server, "sharednorm_commit_wait_seconds_sum", method="Forward")
        assert 0 < waited < told(server, "sharednorm_rpc_duration_seconds_sum", method="Forward")
        assert told(server, "sharednorm_layers_loaded") == 2
        assert told(server, "sharednorm_direct_connections") == 1
        assert told(server, "sharednorm_device_bytes") == 0
        text = get(server, "/metrics").text
        assert re.search(
            r'^sharednorm_info\{device="cpu [^"]+",store="sqlite:[^"]+",version="[^"]+"\} 1.0$', text, re.MULTILINE
        )


def test_groups(tmp_path: Path) -> None:
    with served("direct", tmp_path) as (server, hub):
        group = sharednorm.Group("run", size=2, timeout=1.0)
        layer = hub.BatchNorm2D(3, name="bn", compute="client", group=group)
        with pytest.raises(sharednorm.GroupAborted):
            layer(random_tensor(1, SHAPE))
        assert told(server, "sharednorm_groups") == 1
        assert told(server, "sharednorm_group_calls_waiting") == 0
        assert told(server, "sharednorm_group_calls_aborted_total") == 1
        assert told(server, "sharednorm_rpc_requests_total", method="JoinGroup", code="ABORTED") == 1


def test_no_label_is_a_name_that_somebody_chose(tmp_path: Path) -> None:
    with served("grpc", tmp_path) as (server, hub):
        hub.BatchNorm2D(3, name="a-name-that-nobody-else-has")(random_tensor(1, SHAPE))
        text = get(server, "/metrics").text
        assert "a-name-that-nobody-else-has" not in text
        families = list(text_string_to_metric_families(text))
        names = {name for family in families for sample in family.samples for name in sample.labels}
        ours = {"method", "transport", "code", "le", "version", "device", "store"}
        assert names <= {*ours, "implementation", "major", "minor", "patchlevel"}
        assert all(family.documentation for family in families)


def test_figures_are_asked_for_once_each_time_that_somebody_looks() -> None:
    """For some are of a GPU, which does it between other work."""
    metrics, asked = Metrics(), []

    def figures() -> list[Figure]:
        asked.append(1)
        return [Figure("a", "Something.", 2.0), Figure("b", "More.", 3.0, grows=True)]

    metrics.tell(figures)
    before = len(asked)
    text = metrics.text().decode()
    assert len(asked) == before + 1
    assert "\na 2.0\n" in text
    assert "\nb_total 3.0\n" in text
