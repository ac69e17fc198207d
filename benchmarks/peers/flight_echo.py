"""The peer that shows what gRPC can do from C++: an Arrow Flight server that sends back the batches it gets.

`python -m benchmarks.peers.flight_echo LOCATION` prints where it listens and serves until it is killed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from sharednorm.core.types import Array


class FlightClient:
    """Sends a tensor as one record batch over DoExchange, and gets it back."""

    def __init__(self, location: str) -> None:
        self._client = flight.connect(location)

    def echo(self, x: Array) -> Array:
        """Return the tensor that came back."""
        batch = pa.record_batch([pa.array(x.reshape(-1))], names=["x"])
        writer, reader = self._client.do_exchange(flight.FlightDescriptor.for_command(b"echo"))
        with writer:
            writer.begin(batch.schema)
            writer.write_batch(batch)
            writer.done_writing()
            answer = reader.read_all()
        result: Array = answer.column(0).chunk(0).to_numpy(zero_copy_only=True).reshape(x.shape)
        return result


class _Echo(flight.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    def do_exchange(self, _context: Any, _descriptor: Any, reader: Any, writer: Any) -> None:
        begun = False
        for chunk in reader:
            if not begun:
                writer.begin(chunk.data.schema)
                begun = True
            writer.write_batch(chunk.data)


def main() -> None:
    """Serve."""
    location = sys.argv[1]
    server = _Echo(location)
    print(location if "unix" in location else f"grpc://127.0.0.1:{server.port}", flush=True)
    server.serve()


def check(client: FlightClient) -> None:
    """See that what comes back is what was sent."""
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(client.echo(x), x)


if __name__ == "__main__":
    main()
