"""The store in Redis: what is atomic, what is refused at the start, and what happens when Redis is not well."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import initial_state
from sharednorm.core.types import LayerKind
from sharednorm.errors import BackupFailed, StoreUnavailable
from sharednorm_server.auth import certificates
from sharednorm_server.errors import StartError
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import LastChange, Note
from sharednorm_server.store.redis.layout import LAYOUT
from sharednorm_server.store.redis.store import RedisStore
from tests.support.processes.redis import RedisProcess, redis_server

CONFIG = LayerConfig(LayerKind.BATCH_NORM_2D, 2)
KEY = LayerKey("default", "a", "uid of a")


def make(key: LayerKey = KEY) -> LayerRecord:
    return LayerRecord(key, CONFIG, initial_state(CONFIG, 0.0, np.random.default_rng(0)))


def stepped(record: LayerRecord) -> LayerRecord:
    return record.with_state(replace(record.state, version=record.state.version + 1))


def session(number: int, lane: bytes = b"lane 001") -> bytes:
    return number.to_bytes(8, "big") + lane


def note(number: int, seq: int) -> Note:
    return Note(session(number), LastChange(seq, b"content", seq, seq))


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def url(redis_process: RedisProcess) -> str:
    return redis_process.url()


@pytest.fixture
def store(url: str) -> Iterator[RedisStore]:
    made = RedisStore(url)
    yield made
    made.close()


@pytest.fixture
def other(url: str) -> Iterator[RedisStore]:
    """Give what another server has of the same layers."""
    made = RedisStore(url)
    yield made
    made.close()


# --- Changes ----------------------------------------------------------------------------------------------


def test_a_record_replaces_the_one_that_it_was_made_of_and_no_other(store: RedisStore, other: RedisStore) -> None:
    first = make()
    store.create(first)
    theirs = other.get(KEY)
    assert theirs is not None
    assert theirs.mark == first.mark
    assert store.compare_and_set(first, one := stepped(first))
    assert not other.compare_and_set(theirs, stepped(theirs), note(1, 1))
    look = other.look(KEY, theirs, session(1))
    assert look.record is not None
    assert (look.record.mark, look.record.state.version, look.change) == (one.mark, 1, None)
    assert other.compare_and_set(look.record, stepped(look.record), note(1, 1))
    assert not store.compare_and_set(one, stepped(one))


def test_a_copy_that_is_the_newest_is_not_read_again(store: RedisStore) -> None:
    first = make()
    store.create(first)
    assert store.look(KEY, first).record is first


def test_a_record_that_only_looks_like_the_one_before_is_another(store: RedisStore, other: RedisStore) -> None:
    first = make()
    store.create(first)
    assert store.compare_and_set(first, stepped(first))
    back = replace(first)  # of the same values, as after a fail-over to an older state and other steps
    assert store.compare_and_set(store.get(KEY) or first, back)
    theirs = other.get(KEY)
    assert theirs is not None
    assert theirs.state.version == first.state.version
    assert not other.compare_and_set(first, stepped(first))


def test_racing_servers_lose_nothing(store: RedisStore, other: RedisStore) -> None:
    store.create(make())

    def count(mine: RedisStore) -> None:
        for _ in range(100):
            while True:
                record = mine.get(KEY)
                assert record is not None
                if mine.compare_and_set(record, stepped(record)):
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, (store, other, store, other)))
    found = store.get(KEY)
    assert found is not None
    assert found.state.version == 400


def test_sessions_are_kept_with_the_record_and_the_least_recent_is_forgotten(url: str) -> None:
    store = RedisStore(url, max_sessions=2)
    record = make()
    store.create(record)
    for number, seq in ((50, 1), (90, 1), (50, 2), (70, 1)):
        before, record = record, stepped(record)
        assert store.compare_and_set(before, record, note(number, seq))
    known = {number: store.look(KEY, record, session(number)) for number in (50, 70, 90)}
    assert [known[number].change is not None for number in (50, 70, 90)] == [True, True, False]
    change = known[50].change
    assert change is not None
    assert change.seq == 2
    assert {each.floor for each in known.values()} == {90}  # up to which no unknown session is a new one
    store.close()


def test_a_script_that_redis_was_made_to_forget(store: RedisStore, redis_process: RedisProcess) -> None:
    redis_process.ask("SCRIPT", "FLUSH")
    assert store.create(make())


def test_a_layer_that_was_deleted_is_not_lost(store: RedisStore, redis_process: RedisProcess) -> None:
    store.create(make())
    store.take_snapshot(make(), 1.0, [])
    assert store.delete(KEY)
    look = store.look(KEY)
    assert (look.record, look.deleted) == (None, True)
    assert not store.look(replace(KEY, uid="another")).deleted
    assert store.snapshots(KEY) == []
    prefix = store.description.partition("prefix=")[2]
    left = sorted(key.decode() for key in redis_process.ask("KEYS", f"{prefix}:*"))
    assert left == [f"{prefix}:2:{{default:a}}:deleted", f"{prefix}:state"]


def test_another_one_of_its_name_is_not_deleted_in_its_place(store: RedisStore) -> None:
    store.create(make(replace(KEY, uid="the second")))
    assert not store.delete(KEY)
    assert store.get(KEY) is not None


@pytest.mark.parametrize(
    ("one", "two"), [(("a:b", "c"), ("a", "b:c")), (("a}", "{b"), ("a", "}{b")), (("é", "層 {1}"), ("e", "x"))]
)
def test_no_two_layers_have_the_same_keys(store: RedisStore, one: tuple[str, str], two: tuple[str, str]) -> None:
    keys = LayerKey(*one), LayerKey(*two)
    for key in keys:
        assert store.create(make(key))
    for key in keys:
        found = store.get(key)
        assert found is not None
        assert found.key == key
        assert [each.key for each in store.page(key.namespace, "", 10)] == [key]


def test_the_keys_of_a_layer_are_in_one_slot(store: RedisStore) -> None:
    for key in (KEY, LayerKey("a", "}"), LayerKey("{x}", "{y}"), LayerKey("n", "{}")):
        tags = {name[name.index("{") + 1 : name.index("}", name.index("{"))] for name in store._keys(key)}
        assert len(tags) == 1
        assert "" not in tags


def test_snapshots(store: RedisStore, other: RedisStore) -> None:
    record = make()
    store.create(record)
    for version in (3, 5, 4):
        each = record.with_state(replace(record.state, version=version, num_of_props=10 * version))
        store.take_snapshot(each, 100.0 + version, [])
        other.take_snapshot(each, 999.0, [])  # of a version that there is one of
    assert [(info.version, info.taken, info.num_of_props) for info in other.snapshots(KEY)] == [
        (3, 103.0, 30), (4, 104.0, 40), (5, 105.0, 50),
    ]  # fmt: skip
    found = other.snapshot(KEY, 4)
    assert found is not None
    assert (found.state.version, found.state.num_of_props) == (4, 40)
    store.take_snapshot(record, 200.0, [3, 4])
    assert [info.version for info in store.snapshots(KEY)] == [0, 5]
    assert store.snapshot(KEY, 4) is None


def test_a_page_is_full_where_there_are_more(store: RedisStore) -> None:
    for number in range(230):
        store.create(make(LayerKey("default", f"{number:03}")))
    assert [len(store.page("default", after, 201)) for after in ("", "200")] == [201, 29]


def test_a_change_of_another_server_is_heard(store: RedisStore, other: RedisStore) -> None:
    heard: list[tuple[LayerKey | None, bool]] = []
    store.on_changed(lambda key, deleted: heard.append((key, deleted)))
    time.sleep(0.2)  # it is connected, and has said so
    heard.clear()
    record = make()
    store.create(record)
    assert store.compare_and_set(record, one := stepped(record))
    assert other.compare_and_set(one, stepped(one))
    until(lambda: heard)
    assert heard == [(KEY, False)]
    other.delete(KEY)
    until(lambda: len(heard) > 1)
    assert heard[1:] == [(KEY, True)]


def test_redis_copies_its_state_itself(store: RedisStore) -> None:
    with pytest.raises(BackupFailed, match="redis-cli BGSAVE"):
        store.back_up()


def test_commands_of_many_threads_travel_together(store: RedisStore) -> None:
    keys = [LayerKey("default", f"{number}") for number in range(16)]
    for key in keys:
        store.create(make(key))
    before = store.counts

    def look(key: LayerKey) -> None:
        for _ in range(50):
            assert store.get(key) is not None

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(look, keys))
    after = store.counts
    assert after.changes - before.changes >= 800
    assert after.commits - before.commits < 800
    assert len(store._line.ask_all([("PING",)] * 1000)) == 1000  # more than travel in one piece


# --- The start --------------------------------------------------------------------------------------------


def test_nobody_listens_there() -> None:
    with pytest.raises(StartError, match=r"the state in redis://127.0.0.1:1\?timeout=1 cannot be used: .*refused"):
        RedisStore("redis://:secret@127.0.0.1:1?timeout=1")


@pytest.mark.parametrize("query", ["timeout=never", "timeout=0", "password_file=/nowhere"])
def test_a_url_that_cannot_be_understood(query: str) -> None:
    with pytest.raises(StartError, match=r"--state redis://x\S* cannot be understood: .*password_file") as caught:
        RedisStore(f"redis://me:secret@x?{query}")
    assert "secret" not in str(caught.value)


def test_what_a_newer_release_wrote(store: RedisStore, url: str, redis_process: RedisProcess) -> None:
    redis_process.ask("HSET", f"{url.partition('prefix=')[2]}:state", "version", LAYOUT + 1)
    with pytest.raises(StartError, match=f"is of version {LAYOUT + 1}, and this release knows {LAYOUT}"):
        RedisStore(url)


@pytest.mark.parametrize(
    ("options", "durability", "message"),
    [
        (("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), "os", "allkeys-lru, by which it throws layers"),
        (("--cluster-enabled", "yes"), "os", "is part of a cluster, whose fail-over loses answered changes"),
        (("--replicaof", "127.0.0.1 1"), "os", r"is a replica \(expected: the primary\)"),
        ((), "fsync", r"has appendonly no and appendfsync everysec \(expected: appendonly yes and"),
        (("--appendonly", "yes"), "fsync", "has appendonly yes and appendfsync everysec"),
    ],
)  # fmt: skip
def test_a_redis_that_does_not_do(tmp_path: Path, options: tuple[str, ...], durability: str, message: str) -> None:
    with redis_server(tmp_path, *options) as process, pytest.raises(StartError, match=message):
        RedisStore(process.url(), durability)


@pytest.mark.parametrize(
    ("options", "durability", "words"),
    [
        ((), "os", "it appends to no file, so that what was answered since its last snapshot is lost"),
        (("--appendonly", "yes"), "os", "appendfsync everysec, so that what was answered in the last seconds"),
        (("--appendonly", "yes", "--appendfsync", "always"), "fsync", "what was answered survives loss of power"),
    ],
)  # fmt: skip
def test_what_is_kept_is_said_in_plain_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: tuple[str, ...], durability: str, words: str
) -> None:
    caplog.set_level(logging.INFO)
    with redis_server(tmp_path, *options) as process:
        RedisStore(process.url(), durability).close()
    assert words in caplog.text


def test_users_and_passwords(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("pass word\n")
    with redis_server(tmp_path / "redis") as process:
        rights = "~mine:*", "&mine:*", "+@all", "-@dangerous", "+info", "+role"
        process.ask("ACL", "SETUSER", "norm", "on", ">pass word", *rights)
        process.ask("ACL", "SETUSER", "default", "-@all", "+ping")
        place = f"@{process.address}/0?prefix=mine"
        for url in (f"redis://norm:pass%20word{place}", f"redis://norm{place}&password_file={secret}"):
            store = RedisStore(url)
            assert store.create(make())
            assert store.delete(KEY)
            assert store.description == f"redis://{process.address}/0?prefix=mine"
            store.close()
        with pytest.raises(StartError, match=r"invalid username-password|WRONGPASS"):
            RedisStore(f"redis://norm:wrong{place}")
        with pytest.raises(StartError, match=r"no permissions|NOPERM"):
            RedisStore(f"redis://norm:pass%20word@{process.address}/0?prefix=other")


def test_over_tls_and_over_a_unix_socket(tmp_path: Path) -> None:
    certificates.create(tmp_path / "certs", ["127.0.0.1"], 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        *("--tls-port", str(port), "--tls-cert-file", f"{tmp_path}/certs/server.pem"),
        *("--tls-key-file", f"{tmp_path}/certs/server.key", "--tls-ca-cert-file", f"{tmp_path}/certs/ca.pem"),
        *("--unixsocket", f"{tmp_path}/socket"),
    ]
    shown = "ssl_certfile={0}/client.pem&ssl_keyfile={0}/client.key".format(f"{tmp_path}/certs")
    place = f"rediss://127.0.0.1:{port}/0?prefix=tls&ssl_ca_certs={tmp_path}/certs/ca.pem"
    with redis_server(tmp_path / "redis", *words):
        encrypted = RedisStore(f"{place}&{shown}")
        plain = RedisStore(f"redis+unix://{tmp_path}/socket?db=0&prefix=tls")
        assert encrypted.description == f"rediss://127.0.0.1:{port}/0?prefix=tls"
        assert plain.description == f"redis+unix://{tmp_path}/socket?db=0&prefix=tls"
        heard: list[object] = []
        encrypted.on_changed(lambda key, _: heard.append(key))
        record = make()
        assert encrypted.create(record)
        until(lambda: heard == [None])  # it listens
        assert plain.compare_and_set(record, stepped(record))
        until(lambda: KEY in heard)
        encrypted.close()
        plain.close()
        with pytest.raises(StartError, match="cannot be used"):  # whoever shows no certificate
            RedisStore(place)
        with pytest.raises(StartError, match="certificate verify failed"):  # of an authority that is not believed
            RedisStore(f"rediss://127.0.0.1:{port}/0?{shown}")


# --- A Redis that is not well -----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisProcess]:
    """Give a Redis to this test alone."""
    with redis_server(tmp_path / "redis", "--appendonly", "yes", "--appendfsync", "always") as process:
        yield process


def refused(store: RedisStore) -> str:
    try:
        store.get(KEY)
    except StoreUnavailable as error:
        return error.message
    return ""


def test_one_that_is_killed_and_comes_back(own: RedisProcess) -> None:
    store, told = RedisStore(own.url("p")), list[str]()
    store.on_trouble(told.append)
    store.create(make())
    own.stop()
    began = time.monotonic()
    assert "cannot be used now" in refused(store)
    assert time.monotonic() < began + 5
    until(lambda: told)
    own.start()
    until(lambda: not refused(store))
    assert told[-1] == ""
    assert store.get(KEY) is not None
    store.close()


def test_one_that_is_frozen_and_comes_back(own: RedisProcess) -> None:
    store, told = RedisStore(own.url("p", timeout=1.5)), list[str]()
    store.on_trouble(told.append)
    record = make()
    store.create(record)
    with own.frozen():
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="it does not answer, in the middle of a command"):
            store.compare_and_set(record, stepped(record))
        assert time.monotonic() < began + 10
        began = time.monotonic()
        assert "it does not answer" in refused(store)  # at once, since that is known
        assert time.monotonic() < began + 1.2
        assert told == ["it does not answer"]
    until(lambda: not refused(store))
    assert told[-1] == ""
    found = store.get(KEY)
    assert found is not None
    assert found.state.version in {0, 1}  # it may have been done, and says so
    store.close()


def test_one_that_nobody_asks_is_found_out_as_well(own: RedisProcess) -> None:
    store, told = RedisStore(own.url("p", timeout=0.3)), list[str]()
    store.on_trouble(told.append)
    with own.frozen():
        until(lambda: told)
    until(lambda: told[-1] == "")
    store.close()


def test_one_that_is_full_refuses_changes_and_answers_questions(own: RedisProcess) -> None:
    store, told = RedisStore(own.url("p")), list[str]()
    store.on_trouble(told.append)
    record = make()
    store.create(record)
    own.ask("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(StoreUnavailable, match=r"it says .*command not allowed when used memory"):
        store.compare_and_set(record, stepped(record))
    assert len(told) == 1
    assert store.get(KEY) is not None
    own.ask("CONFIG", "SET", "maxmemory", "0")
    until(lambda: told[-1] == "")
    assert store.compare_and_set(record, stepped(record))
    store.close()


def test_one_that_becomes_a_replica(own: RedisProcess) -> None:
    store, told = RedisStore(own.url("p")), list[str]()
    store.on_trouble(told.append)
    record = make()
    store.create(record)
    own.ask("REPLICAOF", "127.0.0.1", "1")
    until(lambda: any("replica" in why for why in told))
    with pytest.raises(StoreUnavailable, match="replica"):
        store.compare_and_set(record, stepped(record))
    own.ask("REPLICAOF", "NO", "ONE")
    until(lambda: not refused(store))
    assert store.compare_and_set(record, stepped(record))
    store.close()


def test_what_the_line_says_when_others_use_the_thread_that_sends(store: RedisStore) -> None:
    # Whoever comes while another thread sends is answered by it, or sends next: nobody is forgotten.
    def ask(number: int) -> bool:
        return all(store._line.ask("ECHO", f"{number}.{turn}") == f"{number}.{turn}".encode() for turn in range(300))

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(ask, range(12)))
