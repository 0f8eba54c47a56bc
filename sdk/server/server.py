"""A server: gRPC, health, metrics and signals around a manager of sessions."""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc

from swiftvideo.runtime import Pipeline
from swiftvideo.runtime.errors import SwiftVideoError
from swiftvideo.sdk.protocol import MAX_REQUEST

from .auth import AuthInterceptor, TokenFile, credentials
from .config import ServerConfig
from .descriptors import connections
from .drain import drain, end_drained
from .endpoint import Endpoint
from .health import SERVICE as HEALTH, HealthService
from .manager import SessionManager
from .metrics import Metrics
from .service import NAME, GenerationService
from .systemd import ready

log = logging.getLogger(__name__)

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # counts in place of keepalive_timeout_ms; a minute by default
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 10_000),  # of TLS, and of HTTP/2's beginning; two minutes by default
    ("grpc.max_connection_idle_ms", 600_000),  # once or twice that without a call; clients connect again
    ("grpc.max_connection_age_ms", 3_600_000),  # then open calls go on, and further ones connect again
    ("grpc.http2.bdp_probe", 0),  # requests are small: a peer sends 64 KiB ahead, not 4 MiB and more
    ("grpc.so_reuseport", 0),
)
STREAMS = 100
"""Calls that one connection may have open beside one for every session; further ones wait in the client."""
FLUSH = 0.2
"""Seconds that calls have to take their last messages at the end."""
BEAT = 0.5
"""Seconds between two looks at the engine and the tokens."""
EXPIRE = 120
"""Beats between two looks at old snapshots."""


class Server:
    """A pipeline on the network.

        server = Server(pipeline, ServerConfig(port=0))
        await server.start()            # server.port
        await server.wait()             # until SIGTERM or SIGINT, or until somebody calls server.drain()

    Raises SettingsError where the tokens, the certificates or the folder of snapshots are not as they must be, and
    SwiftVideoError where the addresses or the folder cannot be had, which may be otherwise a moment later.
    """

    def __init__(self, pipeline: Pipeline, config: ServerConfig | None = None) -> None:
        self.pipeline = pipeline
        self.config = config or ServerConfig()
        self.metrics = Metrics()
        self.port = 0
        self.metrics_port = 0
        self._drained = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._endpoint: Endpoint | None = None
        self._serving = False

    async def start(self) -> None:
        """Listen, make a first video to know how long a chunk takes, and serve."""
        config = self.config
        self._tokens = None if config.tokens is None else TokenFile(config.tokens)
        secure = credentials(config)
        self.manager = SessionManager(self.pipeline, config, self.metrics)
        service = GenerationService(self.manager, self._tokens, _version())
        self._health = HealthService(("", NAME), config.start_timeout, service.refused)
        self._server = grpc.aio.server(
            interceptors=[AuthInterceptor(self._tokens, service.refused)],
            options=(
                *OPTIONS,
                ("grpc.max_concurrent_streams", config.max_sessions + STREAMS),
                ("grpc.max_allowed_incoming_connections", connections(config.max_connections)),
            ),
        )
        self._server.add_generic_rpc_handlers((service.handler(), self._health.handler()))
        if config.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (NAME, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            await self._open(secure)
        except BaseException:
            await self.close()
            raise

    async def _open(self, secure: Any) -> None:
        config = self.config
        if config.metrics_port is not None:
            self._endpoint = Endpoint(
                config.metrics_host, config.metrics_port, self.metrics.registry, lambda: self._serving
            )
            self.metrics_port = self._endpoint.port
        self.port = await self._listen(secure)
        self.manager.admission.measured(await asyncio.to_thread(_warm_up, self.pipeline))
        await self._server.start()
        self._set_health(True)
        self._watchdog = asyncio.create_task(self._watch(), name="watchdog")
        log.info("serving", extra={"address": config.at(self.port), "metrics": self.metrics_port})

    async def _listen(self, secure: Any) -> int:
        config = self.config
        try:
            await asyncio.get_running_loop().getaddrinfo(config.host.strip("[]"), config.port)
        except socket.gaierror as error:
            raise SwiftVideoError(
                f"host {config.host!r} is no address ({error}): use one of this machine, such as 127.0.0.1"
            ) from error
        try:
            if secure is None:
                return int(self._server.add_insecure_port(config.address))
            return int(self._server.add_secure_port(config.address, secure))
        except RuntimeError as error:
            raise SwiftVideoError(
                f"cannot listen on {config.address} ({error}): is another server there, and is it this machine's?"
            ) from error

    def _set_health(self, well: bool) -> None:
        self._serving = well
        self.metrics.serving.set(well)
        self._health.set(well)

    async def _watch(self) -> None:
        """Look after everything for ever; a look that fails is logged."""
        for beat in itertools.count(1):
            await asyncio.sleep(BEAT)
            try:
                await self._look(beat)
            except Exception:
                log.exception("the watchdog could not look after everything")

    async def _look(self, beat: int) -> None:
        manager = self.manager
        well = manager.watch()
        if well != self._serving and not manager.draining:
            self._set_health(well)
        if beat % EXPIRE == 0 and manager.recovery is not None:
            manager.recovery.expire()
        if self._tokens is not None:
            manager.end_strangers(self._tokens.names())

    def handle_signals(self) -> None:
        """Drain on SIGTERM and SIGINT; a second one ends the sessions at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)

    def _signalled(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self.drain(), name="drain")
        else:
            for session in list(self.manager.sessions.values()):
                end_drained(session)

    async def drain(self) -> None:
        """Say NOT_SERVING, let sessions run on for the grace time, save and end them, and close."""
        self.manager.draining = True
        log.info("draining", extra={"sessions": len(self.manager.sessions), "seconds": self.config.grace})
        try:
            self._set_health(False)
            await drain(self.manager)
            await self._server.stop(FLUSH)
        except Exception:
            log.exception("the drain failed: everything ends at once")
        finally:
            await self.close()

    async def close(self) -> None:
        """End everything at once; twice is fine."""
        if self._drained.is_set():
            return
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._server.stop(0)
        await self.manager.close()
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
        self._drained.set()
        log.info("closed")

    async def wait(self) -> None:
        """Until the server was closed."""
        await self._drained.wait()


def _warm_up(pipeline: Pipeline) -> float:
    """Seconds that a chunk takes: the third one of a video, when all is loaded. Its prompt may be any.

    The first one decodes a frame less than the others, so the torch engine compiles the decoder during the second.
    """
    with pipeline.session(pipeline.words[0] if pipeline.words else "a video") as session:
        next(session)
        next(session)
        begin = time.monotonic()
        next(session)
        return time.monotonic() - begin


def _version() -> str:
    try:
        return version("swiftvideo")
    except PackageNotFoundError:
        return "unknown"


async def serve(pipeline: Pipeline, config: ServerConfig) -> None:
    """Serve until a signal says otherwise."""
    server = Server(pipeline, config)
    await server.start()
    server.handle_signals()
    ready()
    await server.wait()
