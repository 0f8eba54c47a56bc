"""What a client sends in clear text, and to whom: a listener that is no server sees the first bytes of a connection."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc

from swiftvideo.runtime.errors import SettingsError, UsageError
from swiftvideo.sdk import aio, cli, connection
from swiftvideo.sdk.address import is_local
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.remote import UnavailableError
from swiftvideo.sdk.server import server

TOKEN = "a-token-0123456789"
ROOTS = Path(grpc.__file__).parent / "_cython/_credentials/roots.pem"
PLAIN, TLS = b"PRI", b"\x16\x03\x01"
"""How connections begin: HTTP/2 in clear text, and a TLS handshake."""


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("LocalHost", True),
        ("127.0.0.1:50051", True),
        ("127.8.9.1", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("unix:/run/swiftvideo", True),
        ("dns:///localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("dns://8.8.8.8/localhost:50051", False),
        ("0.0.0.0:50051", False),
        ("[2001:db8::1]:50051", False),
        ("localhost.example.org:50051", False),
        ("", False),
    ],
)
def test_addresses_that_stay_on_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local


class Listener:
    """Takes connections, keeps their first bytes, and hangs up."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self._socket = socket.create_server(("", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                data = connection.recv(4096)
                if not data:
                    return
                self.seen.append(data)

    def close(self) -> None:
        """End it."""
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join(20)
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("host", "token", "settings", "begin"),
    [
        ("127.0.0.1", TOKEN, {}, PLAIN),
        ("0.0.0.0", None, {}, PLAIN),
        ("0.0.0.0", TOKEN, {}, TLS),
        ("0.0.0.0", TOKEN, {"tls": False}, PLAIN),
        ("127.0.0.1", TOKEN, {"tls": True}, TLS),
        ("127.0.0.1", None, {"root": ROOTS}, TLS),
    ],
)
def test_a_token_leaves_the_machine_under_tls_unless_told_otherwise(
    listener: Listener, host: str, token: str | None, settings: dict[str, Any], begin: bytes
) -> None:
    address = f"{host}:{listener.port}"
    with Client(address, token, timeout=5, **settings) as client, pytest.raises(UnavailableError):
        client.describe()

    async def describe() -> None:
        async with aio.Client(address, token, timeout=5, **settings) as client:
            with pytest.raises(UnavailableError):
                await client.describe()

    asyncio.run(describe())
    assert len(listener.seen) >= 2 and {data[:3] for data in listener.seen} == {begin}


@pytest.mark.parametrize(("flags", "begin"), [([], TLS), (["--no-tls"], PLAIN)])
def test_the_command_keeps_a_token_of_the_environment_to_tls(
    listener: Listener,
    flags: list[str],
    begin: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SWIFTVIDEO_TOKEN", TOKEN)
    arguments = ["generate", "--server", f"0.0.0.0:{listener.port}", "--prompt", "a red circle", *flags]
    monkeypatch.setattr(sys, "argv", ["swiftvideo", *arguments, "--out", str(tmp_path / "x.mp4")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1 and "Traceback" not in capfd.readouterr().err
    assert listener.seen and {data[:3] for data in listener.seen} == {begin}


@pytest.mark.parametrize("make", [Client, aio.Client])
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tls": False, "root": "x.pem"}, "tls is False and PEM files"),
        ({"certificate": "x.pem"}, "belong together"),
        ({"key": "x.pem"}, "belong together"),
        ({"root": "nowhere.pem"}, r"root 'nowhere\.pem' cannot be read: No such file"),
        ({"root": grpc.__file__}, r"root '.*' has no line '-----BEGIN CERTIFICATE-----'"),
        ({"certificate": ROOTS, "key": ROOTS}, r"key '.*' has no line '-----BEGIN PRIVATE KEY-----'"),
        ({"token": ""}, "the token is empty"),
        ({"token": f"{TOKEN}\n"}, r"character 19 of the token is '\\n'"),
        ({"token": "tökén-0123456789"}, "character 2 of the token is 'ö'"),
    ],
)
def test_settings_that_cannot_be_are_refused_and_tokens_not_shown(
    make: Any, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(SettingsError, match=text) as caught:
        make("localhost:1", **settings)
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("make", [Client, aio.Client])
@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("", "address is '': give HOST:PORT"),
        (None, "address is None: give HOST:PORT"),
        ("localhost", "'localhost' has no port: give HOST:PORT"),  # gRPC takes 443
        ("::1", "'::1' has no port"),
        ("http://localhost:50051", "give HOST:PORT alone"),
        ("HTTPS://example.org", "give HOST:PORT alone"),
        ("localhost:99999", "port of 'localhost:99999' is '99999': use 1 to 65535"),  # gRPC takes 34463
        ("localhost:0", "is '0'"),
        ("localhost:http", "is 'http'"),
        ("[::1]:70000", "is '70000'"),
        ("dns:///localhost:-1", "is '-1'"),
        ("ipv4:127.0.0.1:1,127.0.0.2:65536", "is '65536'"),
    ],
)
def test_addresses_that_are_none_are_refused(make: Any, address: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        make(address)


@pytest.mark.parametrize(
    "address",
    [
        "localhost:1",
        "[::1]:65535",
        "dns:///example.org",
        "dns://[2001:db8::1]/host",
        "unix:/run/x:99999",
        "dns://8.8.8.8/host",
        "ipv6:[::1]:9",
    ],
)
def test_other_addresses_are_grpcs_affair(address: str) -> None:
    Client(address).close()


def test_where_no_server_is_the_error_says_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with (
        Client(f"127.0.0.1:{port}", timeout=1) as client,
        pytest.raises(UnavailableError, match="a server run"),
    ):
        client.describe()


def test_an_asynchronous_client_is_made_in_a_running_loop() -> None:
    with pytest.raises(UsageError, match="make it in an `async def`"):
        aio.Client("localhost:1")


@pytest.mark.parametrize("module", [connection, server])
def test_every_option_is_one_that_grpc_knows(module: ModuleType) -> None:
    """It passes others over without a word. Its library has the names that it looks for."""
    assert module.__file__ is not None
    names = re.findall(r'"(grpc\.[a-z0-9_.]+)"', Path(module.__file__).read_text(encoding="utf-8"))
    library = Path(cygrpc.__file__).read_bytes()
    assert len(names) > 5 and [name for name in names if name.encode() + b"\0" not in library] == []
