"""Exceptions to gRPC statuses: one table, and the refusals that are the service's own."""

from __future__ import annotations

from typing import Literal

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from swiftvideo.runtime import errors

TABLE: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (errors.PromptError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.SettingsError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ClosedError, grpc.StatusCode.ABORTED),
    (errors.UsageError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StoppedError, grpc.StatusCode.CANCELLED),
    (errors.OutOfMemoryError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.EngineUnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.EngineError, grpc.StatusCode.INTERNAL),
    (errors.IntegrityError, grpc.StatusCode.DATA_LOSS),
    (errors.SwiftVideoError, grpc.StatusCode.INTERNAL),
)
"""The first row whose type fits counts."""

RETRY_AFTER = "retry-after-ms"
"""Trailing metadata of a refusal that may not last: milliseconds."""
DETAILS = "grpc-status-details-bin"
"""Trailing metadata of every refusal: a google.rpc.Status, where gRPC's libraries look for it."""
DOMAIN = "swiftvideo.v1"
"""Of the reasons in `DETAILS`."""


Reason = Literal["sessions", "client", "load", "memory", "draining", "stuck"]
"""Of refusals whose status alone does not say why."""


class Refusal(Exception):
    """A call that ends with a status other than OK."""

    def __init__(
        self,
        code: grpc.StatusCode,
        text: str,
        retry_after: float | None = None,
        reason: Reason | None = None,
    ) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.retry_after = retry_after
        """Seconds, or None."""
        self.reason: str = reason or code.name.lower()
        """For the metrics, and in capitals for programs."""

    @property
    def trailers(self) -> tuple[tuple[str, str | bytes], ...]:
        """Trailing metadata: `DETAILS`, and `RETRY_AFTER` where trying again may help."""
        status = Status(code=self.code.value[0], message=self.text)
        parts = [ErrorInfo(reason=self.reason.upper(), domain=DOMAIN)]
        hint: tuple[tuple[str, str | bytes], ...] = ()
        if self.retry_after is not None:
            milliseconds = max(1, round(self.retry_after * 1000))
            delay = Duration()
            delay.FromMilliseconds(milliseconds)
            parts.append(RetryInfo(retry_delay=delay))
            hint = ((RETRY_AFTER, str(milliseconds)),)
        for part in parts:
            detail = Any()
            detail.Pack(part)
            status.details.append(detail)
        return (*hint, (DETAILS, status.SerializeToString()))

    async def end(self, context: grpc.aio.ServicerContext) -> None:
        """End a call of grpc.aio with it; never returns."""
        await context.abort(self.code, self.text, trailing_metadata=self.trailers)


def invalid(text: str) -> Refusal:
    """A message is wrong by itself."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)


def wrong_order(text: str) -> Refusal:
    """A message comes at the wrong time."""
    return Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)


def refusal(error: BaseException) -> Refusal:
    """The status of any exception. What is not ours is INTERNAL, without its text, which may hold secrets."""
    if isinstance(error, Refusal):
        return error
    for kind, code in TABLE:
        if isinstance(error, kind):
            retry = 5.0 if code is grpc.StatusCode.RESOURCE_EXHAUSTED else None
            return Refusal(code, str(error), retry)
    return Refusal(
        grpc.StatusCode.INTERNAL, f"the server failed with {type(error).__name__}: its log says more"
    )
