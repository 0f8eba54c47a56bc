"""What can be set about a server."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.sdk.address import is_loopback

MAX_SETTING = 1_000_000
"""Of seconds and other numbers."""
COUNTS = (
    "max_sessions",
    "max_sessions_per_client",
    "max_connections",
    "max_credits",
    "max_pending_prompts",
    "snapshot_chunks",
    "snapshot_writes",
)
POSITIVE = ("start_timeout", "watchdog", "snapshot_age", "snapshot_space")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of a server. Raises SettingsError where they contradict each other or are not safe."""

    host: str = "127.0.0.1"
    port: int = 50051
    """0: a free one."""
    tokens: Path | None = None
    """File of bearer tokens (`auth.TokenFile`); None: calls need none."""
    certificate: Path | None = None
    """PEM chain of the server; read again when it changes."""
    key: Path | None = None
    """PEM key of `certificate`."""
    client_ca: Path | None = None
    """PEM roots of clients; set: mTLS, clients without a certificate of theirs are refused."""
    insecure: bool = False
    """Serve on other than loopback addresses without TLS or tokens."""
    reflection: bool = False
    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = None
    """HTTP port of /metrics; 0: a free one; None: no metrics endpoint."""
    max_sessions: int = 16
    max_sessions_per_client: int = 4
    max_connections: int = 512
    """Connections that are open at once, of all clients; further ones are closed at once. Fewer where the process may
    open too few files."""
    max_credits: int = 16
    max_pending_prompts: int = 64
    """Prompts of a session that wait for their chunk."""
    max_linger: float = 120.0
    """Seconds that a session waits for a reattach."""
    max_load: float | None = 1.0
    """Admit a session while all of them together need at most this share of the engine's time to play without a
    break; the first is always admitted. None: no such limit."""
    memory_reserve: int = 256 << 20
    """Bytes of memory that admission leaves free."""
    start_timeout: float = 10.0
    """Seconds until a call's first message must be there."""
    grace: float = 20.0
    """Seconds that a drain lets sessions run on."""
    snapshots: Path | None = None
    """Folder of snapshots; None: none are kept."""
    snapshot_chunks: int = 10
    """A session is saved after every so many chunks."""
    snapshot_writes: int = 2
    """Snapshots that are written at once, each from a copy in memory that is as large as a session; others wait."""
    snapshot_age: float = 3600.0
    """Seconds that the snapshot of a session that nobody took up is kept."""
    snapshot_space: float = 16.0
    """GiB that all snapshots may take: the oldest of sessions that do not run are deleted first, then no new ones are
    written."""
    watchdog: float = 60.0
    """Seconds that one chunk may take before the engine counts as stuck."""

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise SettingsError(f"{name} is {port}: use 0 to 65535")
        for name in ("max_linger", "max_load", "grace", *COUNTS, *POSITIVE):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value <= MAX_SETTING):
                raise SettingsError(f"{name} is {value}: use a number of at most {MAX_SETTING}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: use at least 1")
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise SettingsError(f"{name} is {getattr(self, name)}: it must be positive")
        for name in ("grace", "max_linger", "memory_reserve"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} is {getattr(self, name)}: it must not be negative")
        if self.max_load is not None and self.max_load <= 0:
            raise SettingsError(f"max_load is {self.max_load}: it must be positive, or absent for no limit")
        if not self.host.strip():
            raise SettingsError("host is empty: use 127.0.0.1, or 0.0.0.0 for every address of this machine")
        if (self.certificate is None) != (self.key is None):
            raise SettingsError("TLS needs both a certificate and its key: give both or neither")
        if self.client_ca is not None and self.certificate is None:
            raise SettingsError("client_ca without a certificate: clients can only be checked under TLS")
        if not self.insecure and not self.loopback:
            missing = [
                what for what, at in (("TLS", self.certificate), ("tokens", self.tokens)) if at is None
            ]
            if missing:
                raise SettingsError(
                    f"host {self.host!r} is not a loopback address and {' and '.join(missing)} are missing: give a "
                    "certificate, its key and a file of tokens, serve on 127.0.0.1, or pass --insecure"
                )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def address(self) -> str:
        """For gRPC."""
        return self.at(self.port)

    def at(self, port: int) -> str:
        """`address` with another port, such as the one that was free."""
        host = f"[{self.host}]" if ":" in self.host and not self.host.startswith("[") else self.host
        return f"{host}:{port}"
