"""Who may call, and what a wrong call gets: a status and a sentence."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.sdk import cli, remote
from swiftvideo.sdk.client import Client
from swiftvideo.sdk.protocol import MAX_REQUEST
from swiftvideo.sdk.server.auth import TokenFile, identify
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.status import Refusal
from swiftvideo.v1 import generation_pb2 as pb

from .harness import METHOD, ServerProcess, credit, generate, prompt, start

CLIENT, OPERATOR, EXPIRED = "client-token-0123456789", "operator-token-0123456789", "expired-token-0123456789"


@dataclass
class Pki:
    """PEM files."""

    root: Path
    certificate: Path
    key: Path
    client: Path
    client_key: Path
    stranger: Path
    stranger_key: Path


def make_pki(folder: Path) -> Pki:
    """An authority, a server, a client, and a client of another authority."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def named(name: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    def issue(name: str, authority: tuple[Any, Any] | None) -> tuple[Any, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        alternatives = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(name) if authority is None else authority[0].subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        )
        return builder.sign(key if authority is None else authority[1], hashes.SHA256()), key

    def save(name: str, pair: tuple[Any, Any]) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(pair[0].public_bytes(serialization.Encoding.PEM))
        key.write_bytes(
            pair[1].private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key

    folder.mkdir(parents=True, exist_ok=True)
    authority = issue("authority", None)
    root, _ = save("root", authority)
    stranger = issue("stranger", issue("elsewhere", None))
    return Pki(
        root,
        *save("server", issue("server", authority)),
        *save("client", issue("client", authority)),
        *save("stranger", stranger),
    )


def write_tokens(path: Path) -> Path:
    """Three tokens: a client's, an operator's, and one that has expired."""
    path.write_text(
        f"# name role token expires\n\nann client {CLIENT}\nola operator {OPERATOR} 2999-01-01T00:00:00+00:00\n"
        f"eve client {EXPIRED} 2020-01-01T00:00:00\n"
    )
    return path


@pytest.fixture(scope="module")
def guarded(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that wants tokens, with reflection on."""
    tokens = write_tokens(tmp_path_factory.mktemp("tokens") / "tokens")
    arguments = ("--tokens", str(tokens), "--max-load", "0", "--reflection", "--max-sessions-per-client", "2")
    with ServerProcess(small_bundle, *arguments) as server:
        yield server


def every_method() -> list[tuple[str, bool]]:
    """Paths of all calls of all services that the server has, from their descriptors; whether they take a stream."""
    from grpc_reflection.v1alpha import reflection_pb2

    files = (pb.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    return [
        (f"/{service.full_name}/{method.name}", method.client_streaming)
        for file in files
        for service in file.services_by_name.values()
        for method in service.methods
    ]


@pytest.mark.parametrize("path,streaming", every_method())
@pytest.mark.parametrize(
    "header", [None, "Bearer nobody-knows-this-one", "Basic abc", f"Bearer {EXPIRED}", "Bearer"]
)
def test_every_call_refuses_without_a_valid_token(
    guarded: ServerProcess, path: str, streaming: bool, header: str | None
) -> None:
    metadata = () if header is None else (("authorization", header),)
    with grpc.insecure_channel(guarded.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            if streaming:
                list(channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=20))
            else:
                channel.unary_unary(path)(b"", metadata=metadata, timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert ("expired" if header and EXPIRED in header else "token") in caught.value.details()


def test_health_needs_no_token(guarded: ServerProcess) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(guarded.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "swiftvideo.v1.GenerationService"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_operators_see_and_stop_sessions_and_clients_do_not(guarded: ServerProcess) -> None:
    with Client(guarded.address, CLIENT) as client, Client(guarded.address, OPERATOR) as operator:
        with pytest.raises(remote.AuthenticationError, match="operators"):
            client.sessions()
        with client.generate("w1 w2", credits=1) as video:
            next(video)
            (session,) = operator.sessions()
            assert (session.session_id, session.client, session.attached) == (video.session_id, "ann", True)
            operator.stop_session(session.session_id)
            with pytest.raises(remote.SessionLostError, match="operator"):
                for _ in video:
                    pass
        with pytest.raises(remote.SessionLostError, match="no session has the id"):
            operator.stop_session("nonsense")


def test_a_client_has_no_more_than_its_sessions_and_cannot_take_anothers(guarded: ServerProcess) -> None:
    guarded.idle()
    with Client(guarded.address, CLIENT) as client, Client(guarded.address, OPERATOR) as other:
        with client.generate("w1") as first, client.generate("w1") as second:
            next(first), next(second)
            with (
                pytest.raises(remote.BusyError, match="ann has 2 sessions") as caught,
                client.generate("w1") as third,
            ):
                next(third)
            assert caught.value.retry_after is not None and caught.value.retry_after > 0
            with other.generate("w1") as theirs:
                next(theirs)
                theirs.state.started = first.state.started
                theirs._connect()
                with pytest.raises(remote.SessionLostError, match="resume token"):
                    next(theirs)


WRONG_ORDER = [
    ([credit(0)], "FAILED_PRECONDITION", "send start"),
    ([prompt("a", "w1")], "FAILED_PRECONDITION", "send start"),
    ([pb.GenerateRequest()], "INVALID_ARGUMENT", "empty"),
    ([start(), start()], "FAILED_PRECONDITION", "after the session has begun"),
    ([start(), credit(1 << 40)], "INVALID_ARGUMENT", "credit for chunk"),
    ([start(credits=0)], "INVALID_ARGUMENT", "start.credits is 0"),
    ([start(credits=99)], "INVALID_ARGUMENT", "start.credits is 99"),
    ([start("")], "INVALID_ARGUMENT", "empty"),
    ([start("nonsense")], "INVALID_ARGUMENT", "does not know 'nonsense'"),
    ([start("w1", encoding=77)], "INVALID_ARGUMENT", "encoding is 77"),
    (
        [start("w1", policy=pb.PolicySettings(bridge=pb.Bridge(decay=2.0)))],
        "INVALID_ARGUMENT",
        "bridge.decay is 2.0",
    ),
    ([start(), prompt("", "w1")], "INVALID_ARGUMENT", "prompt's id"),
    ([pb.GenerateRequest(reattach=pb.Reattach(resume_token="x"))], "NOT_FOUND", "resume token"),
    ([start("w1 " * 120_000)], "RESOURCE_EXHAUSTED", str(MAX_REQUEST)),
    ([start("w1 " * 2000)], "INVALID_ARGUMENT", "6000 bytes"),
]


@pytest.mark.parametrize(
    "messages,code,text", WRONG_ORDER, ids=[f"{item[1]}-{item[2]}" for item in WRONG_ORDER]
)
def test_wrong_messages_get_the_right_status_and_a_sentence(
    server: ServerProcess, messages: list[pb.GenerateRequest], code: str, text: str
) -> None:
    async def talk() -> tuple[str, str]:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generate(channel, timeout=30)
            try:
                for message in messages:
                    await call.write(message)
                while await call.read() is not grpc.aio.EOF:
                    pass
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass
            return (await call.code()).name, await call.details()

    found, details = asyncio.run(talk())
    assert found == code and text in details


@pytest.mark.parametrize(
    "fields,text",
    [
        ({"host": "0.0.0.0"}, "host '0.0.0.0' is not a loopback address and TLS and tokens are missing"),
        ({"host": " ", "insecure": True}, "host is empty"),
        ({"host": "example.org", "tokens": Path("t")}, "TLS are missing"),
        ({"host": "::", "certificate": Path("c"), "key": Path("k")}, "tokens are missing"),
        ({"certificate": Path("c")}, "both a certificate and its key"),
        ({"client_ca": Path("c")}, "client_ca without a certificate"),
        ({"port": 70_000}, "port is 70000"),
        ({"max_sessions": 0}, "max_sessions is 0"),
        ({"max_load": -1.0}, "max_load is -1.0"),
        ({"grace": -1.0}, "grace is -1.0"),
    ],
)
def test_unsafe_or_impossible_settings_are_refused(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        ServerConfig(**fields)


def test_a_server_without_tls_is_said_to_be_one(server: ServerProcess) -> None:
    with Client(server.address, tls=True, timeout=5) as client:
        with pytest.raises(remote.UnavailableError, match="does not speak TLS"):
            client.describe()


def test_loopback_needs_nothing_and_insecure_allows_anything() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "[::1]"):
        assert ServerConfig(host=host).loopback
    assert ServerConfig(host="0.0.0.0", insecure=True).address == "0.0.0.0:50051"
    assert ServerConfig(host="::1").address == "[::1]:50051"


def test_tokens_are_read_again_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tokens(tmp_path / "tokens")
    tokens = TokenFile(path)
    assert tokens.identify(CLIENT).name == "ann" and tokens.identify(OPERATOR).operator
    path.write_text("bob client another-token-0123456789\n")
    assert tokens.identify("another-token-0123456789").name == "bob"
    with pytest.raises(Refusal, match="not known"):
        tokens.identify(CLIENT)
    path.write_text("nonsense\n")
    for _ in range(3):
        assert tokens.identify("another-token-0123456789").name == "bob" and tokens.names() == {"bob"}
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    write_tokens(path)
    assert tokens.identify(CLIENT).name == "ann"
    away = path.rename(tmp_path / "away")
    for _ in range(3):
        assert tokens.identify(CLIENT).name == "ann"
    caplog.set_level("INFO")
    away.rename(path)
    for _ in range(3):
        assert tokens.identify(CLIENT).name == "ann"
    assert [record.levelname for record in caplog.records].count("ERROR") == 2
    assert [record.getMessage() for record in caplog.records][2:] == ["tokens: as it was before"]
    with pytest.raises(Refusal, match="wants a token"):
        identify(tokens, [("authorization", b"binary")])


@pytest.mark.parametrize(
    "text,message",
    [
        ("", "no token"),
        ("ann king token-0123456789abc\n", "use NAME"),
        ("ann client short\n", "5 characters"),
        ("ann client token-0123456789abc tomorrow\n", "use a moment"),
    ],
)
def test_a_wrong_token_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(SettingsError, match=message):
        TokenFile(tmp_path / "tokens")
    with pytest.raises(SettingsError, match="cannot be read"):
        TokenFile(tmp_path / "nothing")


def test_mutual_tls_and_a_certificate_that_changes_while_serving(small_bundle: Path, tmp_path: Path) -> None:
    pki, later = make_pki(tmp_path / "a"), make_pki(tmp_path / "b")
    tokens = write_tokens(tmp_path / "tokens")
    arguments = (
        "--host",
        "0.0.0.0",
        "--tokens",
        str(tokens),
        "--certificate",
        str(pki.certificate),
        "--key",
        str(pki.key),
    )
    with ServerProcess(small_bundle, *arguments, "--client-ca", str(pki.root)) as server:

        def describe(root: Path, certificate: Path | None, key: Path | None) -> str:
            with Client(
                server.address, CLIENT, root=root, certificate=certificate, key=key, timeout=5
            ) as client:
                return client.describe().engine

        assert describe(pki.root, pki.client, pki.client_key) == "onnxruntime"
        command = ["generate", "--server", server.address, "--token", CLIENT, "--root", pki.root]
        command += ["--client-certificate", pki.client, "--client-key", pki.client_key]
        command += ["--prompt", "w1 w2", "--seconds", "1s", "--out", tmp_path / "x.mp4"]
        made = CliRunner().invoke(cli.app, [str(item) for item in command], catch_exceptions=False)
        assert made.exit_code == 0 and f"with onnxruntime on {server.address}" in made.output
        for certificate, key in ((None, None), (pki.stranger, pki.stranger_key)):
            with pytest.raises(remote.UnavailableError, match="another client certificate"):
                describe(pki.root, certificate, key)
        with pytest.raises(remote.UnavailableError, match="by the authority that is trusted"):
            describe(later.root, pki.client, pki.client_key)
        program = "from swiftvideo.sdk.cli import main; main()"
        stranger = [
            sys.executable,
            "-c",
            program,
            *(later.root if item == pki.root else item for item in command),
        ]
        said = subprocess.run(stranger, check=False, capture_output=True, text=True, timeout=120)
        assert said.returncode == 1 and len(said.stderr.splitlines()) == 1, "gRPC has lines of its own"
        with Client(server.address, CLIENT, timeout=5) as plain, pytest.raises(remote.UnavailableError):
            plain.describe()
        time.sleep(0.01)  # another time stamp
        for old, new in ((pki.key, later.key), (pki.certificate, later.certificate), (pki.root, later.root)):
            old.write_bytes(new.read_bytes())
        assert describe(later.root, later.client, later.client_key) == "onnxruntime"
        with pytest.raises(remote.UnavailableError):
            describe(later.root, pki.client, pki.client_key)
    assert server.log and all(
        line.startswith("{") for line in server.log
    )  # gRPC's lines on handshakes are no JSON


def test_every_status_has_an_exception() -> None:
    assert set(remote.TABLE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    error = remote.error_of(grpc.StatusCode.RESOURCE_EXHAUSTED, None, [("retry-after-ms", "1500")])
    assert (
        isinstance(error, remote.BusyError)
        and error.retry_after == 1.5
        and "RESOURCE_EXHAUSTED" in str(error)
    )


@pytest.mark.parametrize("code", remote.BREAKS)
def test_a_status_that_is_not_the_server_s_word_is_a_broken_connection(code: grpc.StatusCode) -> None:
    """UNKNOWN is an HTTP status 500 of a proxy, say."""
    nothing = grpc.aio.Metadata()
    said = grpc.aio.Metadata((remote.SAID, b""))
    broken = remote.error_from(grpc.aio.AioRpcError(code, nothing, nothing, "it went"))
    assert isinstance(broken, remote.UnavailableError) and "it went" in str(broken)
    assert not isinstance(
        remote.error_from(grpc.aio.AioRpcError(code, nothing, said)), remote.UnavailableError
    )


def test_reflection_is_off_unless_asked_for(small_bundle: Path, server: ServerProcess) -> None:
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    assert METHOD.startswith("/swiftvideo")
    with grpc.insecure_channel(server.address) as channel:
        call = channel.stream_stream(path)(iter([b"\x3a\x01*"]), timeout=20)
        assert b"GenerationService" in next(call)
        call.cancel()
    with ServerProcess(small_bundle) as closed, grpc.insecure_channel(closed.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(path)(iter([b"\x3a\x01*"]), timeout=20))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
