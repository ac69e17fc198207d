"""Certificates that a server shows: read anew when their files change."""

from __future__ import annotations

import logging
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from sharednorm_server.errors import StartError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CertificateFiles:
    """Where a server's certificate is.

    Attributes:
        cert: Its certificate, and those between it and an authority, PEM.
        key: Its private key, PEM.
        client_ca: The authorities whose certificates clients have to show, PEM; None: they need none.
    """

    cert: Path
    key: Path
    client_ca: Path | None

    def credentials(self) -> grpc.ServerCredentials:
        """Return what gRPC takes. Each new connection is shown what the files have by then.

        Raises:
            StartError: They cannot be read, or are no certificate and its key.
        """
        try:
            first = self._stamp(), self._read()
        except OSError as error:
            raise StartError(f"the certificates cannot be read: {error}") from error
        lock, current = threading.Lock(), [first]

        def latest() -> grpc.ServerCertificateConfiguration | None:
            with lock:
                try:
                    stamp = self._stamp()
                    if stamp == current[0][0]:
                        return None  # the ones that are in use
                    current[0] = stamp, self._read()
                except OSError as error:
                    _log.error("the certificates stay as they are: %s", error)
                    return None
                _log.info("read the certificates anew: %s", self.cert)
                return current[0][1]

        asks = self.client_ca is not None
        # The types of grpc do not say that the function may return None, its documentation does.
        latest_or_none: Callable[[], Any] = latest
        return grpc.dynamic_ssl_server_credentials(first[1], latest_or_none, require_client_authentication=asks)

    def context(self) -> ssl.SSLContext:
        """Return what Python's sockets take, as the files are now.

        Raises:
            StartError: They cannot be read, or are no certificate and its key.
        """
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:
            raise StartError(f"the certificates cannot be read: {error}") from error
        return context

    def _read(self) -> grpc.ServerCertificateConfiguration:
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_certificate_configuration(
            [(self.key.read_bytes(), self.cert.read_bytes())], root_certificates=authorities
        )

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        files = [path.stat() for path in (self.cert, self.key, self.client_ca) if path is not None]
        return tuple((status.st_mtime_ns, status.st_ino) for status in files)
