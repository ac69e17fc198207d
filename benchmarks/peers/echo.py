"""The floor under a remote layer: a gRPC server that sends back the bytes it gets, and knows nothing of layers.

`python -m benchmarks.peers.echo LISTEN` prints the address that it listens on and serves until it is killed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from queue import SimpleQueue

import grpc

SERVICE = "benchmarks.Echo"
CHUNK_BYTES = 1 << 20

# What both sides of a comparison have to allow for messages of this size.
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class EchoClient:
    """Sends bytes and gets them back.

    Args:
        address: "host:port" or "unix:path".
    """

    def __init__(self, address: str) -> None:
        channel = grpc.insecure_channel(address, options=OPTIONS)
        self._whole = channel.unary_unary(f"/{SERVICE}/Whole", bytes, bytes)
        self._overlapped = channel.stream_stream(f"/{SERVICE}/Overlapped", bytes, bytes)
        self._received = channel.stream_stream(f"/{SERVICE}/Received", bytes, bytes)

    def whole(self, data: bytes) -> int:
        """Send one message; return the bytes that came back."""
        return len(self._whole(data, timeout=60))

    def overlapped(self, data: Sequence[bytes]) -> int:
        """Send a stream of messages, each of which comes back at once; return the bytes that came back."""
        return sum(map(len, self._overlapped(iter(data), timeout=60)))

    def received(self, data: Sequence[bytes]) -> int:
        """Send a stream of messages, which comes back when all of it has arrived; return the bytes."""
        return sum(map(len, self._received(iter(data), timeout=60)))

    def kept_open(self) -> Callable[[bytes], int]:
        """Open a stream, and return what sends one message on it; it returns the bytes that came back."""
        messages: SimpleQueue[bytes] = SimpleQueue()
        answers = self._overlapped(iter(messages.get, b""))

        def whole(data: bytes) -> int:
            messages.put(data)
            return len(next(answers))

        return whole


def cut(data: bytes) -> list[bytes]:
    """Return the chunks of a stream."""
    return [data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES)]


def _received(messages: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
    yield from list(messages)


def _serve(listen: str) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Whole": grpc.unary_unary_rpc_method_handler(lambda data, _: data),
        "Overlapped": grpc.stream_stream_rpc_method_handler(lambda messages, _: messages),
        "Received": grpc.stream_stream_rpc_method_handler(_received),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port(listen)
    server.start()
    print(listen if listen.startswith("unix:") else f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    _serve(sys.argv[1])
