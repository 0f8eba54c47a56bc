"""`swiftvideo serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swiftvideo.sdk.parts import needing, silence_grpc

from .config import ServerConfig

DEFAULT = ServerConfig()
_File = Path | None


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = DEFAULT.host,
    port: Annotated[int, typer.Option("--port", help="0 for a free one.")] = DEFAULT.port,
    bundle: Annotated[
        _File, typer.Option("--bundle", help="A bundle's folder; the embedded model if absent.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="See 'swiftvideo doctor'.")] = "auto",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of the CPU engine; all cores if absent.")
    ] = None,
    tokens: Annotated[
        _File, typer.Option("--tokens", help="Bearer tokens: NAME client|operator TOKEN [EXPIRES].")
    ] = None,
    certificate: Annotated[
        _File, typer.Option("--certificate", help="PEM chain; read again when it changes.")
    ] = None,
    key: Annotated[_File, typer.Option("--key", help="PEM key of the certificate.")] = None,
    client_ca: Annotated[_File, typer.Option("--client-ca", help="PEM roots of clients: mTLS.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow other addresses without TLS or tokens.")
    ] = False,
    reflection: Annotated[
        bool, typer.Option("--reflection", help="Let clients ask for the protocol.")
    ] = False,
    metrics_host: Annotated[str, typer.Option("--metrics-host", help="Of /metrics.")] = DEFAULT.metrics_host,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", help="Of /metrics; none if absent.")
    ] = None,
    max_sessions: Annotated[int, typer.Option("--max-sessions", help="In all.")] = DEFAULT.max_sessions,
    max_sessions_per_client: Annotated[
        int, typer.Option("--max-sessions-per-client", help="Of one token.")
    ] = DEFAULT.max_sessions_per_client,
    max_connections: Annotated[
        int, typer.Option("--max-connections", help="Of all clients; further ones are closed.")
    ] = DEFAULT.max_connections,
    max_load: Annotated[
        float,
        typer.Option("--max-load", help="Share of the engine's time to admit sessions for; 0: no limit."),
    ] = 1.0,
    grace: Annotated[
        float, typer.Option("--grace", help="Seconds that sessions may run on at the end.")
    ] = DEFAULT.grace,
    snapshots: Annotated[
        _File, typer.Option("--snapshots", help="Folder of session snapshots; none if absent.")
    ] = None,
    snapshot_chunks: Annotated[
        int, typer.Option("--snapshot-chunks", help="Chunks between two snapshots of a session.")
    ] = DEFAULT.snapshot_chunks,
    snapshot_writes: Annotated[
        int, typer.Option("--snapshot-writes", help="Snapshots written at once, each a copy in memory.")
    ] = DEFAULT.snapshot_writes,
    snapshot_age: Annotated[
        float, typer.Option("--snapshot-age", help="Seconds that a session's last snapshot is kept.")
    ] = DEFAULT.snapshot_age,
    snapshot_space: Annotated[
        float, typer.Option("--snapshot-space", help="GiB that all snapshots may take.")
    ] = DEFAULT.snapshot_space,
    watchdog: Annotated[
        float, typer.Option("--watchdog", help="Seconds that a chunk may take.")
    ] = DEFAULT.watchdog,
    log_level: Annotated[str, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
) -> None:
    """Serve sessions over gRPC (docs/service.md)."""
    config = ServerConfig(
        host=host,
        port=port,
        tokens=tokens,
        certificate=certificate,
        key=key,
        client_ca=client_ca,
        insecure=insecure,
        reflection=reflection,
        metrics_host=metrics_host,
        metrics_port=metrics_port,
        max_sessions=max_sessions,
        max_sessions_per_client=max_sessions_per_client,
        max_connections=max_connections,
        max_load=max_load or None,
        grace=grace,
        snapshots=snapshots,
        snapshot_chunks=snapshot_chunks,
        snapshot_writes=snapshot_writes,
        snapshot_age=snapshot_age,
        snapshot_space=snapshot_space,
        watchdog=watchdog,
    )
    import asyncio
    import logging
    import os

    from swiftvideo.sdk.engines import open_pipeline

    silence_grpc()
    with needing("serve", "serving"):
        from . import logs, tracing
        from .server import serve as work
    logs.configure(log_level.upper())
    end_tracing = tracing.configure()
    with open_pipeline(bundle, engine, threads) as pipeline:
        asyncio.run(work(pipeline, config))
    end_tracing()
    logging.shutdown()
    os._exit(0)  # all is closed and written; taking the interpreter apart would cost part of the grace time
