"""What a server says when it starts, and in its log: one line for what cannot be, JSON for the rest."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.remote import AuthenticationError
from swiftvideo.sdk.server import auth
from swiftvideo.sdk.server.config import ServerConfig

from .harness import ROOT, ServerProcess
from .test_access import CLIENT, make_pki, write_tokens


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"grace": float("inf")}, "grace is inf"),
        ({"grace": float("nan")}, "grace is nan"),
        ({"grace": 1e300}, "grace is 1e.300: use a number of at most"),
        ({"watchdog": float("nan")}, "watchdog is nan"),
        ({"max_load": float("nan")}, "max_load is nan"),
        ({"snapshot_space": float("nan")}, "snapshot_space is nan"),
        ({"snapshot_age": 0.0}, "snapshot_age is 0"),
        ({"metrics_port": 70_000}, "metrics_port is 70000"),
        ({"metrics_port": -5}, "metrics_port is -5"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        ServerConfig(**fields)


def test_an_address_of_ip_version_6_is_said_with_brackets() -> None:
    assert ServerConfig(host="::1", port=0).at(50103) == "[::1]:50103"


@pytest.mark.parametrize(
    "code,arguments,text",
    [
        (2, ["--log-level", "foo"], "log level is 'FOO'"),
        (1, ["--metrics-port", "{taken}"], "metrics cannot be served on 127.0.0.1, port {taken}"),
        (
            1,
            ["--metrics-port", "0", "--metrics-host", "nosuch.invalid"],
            "metrics cannot be served on nosuch.invalid",
        ),
        (1, ["--host", "nosuch.invalid", "--insecure"], "host 'nosuch.invalid' is no address"),
        (1, ["--port", "{taken}"], "is another server there"),
        (1, ["--snapshots", "/etc/passwd"], "snapshots '/etc/passwd' cannot be made"),
        (2, ["--tokens", "/etc/nothing"], "tokens: '/etc/nothing' cannot be read: No such file"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line_and_is_2_where_trying_again_is_of_no_use(
    server: ServerProcess, code: int, arguments: list[str], text: str
) -> None:
    taken = str(server.port)
    found = subprocess.run(
        [sys.executable, "-c", "from swiftvideo.sdk.cli import main; main()", "serve", "--port", "0"]
        + [argument.format(taken=taken) for argument in arguments],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [line for line in found.stderr.splitlines() if not line.startswith("{")]
    assert found.returncode == code and len(lines) == 1, found.stderr
    assert lines[0].startswith("swiftvideo: ") and text.format(taken=taken) in lines[0]


def test_refused_callers_are_in_the_log_and_do_not_fill_it(small_bundle: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens")
    with ServerProcess(small_bundle, "--tokens", str(tokens)) as running:
        with Client(running.address, "nobody-knows-this-one") as client:
            for _ in range(30):
                with pytest.raises(AuthenticationError):
                    client.describe()
            time.sleep(1.1)
            with pytest.raises(AuthenticationError):
                client.describe()
        with Client(running.address, CLIENT) as client, client.generate("w1", chunks=1) as video:
            list(video)
        while not any("session ended" in line for line in running.log):
            time.sleep(0.02)
        lines = [json.loads(line) for line in running.log]
    refused = [line for line in lines if "refused" in line["message"]]
    assert 2 <= len(refused) < 10 and sum(line["left_out"] + 1 for line in refused) == 31
    assert all(line["level"] == "warning" and line["peer"].startswith("ipv") for line in refused)
    for message in ("session started", "session ended"):
        assert [line["peer"][:3] for line in lines if line["message"] == message] == ["ipv"]


LOGGING = """
import asyncio, logging, warnings
from swiftvideo.sdk.server import logs
logs.configure("INFO")
async def main():
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.1)
asyncio.run(main())
warnings.warn("old")
logging.getLogger("swiftvideo.x").info("ours")
logging.getLogger("other").info("not seen")
"""


def test_every_line_of_the_log_is_json_whoever_writes_it() -> None:
    found = subprocess.run(
        [sys.executable, "-c", LOGGING], check=True, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    lines = [json.loads(line) for line in found.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["asyncio", "py.warnings", "swiftvideo.x"]


@pytest.mark.parametrize("home", ["", "/dev/null/nowhere"])
def test_a_server_leaves_nothing_at_home_and_its_log_is_json(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    monkeypatch.setenv("HOME", home or str(tmp_path))
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    with ServerProcess(small_bundle) as running:
        running.terminate()
    assert {json.loads(line)["level"] for line in running.log} == {"info"}
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "abstract",
    [
        False,
        pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux has them alone")),
    ],
)
def test_systemd_is_told_when_the_server_serves(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,  # a socket's name has 103 bytes at most on macOS
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as waiting,
    ):
        address = f"@{folder}" if abstract else f"{folder}/notify"
        waiting.bind(address.replace("@", "\0"))
        waiting.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with ServerProcess(small_bundle) as running:
            assert waiting.recv(100) == b"READY=1"
            running.terminate()
            assert running.process.returncode == 0, "it was ready for signals, too"


def test_a_server_that_nobody_can_be_told_of_serves(
    small_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with ServerProcess(small_bundle) as running:
        while not any("cannot be told" in line for line in running.log):
            time.sleep(0.02)
        with Client(running.address) as client, client.generate("w1", chunks=1) as video:
            assert len(list(video)) == 1


def test_a_key_of_another_certificate_is_refused_at_the_start_and_in_a_rotation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says it once, not at every handshake, and says when all is well again."""
    caplog.set_level("INFO")
    pki, other = make_pki(tmp_path / "a"), make_pki(tmp_path / "b")
    with pytest.raises(SettingsError, match="cannot be used together"):
        auth.credentials(ServerConfig(certificate=pki.certificate, key=other.key))
    certificates = auth._Certificates(ServerConfig(certificate=pki.certificate, key=pki.key))
    begun, key = certificates.current, pki.key.read_bytes()
    pki.key.write_bytes(other.key.read_bytes())
    assert [certificates.fetch() for _ in range(3)] == [None] * 3
    pki.certificate.unlink()
    assert [certificates.fetch() for _ in range(3)] == [None] * 3 and certificates.current is begun
    pki.certificate.write_bytes(other.certificate.read_bytes())
    assert certificates.fetch() is certificates.current is not begun
    assert certificates.fetch() is None
    pki.key.write_bytes(key)
    assert certificates.fetch() is None
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in said] == ["ERROR", "ERROR", "INFO", "ERROR"]
    assert "cannot be used together" in said[0][1] and "cannot be read" in said[1][1]
    assert said[2][1] == "TLS: read again" and said[3] == said[0]
