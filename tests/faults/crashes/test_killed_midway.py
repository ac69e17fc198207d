"""A client that is killed in the middle of its upload, a server that is killed in the middle of its download."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sharednorm
from sharednorm import Progress
from sharednorm.errors import ServerUnavailable
from tests.support import oracle
from tests.support.processes.server import in_process, server_process

SHAPE = (32, 4, 512, 512)  # 128 MiB, far more than the buffers of sockets hold
NBYTES = 4 * 32 * 4 * 512 * 512

CLIENT = f"""
import os, signal, sys
import numpy as np
import sharednorm
def tell(progress):
    if progress.sent > {NBYTES // 2}:
        os.kill(os.getpid(), signal.SIGKILL)
hub = sharednorm.connect(sys.argv[1], transport=sys.argv[2], progress=tell)
hub.BatchNorm2D(4, name="bn")(np.ones({SHAPE}, np.float32))
"""


@pytest.mark.parametrize("transport", ["direct", "grpc"])
def test_a_client_that_is_killed_in_the_middle_of_its_upload(transport: str) -> None:
    with in_process() as server, sharednorm.connect(server.address) as hub:
        bn = hub.BatchNorm2D(4, name="bn")
        done = subprocess.run([sys.executable, "-c", CLIENT, server.address, transport], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
        end = time.monotonic() + 10
        while server._service._in_flight.used:
            assert time.monotonic() < end, "the server still holds the tensor of a client that is gone"
            time.sleep(0.01)
        assert (bn.version, bn.numOfProps, bool(bn.mean.any())) == (0, 0, False)
        bn(oracle.random_tensor(1, (4, 4, 5, 2)))
        assert bn.version == 1


@pytest.mark.parametrize("transport", ["direct", "grpc"])
@pytest.mark.parametrize("listen", ["tcp", "unix"])
def test_a_server_that_is_killed_in_the_middle_of_its_download(transport: str, listen: str, tmp_path: Path) -> None:
    where = "127.0.0.1:0" if listen == "tcp" else f"unix:{tmp_path}/s.sock"
    with server_process(listen=where) as process:

        def tell(progress: Progress) -> None:
            if progress.received > NBYTES // 8 and process.process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()

        with sharednorm.connect(process.address, transport=transport, progress=tell, timeout=8) as hub:
            bn = hub.BatchNorm2D(4, name="bn")
            bn.trainMode()
            before = bn(np.ones((2, 4, 3, 3), np.float32))
            with pytest.raises(ServerUnavailable, match="is the server running"):
                bn(np.ones(SHAPE, np.float32))
            assert bn.data is before  # the handle is as it was
            with pytest.raises(ServerUnavailable):
                bn(np.ones((2, 4, 3, 3), np.float32))
