"""The four calls of swiftvideo.v1.GenerationService."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from swiftvideo.runtime.tokenizer import SMALL_VOCABULARY
from swiftvideo.v1 import generation_pb2 as pb

from . import payload, settings
from .auth import Identity, TokenFile, identify
from .first import first_message, malformed, only_message, parser, serialize
from .manager import SessionManager
from .outbox import Outbox
from .reattach import reattach
from .session import ServedSession
from .status import Refusal, invalid, refusal, wrong_order
from .tracing import Tracer

log = logging.getLogger(__name__)

NAME = "swiftvideo.v1.GenerationService"
CLOSING = 0.5
"""Seconds between the end of a client's messages and the end of its session. A call that breaks ends its messages too,
and is cancelled a moment later: that is no wish to stop."""

HEARING = 3
"""Turns of the event loop before a write, in which a cancel that has arrived is heard: a write to a call that is gone
fails, and a failed one is not freed."""


class GenerationService:
    """Handlers over a manager's sessions."""

    def __init__(self, manager: SessionManager, tokens: TokenFile | None, version: str) -> None:
        self._manager = manager
        self._tokens = tokens
        self._version = version
        self._tracer = Tracer()
        self._tasks: set[asyncio.Task[None]] = set()

    def handler(self) -> Any:
        """For `grpc.aio.Server.add_generic_rpc_handlers`.

        Responses of Generate are bytes already.
        """
        methods = {
            "Generate": grpc.stream_stream_rpc_method_handler(
                self._refusing(self.generate), parser(pb.GenerateRequest), bytes
            )
        }
        for name, work, request in (
            ("Describe", self.describe, pb.DescribeRequest),
            ("ListSessions", self.list_sessions, pb.ListSessionsRequest),
            ("StopSession", self.stop_session, pb.StopSessionRequest),
        ):
            methods[name] = grpc.stream_unary_rpc_method_handler(
                self._refusing(self._reading(work)), parser(request), serialize
            )
        return grpc.method_handlers_generic_handler(NAME, methods)

    def refused(self, refused: Refusal) -> None:
        """Count a refusal."""
        self._manager.metrics.rejects.labels(reason=refused.reason).inc()

    def _refusing(
        self, work: Callable[[Any, Any, Identity], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        """Identify the caller; exceptions become statuses."""

        async def handle(messages: Any, context: Any) -> Any:
            try:
                identity = identify(self._tokens, context.invocation_metadata())
                return await work(messages, context, identity)
            except (grpc.aio.AbortError, grpc.aio.BaseError):  # ours, or the client has gone
                raise
            except Exception as error:
                refused = refusal(error)
                if refused.code is grpc.StatusCode.INTERNAL:
                    log.exception("a call failed")
                self.refused(refused)
            return await refused.end(context)

        return handle

    def _reading(
        self, work: Callable[[Any, Any, Identity], Awaitable[Any]]
    ) -> Callable[[Any, Any, Identity], Awaitable[Any]]:
        """Read the message of a call that takes one."""

        async def handle(_: Any, context: Any, identity: Identity) -> Any:
            request = await only_message(context, self._manager.config.start_timeout)
            return await work(request, context, identity)

        return handle

    # -- Generate ------------------------------------------------------------------------------------------------

    async def generate(self, _: Any, context: Any, identity: Identity) -> None:
        """One call of a session: from start or reattach until it ends or breaks."""
        metadata = context.invocation_metadata() or ()
        with self._tracer.call("Generate", metadata, client=identity.name) as span:
            session, outbox = await self._begin(context, identity)
            try:
                span.note(session=session.id)
                self._run(self._read(context, session, outbox), f"read {session.id}")
                writer = self._run(self._write(context, session, outbox), f"write {session.id}")
                await asyncio.shield(writer)
            finally:
                self._manager.detach(session, outbox)
                outbox.close()
                span.note(chunks=session.delivered, reason=session.reason or "detached")
            if isinstance(outbox.outcome, Refusal):
                raise outbox.outcome

    async def _begin(self, context: Any, identity: Identity) -> tuple[ServedSession, Outbox]:
        first = await first_message(context, self._manager.config.start_timeout)
        if first is grpc.aio.EOF:
            raise wrong_order("the call closed before its first message: send start or reattach")
        kind = _kind(first)
        if kind == "start":
            return await self._manager.start(identity.name, first.start, context.peer())
        if kind == "reattach":
            return await reattach(self._manager, identity.name, first.reattach, context.peer())
        raise wrong_order(f"the first message is {kind}: send start or reattach first")

    def _run(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Read or write a call, in a task that ends by itself when the call has ended.

        It is never cancelled: grpc.aio frees an operation only where somebody awaits its end (grpc/grpc issue 43360).
        """
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _write(self, context: Any, session: ServedSession, outbox: Outbox) -> None:
        """Send what the outbox has, until its end or the call's."""
        try:
            while (message := await outbox.get()) is not None:
                for _ in range(HEARING):
                    await asyncio.sleep(0)
                if outbox.closed:
                    return
                await context.write(message)
        except grpc.aio.BaseError:
            log.info("the client went", extra={"session": session.id})

    async def _read(self, context: Any, session: ServedSession, outbox: Outbox) -> None:
        """Take messages until the call ends. What goes wrong ends the session."""
        try:
            while session.outbox is outbox:  # a read from a call that has ended would be lost, too
                message = await context.read()
                if message is grpc.aio.EOF:
                    self._manager.loop.call_later(CLOSING, self._closed, session, outbox)
                    return
                if session.outbox is outbox:
                    await self._take(session, message)
                    await outbox.room()
        except grpc.aio.BaseError:
            return  # the call broke; the writer's end detaches the session
        except Exception as error:  # noqa: BLE001 - the session's end carries it to the client
            if session.outbox is outbox and not session.over:
                self._manager.fail(session, error)

    def _closed(self, session: ServedSession, outbox: Outbox) -> None:
        if session.outbox is outbox:
            self._manager.end(session, pb.Ended.REASON_STOPPED, "the client closed its side")

    async def _take(self, session: ServedSession, message: Any) -> None:
        """Do what one message asks for."""
        kind = _kind(message)
        manager = self._manager
        if kind == "prompt":
            message.prompt.heard_chunk = 0  # a matter of reattaching only
            await manager.prompt(session, message.prompt)
        elif kind == "credit":
            session.credit(message.credit.presented_chunk)
            if session.complete:
                manager.end(
                    session, pb.Ended.REASON_COMPLETED, f"all {session.terms.chunks} chunks were presented"
                )
        elif kind in ("pause", "resume"):
            session.paused = kind == "pause"
            session.refresh()
        elif kind == "stop":
            manager.end(session, pb.Ended.REASON_STOPPED, "the client asked for it")
        else:
            raise wrong_order(f"{kind} after the session has begun: open another call for another session")

    # -- the others ----------------------------------------------------------------------------------------------

    async def describe(self, _: Any, __: Any, ___: Identity) -> pb.DescribeResponse:
        """The model and the limits."""
        manager = self._manager
        config, pipeline = manager.config, manager.pipeline
        words = pipeline.words
        return pb.DescribeResponse(
            version=self._version,
            geometry=settings.geometry(pipeline.geometry),
            engine=pipeline.engine.name,
            words=words if len(words) <= SMALL_VOCABULARY else [],
            max_credits=config.max_credits,
            max_sessions=config.max_sessions,
            max_sessions_per_client=config.max_sessions_per_client,
            max_linger_ms=round(config.max_linger * 1000),
            encodings=payload.encodings(),
            chunk_seconds=manager.admission.chunk_seconds,
        )

    async def list_sessions(self, _: Any, __: Any, identity: Identity) -> pb.ListSessionsResponse:
        """Running sessions."""
        _operators_only(identity)
        now = time.monotonic()
        return pb.ListSessionsResponse(
            sessions=[
                pb.SessionInfo(
                    session_id=session.id,
                    client=session.terms.client,
                    seconds=now - session.began,
                    chunks=session.delivered,
                    credits_left=session.credits_left,
                    attached=session.outbox is not None,
                    paused=session.paused,
                )
                for session in self._manager.sessions.values()
                if not session.over
            ]
        )

    async def stop_session(self, request: Any, _: Any, identity: Identity) -> pb.StopSessionResponse:
        """End a session."""
        _operators_only(identity)
        session = self._manager.sessions.get(request.session_id)
        if session is None or session.over:
            text = f"no session has the id {request.session_id[:64]!r}: ListSessions lists those that run"
            raise Refusal(grpc.StatusCode.NOT_FOUND, text)
        self._manager.end(session, pb.Ended.REASON_OPERATOR, "an operator ended the session")
        return pb.StopSessionResponse()


def _operators_only(identity: Identity) -> None:
    if not identity.operator:
        raise Refusal(
            grpc.StatusCode.PERMISSION_DENIED,
            f"{identity.name} has a client's token and this call is for operators: use an operator's token",
        )


def _kind(message: Any) -> str:
    """Which message it is. Raises Refusal where it is none."""
    if isinstance(message, DecodeError):
        raise malformed(message)
    kind = message.WhichOneof("message")
    if kind is None:
        raise invalid(
            "the message is empty: set one of its fields; perhaps your protocol is newer than this server's"
        )
    return str(kind)
