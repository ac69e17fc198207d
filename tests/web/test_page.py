"""What the pages show, and how it is computed."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import sharednorm
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import blank_state
from sharednorm.core.types import LayerKind
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.http.charts import channels_chart, drift_chart
from sharednorm_server.http.health import Health, health_of
from sharednorm_server.http.history import SAMPLES, History, Sample
from sharednorm_server.http.recent_callers import Attached
from sharednorm_server.layers.requests import ForwardCall
from sharednorm_server.observability.instrumentation import Origin
from sharednorm_server.server import RunningServer
from sharednorm_server.store.base import LayerKey, LayerRecord
from tests.support.oracle import random_tensor
from tests.support.processes.server import in_process
from tests.support.service import KEY, create, new_service
from tests.support.web import get

SHAPE = (4, 3, 5, 2)
ODD = '<script>alert("x")</script>& é層'


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as running, sharednorm.connect(running.address) as hub:
        for name in ("plain", ODD):
            layer = hub.BatchNorm2D(3, name=name)
            layer(random_tensor(1, SHAPE))
        hub.BatchNorm2D(3, name=ODD, domain=ODD)
        hub.BatchNorm2D(3, name="waiting", empty=True)
        hub.BatchNorm1D(7, name="resting").evalMode()
        yield running


def test_the_layers_of_a_namespace(server: RunningServer) -> None:
    text = get(server, "/").text
    assert "Layers of default" in text
    for words in ("plain", "waiting", "resting", "BatchNorm2D", "BatchNorm1D", "empty", "train"):
        assert words in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    links = re.findall(r'href="(/layer\?[^"]+)"', text)
    assert len(links) == 4
    for link in links:
        assert get(server, link.replace("&amp;", "&")).status == 200


def test_the_page_of_a_layer_whatever_its_name(server: RunningServer) -> None:
    for path in (f"/layer?name={quote(ODD)}", f"/layer?name={quote(ODD)}&domain={quote(ODD)}"):
        got = get(server, path)
        assert got.status == 200
        assert "<script" not in got.text
        assert "Running mean" in got.text
    assert "It waits" not in got.text


def test_the_page_of_a_layer_that_waits_for_its_state(server: RunningServer) -> None:
    text = get(server, "/layer?name=waiting").text
    assert "The layer is empty: it waits for its state." in text
    assert "<svg" not in text


def test_nothing_comes_from_elsewhere_and_nothing_is_a_program(server: RunningServer) -> None:
    for path in ("/", "/layer?name=plain"):
        text = get(server, path).text
        assert not re.findall(r"<(script|link|img|iframe|object|embed)\b", text)
        elsewhere = set(re.findall(r"""(?:src|href)=["']((?!/|\?|#)[^"']*)""", text))
        assert elsewhere == set()
        assert not re.findall(r"\burl\((?!#)", text)


@pytest.mark.parametrize(
    ("query", "refresh"), [("", True), ("?every=never", False), ("?every=x", True), ("?namespace=default", True)]
)
def test_it_is_read_again_unless_somebody_says_not_to(server: RunningServer, query: str, refresh: bool) -> None:
    text = get(server, f"/{query}").text
    assert ('http-equiv="refresh" content="10"' in text) is refresh
    assert ("Stay as it is" in text) is refresh


def test_more_layers_than_a_page_has_room_for() -> None:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as running, sharednorm.connect(running.address) as hub:
        for number in range(130):
            hub.BatchNorm(1, name=f"layer {number:03}")
        first = get(running, "/").text
        more = re.search(r'href="([^"]+)">More layers', first)
        assert more is not None
        second = get(running, more[1].replace("&amp;", "&")).text
        found = [re.findall(r">(layer \d{3})<", text) for text in (first, second)]
        assert [len(each) for each in found] == [100, 30]
        assert sorted({*found[0], *found[1]}) == [f"layer {number:03}" for number in range(130)]
        assert "More layers" not in second


def test_groups_and_namespaces() -> None:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as running:
        group = sharednorm.Group("run <7>", size=1)
        with sharednorm.connect(running.address, namespace="a&b") as hub, sharednorm.connect(running.address) as other:
            other.BatchNorm2D(3, name="x")
            hub.BatchNorm2D(3, name="bn", compute="client", group=group)(random_tensor(1, SHAPE))
            text = get(running, "/?namespace=a%26b").text
            assert "run &lt;7&gt;" in text
            assert re.search(r'<td class="n">1 of 1</td><td>0</td>', text)
            assert '<a href="/?namespace=default">default</a> (1)' in text
            assert "Nobody trains in a group here" in get(running, "/").text


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_who_is_attached(listen: str, tmp_path: Path) -> None:
    where = f"unix:{tmp_path}/socket" if listen == "unix" else listen
    with in_process(ServerConfig(listen=where, http_listen="127.0.0.1:0")) as running:
        assert "<dt>direct connections</dt><dd>none</dd>" in get(running, "/").text
        assert "<dt>callers by gRPC in the last minute</dt><dd>none</dd>" in get(running, "/").text
        with sharednorm.connect(running.address, transport="direct") as hub:
            hub.BatchNorm2D(3, name="bn")(random_tensor(1, SHAPE))
            who = f"process {os.getpid()}" if listen == "unix" else "127.0.0.1"
            text = get(running, "/").text
            assert f"<dt>direct connections</dt><dd>{who} (1)</dd>" in text
            who = "unix socket" if listen == "unix" else "127.0.0.1"
            assert f"<dt>callers by gRPC in the last minute</dt><dd>{who} (1)</dd>" in text


def test_who_has_called_by_grpc() -> None:
    now = [100.0]
    attached = Attached(lambda: now[0])

    def call(peer: str, transport: str = "grpc") -> None:
        attached.begin("Forward", transport, "id", lambda: Origin(peer), 0.0).ended()

    for peer in ("ipv4:10.0.0.1:5000", "ipv4:10.0.0.1:5001", "ipv6:%5B::1%5D:5000", "unix:", "unix:%00abstract"):
        call(peer)
    call("ipv4:10.0.0.9:5000", "direct")
    assert attached.recent() == {"10.0.0.1": 2, "::1": 1, "unix socket": 2}
    now[0] += 59
    call("ipv4:10.0.0.1:5000")
    now[0] += 2
    assert attached.recent() == {"10.0.0.1": 1}
    for port in range(20_000):
        call(f"ipv4:10.0.0.2:{port}")
    assert attached.recent() == {"10.0.0.2": 10_000}


# --- What stands out --------------------------------------------------------------------------------------


def record(mean: object = 0.0, var: object = 1.0, scale: object = 1.0, steps: int = 1) -> LayerRecord:
    config = LayerConfig(LayerKind.BATCH_NORM_2D, 4)
    full = {"mean": mean, "var": var, "scale": scale}
    vectors = {name: np.broadcast_to(np.asarray(value, np.float32), 4).copy() for name, value in full.items()}
    return LayerRecord(LayerKey("default", "bn"), config, replace(blank_state(config), num_of_props=steps, **vectors))


@pytest.mark.parametrize(
    ("made", "health"),
    [
        (record(), Health()),
        (record(var=[1, 2, 3, 1e5]), Health()),
        (record(var=[1, 0, 1, 1e7]), Health(dead=(1,), exploding=(3,))),
        (record(var=[1, 1e-7, 1, 1]), Health(dead=(1,))),
        (record(scale=[0, 1, 1, -1]), Health(dead=(0,))),
        (record(mean=[0, np.nan, np.inf, 0]), Health(exploding=(1, 2))),
        (record(var=np.nan), Health(exploding=(0, 1, 2, 3))),
        (record(var=0.0), Health(dead=(0, 1, 2, 3))),
        (record(var=1e-9), Health(dead=(0, 1, 2, 3))),
        (record(var=0.0, steps=0), Health()),
    ],
    ids=[
        "fine",
        "unlike",
        "dead and exploding",
        "dead",
        "scale",
        "not finite",
        "none finite",
        "all dead",
        "tiny",
        "new",
    ],
)
def test_channels_that_stand_out(made: LayerRecord, health: Health) -> None:
    assert health_of(made) == health


# --- How it was lately ------------------------------------------------------------------------------------


def test_the_history_of_a_layer() -> None:
    now = [100.0]
    service = new_service()
    create(service)
    history = History(service.alive, lambda: now[0])
    assert history.samples(KEY) == []
    assert history.rate(KEY) is None
    x = random_tensor(1, SHAPE)

    for _ in range(4):
        history.take()
        for _ in range(5):
            service.forward(ForwardCall(KEY, train=True), x)
        now[0] += 2.0
    history.take()
    samples = history.samples(KEY)
    assert [sample.version for sample in samples] == [0, 5, 10, 15, 20]
    assert history.rate(KEY) == pytest.approx(2.5)
    state = service.get_layer(KEY).state
    np.testing.assert_allclose(samples[-1].mean, np.quantile(state.mean, (0, 0.1, 0.5, 0.9, 1)), rtol=1e-6)
    np.testing.assert_allclose(samples[-1].var, np.quantile(state.var, (0, 0.1, 0.5, 0.9, 1)), rtol=1e-6)
    for _ in range(30):  # it rests: that is no new sample
        now[0] += 2.0
        history.take()
    assert len(history.samples(KEY)) == 5
    assert history.samples(KEY)[-1].when == now[0]
    assert history.rate(KEY) == 0.0
    service.delete_layer(KEY)
    history.take()
    assert history.samples(KEY) == []


def test_the_history_is_bounded() -> None:
    service = new_service()
    create(service)
    clock = iter(range(10_000))
    history = History(service.alive, lambda: float(next(clock)))
    for _ in range(SAMPLES + 20):
        service.update_params(KEY, 0.5)
        history.take()
    assert len(history.samples(KEY)) == SAMPLES


# --- Pictures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values", [[0.0], [1.0, -2.0, 3.0], [np.nan, 1.0, np.inf], [np.nan], [0.0] * 2048, np.linspace(0, 1e30, 500)]
)
def test_a_picture_of_channels(values: list[float], logarithmic: bool) -> None:
    array = np.asarray(values, np.float32)
    marked = [0, array.size - 1] if array.size > 1 else []
    text = channels_chart(array, marked, 'Title "&<', logarithmic=logarithmic)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.attrib["role"] == "img"
    label = root.attrib["aria-label"]
    assert label.startswith(f'Title "&< of {array.size} channels')
    assert ("marked: 0, " in label) is bool(marked)
    assert "#010203" not in text
    assert "var(--line)" in text or not np.isfinite(array).any()


def test_a_picture_of_the_history() -> None:
    quantiles = np.array([0, 1, 2, 3, 4], np.float32)
    samples = [Sample(1e9 + second, second, b"", quantiles + second, quantiles) for second in range(10)]
    for name in ("mean", "var"):
        root = ET.fromstring(drift_chart(samples, name, "Mean", logarithmic=name == "var"))
        words = root.attrib["aria-label"]
        assert words.startswith(
            f"Mean over time: the middle channel went from 2 to {11 if name == 'mean' else 2} in 9 "
        )


def test_pictures_do_not_depend_on_when_they_are_made() -> None:
    values = np.linspace(0, 1, 10, dtype=np.float32)
    assert channels_chart(values, [], "x") == channels_chart(values, [], "x")
