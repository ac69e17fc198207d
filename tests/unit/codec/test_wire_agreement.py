"""`decode` against the stock protobuf runtime: any bytes mean the same to both, or are refused by both."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from sharednorm.codec.wire import DATA_FIELD, decode
from sharednorm.errors import MalformedMessage
from sharednorm.v1 import layer_pb2, service_pb2, tensor_pb2

MessageClass: TypeAlias = type[Any]

SINGLE: tuple[MessageClass, ...] = (
    service_pb2.ForwardRequest,
    service_pb2.ForwardResponse,
    service_pb2.BackwardRequest,
    service_pb2.BackwardResponse,
)
STREAMED: tuple[MessageClass, ...] = (
    service_pb2.ForwardStreamRequest,
    service_pb2.ForwardStreamResponse,
    service_pb2.BackwardStreamRequest,
    service_pb2.BackwardStreamResponse,
)
every_class = pytest.mark.parametrize("cls", SINGLE + STREAMED, ids=lambda cls: cls.__name__)

RANDOM_CASES = int(os.environ.get("SHAREDNORM_MESSAGES", "5000"))
"""Mutated messages for each class; of 5000, 40,000 in all, which take a second or two."""


def data_name(cls: MessageClass) -> str:
    return str(cls.DESCRIPTOR.fields_by_number[DATA_FIELD].name)


def agree(cls: MessageClass, buffer: bytes) -> bool:
    """Check that both sides accept with one meaning, or both refuse; return whether they accept."""
    try:
        stock: Message = cls.FromString(buffer)
    except (DecodeError, UnicodeDecodeError):  # the latter by protobuf's pure Python runtime
        with pytest.raises(MalformedMessage):
            decode(cls, buffer)
        return False
    message, data = decode(cls, buffer)
    name = data_name(cls)
    assert bytes(data) == getattr(stock, name)
    assert not getattr(message, name)
    stock.ClearField(name)
    # By bytes, and not by ==, for the sake of NaN; unknown fields are among them.
    assert message.SerializeToString(deterministic=True) == stock.SerializeToString(deterministic=True)
    return True


# --- Fields, valid and not --------------------------------------------------------------------------


def varint(value: int, padding: int = 0) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    if padding:
        out[-1] |= 0x80
        out += b"\x80" * (padding - 1) + b"\x00"
    return bytes(out)


def tag(number: int, wire_type: int, padding: int = 0) -> bytes:
    return varint(number << 3 | wire_type, padding)


def field_of_bytes(number: int, value: bytes) -> bytes:
    return tag(number, 2) + varint(len(value)) + value


def valid_parts() -> list[bytes]:
    """Whole, valid fields that the messages have, in several values, those of nested messages among them."""
    ref = layer_pb2.LayerRef(namespace="n", name="stem/bn-é")
    spec = tensor_pb2.TensorSpec(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 3, -1, 1 << 62])
    moments = tensor_pb2.Moments(count=[7], mean=[1.0, float("nan")], m2=[0.5, 2.0])
    scale = tensor_pb2.FloatVector(values=[1.0, float("inf"), -0.0])
    saved = service_pb2.SavedForward(input=spec, moments=moments, scale=scale)
    forward = service_pb2.ForwardRequest(ref=ref, mode=layer_pb2.MODE_TRAIN, input=spec, keep_input=True, data=b"in")
    backward = service_pb2.BackwardRequest(
        ref=ref, grad=spec, saved_forward=saved, update_grad=False, scale=0.0, momentum=float("nan"), data=b"in"
    )
    messages = (ref, spec, moments, scale, saved, forward, backward)
    nested = [message.SerializeToString() for message in messages]
    parts = [field_of_bytes(number, value) for number in range(1, 9) for value in (*nested, b"", b"text", b"\xff")]
    parts += [tag(number, 0) + varint(value) for number in range(1, 21) for value in (0, 1, 5, 1 << 40, (1 << 64) - 1)]
    # A NaN, and what looks like the beginning of field 15 to a reader that skips too little.
    parts += [
        tag(number, 1) + value
        for number in range(1, 17)
        for value in (b"\x00" * 6 + b"\xf8\x7f", b"\x7a\x00" * 3 + b"\x7a\x7a")
    ]
    parts += [tag(number, 5) + value for number in range(1, 17) for value in (b"\x00\x00\xc0\x7f", b"\x7a\x00\x7a\x7a")]
    parts += [field_of_bytes(15, value) for value in (b"", b"a", b"payload", bytes(200))] * 20
    return parts


def odd_parts() -> list[bytes]:
    """Fields that a runtime accepts with some thought, or refuses."""
    inner = field_of_bytes(15, b"inside a group")
    parts = [
        tag(15, 3) + inner + tag(15, 4),
        tag(16, 3) + inner + tag(16, 4),
        tag(16, 3) + inner + tag(17, 4),
        tag(16, 3) + tag(16, 3) + tag(16, 4),
        tag(16, 3),
        tag(15, 4),
        tag(15, 6),
        tag(15, 7),
        tag(0, 0) + b"\x01",
        tag(0, 2) + b"\x01a",
        tag((1 << 29) - 1, 0) + b"\x01",
        tag(1 << 29, 0) + b"\x01",
        tag(1 << 33, 0) + b"\x01",
        tag(15, 2) + varint(1 << 31),
        tag(15, 2) + varint((1 << 31) - 1),
        tag(15, 2) + varint((1 << 64) - 1),
        tag(15, 2) + varint(1 << 70),
        tag(1000, 2) + varint(3) + b"abc",
        field_of_bytes(200000, b"unknown"),
        b"\x80" * 4 + b"\x00",
        b"\x80" * 12,
        b"\xff" * 12,
        b"\x00",
        b"",
    ]
    for padding in range(7):
        parts += [
            tag(15, 2, padding) + varint(4) + b"data",
            tag(15, 2) + varint(4, padding) + b"data",
            tag(2, 0) + varint(1, padding),
            tag(1, 2, padding) + varint(0, padding),
            tag(16, 2, padding) + varint(1, padding) + b"u",
        ]
    # Numbers whose tenth byte carries more than the one bit that is left for it, and longer ones.
    parts += [
        tag(number, 0) + b"\xff" * 9 + last for number in (2, 16) for last in (b"\x01", b"\x02", b"\x7f", b"\x81\x00")
    ]
    return parts


VALID, ODD = valid_parts(), odd_parts()


@pytest.mark.parametrize("before", [b"", field_of_bytes(15, b"before")], ids=["alone", "behind data"])
@every_class
def test_every_kind_of_field_alone_and_behind_data(cls: MessageClass, before: bytes) -> None:
    accepted = [agree(cls, before + part) for part in VALID + ODD]
    assert any(accepted)
    assert not all(accepted)


@every_class
def test_every_kind_of_field_cut_anywhere(cls: MessageClass) -> None:
    for part in VALID[::3] + ODD:
        for end in range(min(len(part), 40)):
            agree(cls, part[:end])


@every_class
def test_every_pair_of_odd_fields(cls: MessageClass) -> None:
    for pair in itertools.product(ODD, repeat=2):
        agree(cls, b"".join(pair))


@pytest.mark.parametrize("count", [60, 63, 64, 65, 70_000])
@every_class
def test_very_many_fields(cls: MessageClass, count: int) -> None:
    buffer = (field_of_bytes(15, b"a") + tag(2, 0) + b"\x07") * (count // 2) + field_of_bytes(15, b"last")
    assert agree(cls, buffer)
    # A reader in Python would be busy for long with so many; the runtime is not.
    assert (decode(cls, buffer)[1].obj is buffer) is (count < 64)


# --- Mutations --------------------------------------------------------------------------------------


def cut(rng: random.Random, buffer: bytearray) -> None:
    del buffer[rng.randrange(len(buffer)) :]


def overwrite(rng: random.Random, buffer: bytearray) -> None:
    buffer[rng.randrange(len(buffer))] = rng.choice((0, 0x7A, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def flip(rng: random.Random, buffer: bytearray) -> None:
    buffer[rng.randrange(len(buffer))] ^= 1 << rng.randrange(8)


def insert(rng: random.Random, buffer: bytearray) -> None:
    at = rng.randrange(len(buffer) + 1)
    buffer[at:at] = rng.choice(ODD)


def drop(rng: random.Random, buffer: bytearray) -> None:
    at = rng.randrange(len(buffer))
    del buffer[at : at + rng.randrange(1, 5)]


MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (cut, overwrite, flip, insert, drop)


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Messages of valid fields, most of them then damaged in up to three places."""
    rng = random.Random(seed)  # the same cases on every run
    for _ in range(count):
        buffer = bytearray().join(rng.choices(VALID, k=rng.randrange(1, 7)))
        for _ in range(rng.randrange(4)):
            if buffer:
                rng.choice(MUTATIONS)(rng, buffer)
        yield bytes(buffer)


