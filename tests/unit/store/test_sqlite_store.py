"""The store of SQLite's: what a file has when it is opened again, who may use it, and what happens when it fails."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sharednorm.core.domains import blank_statistics
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import ARRAY_FIELDS, LayerState, Moments, StateUpdate, initial_state, merge_delta, step
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.errors import LayerNotFound, StoreFailed
from sharednorm_server.errors import StartError
from sharednorm_server.layers.requests import ForwardCall
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import LastChange, Note, TakenStep
from sharednorm_server.store.sqlite.database import FILE_VERSION
from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore
from tests.support import oracle
from tests.support.service import CONFIG, KEY, SHAPE, create, new_service

ODD = LayerConfig(
    LayerKind.BATCH_NORM_3D, 2, epsilon=0.1 + 0.2, init_factor=1 / 3, min_factor=0.0, affine=False,
    averaging=Averaging.PRINTED, nonfinite=NonFinitePolicy.ALLOW,
)  # fmt: skip


def moments(seed: int, maps: int = 3) -> Moments:
    rng = np.random.default_rng(seed)
    return Moments(10 + seed, rng.normal(size=maps), rng.uniform(1, 9, maps))


def first(name: str = "a", config: LayerConfig = CONFIG) -> LayerRecord:
    state = initial_state(config, 0.3, np.random.default_rng(1))
    return LayerRecord(LayerKey("default", name, f"uid of {name}"), config, state)


def put(store: SqliteStore, record: LayerRecord) -> LayerRecord:
    kept = store.put(record)
    assert kept is not None
    kept.wait()
    return record


def same(found: LayerRecord | None, expected: LayerRecord) -> None:
    assert found is not None
    assert (found.key, found.key.uid, found.config) == (expected.key, expected.key.uid, expected.config)
    assert (found.train, found.key.domain) == (expected.train, "")
    same_state(found.state, expected.state)
    assert found.domains.keys() == expected.domains.keys()
    for domain in expected.domains:
        same_state(found.within(domain).state, expected.within(domain).state)


def same_state(found: LayerState, expected: LayerState) -> None:
    for name in ARRAY_FIELDS:
        assert getattr(found, name).tobytes() == getattr(expected, name).tobytes(), name
        assert not getattr(found, name).flags.writeable
    for name in ("num_of_props", "version", "initialized", "stats_frozen", "merged"):
        assert getattr(found, name) == getattr(expected, name), name


def again(store: SqliteStore) -> SqliteStore:
    store.close()
    return SqliteStore(store.directory)


def test_what_is_kept_is_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "new" / "directory")
    odd = LayerRecord(
        LayerKey("層/ß", "\U0001f600 'a';--"), ODD, initial_state(ODD, 0.0, np.random.default_rng(0)), False
    )
    records = [
        first(),
        odd,
        replace(first("empty"), state=initial_state(CONFIG, 0, np.random.default_rng(0), empty=True)),
    ]
    for record in records:
        assert store.create(record)
    store = again(store)
    assert (store.directory.stat().st_mode & 0o777) == 0o700
    for record in records:
        same(store.get(record.key), record)
    assert [found.key.name for found in store.page("default", "", 10)] == ["a", "empty"]
    assert store.get(LayerKey("default", "b")) is None
    store.close()


CHANGES: dict[str, Callable[[LayerRecord], LayerRecord]] = {
    "step": lambda r: r.with_state(step(r.state, r.config, moments(1))),
    "mode": lambda r: replace(r, train=False),
    "parameters": lambda r: r.with_state(replace(r.state, scale=np.array([7, 8, 1 + 2**-23], np.float32))),
    "gradients": lambda r: r.with_state(replace(r.state, bias_grad=np.array([1e-40, np.inf, np.nan], np.float32))),
    "bias": lambda r: r.with_state(replace(r.state, bias=np.array([7, 8, 9], np.float32))),
    "gradient of the scale": lambda r: r.with_state(replace(r.state, scale_grad=np.array([7, 8, 9], np.float32))),
    "frozen": lambda r: r.with_state(replace(r.state, stats_frozen=True)),
    "merged": lambda r: r.with_state(merge_delta(r.state, r.config, b"\0" * 64, moments(2))),
    "merged twice": lambda r: r.with_state(
        merge_delta(merge_delta(r.state, r.config, b"x", moments(2)), r.config, b"y", moments(3))
    ),
    "nothing": lambda r: r.with_state(replace(r.state)),
    "a domain's step": lambda r: r.within("b").with_state(step(r.within("b").state, r.config, moments(3))).within(""),
    "a domain's delta": lambda r: (
        r.within("b").with_state(merge_delta(r.within("b").state, r.config, b"delta", moments(3))).within("")
    ),
    "a domain less": lambda r: replace(r, domains={"b": r.domains["b"]}),
    "a domain in another's place": lambda r: replace(r, domains={"c": r.domains["b"]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["by whom it was made", "by whom has read it"])
def test_each_change_is_kept(tmp_path: Path, change: Callable[[LayerRecord], LayerRecord], when: str) -> None:
    service = new_service(store=(store := SqliteStore(tmp_path)))
    create(service)
    for domain in ("b", "höhle"):
        service.create_domain(replace(KEY, domain=domain), StateUpdate(num_of_props=len(domain)))
    if when == "by whom has read it":
        store = again(store)
    record = store.get(KEY)
    assert record is not None
    changed = put(store, change(record))
    store = again(store)
    same(store.get(KEY), changed)
    store.close()


def test_a_name_that_was_deleted_comes_without_what_it_had(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store.create(first())
    put(store, replace(first(), domains={"b": blank_statistics(CONFIG, StateUpdate())}))
    store.delete(first().key)
    store = again(store)
    assert store.get(first().key) is None
    store.create(first())
    store = again(store)
    same(store.get(first().key), first())
    store.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        for table in ("layers", "parameters", "gradients", "statistics"):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)
    database.close()


def test_a_service_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    model = oracle.Model(3)
    store = SqliteStore(tmp_path)
    for number in range(4):
        service = new_service(store=store)
        create(service)
        x = oracle.random_tensor(number, SHAPE)
        answer = service.forward(ForwardCall(KEY, train=True), x)
        assert answer.version == number + 1
        np.testing.assert_allclose(answer.output.array(), model.train(x), rtol=0, atol=1e-5)
        store = again(store)
    record = store.get(KEY)
    assert record is not None
    np.testing.assert_allclose(record.state.mean, model.mean, rtol=1e-5, atol=1e-6)
    store.close()


@pytest.mark.parametrize(("durability", "synchronous"), [("os", 1), ("fsync", 2)])
def test_what_each_durability_asks_of_the_disk(tmp_path: Path, durability: str, synchronous: int) -> None:
    store = SqliteStore(tmp_path, durability)
    assert store.description.endswith(f"?durability={durability}")
    for name, value in (("synchronous", synchronous), ("journal_mode", "wal"), ("locking_mode", "exclusive")):
        assert store._database.execute(f"PRAGMA {name}").fetchone() == (value,)
    store.close()


# --- Sessions ---------------------------------------------------------------------------------------


def taken(seed: int) -> TakenStep:
    rng = np.random.default_rng(seed)
    scale, bias = (rng.normal(size=3).astype(np.float32) for _ in range(2))
    return TakenStep(moments(seed), scale, bias)


def changes() -> dict[bytes, LastChange]:
    return {
        b"session a".ljust(16): LastChange(3, b"1" * 16, 12, 11, taken(1)),
        bytes(16): LastChange((1 << 62) - 1, bytes(range(16)), (1 << 53), 1 << 53, taken(2)),
        b"\xff" * 16: LastChange(1, b"", 0, 0),
    }


def test_last_changes_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store.create(first())
    for session, change in changes().items():
        kept = store.put(first(), Note(session, change))
        assert kept is not None
    assert kept is not None
    kept.wait()
    for _ in range(2):
        found = store.remembered(first().key)
        assert list(found.changes) == list(changes())
        for session, change in changes().items():
            same_change(found.changes[session], change)
        store = again(store)
    store.close()


def same_change(found: LastChange, expected: LastChange) -> None:
    for name in ("seq", "content", "version", "num_of_props"):
        assert getattr(found, name) == getattr(expected, name)
    if expected.step is None:
        assert found.step is None
        return
    assert found.step is not None
    for one, other in ((found.step, expected.step), (found.step.moments, expected.step.moments)):
        for name in ("scale", "bias") if isinstance(one, TakenStep) else ("mean", "m2"):
            assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
            assert getattr(one, name).dtype == getattr(other, name).dtype
    assert found.step.moments.count == expected.step.moments.count


def test_each_opening_is_another_run(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    for run in (1, 2, 3):
        assert store.open_session() == run << 32
        store = again(store)
    store.close()


# --- Many at a time ---------------------------------------------------------------------------------


def test_what_waits_together_is_kept_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SqliteStore(tmp_path)
    statements: list[str] = []
    names = [f"{number}" for number in range(20)]
    last = {name: first(name) for name in names}
    for record in last.values():
        store.create(record)
    store._database.set_trace_callback(statements.append)
    waiting = []
    for number in range(3):
        for name in names:
            record = last[name]
            last[name] = record.with_state(step(record.state, record.config, moments(number)))
            waiting.append(store.put(last[name], Note(bytes([number]) * 16, LastChange(1, b"", number, number))))
    assert statements == []  # nobody has waited
    for kept in reversed(waiting):
        assert kept is not None
        kept.wait()
    # One transaction, and of each layer the last state alone.
    assert [sum(text.startswith(word) for text in statements) for word in ("BEGIN", "COMMIT")] == [1, 1]
    assert sum(text.startswith("UPDATE layers") for text in statements) == 20
    assert not any("parameters" in text for text in statements)  # which no step changes
    assert sum("INTO changes" in text for text in statements) == 60  # but what each session has done
    store._database.set_trace_callback(None)
    store = again(store)
    for name in names:
        same(store.get(LayerKey("default", name)), last[name])
        assert len(store.remembered(LayerKey("default", name)).changes) == 3
    store.close()


def test_a_deletion_between_two_changes_of_a_name_is_seen(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    store.create(first())
    with store._committing:  # so that all of it waits for one commit
        old = store.put(replace(first(), train=False))
        others = [threading.Thread(target=work) for work in (lambda: store.delete(first().key),)]
        for thread in others:
            thread.start()
        while len(store._waiting) < 2:
            pass
        made = threading.Thread(target=lambda: store.create(first()))
        made.start()
        while len(store._waiting) < 3:
            pass
        new = store.put(first().with_state(step(first().state, CONFIG, moments(1))))
    for thread in (*others, made):
        thread.join()
    for kept in (old, new):
        assert kept is not None
        kept.wait()
    store = again(store)
    same(store.get(first().key), first().with_state(step(first().state, CONFIG, moments(1))))
    store.close()


def test_threads_that_change_many_layers(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    service = new_service(store=store)
    keys = [LayerKey("default", f"{number}") for number in range(3)]
    for key in keys:
        create(service, key)

    def work() -> None:
        for _ in range(25):
            for key in keys:
                service.push_moments(key, True, moments(1))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = again(store)
    found = [store.get(key) for key in keys]
    assert [record.state.version for record in found if record is not None] == [150] * 3
    store.close()


# --- Whose file it is -------------------------------------------------------------------------------


def test_a_directory_that_another_process_uses(tmp_path: Path) -> None:
    code = f"""
