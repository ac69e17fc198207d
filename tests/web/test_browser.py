"""The pages in a real browser: wide and narrow, light and dark."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest

import sharednorm
from sharednorm_server.config.options import ServerConfig
from sharednorm_server.server import RunningServer
from tests.support.oracle import random_tensor
from tests.support.processes.programs import program
from tests.support.processes.server import in_process

LONG = "a/very/long/name/of/a/layer/" * 8
Picture = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with in_process(ServerConfig(http_listen="127.0.0.1:0")) as running, sharednorm.connect(running.address) as hub:
        for name in ("stem/bn", LONG):
            hub.BatchNorm2D(64, name=name)(random_tensor(1, (4, 64, 5, 2)))
        yield running


def browse(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [
        program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={directory}/profile", *words,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)


def picture(directory: Path, url: str, width: int, *words: str) -> Picture:
    """Return a screenshot, of shape (height, width, 3), from 0 to 1."""
    file = directory / "page.png"
    browse(directory, f"--window-size={width},1400", f"--screenshot={file}", *words, url)
    pixels: Any = matplotlib.image.imread(file)
    return np.asarray(pixels[..., :3], np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/?every=never", "/layer?name=stem/bn&every=never"])
def test_it_follows_the_colours_that_somebody_prefers(server: RunningServer, tmp_path: Path, path: str) -> None:
    url = f"http://{server.http}{path}"
    light = picture(tmp_path, url, 1200)
    dark = picture(tmp_path, url, 1200, "--blink-settings=preferredColorScheme=0")
    for pixels in (light, dark):
        assert pixels.std() > 0.02  # something is there
    assert np.median(light) > 0.95
    assert np.median(dark) < 0.15


@pytest.mark.slow
def test_the_words_are_there_and_the_pictures(server: RunningServer, tmp_path: Path) -> None:
    found = browse(tmp_path, "--dump-dom", f"http://{server.http}/layer?name=stem/bn").stdout
    assert "Channel by channel" in found
    assert found.count("<svg") == 4
    assert "var(--line)" in found


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/?every=never", f"/layer?name={LONG}&every=never"])
def test_on_a_phone_nothing_is_cut_off(server: RunningServer, tmp_path: Path, path: str) -> None:
    """What is wide moves in its own box: the page's right margin stays empty, but for such a box."""
    pixels = picture(tmp_path, f"http://{server.http}{path}", 500)
    margin = pixels[:, -10:]
    rows = np.abs(margin - np.median(pixels)).max(axis=(1, 2)) > 0.2
    assert rows.mean() < 0.05
