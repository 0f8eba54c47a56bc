"""A server: gRPC, health, metrics and signals around a manager of sessions."""

from __future__ import annotations

import asyncio
import logging
import signal
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from swiftvideo.runtime import Pipeline
from swiftvideo.runtime.errors import SettingsError

from .auth import AuthInterceptor, TokenFile, credentials
from .config import MAX_MESSAGE, ServerConfig
from .manager import SessionManager
from .metrics import Metrics
from .service import NAME, GenerationService

log = logging.getLogger(__name__)

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),
)
FLUSH = 0.2
"""Seconds that calls have to take their last messages at the end."""


class Server:
    """A pipeline on the network.

        server = Server(pipeline, ServerConfig(port=0))
        await server.start()            # server.port
        await server.wait()             # until SIGTERM or SIGINT, or until somebody calls server.drain()

    Raises SettingsError where the address, the tokens or the certificates cannot be used.
    """

    def __init__(self, pipeline: Pipeline, config: ServerConfig | None = None) -> None:
        self.pipeline = pipeline
        self.config = config or ServerConfig()
        self.metrics = Metrics()
        self.port = 0
        self.metrics_port = 0
        self._drained = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None
        self._serving = True

    async def start(self) -> None:
        """Listen."""
        config = self.config
        self.manager = SessionManager(self.pipeline, config, self.metrics)
        tokens = None if config.tokens is None else TokenFile(config.tokens)
        service = GenerationService(self.manager, tokens, _version())
        self._health = health.HealthServicer()
        interceptor = AuthInterceptor(tokens, service.refused)
        self._server = grpc.aio.server(interceptors=[interceptor], options=OPTIONS)
        self._server.add_generic_rpc_handlers((service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            from grpc_reflection.v1alpha import reflection

            names = (NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.port = self._listen(credentials(config))
        if config.metrics_port is not None:
            self.metrics_port = self.metrics.endpoint(config.metrics_host, config.metrics_port)
        await self._server.start()
        await self._set_health(True)
        self._watchdog = asyncio.create_task(self._watch(), name="watchdog")
        log.info("serving", extra={"address": f"{config.host}:{self.port}", "metrics": self.metrics_port})

    def _listen(self, secure: Any) -> int:
        address = self.config.address
        try:
            if secure is None:
                return int(self._server.add_insecure_port(address))
            return int(self._server.add_secure_port(address, secure))
        except RuntimeError as error:
            raise SettingsError(f"cannot listen on {address} ({error}): is another server there?") from error

    async def _set_health(self, well: bool) -> None:
        self._serving = well
        states = health_pb2.HealthCheckResponse
        state = states.SERVING if well else states.NOT_SERVING
        for name in ("", NAME):
            await self._health.set(name, state)

    async def _watch(self) -> None:
        """Look after the engine every half second, and after old snapshots every minute."""
        for beat in range(1 << 62):
            await asyncio.sleep(0.5)
            well = self.manager.watch()
            if well != self._serving and not self.manager.draining:
                await self._set_health(well)
            if beat % 120 == 119 and self.manager.recovery is not None:
                await self.manager.recovery.expire()

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
                self.manager.end_drained(session)

    async def drain(self) -> None:
        """Say NOT_SERVING, let sessions run on for the grace time, end them, and close."""
        self.manager.draining = True
        await self._set_health(False)
        log.info("draining", extra={"sessions": len(self.manager.sessions), "seconds": self.config.grace})
        await self.manager.drain()
        await self._server.stop(FLUSH)
        await self.close()

    async def close(self) -> None:
        """End everything at once; twice is fine."""
        if self._drained.is_set():
            return
        self._watchdog.cancel()
        await self._server.stop(0)
        await asyncio.gather(self.manager.close(), asyncio.to_thread(self.metrics.close))
        self._drained.set()
        log.info("closed")

    async def wait(self) -> None:
        """Until the server was closed."""
        await self._drained.wait()


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
    await server.wait()
