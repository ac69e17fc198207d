"""What an earlier release has left in Redis is brought to this layout bit for bit; other layouts are left alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from sharednorm.errors import StoreUnavailable
from sharednorm_server.errors import StartError
from sharednorm_server.store.base import LayerKey
from sharednorm_server.store.redis.layout import LAYOUT
from sharednorm_server.store.redis.migration import _Migration, migrate_layout
from sharednorm_server.store.redis.store import RedisStore
from tests.redis.test_store import make, note, stepped, until
from tests.support.processes.old_state import MAX_SESSIONS, check_that_training_goes_on, commands, described, expected
from tests.support.processes.redis import RedisProcess, redis_server
from tests.support.processes.server import run, server_process

OLD = "redis-1"


@pytest.fixture
def url(redis_process: RedisProcess) -> str:
    """Give a state of layout 1."""
    made = redis_process.url()
    fill(redis_process, prefix_of(made))
    return made


def prefix_of(url: str) -> str:
    return url.partition("prefix=")[2]


def fill(process: RedisProcess, prefix: str) -> None:
    for command in commands(OLD, prefix):
        process.ask(*command)


def keys(process: RedisProcess, prefix: str) -> dict[str, Any]:
    with redis.Redis(port=process.port, protocol=2) as client:
        return {key.decode(): client.dump(key) for key in client.scan_iter(f"{prefix}:*", count=1000)}


# --- From the layout before -------------------------------------------------------------------------------


def test_every_bit_is_there(url: str, redis_process: RedisProcess) -> None:
    prefix = prefix_of(url)
    before = redis_process.ask("HGETALL", f"{prefix}:{{default:bn}}:layer")
    shown = url.replace("redis://", "redis://default@")
    done = run(["migrate", shown])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{url} has the layout of this release: 4 layers changed\n"
    store = RedisStore(url, max_sessions=MAX_SESSIONS)
    assert described(store) == expected(OLD)
    assert (store.last_session, store.identity) == (4, "40ccab85d4e70a64")
    uid = next(iter(redis_process.ask("SMEMBERS", f"{prefix}:2:{{default:deleted}}:deleted")))
    assert store.look(LayerKey("default", "deleted", uid.decode())).deleted
    assert redis_process.ask("TTL", f"{prefix}:2:{{default:deleted}}:deleted") > 29 * 86400
    store.close()
    after = redis_process.ask("HGETALL", f"{prefix}:2:{{default:bn}}:layer")
    assert {name: value for name, value in after.items() if not name.startswith(b"statistics:")} == {
        name: value for name, value in before.items() if not name.startswith(b"statistics:")
    }
    old = [name for name in keys(redis_process, prefix) if not name.startswith(f"{prefix}:2:")]
    assert sorted(old) == [f"{prefix}:{name}" for name in ("namespaces", "sessions", "state")]
    state = keys(redis_process, prefix)
    again = run(["migrate", url, "--json"])
    assert (again.returncode, json.loads(again.stdout)) == (0, {"layers": 0})
    assert keys(redis_process, prefix) == state


def test_training_goes_on_and_what_comes_again_is_known(url: str) -> None:
    assert migrate_layout(url) == 4
    check_that_training_goes_on(RedisStore(url, max_sessions=MAX_SESSIONS), 1)


def test_there_is_nothing(redis_process: RedisProcess) -> None:
    url = redis_process.url()
    done = run(["migrate", url])
    assert (done.returncode, done.stderr) == (
        2, f"sharednorm: the state in {url} cannot be migrated: there is none\n",
    )  # fmt: skip
    assert keys(redis_process, prefix_of(url)) == {}


def test_a_server_says_what_is_to_be_done(url: str, redis_process: RedisProcess) -> None:
    before = keys(redis_process, prefix_of(url))
    words = r"of version 1, and this release needs 2 \(expected: stop all .* and run `sharednorm migrate redis://"
    with pytest.raises(StartError, match=words):
        RedisStore(url)
    copied = run(["migrate", url, "sqlite:///nowhere"])
    assert copied.returncode != 0
    assert "is of version 1, and this release needs 2" in copied.stderr
    assert keys(redis_process, prefix_of(url)) == before


@pytest.mark.parametrize("failing", range(19))
def test_one_that_was_broken_off_is_gone_on_with(
    url: str, redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each transaction is one of Redis's own; here it ends before any of them."""
    transact, calls = _Migration._transact, [0]

    def broken(self: _Migration, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] > failing:
            raise redis.ConnectionError("it is gone")
        transact(self, *arguments)

    monkeypatch.setattr("sharednorm_server.store.redis.migration._SETTLING_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(_Migration, "_transact", broken)
        with pytest.raises(StartError, match="cannot be migrated: it is gone"):
            migrate_layout(url)
    words = rf"is being migrated by process {os.getpid()} on .*`sharednorm migrate redis:"
    with pytest.raises(StartError, match=words):
        RedisStore(url)
    migrate_layout(url)
    store = RedisStore(url, max_sessions=MAX_SESSIONS)
    assert described(store) == expected(OLD)
    store.close()


# --- Who else is there ------------------------------------------------------------------------------------


@pytest.fixture
def listener(url: str, redis_process: RedisProcess) -> Iterator[str]:
    """Give the address of what listens like a server of layout 1."""
    with redis.Redis(port=redis_process.port, client_name="sharednorm", protocol=2) as client:
        pubsub = client.pubsub()
        pubsub.subscribe(f"{prefix_of(url)}:changed:0")
        assert pubsub.get_message(timeout=5)
        (mine,) = [each for each in client.client_list() if each["sub"] == "1" and each["name"] == "sharednorm"]
        yield mine["addr"]
        pubsub.close()


def test_a_server_of_the_earlier_release_that_is_there(url: str, listener: str, redis_process: RedisProcess) -> None:
    before = keys(redis_process, prefix_of(url))
    done = run(["migrate", url])
    assert done.returncode != 0
    words = f"it is used by 1 server of an earlier release, connected from {listener} (expected: no server; stop all"
    assert words in done.stderr
    assert keys(redis_process, prefix_of(url)) == before


def test_one_that_connects_in_the_last_moment(
    url: str, redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(redis_process, prefix_of(url))
    with redis.Redis(port=redis_process.port, protocol=2) as client:
        pubsub = client.pubsub()
        monkeypatch.setattr(
            "sharednorm_server.store.redis.migration.time.sleep",
            lambda _: pubsub.subscribe(f"{prefix_of(url)}:changed:0"),
        )
        with pytest.raises(StartError, match="it is used by 1 server of an earlier release"):
            migrate_layout(url)
        pubsub.close()
    assert keys(redis_process, prefix_of(url)) == before


def test_one_that_nothing_has_told_can_open_no_session_and_make_no_layer(url: str, redis_process: RedisProcess) -> None:
    """A server of layout 1 whose connection has lived on: what it runs, it runs on the old keys."""
    migrate_layout(url)
    prefix = prefix_of(url)
    with pytest.raises(redis.ResponseError, match="not an integer"):
        redis_process.ask("INCR", f"{prefix}:sessions")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        redis_process.ask("SADD", f"{prefix}:namespaces", "default")
    assert redis_process.ask("HGET", f"{prefix}:{{default:bn}}:layer", "mark") is None
    assert b"use a newer release of sharednorm" in redis_process.ask("GET", f"{prefix}:sessions")


def test_what_it_writes_meanwhile_is_left_alone(
    url: str, redis_process: RedisProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    junk = f"{prefix_of(url)}:{{default:bn}}:layer"
    with monkeypatch.context() as patch:
        patch.setattr(_Migration, "_keys", lambda _, start: iter([junk.encode()] if start == "{" else []))
        migrate_layout(url)
    redis_process.ask("HSET", f"{prefix_of(url)}:state", "migrating", "nothing")
    redis_process.ask("HSET", junk, "mark", "another")
    migrate_layout(url)
    assert [record.getMessage() for record in caplog.records] == [
        f"{junk.encode()!r} was written by a server of an earlier release meanwhile, and is left alone"
    ]
    store = RedisStore(url, max_sessions=MAX_SESSIONS)
    assert described(store) == expected(OLD)
    store.close()


def test_layers_are_copied_from_no_state_that_a_server_uses(redis_process: RedisProcess, tmp_path: Path) -> None:
    url, empty = redis_process.url("a*[b]"), redis_process.url("a-other")
    with server_process("--state", url) as server:
        for words in (["migrate", url, empty], ["migrate", empty, url]):
            done = run(words)
            assert done.returncode == 2
            assert f"is used by process {server.pid} on " in done.stderr
        assert server.stop() == 0
    assert run(["migrate", url, f"sqlite://{tmp_path}/state"]).returncode == 0


def test_what_a_user_needs(tmp_path: Path) -> None:
    with redis_server(tmp_path / "redis") as process:
        fill(process, "mine")
        rights = "~mine:*", "&mine:*", "+@all", "-@dangerous", "+info", "+role"
        process.ask("ACL", "SETUSER", "norm", "on", ">word", *rights)
        url = f"redis://norm:word@{process.address}/0?prefix=mine"
        with redis.Redis(port=process.port) as client:
            pubsub = client.pubsub()
            pubsub.subscribe("mine:changed:0")
            assert pubsub.get_message(timeout=5)
            with pytest.raises(StartError, match=r"used by 1 server of an earlier release \(expected: no server"):
                migrate_layout(url)
            pubsub.close()
        until(lambda: process.ask("PUBSUB", "NUMSUB", "mine:changed:0")[1] == 0)
        assert migrate_layout(url) == 4
        store = RedisStore(url)
        assert described(store) == expected(OLD)
        until(lambda: process.ask("PUBSUB", "CHANNELS", "mine:2:server:*"))
        assert store.others() == []
        store.close()


# --- To a layout after this one ---------------------------------------------------------------------------

CALLS: dict[str, Callable[[RedisStore], object]] = {
    "look": lambda store: store.look(make().key),
    "swap": lambda store: store.compare_and_set(make(), stepped(make()), note(1, 1)),
    "create": lambda store: store.create(make(LayerKey("default", "new"))),
    "delete": lambda store: store.delete(make().key),
    "snapshot": lambda store: store.take_snapshot(make(), 1.0, []),
    "session": lambda store: store.open_session(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("stamp", "words"),
    [
        (("version", LAYOUT + 1), f"is of version {LAYOUT + 1}, and this release knows {LAYOUT}"),
        (("features", "wide"), "uses wide, which this release does not know"),
        (("migrating", "process 1"), "is being migrated by process 1"),
    ],
)
def test_a_server_that_is_connected_changes_nothing_any_more(
    redis_process: RedisProcess, call: Callable[[RedisStore], object], stamp: tuple[str, Any], words: str
) -> None:
    url = redis_process.url()
    store, prefix = RedisStore(url), prefix_of(url)
    assert store.create(make())
    troubles: list[str] = []
    store.on_trouble(troubles.append)
    redis_process.ask("HSET", f"{prefix}:state", *stamp)
    before = keys(redis_process, prefix)
    with pytest.raises(StoreUnavailable, match="what is there is not of version 2 any more"):
        call(store)
    assert keys(redis_process, prefix) == before
    until(lambda: words in troubles[-1])
    with pytest.raises(StoreUnavailable, match=words):  # also what is no script
        store.page("default", "", 1)
    with pytest.raises(StartError, match=words):
        RedisStore(url)
    redis_process.ask("HSET", f"{prefix}:state", "version", LAYOUT)
    redis_process.ask("HDEL", f"{prefix}:state", "features", "migrating")
    until(lambda: troubles[-1] == "")
    call(store)
    store.close()


def test_the_layout_before_may_not_come_back(redis_process: RedisProcess) -> None:
    """A copy of an earlier layout was put in place while a server was connected."""
    url = redis_process.url()
    store = RedisStore(url)
    fill(redis_process, prefix_of(url))
    with pytest.raises(StoreUnavailable, match="not of version 2 any more"):
        store.create(make())
    assert redis_process.ask("EXISTS", f"{prefix_of(url)}:2:namespaces") == 0
    store.close()


def test_a_redis_that_has_lost_its_stamp_gets_one_with_the_first_layer(redis_process: RedisProcess) -> None:
    url = redis_process.url()
    store = RedisStore(url)
    redis_process.ask("DEL", f"{prefix_of(url)}:state")
    assert store.create(make())
    assert redis_process.ask("HGET", f"{prefix_of(url)}:state", "version") == b"%d" % LAYOUT
    store.close()


def test_registrations_end_with_their_connections(redis_process: RedisProcess) -> None:
    url = redis_process.url()
    one, two = RedisStore(url), RedisStore(url)
    until(lambda: len(one.others()) == 1)
    (name,) = one.others()
    assert name.startswith(f"process {os.getpid()} on ")
    two.close()
    until(lambda: one.others() == [])
    one.close()
