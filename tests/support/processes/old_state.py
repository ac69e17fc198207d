"""A state that an earlier release has written, as text: how it was made, and how tests get it back.

`layouts/` has a file of SQLite as its SQL, a Redis as the commands that fill it (`redis-cli` reads them), and what the
release that wrote each found in it. They were made by `python -m tests.support.processes.old_state`, run with that
release's own code: `sqlite-2` and `redis-1` are from the last commit before running statistics were stored as float64.
They are never made anew; a state of another layout gets files of its own.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments, StateUpdate, initial_state, step
from sharednorm.core.types import Averaging, LayerKind, NonFinitePolicy
from sharednorm.errors import KeyReused, SessionExpired
from sharednorm_server.device.cpu import CpuDevice
from sharednorm_server.layers.placement import Placement
from sharednorm_server.layers.requests import BackwardCall, Together
from sharednorm_server.layers.service import LayerService
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.codec import config_to_text
from sharednorm_server.store.records import CallKey, LastChange
from sharednorm_server.store.snapshots import SnapshotPolicy
from sharednorm_server.store.sqlite.store import FILE_NAME, SqliteStore

if TYPE_CHECKING:
    from sharednorm_server.store.redis.store import RedisStore

LAYOUTS = Path(__file__).parents[1] / "layouts"
KEY = LayerKey("default", "bn")
MAPS = 3
MAX_SESSIONS = 3
_PREFIX = "PREFIX"

# Which session has made the last change of `KEY`, with which number and of which moments: to be asked for again.
LAST_SEQ, LAST_SEED = 2, 10


def moments(seed: int) -> Moments:
    """Return the moments of the batch of a step."""
    rng = np.random.default_rng(seed)
    return Moments(10 + seed, rng.normal(size=MAPS), rng.uniform(1, 9, MAPS))


def session_of(number: int) -> bytes:
    """Return the session whose number was given first, second ...; those of a file begin with 2^32."""
    return number.to_bytes(8, "big") + b"lane 001"


def described(store: SqliteStore | RedisStore) -> dict[str, Any]:
    """Return all that a store keeps, bit for bit, as JSON has it."""
    layers = []
    for namespace in store.namespaces():
        for record in store.page(namespace, "", 100):
            whole = store.whole(record.key)
            assert whole is not None
            layers.append(
                {
                    **_record(whole.record),
                    "gradients": [_bits(whole.record.state.scale_grad), _bits(whole.record.state.bias_grad)],
                    "changes": [[name.hex(), _change(each)] for name, each in whole.remembered.changes.items()],
                    "floor": whole.remembered.floor,
                    "snapshots": [{"taken": taken, **_record(each)} for taken, each in whole.snapshots],
                }
            )
    return {"layers": layers}


def _record(record: LayerRecord) -> dict[str, Any]:
    domains = {domain: record.within(domain).state for domain in sorted(("", *record.domains))}
    return {
        "key": [record.key.namespace, record.key.name, record.key.uid],
        "config": json.loads(config_to_text(record.config)),
        "train": record.train,
        "version": record.state.version,
        "initialized": record.state.initialized,
        "parameters": [_bits(record.state.scale), _bits(record.state.bias)],
        "statistics": {
            domain: {
                "mean": _bits(state.mean),
                "var": _bits(state.var),
                "numOfProps": state.num_of_props,
                "frozen": state.stats_frozen,
                "merged": [name.hex() for name in state.merged],
            }
            for domain, state in domains.items()
        },
    }


def _change(change: LastChange) -> dict[str, Any]:
    step = change.step
    return {
        "seq": change.seq,
        "content": change.content.hex(),
        "version": change.version,
        "numOfProps": change.num_of_props,
        "step": None
        if step is None
        else {
            "count": step.moments.count,
            "moments": [step.moments.mean.tobytes().hex(), step.moments.m2.tobytes().hex()],
            "parameters": [_bits(step.scale), _bits(step.bias)],
        },
        "sums": None if change.sums is None else change.sums.tobytes().hex(),
    }


def _bits(vector: npt.NDArray[Any]) -> str:
    return vector.astype("<f4").tobytes().hex()


# --- Back into a store ----------------------------------------------------------------------------------


def expected(name: str) -> dict[str, Any]:
    """Return what the release that wrote a state found in it."""
    found: dict[str, Any] = json.loads((LAYOUTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def write_sqlite(name: str, path: Path) -> None:
    """Make the file of SQLite that a release wrote."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as database:
        database.executescript((LAYOUTS / f"{name}.sql").read_text(encoding="utf-8"))


