"""A server whose machine loses its power, or whose disk fails: with `--durability fsync` what was answered is there.

`SHAREDNORM_CUTS` is how many moments are looked at.
"""

from __future__ import annotations

import os
import random
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import sharednorm
from sharednorm_server.store.base import LayerKey
from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore
from tests.faults.crashes.test_server_killed import all_have_trained, training
from tests.support.oracle import random_tensor
from tests.support.processes import disk
from tests.support.processes.server import server_process

pytestmark = pytest.mark.timeout(400)  # a dozen servers are started, each of which takes its time on a busy machine

CUTS = int(os.environ.get("SHAREDNORM_CUTS", "60"))
MAPS, WORKERS, STEPS = 900, 3, 240
SHAPE = (4, MAPS, 2, 2)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disk.build(tmp_path_factory.mktemp("disk"))


class Worker(threading.Thread):
    """Trains a layer of its own, and remembers how far the disk's log was when each step was answered."""

    def __init__(self, number: int, address: str, log: Path) -> None:
        super().__init__(daemon=True)
        self.key = LayerKey("default", f"layer/{number}")
        self._address, self._log = address, log
        self.answered: list[int] = []  # the length of the log, by step
        self.states = [b""]  # what the layer is, by version
        self.error: BaseException | None = None

    def run(self) -> None:
        """Take all steps."""
        try:
            twin = sharednorm.BatchNorm2D(MAPS, sscale=0.0)
            with sharednorm.connect(self._address, timeout=60) as hub:
                layer = hub.BatchNorm2D(MAPS, name=self.key.name, sscale=0.0, compute="client")
                for seed in range(STEPS):
                    layer(random_tensor(seed, SHAPE))
                    self.answered.append(self._log.stat().st_size)
                    twin(random_tensor(seed, SHAPE))
                    state = twin.snapshot()
                    self.states.append(state.mean.tobytes() + state.var.tobytes())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            self.error = error


def test_what_was_answered_survives_that_the_power_goes_away(tmp_path: Path, library: Path) -> None:
    """The disk's writes and syncs are recorded; then states are put together as they may be after any of them."""
    state, log = tmp_path / "state", tmp_path / "log"
    options = ("--state", f"sqlite://{state}", "--durability", "fsync", "--log-level", "warning")
    log.touch()
    with server_process(*options) as server:  # makes the file, which happens once
        server.stop()
    base = {path.name: path.read_bytes() for path in state.glob(f"{FILE_NAME}*")}
    assert list(base) == [FILE_NAME]
    with server_process(*options, env=disk.watched(library, state, log)) as server:
        workers = [Worker(number, server.address, log) for number in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(100)
        assert [(worker.error, len(worker.answered)) for worker in workers] == [(None, STEPS)] * WORKERS
    changes, rng = disk.read(log), random.Random(1)
    assert sum(change.name == FILE_NAME for change in changes) > 20  # the log was brought into the file, too
    began = min(worker.answered[0] for worker in workers)
    ends = [number for number, change in enumerate(changes, 1) if change.end > began]
    seen = set()
    for cut in (rng.choice(ends) for _ in range(CUTS)):
        files = disk.after_power_loss(base, changes[:cut], rng, kept=rng.choice((0.0, 0.5, 0.9, 1.0)))
        place = tmp_path / f"cut {cut} {rng.random()}"
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
        store = SqliteStore(place)
        for worker in workers:
            told = sum(end <= changes[cut - 1].end for end in worker.answered)
            record = store.get(worker.key)
            if record is None:
                assert told == 0
                continue
            version = record.state.version
            assert told <= version <= told + 1, f"{worker.key} after {cut} changes"
            if version:
                assert record.state.mean.tobytes() + record.state.var.tobytes() == worker.states[version]
                (change,) = store.remembered(worker.key).changes.values()
                assert (change.seq, change.version) == (version, version)
            seen.add(version)
        store.close()
    assert len(seen) > 10


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_is_killed_at_its_syncs(tmp_path: Path, library: Path, when: str) -> None:
    """At the first, the second, the fifth ... sync of each server, before it or behind it, and training goes on."""
    listen, state = f"unix:{tmp_path}/socket", tmp_path / "state"
    options = ("--state", f"sqlite://{state}", "--durability", "fsync", "--log-level", "warning")
    with ExitStack() as stack:
        # The first sync of all is in the file's making, where no server has said yet that it is there.
        stack.enter_context(server_process(*options, listen=listen)).stop()
        server = stack.enter_context(server_process(*options, listen=listen))
        with training(listen) as trainers:
            for number in (5, 12, 41, 150):
                all_have_trained(trainers)
                server.stop()
                env = disk.watched(library, state, fault=f"kill-{when}-sync:{number}")
                server = stack.enter_context(server_process(*options, listen=listen, env=env))
                assert server.wait(60) == -9
                server = stack.enter_context(server_process(*options, listen=listen))
            all_have_trained(trainers)


@pytest.mark.parametrize(
    ("fault", "durability"),
    [("eio-sync:9", "fsync"), ("eio-write:40", "fsync"), ("enospc-write:40", "os"), ("enospc-write:41", "fsync")],
)
def test_a_disk_that_fails_ends_the_server_and_loses_nothing(
    tmp_path: Path, library: Path, fault: str, durability: str
) -> None:
    listen, state = f"unix:{tmp_path}/socket", tmp_path / "state"
    options = ("--state", f"sqlite://{state}", "--durability", durability, "--log-level", "warning")
    with ExitStack() as stack:
        first = stack.enter_context(server_process(*options, listen=listen))
        with training(listen) as trainers:
            all_have_trained(trainers)
            first.stop()
            env = disk.watched(library, state, fault=fault)
            failing = stack.enter_context(server_process(*options, listen=listen, env=env))
            assert failing.wait(60) == 4
            assert "cannot be kept any more" in failing.log()
            stack.enter_context(server_process(*options, listen=listen))
            all_have_trained(trainers)
