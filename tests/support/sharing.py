"""What spawned processes do in the tests of sharing, and how they are run."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Connected
from multiprocessing.synchronize import Barrier
from typing import Any, TypeVar

import numpy as np

import sharednorm
from sharednorm.codec.convert import ref_to_proto
from sharednorm.core.address import parse_address
from sharednorm.core.layer_config import LayerConfig
from sharednorm.core.types import Array
from sharednorm.layers.backend import ForwardResult
from sharednorm.layers.batch_norm import Layer
from sharednorm.remote.backends.server_compute import RemoteBackend
from sharednorm.remote.context import HubContext
from sharednorm.transport.client import ServerClient
from sharednorm.transport.grpc import Connection

T = TypeVar("T")

NAME = "shared/bn"
MAPS = 5


def batch(seed: int) -> Array:
    """Return a batch whose size, offset and spread depend on the seed, too."""
    random = np.random.default_rng(seed)
    rows, height = int(random.integers(2, 9)), int(random.integers(1, 8))
    x = random.normal(random.normal(0, 3), random.uniform(0.5, 4), (rows, MAPS, height, 3))
    return x.astype(np.float32)


class Recorder(RemoteBackend):
    """The backend of a remote layer, which also remembers the version that each step made."""

    versions: list[int]

    def forward(self, x: Array, *, train: bool | None, release: str, out: Array | None) -> ForwardResult:
        """Pass the call on, and note the version."""
        result = super().forward(x, train=train, release=release, out=out)
        assert result.saved is not None
        self.versions.append(result.saved.version)
        return result


@dataclass(frozen=True)
class Steps:
    """What one process did: the seed of the batch of each of its steps, by version, and what it saw at the end."""

    seeds: dict[int, int]
    seen: list[int]


def train(address: str, namespace: str, config: LayerConfig, first_seed: int, steps: int) -> Steps:
    """Attach to the layer, take steps, and report them."""
    connection = Connection(parse_address(address), 30.0)
    connection.handshake()
    exchange = ServerClient(connection, "auto", None)
    backend = Recorder(HubContext(exchange), ref_to_proto(namespace, NAME), config)
    backend.versions = []
    layer = Layer(backend, NAME, inplace=False, train=None)
    seen = []
    for seed in range(first_seed, first_seed + steps):
        layer(batch(seed))
        seen.append(layer.snapshot().num_of_props)
    connection.close()
    exchange.close()
    return Steps(dict(zip(backend.versions, range(first_seed, first_seed + steps), strict=True)), seen)


def read_statistics(address: str, namespace: str) -> dict[str, Any]:
    """Attach by name alone, and return all that can be read."""
    with sharednorm.connect(address, namespace=namespace) as hub:
        layer = hub.layer(NAME)
        return {"mean": layer.mean, "var": layer.var, "scale": layer.scale, "numOfProps": layer.numOfProps}


def in_processes(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]], timeout: float) -> list[T]:
    """Call a function once in a spawned process for each tuple of arguments; they begin at the same time.

    Returns the results in that order. A process that fails raises here, with its traceback; one that takes
    longer than so many seconds is killed and raises, too.
    """
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(len(arguments))
    children = []
    for one in arguments:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(sender, ready, timeout, function, one), daemon=True)
        process.start()
        sender.close()
        children.append((process, receiver))
    try:
        return [_result(receiver, timeout) for _, receiver in children]
    finally:
        for process, receiver in children:
            process.join(5)
            process.kill()
            process.join(5)
            receiver.close()


def _run(sender: Connected, ready: Barrier, timeout: float, function: Callable[..., Any], arguments: Any) -> None:
    try:
        ready.wait(timeout)
        sender.send((True, function(*arguments)))
    except Exception:  # noqa: BLE001 - it is raised again in the parent
        sender.send((False, traceback.format_exc()))


def _result(receiver: Connected, timeout: float) -> Any:
    assert receiver.poll(timeout), f"a process did not answer within {timeout} s"
    fine, result = receiver.recv()
    assert fine, f"a process failed:\n{result}"
    return result