def commands(name: str, prefix: str) -> Iterator[list[bytes]]:
    """Give the commands that bring into a Redis what a release wrote, under another prefix."""
    for line in (LAYOUTS / f"{name}.redis").read_text(encoding="ascii").splitlines():
        words = [_unquoted(word) for word in re.findall(r'"((?:[^"\\]|\\.)*)"', line)]
        words[1] = words[1].replace(_PREFIX.encode(), prefix.encode(), 1)
        yield words


def _quoted(value: bytes) -> str:
    return '"' + "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in value) + '"'


def _unquoted(word: str) -> bytes:
    return word.encode("ascii").decode("unicode_escape").encode("latin-1")


def check_that_training_goes_on(store: SqliteStore | RedisStore, numbers: int) -> None:
    """See that clients of a state that was filled by `fill` notice nothing; closes it.

    Args:
        store: The state.
        numbers: What was added to the numbers of sessions.
    """
    record, session = store.get(KEY), session_of(numbers + 2)
    assert record is not None
    service = _service(store, SnapshotPolicy(every=0))
    again = service.push_moments(KEY, True, moments(LAST_SEED), call=CallKey(session, LAST_SEQ))
    assert (again.replayed, again.version) == (True, record.state.version)
    with pytest.raises(KeyReused):
        service.push_moments(KEY, True, moments(99), call=CallKey(session, LAST_SEQ))
    with pytest.raises(SessionExpired):
        service.push_moments(KEY, True, moments(0), call=CallKey(session_of(numbers), 1))
    service.push_moments(KEY, True, moments(99), call=CallKey(session, LAST_SEQ + 1))
    trained, found = step(record.state, record.config, moments(99)), service.get_layer(KEY).state
    assert (found.version, found.num_of_props) == (trained.version, trained.num_of_props)
    np.testing.assert_array_equal(found.mean, trained.mean)
    np.testing.assert_array_equal(found.var, trained.var)
    assert service.open_session() + b"lane 001" > session_of(numbers + 3)
    change = service.end_together(LayerKey("default", "group"), session_of(numbers + 1))
    assert change is not None
    assert change.sums is not None
    service.roll_back(KEY, 6)
    service.close()


def _service(store: SqliteStore | RedisStore, policy: SnapshotPolicy) -> LayerService:
    device = CpuDevice(arithmetic("numpy"))
    return LayerService(store, Placement(device), 1 << 20, policy=policy, max_sessions=MAX_SESSIONS)


# --- How they were made ---------------------------------------------------------------------------------


