"""A tensor of more than 2 GiB, beyond every 32-bit size on its way: through a real server, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from sharednorm.codec import wire
from sharednorm.v1 import layer_pb2, service_pb2
from tests.support.processes import server
from tests.support.stock import Floats, StockClient, channel_to, raw_stream, ref, spec

IMAGES, KINDS, MAPS, HEIGHT, WIDTH = 560, 7, 2, 512, 1024
SHAPE = (IMAGES, MAPS, HEIGHT, WIDTH)
NBYTES = 4 * IMAGES * MAPS * HEIGHT * WIDTH
CHUNK = 1 << 20
PER_IMAGE = 4 * MAPS * HEIGHT * WIDTH // CHUNK
SECONDS = 240.0


def images() -> Floats:
    """Return the few images of which the tensor consists, in turn: image i is the kind i modulo 7."""
    random = np.random.default_rng(3)
    return random.normal(5.0, 2.0, (KINDS, MAPS, HEIGHT, WIDTH)).astype(np.float32)


def chunk_of(kinds: Floats, number: int) -> memoryview:
    """Return a chunk of the tensor that never exists as a whole on this side."""
    image, part = divmod(number, PER_IMAGE)
    flat = kinds[image % KINDS].reshape(-1)
    size = CHUNK // 4
    return memoryview(flat[part * size : (part + 1) * size].view(np.uint8))


def messages(kinds: Floats) -> Iterator[bytes]:
    header = service_pb2.ForwardRequest(ref=ref("large"), mode=layer_pb2.MODE_TRAIN, input=spec(SHAPE), keep_input=True)
    yield service_pb2.ForwardStreamRequest(header=header).SerializeToString()
    for number in range(NBYTES // CHUNK):
        yield wire.encode_chunk(number * CHUNK, chunk_of(kinds, number))


def expected_images(kinds: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    wide = kinds.astype(np.float64)
    assert IMAGES % KINDS == 0  # so that the tensor's moments are those of one image of each kind
    mean, var = wide.mean(axis=(0, 2, 3), keepdims=True), wide.var(axis=(0, 2, 3), keepdims=True)
    result: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = (wide - mean) / np.sqrt(var + 1e-5)
    return result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_tensor_of_more_than_2_gib() -> None:
    assert NBYTES > 1 << 31
    kinds = images()
    expected = expected_images(kinds)
    with server.server_process() as process, channel_to(process.address) as channel:
        client = StockClient.on(channel)
        client.create("large", maps=MAPS)
        answers = raw_stream(channel, "ForwardStream", messages(kinds), seconds=SECONDS)
        header = service_pb2.ForwardStreamResponse.FromString(next(answers)).header
        assert (header.version, list(header.moments.count)) == (1, [IMAGES * HEIGHT * WIDTH])
        assert header.saved_input == ""  # larger than all inputs together may be
        received = 0
        for answer in answers:
            message, chunk = wire.decode(service_pb2.ForwardStreamResponse, answer)
            assert message.offset == received
            image, part = divmod(received // CHUNK, PER_IMAGE)
            wanted = expected[image % KINDS].reshape(-1)[part * CHUNK // 4 :][: chunk.nbytes // 4]
            np.testing.assert_allclose(np.frombuffer(chunk, "<f4"), wanted, rtol=0, atol=4e-6)
            received += chunk.nbytes
        assert received == NBYTES
        # The input, and nothing else of that size; and when the call is over, not even that.
        assert process.resident_bytes("VmHWM") < NBYTES + (512 << 20)
        assert client.stats("large").layer.version == 1
        assert process.resident_bytes() < 512 << 20
        assert process.stop() == 0
