"""Tokens of the pages of a list: opaque to clients, checked when they come back, and kept by nobody."""

from __future__ import annotations

import base64
import binascii
import zlib

from sharednorm.errors import InvalidConfiguration, InvalidPageToken

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


def page_size(asked: int) -> int:
    """Return how many layers a page has, of what was asked for.

    Raises:
        InvalidConfiguration: More than 1000, or less than 0.
    """
    if not 0 <= asked <= MAX_PAGE_SIZE:
        raise InvalidConfiguration(f"page_size is {asked} (expected: 1 to {MAX_PAGE_SIZE}, or 0 for the usual size)")
    return asked or DEFAULT_PAGE_SIZE


def token_of_name(namespace: str, name: str) -> str:
    """Return the token of the page that begins behind a name."""
    encoded = name.encode()
    return base64.urlsafe_b64encode(_checksum(namespace, encoded) + encoded).decode()


def name_of_token(namespace: str, token: str) -> str:
    """Return the name behind which a page begins; "" for the first page's empty token.

    Raises:
        InvalidPageToken: The token is none that `token_of_name` gave for this namespace.
    """
    if not token:
        return ""
    try:
        decoded = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        checksum, name = decoded[:4], decoded[4:]
        if checksum == _checksum(namespace, name):
            return name.decode()
    except (UnicodeError, binascii.Error):
        pass  # the same error as for a wrong checksum
    raise InvalidPageToken("page_token is not one that this server gave (expected: next_page_token of the page before)")


def _checksum(namespace: str, name: bytes) -> bytes:
    return zlib.crc32(name, zlib.crc32(namespace.encode() + b"\0")).to_bytes(4, "big")
