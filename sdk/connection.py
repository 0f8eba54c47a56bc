"""How a client connects: channel options, TLS, and the token. Needs grpcio only."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import grpc

from swiftvideo.runtime.errors import SettingsError, UsageError

from .address import check_target, is_local

OPTIONS = (
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # a minute otherwise, and it counts for keepalive too
    ("grpc.client_idle_timeout_ms", 240_000),  # before the server, whose way to end it is a line on stderr
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

CONNECTING = 20.0
"""Seconds that a connection may take at most, whatever the client's timeout: gRPC's own limit."""


def metadata_of(token: str | None) -> tuple[tuple[str, str], ...]:
    """What every call carries. Raises SettingsError for a token that no server can have given out."""
    if token is None:
        return ()
    wrong = next((index for index, letter in enumerate(token) if not "!" <= letter <= "~"), None)
    if not token:
        raise SettingsError("the token is empty: give the one that the operator made, or none")
    if wrong is not None:  # the token itself is not shown: messages end up in logs
        raise SettingsError(
            f"character {wrong + 1} of the token is {token[wrong]!r}: a token has printable ASCII characters alone, "
            "no spaces and no line ends"
        )
    return (("authorization", f"Bearer {token}"),)


def open_channel(
    module: Any,
    address: str,
    token: str | None,
    tls: bool | None,
    root: str | Path | None,
    certificate: str | Path | None,
    key: str | Path | None,
    timeout: float,
) -> Any:
    """A channel of `module`, grpc or grpc.aio, that may take `timeout` seconds to connect.

    Where `tls` is None it has TLS if a PEM file is given, or if the token would leave this machine.

    Raises SettingsError where the address is none, a file cannot be read or is no PEM file, or the settings contradict
    each other; UsageError for grpc.aio where no event loop runs.
    """
    check_target(address)
    given = root is not None or certificate is not None or key is not None
    if tls is None:
        tls = given or (token is not None and not is_local(address))
    if given and not tls:
        raise SettingsError("tls is False and PEM files are given: leave one of them out")
    if (certificate is None) != (key is None):
        raise SettingsError("a client certificate and its key belong together: give both or neither")
    files = (("root", root), ("key", key), ("certificate", certificate))
    data = [None if path is None else _pem(name, Path(path)) for name, path in files]
    if module is grpc.aio:
        running_loop()
    # gRPC's name for the time that an attempt may take: it waits between attempts for as long as the backoffs say
    options = (*OPTIONS, ("grpc.min_reconnect_backoff_ms", round(min(timeout, CONNECTING) * 1000)))
    if not tls:
        return module.insecure_channel(address, options)
    return module.secure_channel(address, grpc.ssl_channel_credentials(*data), options)


def running_loop() -> asyncio.AbstractEventLoop:
    """The event loop that runs here. Raises UsageError where none does."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError as error:
        raise UsageError(
            "no event loop runs here, and an asynchronous client belongs to one: make it in an `async def`"
        ) from error


def _pem(name: str, path: Path) -> bytes:
    """Content of a PEM file. gRPC would say of another one that it cannot connect."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"TLS: {name} {str(path)!r} cannot be read: {error.strerror}") from error
    kind = "PRIVATE KEY" if name == "key" else "CERTIFICATE"
    if not re.search(rf"-----BEGIN ([A-Z0-9]+ )*{kind}-----".encode(), data):
        raise SettingsError(
            f"TLS: {name} {str(path)!r} has no line '-----BEGIN {kind}-----': give a PEM file that has"
        )
    return data
