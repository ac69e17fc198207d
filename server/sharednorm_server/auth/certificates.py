"""Certificates for a first deployment: an authority of one's own, and what it has signed."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sharednorm.errors import InvalidConfiguration

# Clocks of other machines may be behind.
_EARLIER = timedelta(hours=1)


@dataclass(frozen=True)
class _Signed:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def create(directory: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """Make an authority, a certificate for a server and one for clients; return the files, PEM.

    `ca.pem` is for clients to see who the server is, and for the server to see who they are; the authority's key is
    written to `ca.key`, which signs more of them and is needed by nobody who runs.

    Args:
        directory: Where; it is made if it is not there.
        hosts: Names and numbers by which clients reach the server.
        days: How long they are valid.

    Raises:
        InvalidConfiguration: One of the files is there already; or the days are none.
        OSError: They cannot be written.
    """
    if not 1 <= days <= 3650:
        raise InvalidConfiguration(f"days is {days} (expected: 1 to 3650)")
    authority = _sign("sharednorm authority", days)
    server = _sign(hosts[0], days, authority, hosts, ExtendedKeyUsageOID.SERVER_AUTH)
    client = _sign("sharednorm client", days, authority, (), ExtendedKeyUsageOID.CLIENT_AUTH)
    made = {"ca": authority, "server": server, "client": client}
    files = {directory / f"{name}{end}": (signed, end) for name, signed in made.items() for end in (".pem", ".key")}
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    there = [path for path in files if os.path.lexists(path)]
    if there:
        raise InvalidConfiguration(f"{there[0]} is there already (expected: another --directory, or none of the files)")
    for path, (signed, end) in files.items():
        mode = 0o644 if end == ".pem" else 0o600
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(_certificate(signed) if end == ".pem" else _key(signed))
    return list(files)


def _sign(
    name: str,
    days: int,
    by: _Signed | None = None,
    hosts: Sequence[str] = (),
    usage: x509.ObjectIdentifier | None = None,
) -> _Signed:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=0 if by is None else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if by is not None:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(by.key.public_key())
        builder = builder.add_extension(issuer, critical=False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_name(host) for host in hosts]), critical=False)
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return _Signed(key, builder.sign(key if by is None else by.key, hashes.SHA256()))


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise InvalidConfiguration(
            f"{ascii(host)[:80]} is no host (expected: a name in ASCII, or a number of the internet)"
        ) from None


def _certificate(signed: _Signed) -> bytes:
    return signed.certificate.public_bytes(serialization.Encoding.PEM)


def _key(signed: _Signed) -> bytes:
    return signed.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
