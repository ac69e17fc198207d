"""What it costs and gives that several servers share their layers through Redis.

`python -m benchmarks.servers` measures everything, prints the figures beside their goals, and writes
benchmarks/results/servers.json. Needs redis-server. Clients, servers and Redis are processes on this machine; clients
take steps whose tensors stay with them (`compute="client"`), so that what is measured is the state and not the tensors.

- Steps a second on one layer and on 64, of eight clients, with one, two and three servers, and with one server and a
  file of SQLite's, `--durability os`.
- What Redis adds to the step of one client alone, over a server's memory.
- How many evaluations find the server's own copy of the layer, while the layer is trained.
- 10,000 layers: the start of a server, the memory of Redis, all of them listed.
- A step of a large layer in both ways that there are: computed by the server, and put in the record's place if that
  still is the one before (what this project does); and computed within Redis, by a script in Lua.

`python -m benchmarks.servers client SECONDS LAYERS THREADS PLACE...` is one client: it reads the number of a place,
trains there for so long, prints what each step took, and reads the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import redis

import sharednorm
from benchmarks.goals import Goal
from benchmarks.remote import machine, server
from benchmarks.trainers import obey, started, steps_at
from sharednorm.arithmetic.select import arithmetic
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.state import Moments, initial_state, step
from sharednorm.core.types import LayerKind
from sharednorm_server.store.base import LayerKey, LayerRecord
from sharednorm_server.store.records import LastChange, Note, TakenStep
from sharednorm_server.store.redis.store import RedisStore

MAPS = 64
SECONDS, ROUNDS = 1.5, 5
CLIENTS, LAYERS, MANY = 8, 64, 10_000
SESSION = b"8 bytes.8 bytes."
RESULTS = Path(__file__).parent / "results" / "servers.json"

GOALS = {
    "two": Goal("steps a second on 64 layers, 2 servers / 1 server", least=1.6),
    "three": Goal("steps a second on 64 layers, 3 servers / 1 server"),
    "one layer": Goal("steps a second on one layer, Redis / SQLite, durability os", least=0.5),
    "64 layers": Goal("steps a second on 64 layers, one server, Redis / SQLite, durability os"),
    "spread": Goal("steps a second on one layer through all of 2 servers at once / through one"),
    "alone": Goal("step of one client alone, Redis / memory, p50"),
    "alone, p99": Goal("step of one client alone, Redis / memory, p99"),
    "hits, one": Goal("evaluations that find the server's copy, beside a trainer through the same server"),
    "hits, two": Goal("evaluations that find the server's copy, beside a trainer through another server"),
    "start": Goal("start of a server with 10,000 layers in Redis, seconds", most=3.0),
    "list": Goal("10,000 layers listed, seconds"),
    "memory": Goal("memory of Redis for a layer of 64 channels, KB"),
    "ways, 64": Goal("step of 64 channels, replaced if it is the one before / computed by Redis, time of Redis"),
    "ways, 2048": Goal("step of 2048 channels, replaced if it is the one before / computed by Redis, time of Redis"),
    "ways, 2048, all": Goal("step of 2048 channels, replaced if it is the one before / computed by Redis, in all"),
}

# The averages of one step, in Lua, as `state.step` takes them: f weighs the batch. The session's record goes along.
IN_REDIS = """
local mean, var = redis.call('HGET', KEYS[1], 'mean'), redis.call('HGET', KEYS[1], 'var')
local n = redis.call('HINCRBY', KEYS[1], 'steps', 1)
local f = math.max(1 / n, 0.1)
local means, vars = {}, {}
for i = 1, #mean, 4 do
  local j = 2 * i - 1
  local c = (i + 3) / 4
  means[c] = struct.pack('<f', (1 - f) * struct.unpack('<f', mean, i) + f * struct.unpack('<d', ARGV[1], j))
  vars[c] = struct.pack('<f', (1 - f) * struct.unpack('<f', var, i) + f * struct.unpack('<d', ARGV[2], j))
end
redis.call('HSET', KEYS[1], 'mean', table.concat(means), 'var', table.concat(vars))
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
return {n, redis.call('HGET', KEYS[1], 'scale'), redis.call('HGET', KEYS[1], 'bias')}
"""
# struct.unpack also returns where it ended; each is taken alone by the arithmetic around it.


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[int]:
    """Run a redis-server with a file that it syncs each second; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    directory.mkdir()
    words = ["redis-server", "--port", str(port), "--dir", str(directory), "--save", "", "--appendonly", "yes"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port) as client:
                for _ in range(200):
                    with contextlib.suppress(redis.RedisError):
                        client.ping()
                        break
                    time.sleep(0.05)
            yield port
        finally:
            process.kill()


