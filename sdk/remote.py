"""What both clients share: errors, chunks, and the state that lets a broken call go on. Needs grpcio and protobuf only.

ServiceError                a call failed (a SwiftVideoError); `code` is the gRPC status
├── RefusedError            the request is wrong (also a UsageError)
├── AuthenticationError     no token, an unknown or expired one, or one for another role
├── BusyError               no room: `retry_after` seconds say when to ask again
├── UnavailableError        no server, or one that shuts down
├── DeadlineError           it took longer than it may (also a TimeoutError)
├── SessionLostError        the session is gone or was ended by others
└── ServerError             the server or its engine failed
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import grpc

from swiftvideo.runtime.errors import SettingsError, SwiftVideoError, UsageError
from swiftvideo.runtime.geometry import Mode
from swiftvideo.v1 import generation_pb2 as pb

from .messages import EncodingName, check_text, filled, prompt_of
from .protocol import MAX_PROMPTS

SERVICE = "/swiftvideo.v1.GenerationService/"
NAMES: dict[int, EncodingName] = {pb.ENCODING_RAW: "raw", pb.ENCODING_JPEG: "jpeg", pb.ENCODING_H264: "h264"}
BACKOFF = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
"""Seconds before each reconnect; the last one repeats."""
CLOSING = 2.0
"""Seconds that the end of a session may take on the server."""


class ServiceError(SwiftVideoError):
    """A call failed."""

    def __init__(self, text: str, code: grpc.StatusCode, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.retry_after = retry_after
        """Seconds after which the server suggests to try again, or None."""


class RefusedError(ServiceError, UsageError):
    """The request is wrong."""


class AuthenticationError(ServiceError):
    """No token, an unknown or expired one, or one for another role."""


class BusyError(ServiceError):
    """The server has no room."""


class UnavailableError(ServiceError):
    """There is no server, or it shuts down."""


class DeadlineError(ServiceError, TimeoutError):
    """It took longer than it may."""


class SessionLostError(ServiceError):
    """The session is gone, or was ended by others."""


class ServerError(ServiceError):
    """The server or its engine failed."""


TABLE: dict[grpc.StatusCode, type[ServiceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RefusedError,
    grpc.StatusCode.FAILED_PRECONDITION: RefusedError,
    grpc.StatusCode.OUT_OF_RANGE: RefusedError,
    grpc.StatusCode.UNIMPLEMENTED: RefusedError,
    grpc.StatusCode.ALREADY_EXISTS: RefusedError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: BusyError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: SessionLostError,
    grpc.StatusCode.ABORTED: SessionLostError,
    grpc.StatusCode.CANCELLED: SessionLostError,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
}
"""One row for every status but OK."""


def error_of(code: grpc.StatusCode, details: str | None, trailers: Sequence[Any] | None) -> ServiceError:
    """The exception of a status."""
    hint = next((float(value) / 1000 for key, value in trailers or () if key == "retry-after-ms"), None)
    return TABLE[code](details or f"the call ended with {code.name} and no word why", code, hint)


def late(deadline: float | None) -> DeadlineError:
    """What a chunk that did not come in time means; the video goes on."""
    text = f"no chunk came within {deadline:g} s: ask again, or give a longer deadline"
    return DeadlineError(text, grpc.StatusCode.DEADLINE_EXCEEDED)


SAID = "grpc-status-details-bin"
"""Trailing metadata of every error that the server itself ends a call with (sdk/server/status.py)."""
BREAKS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
"""What else a call ends with that broke: where a proxy resets it or answers itself (HTTP 500), since its own connection
to the server is gone; and where grpc.aio writes to it in that moment, and loses its status."""
LATE = "Deadline Exceeded"
"""What gRPC says of an answer that did not come in time."""
CONNECTING = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
"""How the details of a call begin that found no server."""
REMEDIES = (
    (
        "WRONG_VERSION_NUMBER",
        "The server does not speak TLS: serve with a certificate, or allow clear text (--no-tls, tls=False)",
    ),
    (
        "Tls handshake failed",
        "Is the server's certificate for this address, and by the authority that is trusted (--root, root=)?",
    ),
    (
        "Socket closed",
        "The server hung up: does it want TLS (--tls, tls=True), another client certificate (--client-certificate), or "
        "has it too many connections?",
    ),
    ("", "Does a server run there, and may this machine connect to it?"),
)
"""What to do, by what the details of such a call say."""


def error_from(error: Any) -> ServiceError:
    """The exception of gRPC's own."""
    details = error.details() or ""
    if error.code() in BREAKS and all(key != SAID for key, _ in error.trailing_metadata() or ()):
        return UnavailableError(f"the connection broke: {details}", grpc.StatusCode.UNAVAILABLE)
    if error.code() is grpc.StatusCode.UNAVAILABLE and details.startswith(CONNECTING):
        remedy = next(remedy for sign, remedy in REMEDIES if sign in details)
        return UnavailableError(f"{details.strip()}. {remedy}", grpc.StatusCode.UNAVAILABLE)
    if details == LATE:
        details = "the server did not answer in time: is it well, or busy? A client's timeout says how long it may take"
    return error_of(error.code(), details, error.trailing_metadata())


