"""The edge for people and for what watches servers: a few pages over HTTP, which change nothing.

`/metrics` is for Prometheus, `/healthz` and `/readyz` are for whoever starts servers anew or sends them clients; the
others are the pages of `page`. It is open to whoever may reach it, or where tokens are asked for, to those with one:
as a bearer token, or as the password that a browser asks for.
"""

from __future__ import annotations

import base64
import binascii
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

from sharednorm.errors import SharedNormError
from sharednorm_server.auth.tokens import AUTHORIZATION, TokenFile
from sharednorm_server.errors import StartError
from sharednorm_server.rpc.endpoints import TcpEndpoint, parse_endpoint
from sharednorm_server.rpc.errors import known_error

MAX_CONNECTIONS = 64
"""At a time; each has a thread."""
# A connection that is silent for so long ends.
_SILENCE_SECONDS = 20.0
_MAX_QUERY_BYTES = 8192

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Visitor:
    """Who asks.

    Attributes:
        tokens: Who may do what; None: everybody.
        authorization: What they have shown.
    """

    tokens: TokenFile | None
    authorization: str | None

    def require(self, namespace: str) -> None:
        """Check that they may read a namespace.

        Raises:
            Unauthenticated, PermissionDenied: They may not.
        """
        if self.tokens is not None:
            self.tokens.admit_reader(self.authorization, namespace)

    def may_read(self, namespace: str) -> bool:
        """Return whether they may read a namespace."""
        try:
            self.require(namespace)
        except SharedNormError:
            return False
        return True

    def require_token(self) -> None:
        """Check that they have a token, for whatever.

        Raises:
            Unauthenticated: They have none that is good.
        """
        if self.tokens is not None:
            self.tokens.require_known(self.authorization)


@dataclass(frozen=True)
class Response:
    """What is answered."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Route(Protocol):
    """What answers a path. It gets who asks and the query, of which each name has one value."""

    def __call__(self, visitor: Visitor, query: Mapping[str, str]) -> Response:
        """Answer; raises what becomes an error's page."""
        ...


class WebServer:
    """Answers GET and HEAD on a port, on threads of its own.

    Args:
        listen: "HOST:PORT"; port 0 picks one.
        routes: What answers, by path.
        tokens: Who may; None: everybody.
        context: Makes the encryption of a connection; None: there is none.

    Raises:
        StartError: It cannot listen there.
    """

    def __init__(
        self,
        listen: str,
        routes: Mapping[str, Route],
        tokens: TokenFile | None,
        context: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        endpoint = parse_endpoint(listen)
        if not isinstance(endpoint, TcpEndpoint):
            raise StartError(f"{listen} is no address for HTTP (expected: HOST:PORT)")
        handler = type("Handler", (_Handler,), {"routes": routes, "tokens": tokens})
        try:
            self._server = _Server(endpoint, handler, context)
        except OSError as error:
            raise StartError(f"cannot listen on {listen} for HTTP: {error.strerror}") from error
        self.address = f"{endpoint.host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, endpoint: TcpEndpoint, handler: type[_Handler], context: Callable[[], ssl.SSLContext] | None
    ) -> None:
        self._context = context
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        host = endpoint.host.strip("[]")
        self.address_family = socket.getaddrinfo(host, endpoint.port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, endpoint.port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            request.settimeout(_SILENCE_SECONDS)
            if self._context is not None:  # in the connection's own thread: the other side may be slow
                request = self._context().wrap_socket(request, server_side=True)
            super().process_request_thread(request, client_address)
        except (OSError, ssl.SSLError) as error:
            _log.debug("a connection by HTTP ended: %s", error)
            self.shutdown_request(request)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - as socketserver calls it
        _log.debug("a connection by HTTP ended", exc_info=True)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the system for the name of the host.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


class _Handler(BaseHTTPRequestHandler):
    routes: Mapping[str, Route]
    tokens: TokenFile | None
    protocol_version = "HTTP/1.1"
    server_version = "sharednorm"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer."""
        self._respond(self._answer())

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as http.server calls it
        """Keep requests out of the log, but at its most talkative."""
        _log.debug(format, *args)

    def _answer(self) -> Response:
        if len(self.path) > _MAX_QUERY_BYTES:
            return Response(b"the address is too long\n", status=414)
        parts = urlsplit(self.path)
        route = self.routes.get(parts.path)
        if route is None:
            return Response(b"there is no such page; there are: " + " ".join(self.routes).encode() + b"\n", status=404)
        query = {name: values[0] for name, values in parse_qs(parts.query, errors="replace").items()}
        try:
            return route(Visitor(self.tokens, _bearer(self.headers.get(AUTHORIZATION))), query)
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
            return _refusal(known_error(parts.path, error))

    def _respond(self, response: Response) -> None:
        with suppress(ConnectionError, TimeoutError):
            self.send_response(response.status)
            headers = {**_HEADERS, "Content-Type": response.kind, "Content-Length": str(len(response.body))}
            for name, value in {**headers, **response.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(response.body)


# Of the codes of gRPC: https://grpc.io/docs/guides/status-codes/
_STATUS = {3: 400, 5: 404, 7: 403, 8: 429, 9: 409, 14: 503, 16: 401}


def _refusal(error: SharedNormError) -> Response:
    status = _STATUS.get(error.code, 500)
    headers = {"WWW-Authenticate": 'Basic realm="sharednorm: a token as the password", charset="UTF-8"'}
    text = f"{error.reason}: {error.message}\n".encode("utf-8", "backslashreplace")
    return Response(text, status=status, headers=headers if status == 401 else {})


def _bearer(given: str | None) -> str | None:
    """Return what was shown as a bearer token; a browser shows a password."""
    scheme, _, value = (given or "").partition(" ")
    if scheme.lower() != "basic":
        return given
    try:
        _, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return f"Bearer {password}"