def rates(directory: Path) -> dict[str, Any]:
    """Measure steps a second of eight clients in each place, and the steps of one alone."""
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(redis_server(directory / "redis"))
        state = ("--state", f"redis://127.0.0.1:{port}")
        addresses = [stack.enter_context(server("127.0.0.1:0", *state)).address for _ in range(3)]
        memory = stack.enter_context(server("127.0.0.1:0")).address
        sqlite = stack.enter_context(server("127.0.0.1:0", "--state", f"sqlite://{directory}/sqlite")).address
        places = {
            "memory": memory,
            "SQLite": sqlite,
            "1 server": addresses[0],
            "2 servers": ",".join(addresses[:2]),
            "3 servers": ",".join(addresses),
            "2 servers, each for itself": "|".join(addresses[:2]),
        }
        for name, layers, clients, threads in (
            ("64 layers", LAYERS, CLIENTS, LAYERS // CLIENTS),
            ("1 layer", 1, CLIENTS, 1),
            ("1 client", 1, 1, 1),
        ):
            rounds: dict[str, list[list[float]]] = {place: [] for place in places}
            words = ["benchmarks.servers", "client", str(SECONDS), str(layers), str(threads)]
            with started([[*words, str(number), *places.values()] for number in range(clients)]) as trainers:
                for _ in range(ROUNDS):
                    for index, place in enumerate(places):
                        rounds[place].append(steps_at(trainers, index))
            found[name] = {place: _summary(taken) for place, taken in rounds.items()}
        found["hits"] = {"one": _hits(port, addresses[0], addresses[0]), "two": _hits(port, addresses[0], addresses[1])}
    return found


def _summary(rounds: list[list[float]]) -> dict[str, Any]:
    p50, p99 = np.percentile([ms for each in rounds for ms in each], (50, 99)).round(4).tolist()
    return {"steps a second": median(len(each) / SECONDS for each in rounds), "ms": {"p50": p50, "p99": p99}}


def _hits(port: int, trained: str, evaluated: str) -> float:
    """Return which part of evaluations asked Redis for nothing, while a layer is trained twenty times a second."""
    x = np.random.default_rng(0).normal(size=(8, MAPS)).astype(np.float32)
    with sharednorm.connect(trained) as one, sharednorm.connect(evaluated) as two, redis.Redis(port=port) as client:
        trainer, evaluator = one.BatchNorm(MAPS, name="hits"), two.BatchNorm(MAPS, name="hits")
        evaluator.evalMode()
        over = threading.Event()
        steps = [0]

        def train() -> None:
            while not over.wait(0.05):
                trainer(x)
                steps[0] += 1

        def scripts() -> int:
            return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])

        thread = threading.Thread(target=train)
        thread.start()
        evaluator(x)
        before, steps_before, calls, end = scripts(), steps[0], 0, time.monotonic() + 5
        while time.monotonic() < end:
            evaluator(x)
            calls += 1
        asked = scripts() - before - (steps[0] - steps_before)
        over.set()
        thread.join()
    return 1.0 - max(asked, 0) / calls


def many(directory: Path) -> dict[str, float]:
    """Measure what 10,000 layers are to a Redis, and to a server that is started."""
    with redis_server(directory / "many") as port, redis.Redis(port=port) as client:
        url = f"redis://127.0.0.1:{port}"
        store = RedisStore(url)
        config = LayerConfig(LayerKind.BATCH_NORM_2D, MAPS)
        state = initial_state(config, 0.1, np.random.default_rng(0))
        before = client.info("memory")["used_memory"]
        for number in range(MANY):
            store.create(LayerRecord(LayerKey("default", f"stage{number:05}/bn", f"{number:016x}"), config, state))
        used = client.info("memory")["used_memory"] - before
        store.close()
        began = time.perf_counter()
        with server("127.0.0.1:0", "--state", url) as running, sharednorm.connect(running.address) as hub:
            hub.layer("stage00500/bn")
            started = time.perf_counter() - began
            began = time.perf_counter()
            layers = len(hub.layers())
            listed = time.perf_counter() - began
    if layers != MANY:
        raise RuntimeError(f"{layers} layers were listed")
    return {"start": started, "list": listed, "memory": used / MANY / 1000}


def ways(directory: Path) -> dict[str, dict[str, float]]:
    """Measure a step in both ways: time of Redis, and in all, in microseconds; one thread, one layer."""
    found: dict[str, dict[str, float]] = {}
    with redis_server(directory / "ways") as port, redis.Redis(port=port, protocol=2) as client:
        store = RedisStore(f"redis://127.0.0.1:{port}")
        script = client.register_script(IN_REDIS)
        for maps in (64, 256, 2048):
            batch = arithmetic().moments(np.random.default_rng(0).normal(size=(8, maps)).astype(np.float32))
            client.hset(f"lua{maps}", mapping=dict.fromkeys(("mean", "var", "scale", "bias"), bytes(4 * maps)))
            sent = batch.mean.tobytes(), batch.biased_var.tobytes(), SESSION, bytes(24 * maps)
            both: dict[str, Callable[[], object]] = {
                "replaced": _replacing(store, maps, batch),
                "computed": partial(script, [f"lua{maps}", f"luas{maps}"], sent),
            }
            row: dict[str, float] = {}
            for way, take in both.items():
                for _ in range(100):
                    take()
                client.config_resetstat()
                row[f"{way}, in all"] = median(_taken(take) for _ in range(1000))
                row[f"{way}, in Redis"] = client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
            found[f"{maps}"] = row
        store.close()
    return found


