"""OpenTelemetry spans, where the extra "telemetry" is installed; else nothing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from swiftvideo.runtime.errors import SettingsError

ASKING = ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Variables of which one must be there for spans to be exported."""
LAST = 3.0
"""Seconds in which the last spans must have been exported."""


def configure() -> Callable[[], None]:
    """Set up what OTEL_* variables ask for, as OpenTelemetry's SDK reads them; its end, for the end of the process.

    Raises SettingsError where they are wrong.
    """
    if not any(os.environ.get(name) for name in ASKING):
        return lambda: None
    try:
        from opentelemetry import trace
        from opentelemetry.sdk._configuration import _OTelSDKConfigurator
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"OTEL_* variables ask for spans and {error.name} is missing: pip install 'swiftvideo[telemetry]'"
        ) from error
    os.environ.setdefault("OTEL_TRACES_EXPORTER", "otlp")
    with _explained():
        configurator: Any = _OTelSDKConfigurator
        configurator().configure()
    provider: Any = trace.get_tracer_provider()

    def end() -> None:
        thread = threading.Thread(target=provider.shutdown, name="swiftvideo-spans", daemon=True)
        thread.start()
        thread.join(LAST)  # a collector that does not answer must not keep the server from ending

    return end


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever entry points and exporters raise
        raise SettingsError(
            f"OpenTelemetry cannot be set up ({type(error).__name__}: {error}): correct the OTEL_* variables"
        ) from error


class Span:
    """One session's call."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def note(self, **attributes: str | int | float) -> None:
        """Set attributes."""
        if self._span is not None:
            self._span.set_attributes({f"swiftvideo.{name}": value for name, value in attributes.items()})


class Tracer:
    """Makes spans by the provider that is set. Raises SettingsError where OTEL_* variables name a wrong one."""

    def __init__(self) -> None:
        self._tracer: Any = None
        try:
            from opentelemetry import propagate, trace
        except ModuleNotFoundError:
            return
        with _explained():
            self._tracer = trace.get_tracer("swiftvideo")
        self._extract = propagate.extract
        self._kind = trace.SpanKind.SERVER

    @contextmanager
    def call(
        self, name: str, metadata: Iterable[tuple[str, str | bytes]], **attributes: str | int | float
    ) -> Iterator[Span]:
        """A span around a call, part of the trace that its metadata (traceparent) tells of."""
        if self._tracer is None:
            yield Span(None)
            return
        context = self._extract({key: value for key, value in metadata if isinstance(value, str)})
        with self._tracer.start_as_current_span(name, context=context, kind=self._kind) as inner:
            span = Span(inner)
            span.note(**attributes)
            yield span
