"""All sessions of a server: start, attach, detach, end. Belongs to the event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc

from swiftvideo.runtime import Pipeline, Prompt, Session
from swiftvideo.runtime.errors import EngineError, PromptError, StoppedError, SwiftVideoError
from swiftvideo.sdk.protocol import MAX_PROMPTS
from swiftvideo.v1 import generation_pb2 as pb

from . import payload, settings
from .admission import Admission
from .config import ServerConfig
from .engine import EngineThread, Job, Made
from .metrics import Metrics
from .outbox import Outbox
from .recovery import Recovery
from .session import Packed, ServedSession, Terms, check_id, too_long
from .status import Refusal, invalid

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class SessionManager:
    """Sessions by id, and the threads they share."""

    def __init__(self, pipeline: Pipeline, config: ServerConfig, metrics: Metrics) -> None:
        self.pipeline = pipeline
        self.config = config
        self.metrics = metrics
        self.loop = asyncio.get_running_loop()
        self.admission = Admission(config, pipeline)
        self.sessions: dict[str, ServedSession] = {}
        self.draining = False
        self.stuck = False
        """The engine does not answer."""
        self.recovery = Recovery(self) if config.snapshots is not None else None
        self._starting: list[str] = []
        self._caches: set[weakref.ref[Session]] = set()
        self._reader = ThreadPoolExecutor(1, "swiftvideo-prompts")
        self._packer = ThreadPoolExecutor(1, "swiftvideo-pack")
        self.engine = self._new_engine()
        self._register()

    def _register(self) -> None:
        """Values that are read in the endpoint's threads: from copies, which C code makes in one step."""
        metrics, sessions = self.metrics, self.sessions
        metrics.watch(metrics.sessions, lambda: self._count(attached=True), state="attached")
        metrics.watch(metrics.sessions, lambda: self._count(attached=False), state="detached")
        metrics.watch(metrics.sessions, lambda: len(self._starting), state="starting")
        metrics.watch(metrics.queue, lambda: self.engine.waiting)
        metrics.watch(metrics.credits, lambda: sum(s.credits_left for s in list(sessions.values())))
        metrics.watch(metrics.caches, self._open_caches)
        if self.recovery is not None:
            store = self.recovery.store
            metrics.watch(metrics.snapshot_bytes, lambda: store.used)
            metrics.watch(metrics.unsaved, self._unsaved)
        metrics.watch(metrics.tasks, lambda: len(asyncio.all_tasks(self.loop)))

    def _open_caches(self) -> int:
        made = [reference() for reference in list(self._caches)]
        return sum(session is not None and not session.closed for session in made)

    def _count(self, attached: bool) -> int:
        return sum((session.outbox is not None) is attached for session in list(self.sessions.values()))

    def _unsaved(self) -> int:
        kept = [s for s in list(self.sessions.values()) if s.saver is not None and not s.over]
        return max((session.delivered - session.saved for session in kept), default=0)

    def _new_engine(self) -> EngineThread:
        return EngineThread(lambda _: self.post(self._crashed))

    def post(self, call: Callable[..., object], *args: object) -> None:
        """Call in the event loop, from any thread; nothing once it is closed."""
        try:
            self.loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            if not self.loop.is_closed():
                raise

    async def read(
        self,
        work: Callable[[], _T],
        undo: Callable[[_T], object] | None = None,
        pool: ThreadPoolExecutor | None = None,
    ) -> _T:
        """Run in the thread that reads prompts, or in another; `undo` gets a result that came too late."""
        future = (pool or self._reader).submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if undo is not None and not future.cancel():
                future.add_done_callback(lambda f: undo(f.result()) if f.exception() is None else None)
            raise

    # -- start, attach, detach -----------------------------------------------------------------------------------

    async def start(self, client: str, message: pb.Start, peer: str) -> tuple[ServedSession, Outbox]:
        """A new session, attached. Raises Refusal or an error of the runtime."""
        terms = self._terms(client, message)
        self.check_open()
        self.admission.check(client, self._holders(), terms.credits)
        policy = settings.policy(message.policy, self.pipeline.settings)
        self._starting.append(client)
        try:
            first = await self.read(lambda: self.pipeline.encode(message.prompt))
            ahead = [await self._known_ahead(number, item) for number, item in enumerate(message.prompts)]
            made = await self.read(lambda: self.pipeline.session(first, message.seed, policy), Session.close)
        finally:
            self._starting.remove(client)
        if self.draining:
            await self.read(made.close)
            self.check_open()
        session = self.adopt(made, secrets.token_hex(8), secrets.token_urlsafe(32), terms)
        for prompt, encoded in zip(message.prompts, ahead, strict=True):
            session.know(prompt, encoded)
        return session, self.attach(session, 0, peer, [prompt.id for prompt in message.prompts])

    def _terms(self, client: str, message: pb.Start) -> Terms:
        if not 1 <= message.credits <= self.config.max_credits:
            raise invalid(f"start.credits is {message.credits}: use 1 to {self.config.max_credits}")
        reason = too_long(message.prompt)
        if reason is not None:
            raise invalid(reason)
        limit = min(MAX_PROMPTS, self.config.max_pending_prompts)
        if len(message.prompts) > limit:
            raise invalid(
                f"start.prompts has {len(message.prompts)} entries: send the first {limit}, and the others as prompts "
                "while the video plays"
            )
        ids: set[str] = set()
        for number, prompt in enumerate(message.prompts):
            check_id(prompt)
            reason = too_long(prompt.text)
            if prompt.id in ids:
                reason = f"its id {prompt.id!r} is an earlier one's: give every prompt an id of its own"
            if reason is not None:
                raise invalid(f"start.prompts[{number}]: {reason}")
            ids.add(prompt.id)
        linger = min(message.linger_ms / 1000, self.config.max_linger)
        return Terms(client, message.credits, payload.checked(message.encoding), linger, message.chunks)

    async def _known_ahead(self, number: int, prompt: pb.Prompt) -> Prompt:
        """Read a prompt of a start. Raises Refusal, that says which one."""
        try:
            return await self.read(lambda: self.pipeline.encode(prompt.text))
        except PromptError as error:
            raise invalid(f"start.prompts[{number}]: {error}") from error

    def adopt(
        self, made: Session, id: str, token: str, terms: Terms, next_chunk: int = 0, asked: int = 1
    ) -> ServedSession:
        """Take a session of the runtime in."""
        self._caches.add(weakref.ref(made, self._caches.discard))
        recovery = self.recovery if terms.linger > 0 else None
        saver = None if recovery is None else recovery.saver(made, id, next_chunk)

        def done(made: Made) -> None:
            session = self.sessions[id]  # the name below would close a cycle: it holds the job
            self._packer.submit(lambda: self.post(self._take, session, session.pack(made)))

        job = Job(made, done, self.admission.period, next_chunk, asked, saver)
        session = ServedSession(
            id, token, terms, job, self.engine, self.config.max_pending_prompts, self.pipeline.encode
        )
        session.delivered = session.saved = next_chunk
        session.saver = saver
        self.sessions[id] = session
        self.engine.add(job)
        return session

    def attach(
        self,
        session: ServedSession,
        next_chunk: int,
        peer: str,
        known: Sequence[str],
        resumed: bool = False,
    ) -> Outbox:
        """Let a call take a session, and hear that the prompts of the ids `known` are. resumed: it had one before."""
        outbox = Outbox()
        started = pb.Started(
            session_id=session.id,
            resume_token=session.token,
            geometry=settings.geometry(self.pipeline.geometry),
            next_chunk=next_chunk,
            credits=session.terms.credits,
            linger_ms=round(session.terms.linger * 1000),
            encoding=session.terms.encoding,
            resumed=resumed,
        )
        outbox.put(pb.GenerateResponse(started=started).SerializeToString())
        for id in known:  # before the chunks that were made with it
            outbox.put(session.acceptance(id).SerializeToString())
        session.attach(outbox, next_chunk)
        session.peer = peer
        extra = {"session": session.id, "client": session.terms.client, "peer": peer}
        log.info("session taken up" if resumed else "session started", extra=extra)
        return outbox

    def detach(self, session: ServedSession, outbox: Outbox | None) -> None:
        """A call ended, for whatever reason; None: one that was not attached yet, to a session without any."""
        if session.outbox is not outbox:
            return
        session.outbox = None
        if session.over or session.linger_timer is not None:
            return
        if session.terms.linger <= 0:
            self.give_up(session, "the call broke")
            return
        session.refresh()
        if self.draining:
            return  # the drain saves it and gives it up
        session.linger_timer = self.loop.call_later(
            session.terms.linger, self.give_up, session, "nobody reattached in time"
        )
        log.info("session waits for a reattach", extra={"session": session.id, "peer": session.peer})

    def give_up(self, session: ServedSession, text: str) -> None:
        """End a session without a call; its snapshot, if any, stays."""
        log.info(text, extra={"session": session.id})
        session.finish(Refusal(grpc.StatusCode.CANCELLED, text))

    def end(self, session: ServedSession, reason: pb.Ended.Reason, text: str) -> None:
        """End a session for good."""
        session.finish(pb.Ended(reason=reason, text=text))
        self._forget(session)

    def fail(self, session: ServedSession, error: BaseException) -> None:
        """End a session because of an error."""
        session.fail(error)
        self._forget(session)

    def _forget(self, session: ServedSession) -> None:
        """Nobody may take a session up any more."""
        session.stored = False
        if self.recovery is not None:
            self.recovery.forget(session)

    # -- chunks --------------------------------------------------------------------------------------------------

    def _take(self, session: ServedSession, packed: Packed) -> None:
        """What the engine made of a session."""
        made = packed.made
        if packed.kept is None:
            if not isinstance(made.error, StoppedError):
                self.fail(session, made.error or EngineError("the chunk is missing"))
            session.finish(Refusal(grpc.StatusCode.CANCELLED, "the session was given up"))
            if made.chunk is None:  # else it was made, and could not be packed
                self._gone(session)
            return
        if session.over:
            return
        first = session.delivered == 0
        waited = session.deliver(packed)
        self._measure(session, packed, waited, first)
        if made.snapshot is not None and self.recovery is not None:
            self.recovery.write(session, made.snapshot)

    def _measure(self, session: ServedSession, packed: Packed, waited: float | None, first: bool) -> None:
        made, metrics = packed.made, self.metrics
        chunk = made.chunk
        assert chunk is not None
        self.admission.measured(made.took)
        metrics.chunk.observe(made.took)
        for stage, seconds in chunk.timings.items():
            metrics.stage.labels(stage=stage).observe(seconds)
        metrics.stage.labels(stage="encode").observe(packed.seconds)
        metrics.frames.inc(len(chunk.frames))
        metrics.fps.set(
            self.pipeline.geometry.fps * self.admission.period / max(self.admission.chunk_seconds, 1e-9)
        )
        if first:
            metrics.first_frame.observe(time.monotonic() - session.began)
        if chunk.mode:
            metrics.switches.labels(mode=chunk.mode).inc()
        if waited is not None:
            metrics.switch.observe(waited)

    def _gone(self, session: ServedSession) -> None:
        """Nothing of a session is left in the engine."""
        if self.sessions.pop(session.id, None) is None:
            return
        self.metrics.after_cancel.set(max(self.after_cancel, session.job.forwards_cancelled))
        self.after_cancel = max(self.after_cancel, session.job.forwards_cancelled)
        self.metrics.ended.labels(reason=session.reason).inc()
        extra = {
            "session": session.id,
            "peer": session.peer,
            "chunks": session.delivered,
            "reason": session.reason,
            "seconds": round(time.monotonic() - session.began, 3),
        }
        log.info("session ended", extra=extra)

    after_cancel = 0

    # -- the whole -----------------------------------------------------------------------------------------------

    def _holders(self) -> list[str]:
        return [session.terms.client for session in self.sessions.values()] + self._starting

    def check_open(self) -> None:
        if self.draining:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "this server shuts down: connect again for another one",
                1.0,
                "draining",
            )
        if self.stuck:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE, "the engine does not answer: try again later", 10.0, "stuck"
            )

    def _crashed(self) -> None:
        """The engine's thread ended; its sessions have been told. Go on with a new one."""
        self.metrics.engine_crashes.inc()
        if not self.draining:
            self.engine = self._new_engine()

    def watch(self) -> bool:
        """Look after the engine; whether it is well. Call it every second or so."""
        stuck = self.engine.busy_for > self.config.watchdog
        if stuck and not self.stuck:
            log.error("the engine is stuck", extra={"seconds": round(self.engine.busy_for, 1)})
            text = f"one chunk has taken more than {self.config.watchdog:g} s: the engine counts as stuck"
            for session in list(self.sessions.values()):
                session.finish(Refusal(grpc.StatusCode.UNAVAILABLE, text, 10.0))
        self.stuck = stuck
        return not stuck and self.engine.alive

    def end_strangers(self, names: Collection[str]) -> None:
        """End sessions whose client has none of the names of valid tokens any more; their snapshots stay."""
        for session in list(self.sessions.values()):
            if session.terms.client not in names and not session.over:
                text = f"{session.terms.client} has no valid token any more: ask the operator for a new one"
                session.finish(Refusal(grpc.StatusCode.UNAUTHENTICATED, text))

    async def close(self) -> None:
        """End everything. The engine gets a second for the chunk in the making."""
        for session in list(self.sessions.values()):
            session.finish(Refusal(grpc.StatusCode.UNAVAILABLE, "the server has shut down"))
        ended = await self.loop.run_in_executor(None, self.engine.stop, 0.7)
        if self.recovery is not None:
            await self.recovery.close()
        self._reader.shutdown(wait=False, cancel_futures=True)
        if ended:
            self._packer.shutdown()
        else:  # it ends its sessions when it comes to them, and hands them on
            log.warning("the engine is still busy and is left behind")

    async def _ask(self, session: ServedSession, message: pb.Prompt) -> None:
        """Ask once, however many calls bring the prompt, and to the end, also where the call breaks meanwhile."""
        task = session.asking.get(message.id)
        first = task is None
        if task is None:
            task = asyncio.create_task(self.read(lambda: session.ask(message, self.loop)))
            session.asking[message.id] = task

            def asked(task: asyncio.Task[None]) -> None:
                session.asking.pop(message.id, None)
                if not task.cancelled():
                    task.exception()  # those who wait have it; nobody may be left

            task.add_done_callback(asked)
        await asyncio.shield(task)
        if not first and message.id in session.prompts:
            session.accept(message.id)

    async def prompt(self, session: ServedSession, message: pb.Prompt) -> None:
        """Take a prompt; the client hears whether it was accepted. Raises Refusal or an error of the runtime."""
        reason = session.check_prompt(message)
        if reason is None:
            known = session.prompts.get(message.id)
            if known is not None:
                session.accept(message.id)
                return
            try:
                await self._ask(session, message)
                return
            except SwiftVideoError as error:
                if session.over or not isinstance(error, ValueError):
                    raise
                reason = str(error)
        rejected = pb.PromptRejected(id=message.id, reason=reason)
        session.send(pb.GenerateResponse(prompt_rejected=rejected))