@every_class
def test_thousands_of_damaged_messages(cls: MessageClass) -> None:
    accepted = sum(agree(cls, buffer) for buffer in mutants(seed=20, count=RANDOM_CASES))
    # Both outcomes are exercised, neither by accident.
    assert RANDOM_CASES * 0.1 < accepted < RANDOM_CASES * 0.9


def test_the_pure_python_runtime_agrees_too() -> None:
    # Which runtime protobuf uses is chosen when it is imported, so this needs a process of its own.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "every_kind or damaged", __file__],
        env=os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout


fields = st.one_of(st.sampled_from(VALID), st.sampled_from(ODD), st.binary(max_size=12))
numbers = st.integers(0, 20) | st.integers(0, 1 << 34)
made_up = st.builds(
    lambda number, wire, padding, body: tag(number, wire, padding) + body,
    numbers,
    st.integers(0, 7),
    st.integers(0, 5),
    st.binary(max_size=10) | st.binary(max_size=300).map(lambda value: varint(len(value)) + value),
)


@every_class
@settings(max_examples=300)
@given(parts=st.lists(fields | made_up, max_size=6), missing=st.integers(0, 3))
def test_fields_in_any_order(cls: MessageClass, parts: list[bytes], missing: int) -> None:
    buffer = b"".join(parts)
    agree(cls, buffer[: max(0, len(buffer) - missing)])


@every_class
@settings(max_examples=300)
@given(buffer=st.binary(max_size=64))
def test_random_bytes(cls: MessageClass, buffer: bytes) -> None:
    agree(cls, buffer)
