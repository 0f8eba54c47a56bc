"""Who calls: bearer tokens from a file, and TLS credentials that are read again when they change."""

from __future__ import annotations

import hashlib
import hmac
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from swiftvideo.runtime.errors import SettingsError

from .config import ServerConfig
from .logs import Sparing
from .reread import Reread
from .status import Refusal

log = logging.getLogger(__name__)

HEALTH = "/grpc.health.v1.Health/"
ROLES = ("client", "operator")
HEADER = "authorization"


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller."""

    name: str
    operator: bool


@dataclass(frozen=True, slots=True)
class _Token:
    identity: Identity
    digest: bytes
    expires: float | None


ANONYMOUS = Identity("anonymous", operator=True)
"""Everybody, on a server without tokens."""


class TokenFile:
    """Bearer tokens: a line each, `NAME client|operator TOKEN [EXPIRES]`, EXPIRES as 2027-01-31T12:00:00+00:00.

    Empty lines and those that begin with # are passed over. The file is read again when it changes; where it is wrong
    then, the tokens before stay.

    Raises SettingsError where it cannot be read or is wrong at the start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokens = Reread("tokens", [path], self._read)

    def identify(self, token: str) -> Identity:
        """Whose token it is. Compares with all of them, in constant time. Raises Refusal (UNAUTHENTICATED)."""
        self._tokens.refresh()
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self._tokens.value:
            if hmac.compare_digest(known.digest, digest):
                found = known
        if found is None:
            raise _refused("this token is not known here: ask the operator for one")
        if found.expires is not None and time.time() >= found.expires:
            raise _refused(f"the token of {found.identity.name} has expired: ask the operator for a new one")
        return found.identity

    def names(self) -> set[str]:
        """Of those who have a token that is valid now."""
        self._tokens.refresh()
        now = time.time()
        valid = (known for known in self._tokens.value if known.expires is None or now < known.expires)
        return {known.identity.name for known in valid}

    def _read(self) -> list[_Token]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise SettingsError(f"tokens: {str(self.path)!r} cannot be read: {reason}") from error
        tokens = []
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            tokens.append(self._parse(line.split(), number))
        if not tokens:
            raise SettingsError(f"tokens: {str(self.path)!r} has no token: nobody could connect; add a line")
        return tokens

    def _parse(self, words: list[str], number: int) -> _Token:
        where = f"tokens: {str(self.path)!r}, line {number}"
        if len(words) not in (3, 4) or words[1] not in ROLES:
            raise SettingsError(f"{where}: use NAME {'|'.join(ROLES)} TOKEN [EXPIRES]")
        if len(words[2]) < 16:
            raise SettingsError(
                f"{where}: the token has {len(words[2])} characters; use 16 or more random ones"
            )
        expires = None
        if len(words) == 4:
            try:
                moment = datetime.fromisoformat(words[3])
            except ValueError as error:
                raise SettingsError(
                    f"{where}: {error}; use a moment such as 2027-01-31T12:00:00+00:00"
                ) from error
            expires = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        digest = hashlib.sha256(words[2].encode()).digest()
        return _Token(Identity(words[0], words[1] == "operator"), digest, expires)


def _refused(text: str) -> Refusal:
    return Refusal(grpc.StatusCode.UNAUTHENTICATED, text)


def identify(tokens: TokenFile | None, metadata: Sequence[tuple[str, str | bytes]] | None) -> Identity:
    """The caller of a call with this metadata. Raises Refusal (UNAUTHENTICATED)."""
    if tokens is None:
        return ANONYMOUS
    value = next((value for key, value in metadata or () if key == HEADER), None)
    scheme, _, token = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if scheme.lower() != "bearer" or not token:
        raise _refused("this server wants a token: send the metadata 'authorization: Bearer TOKEN'")
    return tokens.identify(token)


class AuthInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call without a valid token, of whatever service, except health checks."""

    def __init__(self, tokens: TokenFile | None, refused: Callable[[Refusal], None]) -> None:
        self._tokens = tokens
        self._refused = refused
        self._sparing = Sparing(log)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See grpc.aio.ServerInterceptor."""
        if not details.method.startswith(HEALTH):
            try:
                identify(self._tokens, details.invocation_metadata)
            except Refusal as refusal:
                self._refused(refusal)
                return self._refusing(refusal)
        return await continuation(details)

    def _refusing(self, refusal: Refusal) -> Any:
        """A handler that ends a call of any kind with a refusal; one of streams does so before any message."""

        async def refuse(_: Any, context: Any) -> None:
            self._sparing.warning(f"a call was refused: {refusal.text}", peer=context.peer())
            await refusal.end(context)

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Certificates:
    """Certificate, key and roots from files."""

    def __init__(self, config: ServerConfig) -> None:
        assert config.certificate is not None and config.key is not None
        self._files = [
            path for path in (config.key, config.certificate, config.client_ca) if path is not None
        ]
        self._read = Reread("TLS", self._files, self._load)

    @property
    def current(self) -> Any:
        """gRPC's configuration."""
        return self._read.value

    def fetch(self) -> Any:
        """For gRPC, at every handshake: a new configuration, or None where nothing changed, or is half changed."""
        return self.current if self._read.refresh() else None

    def _load(self) -> Any:
        try:
            key, chain, *roots = (path.read_bytes() for path in self._files)
        except OSError as error:
            raise SettingsError(f"TLS: {error}") from error
        for path, data in zip(self._files, (key, chain, *roots), strict=True):
            if b"-----BEGIN " not in data:
                raise SettingsError(f"TLS: {str(path)!r} is no PEM file")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                self._files[1], self._files[0], password=lambda: b""
            )
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise SettingsError(
                f"TLS: {str(self._files[1])!r} and {str(self._files[0])!r} cannot be used together ({error}): give a "
                "certificate and its own key, without a passphrase"
            ) from error
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots[0] if roots else None)


def credentials(config: ServerConfig) -> Any:
    """TLS credentials, or None for a server without TLS. Raises SettingsError."""
    if config.certificate is None:
        return None
    certificates = _Certificates(config)
    return grpc.dynamic_ssl_server_credentials(
        certificates.current, certificates.fetch, require_client_authentication=config.client_ca is not None
    )