def fill(store: SqliteStore | RedisStore, numbers: int) -> None:
    """Do to a store what clients do: steps of sessions, domains, deltas, gradients, snapshots, deletions.

    Args:
        store: An empty one.
        numbers: What is added to the numbers of sessions.
    """
    times = iter(range(1_700_000_000, 1_800_000_000))
    service = _service(store, SnapshotPolicy(every=0.5, most=3, clock=lambda: next(times) + 0.25))
    config = LayerConfig(LayerKind.BATCH_NORM_2D, MAPS)
    for key in (KEY, LayerKey("default", "deleted"), LayerKey("default", "group")):
        service.create_layer(key, config, StateUpdate(), sscale=0.1, empty=False)
    service.delete_layer(LayerKey("default", "deleted"))
    service.create_domain(replace(KEY, domain="höhle"), StateUpdate(num_of_props=5, mean=[0.1, 2.0, 3e-42]))
    sessions = [service.open_session() + b"lane 001" for _ in range(4)]
    assert sessions == [session_of(numbers + number) for number in range(4)]
    for seed, session in enumerate(sessions):
        service.push_moments(KEY, True, moments(seed), call=CallKey(session, 1))
    service.push_moments(replace(KEY, domain="höhle"), True, moments(9), call=CallKey(sessions[3], 2))
    service.merge_statistics(replace(KEY, domain="höhle"), b"delta 1", moments(7))
    service.set_train(KEY, False)
    service.push_moments(KEY, True, moments(LAST_SEED), call=CallKey(sessions[2], LAST_SEQ))
    group = LayerKey("default", "group")
    service.step_together(group, moments(4), Together(CallKey(sessions[0], 1), b"content of a group's step"))
    sums = np.arange(6.0).reshape(2, 3) / 3
    gradients = np.array([1 / 3, 2 / 3, 1], np.float32), np.array([0.1, -2, 3e38], np.float32)
    service.backward_together(BackwardCall(group), sums, gradients, Together(CallKey(sessions[1], 1), b"a backward's"))
    # What no step makes, but a file may have.
    odd = LayerConfig(
        LayerKind.BATCH_NORM_3D, 2, epsilon=0.1 + 0.2, init_factor=1 / 3, min_factor=0.0, affine=False,
        averaging=Averaging.PRINTED, nonfinite=NonFinitePolicy.ALLOW,
    )  # fmt: skip
    state = replace(
        initial_state(odd, 0.0, np.random.default_rng(0)),
        mean=np.array([np.nan, -0.0], np.float32), var=np.array([np.inf, 1e-45], np.float32),
        num_of_props=1 << 53, version=1 << 53, stats_frozen=True, merged=(b"one", b"x" * 64),
    )  # fmt: skip
    store.create(LayerRecord(LayerKey("é{:}", "層/ß 'a';--{b}:c", "uid of the odd"), odd, state, False))
    blank = initial_state(config, 0.0, np.random.default_rng(0), empty=True)
    store.create(LayerRecord(LayerKey("default", "empty", "uid of the empty"), config, blank))


def _make_sqlite() -> None:
    with tempfile.TemporaryDirectory() as place:
        store = SqliteStore(Path(place))
        fill(store, 1 << 32)
        found = described(store)
        store.close()
        with closing(sqlite3.connect(Path(place) / FILE_NAME)) as database:
            marks = [
                f"PRAGMA {name} = {database.execute(f'PRAGMA {name}').fetchone()[0]};"
                for name in ("application_id", "user_version", "journal_mode")
            ]
            (version,) = database.execute("PRAGMA user_version").fetchone()
            text = "\n".join([*marks, *database.iterdump()])
    (LAYOUTS / f"sqlite-{version}.sql").write_text(text + "\n", encoding="utf-8")
    _tell(f"sqlite-{version}", found)


def _make_redis() -> None:
    # Here, so that tests of the file need no redis-py.
    from sharednorm_server.store.redis.layout import LAYOUT
    from sharednorm_server.store.redis.store import RedisStore
    from tests.support.processes.redis import redis_server

    lines = []
    with tempfile.TemporaryDirectory() as place, redis_server(Path(place)) as process:
        store = RedisStore(process.url(_PREFIX), max_sessions=MAX_SESSIONS)
        fill(store, 1)
        found = described(store)
        store.close()
        for key in sorted(process.ask("KEYS", "*")):
            read, write = {
                b"hash": (("HGETALL", key), "HSET"),
                b"zset": (("ZRANGE", key, 0, -1, "WITHSCORES"), "ZADD"),
                b"set": (("SMEMBERS", key), "SADD"),
                b"string": (("GET", key), "SET"),
            }[process.ask("TYPE", key)]
            values = process.ask(*read)
            if isinstance(values, dict):
                values = [each for pair in values.items() for each in pair]
            elif write == "SET":
                values = [values]
            elif write == "ZADD":
                values = [each for pair in zip(values[1::2], values[::2], strict=True) for each in pair]
            words = [write.encode(), key, *values]
            lines.append(" ".join(map(_quoted, words)))
            if process.ask("TTL", key) > 0:
                lines.append(" ".join(map(_quoted, (b"EXPIRE", key, b"2592000"))))
    (LAYOUTS / f"redis-{LAYOUT}.redis").write_text("\n".join(lines) + "\n", encoding="ascii")
    _tell(f"redis-{LAYOUT}", found)


def _tell(name: str, found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1, ensure_ascii=False)
    (LAYOUTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    {"sqlite": _make_sqlite, "redis": _make_redis}[sys.argv[1]]()
