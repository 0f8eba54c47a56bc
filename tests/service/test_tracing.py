"""Spans of calls: what is in them, whose trace they are part of, and what OTEL_* variables bring about."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from swiftvideo.sdk.client import Client
from swiftvideo.sdk.server import tracing

from .harness import ROOT, ServerProcess

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: the provider of spans is one for a whole process."""
    return subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "GRPC_VERBOSITY": "NONE", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


SPAN = f"""
from swiftvideo.sdk.server import tracing
end = tracing.configure()
metadata = [("traceparent", "00-{TRACE}-{PARENT}-01"), ("x-bin", b"1")]
with tracing.Tracer().call("Generate", metadata, client="ann") as span:
    span.note(session="s", chunks=3)
end()
print("ended", flush=True)
import os; os._exit(0)
"""


class Collector:
    """Takes spans over OTLP."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service

        self.got: list[Any] = []
        self._arrived = threading.Event()

        def export(request: Any, _: Any) -> Any:
            self.got.append(request)
            self._arrived.set()
            return service.ExportTraceServiceResponse()

        handler = grpc.unary_unary_rpc_method_handler(
            export,
            service.ExportTraceServiceRequest.FromString,
            service.ExportTraceServiceResponse.SerializeToString,
        )
        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._pool = futures.ThreadPoolExecutor(1)
        self._server = grpc.server(self._pool)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"Export": handler}),)
        )
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def spans(self) -> tuple[Any, list[Any]]:
        """The resource and the spans of the first request."""
        assert self._arrived.wait(10)
        (found,) = self.got[0].resource_spans
        return found.resource, list(found.scope_spans[0].spans)

    def close(self) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def attributes(span: Any) -> dict[str, Any]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_a_span_goes_to_the_collector_that_the_environment_names(collector: Collector) -> None:
    found = run(SPAN, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_SERVICE_NAME="studio")
    assert found.returncode == 0, found.stderr
    resource, (span,) = collector.spans()
    assert "studio" in {item.value.string_value for item in resource.attributes}
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("Generate", TRACE, PARENT)
    assert span.kind == span.SPAN_KIND_SERVER
    assert attributes(span) == {"swiftvideo.client": "ann", "swiftvideo.session": "s", "swiftvideo.chunks": 3}


def test_a_server_that_ends_has_sent_its_last_spans(
    collector: Collector, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    with ServerProcess(small_bundle) as server:
        with Client(server.address) as client, client.generate("w1", chunks=2) as video:
            list(video)
        server.terminate()
    _, (span,) = collector.spans()
    noted = attributes(span)
    assert (noted["swiftvideo.client"], noted["swiftvideo.chunks"]) == ("anonymous", 2)
    assert noted["swiftvideo.reason"] == "completed"


@pytest.mark.parametrize(
    "name,value",
    [
        ("OTEL_PYTHON_TRACER_PROVIDER", "nonsense"),
        ("OTEL_TRACES_EXPORTER", "nonsense"),
    ],
)
def test_variables_that_are_wrong_are_said_at_the_start(name: str, value: str) -> None:
    found = run(SPAN, **{name: value})
    assert "SettingsError: OpenTelemetry cannot be set up" in found.stderr
    assert "correct the OTEL_* variables" in found.stderr


def test_nothing_is_exported_unless_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.ASKING:
        monkeypatch.delenv(name, raising=False)
    tracing.configure()()
    with tracing.Tracer().call("Generate", (), client="ann") as span:
        span.note(chunks=1)


def test_a_collector_that_is_not_there_does_not_hold_up_the_end() -> None:
    found = run(SPAN, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")
    assert found.stdout == "ended\n" and found.returncode == 0
