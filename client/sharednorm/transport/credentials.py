"""How a client shows who it is, and sees who the server is: tokens and certificates."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import grpc

from sharednorm.core.address import Address
from sharednorm.errors import InvalidConfiguration

TOKEN_VARIABLE, CA_VARIABLE = "SHAREDNORM_TOKEN", "SHAREDNORM_TLS_CA"
_MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True)
class TLS:
    """How a connection is encrypted.

    Attributes:
        ca: File of the authorities whose certificates are believed, PEM; None: those of gRPC.
        cert: File of this client's certificate, PEM, for servers that ask for one; None: it has none.
        key: File of its private key, PEM.
        server_name: The name that the server's certificate has, if it is not the host of the address.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return what gRPC takes.

        Raises:
            InvalidConfiguration: A file cannot be read, or a certificate has no key.
        """
        if (self.cert is None) != (self.key is None):
            raise InvalidConfiguration("tls has one of cert and key (expected: both, or none)")
        return grpc.ssl_channel_credentials(*(_read(path) for path in (self.ca, self.key, self.cert)))


@dataclass(frozen=True, repr=False)
class Credentials:
    """What a connection is made with.

    Attributes:
        tls: How it is encrypted; None: it is not.
        metadata: What each call carries.
    """

    tls: TLS | None = None
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    @classmethod
    def parse(cls, token: object, tls: object, namespace: str, address: Address) -> Credentials:
        """Check what `connect` was given.

        Raises:
            InvalidConfiguration: It is not what it should be, or a token would travel where others can read it.
        """
        encryption = _tls(tls, address)
        if token is None:
            token = os.environ.get(TOKEN_VARIABLE) or None
        if token is None:
            return cls(encryption)
        fine = isinstance(token, str) and token.isascii() and token.isprintable() and " " not in token and token
        if not (isinstance(token, str) and fine and len(token) <= _MAX_TOKEN_BYTES):
            raise InvalidConfiguration("the token is none (expected: what `sharednorm token create` has printed)")
        if encryption is None and not address.local and tls is not False:
            raise InvalidConfiguration(
                f"a token for {address.text} would travel unencrypted (expected: tls=True, or the file of an "
                "authority's certificate; or tls=False, if nobody else can listen there)"
            )
        metadata = (("authorization", f"Bearer {token}"), ("sharednorm-namespace-bin", namespace.encode()))
        return cls(encryption, metadata)

    def named(self, host: str) -> Credentials:
        """Return the same for one of the addresses that a name has, whose certificate is the name's."""
        if self.tls is None or self.tls.server_name is not None:
            return self
        return replace(self, tls=replace(self.tls, server_name=host))


def _tls(tls: object, address: Address) -> TLS | None:
    if tls is None:
        ca = os.environ.get(CA_VARIABLE)
        return TLS(ca=ca) if ca and not address.path else None
    if tls is False:
        return None
    if tls is True:
        return TLS()
    if isinstance(tls, (str, os.PathLike)):
        return TLS(ca=tls)
    if isinstance(tls, TLS):
        return tls
    raise InvalidConfiguration(
        f"tls is {ascii(tls)[:60]} (expected: True, False, the file of an authority's certificate, or sharednorm.TLS)"
    )


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidConfiguration(
            f"{os.fspath(path)} cannot be read: {error.strerror} (expected: a PEM file)"
        ) from None
