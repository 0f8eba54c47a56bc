"""OpenTelemetry spans, where its API is installed (extra "telemetry"); else nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Span:
    """One session's call."""

    def __init__(self, span: Any) -> None:
        self._span = span

    def note(self, **attributes: str | int | float) -> None:
        """Set attributes."""
        if self._span is not None:
            self._span.set_attributes({f"swiftvideo.{name}": value for name, value in attributes.items()})


@contextmanager
def call(name: str, **attributes: str | int | float) -> Iterator[Span]:
    """A span around a call."""
    try:
        from opentelemetry import trace
    except ModuleNotFoundError:
        yield Span(None)
        return
    with trace.get_tracer("swiftvideo").start_as_current_span(name) as inner:
        span = Span(inner)
        span.note(**attributes)
        yield span