import sys, pathlib
from sharednorm_server.store.records import LastChange, Note, Remembered, TakenStep
from sharednorm_server.store.sqlite.store import SqliteStore
store = SqliteStore(pathlib.Path({str(tmp_path)!r}))
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            StartError, match=rf"is used by process {other.pid} on \S+, since 20\d\d-.*: stop that server"
        ):
            SqliteStore(tmp_path)
        other.kill()
        other.wait(10)
    SqliteStore(tmp_path).close()  # whoever is dead holds nothing


def test_a_store_that_is_open_here(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    with pytest.raises(StartError, match=f"is used by process {os.getpid()}"):
        SqliteStore(tmp_path)
    store.close()


def test_a_file_of_a_newer_release(tmp_path: Path) -> None:
    SqliteStore(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute(f"PRAGMA user_version = {FILE_VERSION + 1}")
    database.close()
    with pytest.raises(StartError, match=rf"of file version {FILE_VERSION + 1}, and this release knows {FILE_VERSION}"):
        SqliteStore(tmp_path)
    with pytest.raises(StartError, match="of file version"):  # and holds nothing afterwards
        SqliteStore(tmp_path)


def test_a_file_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(StartError, match="is not a state of sharednorm"):
        SqliteStore(tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", [0, 40, 4096])
def test_a_file_that_is_damaged(tmp_path: Path, where: int) -> None:
    store = SqliteStore(tmp_path)
    for number in range(50):
        store.create(first(f"{number}"))
    store.close()
    path = tmp_path / FILE_NAME
    data = bytearray(path.read_bytes())
    data[where : where + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(StartError, match=r"damaged|cannot be used|is not a state"):
        SqliteStore(tmp_path)


def test_a_place_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match=r"the state cannot be kept in .*/file/x: Not a directory"):
        SqliteStore(tmp_path / "file" / "x")


# --- When it fails ----------------------------------------------------------------------------------


class Broken:
    """A connection whose commits fail, as on a disk that is full."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def execute(self, text: str, *arguments: object) -> sqlite3.Cursor:
        if text == "COMMIT":
            raise sqlite3.OperationalError("database or disk is full")
        return self._database.execute(text, *arguments)  # type: ignore[arg-type]

    def close(self) -> None:
        self._database.close()


def test_a_commit_that_fails_ends_the_store(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    service = new_service(store=store)
    create(service)
    kept = service.push_moments(KEY, True, moments(1)).record
    reasons: list[str] = []
    service.on_store_failed(reasons.append)
    store._database = Broken(store._database)  # type: ignore[assignment]
    with pytest.raises(StoreFailed, match="cannot keep its state any more") as caught:
        service.push_moments(KEY, True, moments(2))
    assert isinstance(caught.value, ConnectionError)
    assert str(tmp_path) not in caught.value.message
    assert len(reasons) == 1
    assert "database or disk is full" in reasons[0]
    # Nobody is told of what may not be kept, and nothing more is taken.
    for call in (
        lambda: service.get_layer(KEY),
        lambda: service.push_moments(KEY, True, moments(3)),
        lambda: create(service, LayerKey("default", "another")),
        lambda: service.list_layers("default", 10, ""),
        lambda: service.forward(ForwardCall(KEY, train=False), oracle.random_tensor(1, SHAPE)),
    ):
        with pytest.raises(StoreFailed):
            call()
    assert len(reasons) == 1
    store = again(store)
    same(store.get(KEY), kept)
    store.close()


def test_all_that_waits_hears_of_it(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    for name in "abc":
        store.create(first(name))
    waiting = [store.put(replace(first(name), train=False)) for name in "abc"]
    store._database = Broken(store._database)  # type: ignore[assignment]
    for kept in waiting:
        assert kept is not None
        with pytest.raises(StoreFailed):
            kept.wait()
    with pytest.raises(StoreFailed):
        store.put(first("a"))
    store.close()


def test_a_step_of_a_layer_that_is_deleted_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    service = new_service(store=store)
    create(service)
    service.delete_layer(KEY)
    with pytest.raises(LayerNotFound):
        service.push_moments(KEY, True, moments(1))
    assert store.put(first("bn")) is None
    store.close()
