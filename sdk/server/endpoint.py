"""HTTP: /metrics for Prometheus, /healthz for whoever cannot ask gRPC's health service."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from swiftvideo.runtime.errors import SwiftVideoError

log = logging.getLogger(__name__)

CONNECTIONS = 32
"""That are open at once; further ones are closed."""
SECONDS = 10.0
"""That a connection lives, whatever it sends."""


class Endpoint:
    """Serves from threads of its own until `close`.

    Args:
        host: to listen on.
        port: 0 for a free one.
        registry: of the metrics.
        well: what /healthz says: 200 or 503.

    Raises SwiftVideoError where it cannot listen there.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, well: Callable[[], bool]) -> None:
        metrics: Any = make_wsgi_app(registry)

        def app(environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if path == "/metrics":
                return metrics(environ, respond)  # type: ignore[no-any-return]
            status, text = "404 Not Found", "use /metrics or /healthz\n"
            if path == "/healthz":
                status, text = (
                    ("200 OK", "serving\n") if well() else ("503 Service Unavailable", "not serving\n")
                )
            respond(status, [("Content-Type", "text/plain")])
            return [text.encode()]

        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            kind = type("_Server", (_Server,), {"address_family": family})
            self._server = kind((host, port), _Handler)
        except OSError as error:  # socket.gaierror is one
            raise SwiftVideoError(
                f"metrics cannot be served on {host}, port {port} ({error}): name an address of this machine and a "
                "free port"
            ) from error
        self.port = int(self._server.server_port)
        self._server.set_app(app)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="swiftvideo-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, of which few are open, and none long."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._begun: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room; the connection is closed where there is none."""
        with self._lock:
            if len(self._begun) >= CONNECTIONS:
                return False
            self._begun[request] = time.monotonic()
        return True

    def shutdown_request(self, request: Any) -> None:
        """At the end of every connection, whatever it was."""
        with self._lock:
            self._begun.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: break those that take too long."""
        late = time.monotonic() - SECONDS
        with self._lock:
            slow = [request for request, begun in self._begun.items() if begun < late]
            for request in slow:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.info("an HTTP request broke", exc_info=True, extra={"peer": client_address})


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
