"""Protobuf's wire format, as much of it as a field of bytes needs: https://protobuf.dev/programming-guides/encoding/."""

from __future__ import annotations

from functools import lru_cache

from sharednorm.errors import LimitExceeded

# protobuf refuses a field that is longer.
_MAX_FIELD_BYTES = (1 << 31) - 1

# More fields than any message of the contract has. A message of a million tiny ones is read by the runtime in
# milliseconds, and would keep Python busy for a second.
_MAX_FIELDS = 64

# Wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def varint(value: int, width: int = 1) -> bytes:
    """Return a number in base 128, lowest digit first, in at least `width` bytes; leading zeros are allowed."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < width:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@lru_cache(maxsize=512)  # a layer's messages have the same sizes again and again
def field_header(number: int, size: int, *, behind: int = 0, align: int = 1) -> bytes:
    """Return what stands in front of a field of bytes: its tag, and its size.

    Args:
        number: The field's.
        size: Bytes of the field.
        behind: Bytes of the message in front of this field.
        align: The field's bytes should begin at a multiple of this, counted from the message's first byte. The
            size is written with leading zeros for that, as far as protobuf's 5 bytes allow.

    Raises:
        LimitExceeded: The field would be larger than protobuf allows, 2 GiB.
    """
    if size > _MAX_FIELD_BYTES:
        raise LimitExceeded(
            f"{size} bytes do not fit one message (expected: at most protobuf's limit of {_MAX_FIELD_BYTES}; "
            "larger tensors travel as streams)",
            {"limit": "protobuf", "value": str(_MAX_FIELD_BYTES)},
        )
    tag, length = varint((number << 3) | _BYTES), varint(size)
    missing = -(behind + len(tag) + len(length)) % align
    if missing and len(length) + missing <= 5:
        length = varint(size, len(length) + missing)
    return tag + length


def find_field(buffer: bytes, number: int) -> tuple[bytes, int, int] | None:
    """Find a field of bytes in a message; of several, the last.

    Returns:
        All other fields, and where the field's bytes start and end (both 0 if it is absent). None where it is not
        certain where a field ends (groups, over-long or missing bytes, unknown wire types), or where there are very
        many: then a real parser must decide what the message means. The other fields are not looked into: whether
        they are allowed is for the parser that gets them.
    """
    wanted = (number << 3) | _BYTES
    others: list[bytes] = []
    kept = position = start = end = 0
    size = len(buffer)
    try:
        for _ in range(_MAX_FIELDS):
            if position == size:
                others.append(buffer[kept:])
                return b"".join(others), start, end
            begin = position
            tag, position = _read_tag(buffer, position)
            if tag & 7 == _BYTES:
                length, position = _read_varint(buffer, position, 5)
                position += length
                if length > _MAX_FIELD_BYTES:
                    return None
                if tag == wanted:
                    others.append(buffer[kept:begin])
                    kept, start, end = position, position - length, position
            else:
                position = _skip(buffer, position, tag & 7)
    except (IndexError, OverflowError):
        return None
    return None


def _skip(buffer: bytes, position: int, wire_type: int) -> int:
    if wire_type == _VARINT:
        return _read_varint(buffer, position, 10)[1]
    if wire_type == _FIXED64:
        return position + 8
    if wire_type == _FIXED32:
        return position + 4
    raise OverflowError


def _read_tag(buffer: bytes, position: int) -> tuple[int, int]:
    tag, behind = _read_varint(buffer, position, 5)
    if behind - position > 1 and not buffer[behind - 1]:
        raise OverflowError  # Leading zeros: runtimes differ on whether that is still the same field.
    return tag, behind


def _read_varint(buffer: bytes, position: int, longest: int) -> tuple[int, int]:
    """Return a number in base 128, and the position behind it.

    Raises:
        IndexError: The buffer ends before it does.
        OverflowError: It has more bytes than `longest`.
    """
    value = buffer[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    for shift in range(7, 7 * longest, 7):
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise OverflowError