def _replacing(store: RedisStore, maps: int, batch: Moments) -> Callable[[], object]:
    config = LayerConfig(LayerKind.BATCH_NORM, maps)
    first = initial_state(config, 0.1, np.random.default_rng(0))
    record = LayerRecord(LayerKey("default", f"{maps}", "uid"), config, first)
    store.create(record)

    def take() -> None:
        nonlocal record
        state = step(record.state, config, batch)
        made, taken = record.with_state(state), TakenStep(batch, state.scale, state.bias)
        change = LastChange(state.version, b"content.content.", state.version, state.num_of_props, taken)
        if not store.compare_and_set(record, made, Note(SESSION, change)):
            raise RuntimeError("somebody else has changed the layer")
        record = made

    return take


def _taken(take: Callable[[], object]) -> float:
    began = time.perf_counter()
    take()
    return 1e6 * (time.perf_counter() - began)


def ratios(report: dict[str, Any]) -> dict[str, float]:
    """Return the figures."""
    rate = {
        name: {place: found["steps a second"] for place, found in row.items()}
        for name, row in report["rates"].items()
        if name != "hits"
    }
    many_layers, one, alone = rate["64 layers"], rate["1 layer"], report["rates"]["1 client"]
    both = report["ways"]
    return {
        "two": many_layers["2 servers"] / many_layers["1 server"],
        "three": many_layers["3 servers"] / many_layers["1 server"],
        "one layer": one["1 server"] / one["SQLite"],
        "64 layers": many_layers["1 server"] / many_layers["SQLite"],
        "spread": one["2 servers, each for itself"] / one["1 server"],
        "alone": alone["1 server"]["ms"]["p50"] / alone["memory"]["ms"]["p50"],
        "alone, p99": alone["1 server"]["ms"]["p99"] / alone["memory"]["ms"]["p99"],
        "hits, one": report["rates"]["hits"]["one"],
        "hits, two": report["rates"]["hits"]["two"],
        **report["many"],
        "ways, 64": both["64"]["replaced, in Redis"] / both["64"]["computed, in Redis"],
        "ways, 2048": both["2048"]["replaced, in Redis"] / both["2048"]["computed, in Redis"],
        "ways, 2048, all": both["2048"]["replaced, in all"] / both["2048"]["computed, in all"],
    }


def client(number: int, places: list[str], seconds: float, layers: int, threads: int) -> None:
    """Take steps in one of the places for so long, whenever its number is read; print what each took, in ms.

    Of 64 layers each thread of each client has one; one layer all share. A place with a bar is of servers that clients
    choose by themselves: each takes one.
    """
    x = np.random.default_rng(0).normal(size=(8, MAPS)).astype(np.float32)
    with contextlib.ExitStack() as stack:
        handles: list[list[sharednorm.Layer]] = []
        for place in places:
            choice = place.split("|")
            hub = stack.enter_context(sharednorm.connect(choice[number % len(choice)]))
            names = ["one"] * threads if layers == 1 else [f"load/{number}/{each}" for each in range(threads)]
            handles.append([hub.BatchNorm(MAPS, name=f"{layers}/{name}", compute="client") for name in names])
        obey(handles, x, seconds)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Measure what several servers cost and give.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write; default %(default)s")
    commands = parser.add_subparsers(dest="command")
    one = commands.add_parser("client")
    one.add_argument("seconds", type=float)
    one.add_argument("layers", type=int)
    one.add_argument("threads", type=int)
    one.add_argument("number", type=int)
    one.add_argument("places", nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "client":
        client(arguments.number, arguments.places, arguments.seconds, arguments.layers, arguments.threads)
        return
    report: dict[str, Any] = {"machine": machine()}
    version = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    report["machine"]["redis"] = version.partition("v=")[2].split()[0]
    with tempfile.TemporaryDirectory(dir=RESULTS.parent) as place:  # a temporary directory may well be in memory
        directory = Path(place)
        report |= {"rates": rates(directory), "many": many(directory), "ways": ways(directory)}
    figures = ratios(report)
    report["goals"] = [
        {"what": goal.what, "ratio": round(figures[name], 3), "goal": goal.words(), "met": goal.met(figures[name])}
        for name, goal in GOALS.items()
    ]
    for name, row in report["rates"].items():
        for store, found in row.items():
            if isinstance(found, dict):
                print(f"{name:10} {store:28} {found['steps a second']:7.0f} a second, p50 {found['ms']['p50']:.3f} ms")
    for maps, row in report["ways"].items():
        print(f"{maps:>5} channels: " + ", ".join(f"{name} {value:.0f} us" for name, value in row.items()))
    print()
    for line in report["goals"]:
        goal = f"  (goal {line['goal']}{'' if line['met'] else ': not met'})" if line["goal"] else ""
        print(f"{line['what']:98} {line['ratio']:7.3f}{goal}")
    output: Path = arguments.output
    output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
