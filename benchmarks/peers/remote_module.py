"""The peer that PyTorch has: a BatchNorm2d in another process, by torch.distributed.rpc's RemoteModule.

By default it sends tensors between two processes of one machine through shared memory, and keeps a processor of each
busy with looking for them, also while nobody calls. So it is measured in two ways: over TCP, in turns with other calls,
and as it is by default, in a process of its own while nothing else runs:
`python -m benchmarks.peers.remote_module alone`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.distributed import rpc
from torch.distributed.nn.api.remote_module import RemoteModule

from benchmarks.remote import measure
from sharednorm.core.types import Array

SHAPE = (32, 64, 56, 56)


@contextlib.contextmanager
def remote_module(x: Array, *, tcp: bool) -> Iterator[Callable[[], object]]:
    """Give a call that sends `x` to a layer in another process, and gets the output back."""
    port = _free_port()
    how = "tcp" if tcp else "default"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.remote_module", how, str(port)]
    ) as other:
        try:
            _join(0, port, tcp=tcp)
            layer = RemoteModule("layers/cpu", torch.nn.BatchNorm2d, args=(x.shape[1],))
            tensor = torch.from_numpy(x)

            def call() -> object:
                with torch.no_grad():
                    return layer.forward(tensor)

            yield call
            rpc.shutdown()
        finally:
            other.kill()


def alone() -> dict[str, float]:
    """Return percentiles in ms of calls as they are by default, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers.remote_module", "alone"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    result: dict[str, float] = json.loads(found.stdout)
    return result


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _join(rank: int, port: int, *, tcp: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ways = {"_transports": ["uv"], "_channels": ["basic"]} if tcp else {}
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=60, **ways)
    rpc.init_rpc(("client", "layers")[rank], rank=rank, world_size=2, rpc_backend_options=options)


def main() -> None:
    """Be the other process, or measure."""
    if sys.argv[1] == "alone":
        x = np.random.default_rng(0).normal(1, 2, SHAPE).astype(np.float32)
        with remote_module(x, tcp=False) as call:
            print(json.dumps(measure({"RemoteModule": call})["RemoteModule"]))
    else:
        _join(1, int(sys.argv[2]), tcp=sys.argv[1] == "tcp")
        rpc.shutdown()


if __name__ == "__main__":
    main()