@dataclass(frozen=True, slots=True, eq=False)
class RemoteChunk:
    """A few frames of a session's video."""

    index: int
    first_frame: int
    """First video frame."""
    frame_count: int
    payloads: Sequence[bytes] = field(repr=False)
    """As the encoding says: raw and h264 one, jpeg one per frame."""
    width: int
    height: int
    encoding: EncodingName
    prompt_id: str
    """As `prompt` returned it; empty for the first prompt."""
    window: int
    mode: Mode | Literal[""]
    """How a new prompt took over with this chunk; empty in all other chunks."""
    rho: float | None
    """Strength of that switch, 0 to 1, or None."""
    timings: dict[str, float]
    """Seconds: queue, engine, encode, and the engine's stages."""

    @property
    def frames(self) -> memoryview:
        """uint8 [n,H,W,3], RGB, without a copy: numpy.asarray(chunk.frames). Raises SettingsError unless raw."""
        if self.encoding != "raw":
            raise SettingsError(f"the frames are {self.encoding}: use payloads, or ask for encoding='raw'")
        return memoryview(self.payloads[0]).cast("B", (self.frame_count, self.height, self.width, 3))


class VideoState:
    """A session's state on the client's side: what to send first, what a message means, what to repeat after a cut.

    Not thread-safe.
    """

    def __init__(self, start: pb.Start) -> None:
        self.start = start
        self.started: pb.Started | None = None
        self.next_chunk = 0
        """First chunk that was not received."""
        self.presented = -1
        self.paused = False
        self.prompts: dict[str, pb.Prompt] = {prompt.id: prompt for prompt in start.prompts}
        """Recent ones by id, in order."""
        self.rejected: dict[str, str] = {}
        """Why prompts were refused, by id."""
        self.accepted: dict[str, pb.PromptAccepted] = {}
        """What the server said of prompts that it knows, by id: their order, and the first chunk made with each."""
        self.applied: dict[str, int] = {}
        """Chunk at which prompts took over, by id."""
        self.notices: list[pb.Notice] = []
        """The last few."""
        self.ended: pb.Ended | None = None
        self.on_notice: Callable[[pb.Notice], None] | None = None
        self._rho: float | None = None
        self._broke: float | None = None
        """When the outage began that is under way."""
        self._attempts = 0
        """Reconnects since the last chunk."""

    @classmethod
    def taken_up(cls, token: str, next_chunk: int) -> VideoState:
        """Of a session that another client began. Raises SettingsError for what cannot be sent."""
        check_text("resume token", token)
        reattach = filled(pb.Reattach, resume_token=token, next_chunk=next_chunk)
        state = cls(pb.Start())
        waiting = 1  # what counts until the server says how long: that it does
        state.started = pb.Started(resume_token=reattach.resume_token, linger_ms=waiting)
        state.next_chunk = reattach.next_chunk
        state.presented = state.next_chunk - 1
        return state

    @property
    def can_resume(self) -> bool:
        """Whether a broken call may go on."""
        return self.started is not None and self.started.linger_ms > 0

    def was_cut(self, error: ServiceError | None) -> bool:
        """Whether a call that ended with `error` left a session behind."""
        return self.can_resume and isinstance(error, UnavailableError)

    def opening(self) -> list[pb.GenerateRequest]:
        """The messages that begin a call."""
        if self.started is None:
            return [pb.GenerateRequest(start=self.start)]
        for name, prompt in self.prompts.items():  # one that nobody heard may apply to no chunk that is here
            known = self.accepted.get(name)
            prompt.heard_chunk = self.next_chunk if known is None else known.heard_chunk
        reattach = pb.Reattach(
            resume_token=self.started.resume_token,
            next_chunk=self.next_chunk,
            prompts=[self.prompts[name] for name in self._order() if name not in self.rejected],
        )
        # said again, because the cut may have taken either message
        hold = pb.GenerateRequest(pause=pb.Pause()) if self.paused else pb.GenerateRequest(resume=pb.Resume())
        return [pb.GenerateRequest(reattach=reattach), hold]

    def pause_before(self, error: ServiceError | None, patience: float) -> float:
        """Seconds until the next reconnect of a call that broke with `error`.

        An outage begins when a call breaks and ends when the server is heard again. It has one reconnect at least, and
        others for `patience` seconds. Raises `error`, or what stands for it, where reconnects are of no use or did not
        help.
        """
        now = time.monotonic()
        if self._broke is None:
            self._broke = now
        busy = isinstance(error, BusyError) and self.started is not None
        lasting = error is not None and not busy and not isinstance(error, UnavailableError)
        if lasting or not self.can_resume or now - self._broke > patience:
            self._broke = None
            raise error or UnavailableError("the server closed the call", grpc.StatusCode.UNAVAILABLE)
        self._attempts += 1
        return BACKOFF[min(self._attempts, len(BACKOFF)) - 1]

    def _order(self) -> list[str]:
        """Prompts as the server took them, then those that it has not spoken of.

        That is not always the order of asking: one that was refused for want of room, which the client never heard
        because of a cut, is taken when it comes again, after later ones.
        """
        known = sorted(self.accepted, key=lambda name: self.accepted[name].number)
        return [*known, *(name for name in self.prompts if name not in self.accepted)]

    def ask(self, text: str, at_chunk: int) -> pb.GenerateRequest:
        """A new prompt. Raises SettingsError for one that cannot be sent."""
        prompt = prompt_of(text, at_chunk)
        self.prompts[prompt.id] = prompt
        while len(self.prompts) > MAX_PROMPTS:
            oldest = next(iter(self.prompts))
            for known in (self.prompts, self.rejected, self.accepted, self.applied):
                known.pop(oldest, None)
        return pb.GenerateRequest(prompt=prompt)

    def credit(self) -> pb.GenerateRequest | None:
        """Credit for everything received, or None where it was given."""
        if self.presented >= self.next_chunk - 1:
            return None
        self.presented = self.next_chunk - 1
        return pb.GenerateRequest(credit=pb.Credit(presented_chunk=self.presented))

    def take(self, message: pb.GenerateResponse) -> RemoteChunk | None:
        """A message; the chunk if it is one that was not received before."""
        kind = message.WhichOneof("message")
        self._broke = None
        if kind == "chunk":
            self._attempts = 0
            return self._chunk(message.chunk)
        if kind == "started":
            self.started = message.started
            self.presented = self.next_chunk - 1
        elif kind == "prompt_accepted":
            accepted = message.prompt_accepted
            if accepted.id in self.prompts:  # those that are too old are not repeated
                self.accepted[accepted.id] = accepted
        elif kind == "prompt_applied":
            applied = message.prompt_applied
            self._rho = applied.rho if applied.HasField("rho") else None
            self.applied[applied.id] = applied.chunk_index
        elif kind == "prompt_rejected":
            self.rejected[message.prompt_rejected.id] = message.prompt_rejected.reason
        elif kind == "notice":
            self.notices = [*self.notices[-15:], message.notice]
            if self.on_notice is not None:
                self.on_notice(message.notice)
        elif kind == "ended":
            self.ended = message.ended
        return None

    def finished(self) -> bool:
        """Whether the session is over as it should. Raises SessionLostError where others ended it."""
        if self.ended is None:
            return False
        reason = pb.Ended.Reason
        if self.ended.reason in (reason.REASON_STOPPED, reason.REASON_COMPLETED):
            return True
        if self.ended.reason == reason.REASON_DRAINED and self.ended.resumable:
            return False
        raise SessionLostError(self.ended.text, grpc.StatusCode.ABORTED)

    def _chunk(self, chunk: pb.Chunk) -> RemoteChunk | None:
        if chunk.index != self.next_chunk:
            if chunk.index < self.next_chunk:
                return None
            raise ServerError(
                f"chunk {chunk.index} came and {self.next_chunk} was next: the server skipped some; report it",
                grpc.StatusCode.DATA_LOSS,
            )
        assert self.started is not None
        ahead = (prompt.id for prompt in self.start.prompts)
        if chunk.index == 0 and any(id in self.prompts and id not in self.accepted for id in ahead):
            raise RefusedError(
                "the server has not heard the prompts that are known ahead: it is older than this client; say them "
                "with the video's `prompt`",
                grpc.StatusCode.UNIMPLEMENTED,
            )
        self.next_chunk += 1
        geometry, encoding = self.started.geometry, self.started.encoding
        timings = chunk.timings
        took = {"queue": timings.queue_ms, "engine": timings.engine_ms, "encode": timings.encode_ms}
        took |= timings.stages_ms
        rho, self._rho = (self._rho if chunk.mode else None), None
        return RemoteChunk(
            index=chunk.index,
            first_frame=chunk.first_frame,
            frame_count=chunk.frame_count,
            payloads=tuple(chunk.payloads),  # protobuf's container copies at every look
            width=geometry.width,
            height=geometry.height,
            encoding=NAMES[encoding],
            prompt_id=chunk.prompt_id,
            window=chunk.window,
            mode=cast(Mode, chunk.mode),
            rho=rho,
            timings={stage: milliseconds / 1000 for stage, milliseconds in took.items()},
        )
