"""Sessions that are taken up again after a cut. Belongs to the event loop."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

import grpc

from swiftvideo.sdk.protocol import MAX_PROMPTS
from swiftvideo.v1 import generation_pb2 as pb

from .outbox import Outbox
from .session import ServedSession, check_id, token_hash
from .status import Refusal, invalid

if TYPE_CHECKING:
    from .manager import SessionManager


async def reattach(
    manager: SessionManager, client: str, message: pb.Reattach, peer: str
) -> tuple[ServedSession, Outbox]:
    """An earlier session, attached again. Raises Refusal; the session goes on waiting then."""
    manager.check_open()
    if len(message.prompts) > MAX_PROMPTS:
        raise invalid(f"reattach.prompts has {len(message.prompts)} entries: send the last {MAX_PROMPTS}")
    for prompt in message.prompts:
        check_id(prompt)
    session = await _find(manager, client, message.resume_token)
    outbox = None
    try:
        _check(session, message.next_chunk)
        session.take_over()
        for prompt in message.prompts:  # before any further chunk, so that each applies where it did
            await manager.prompt(session, prompt)
        if session.over:
            raise Refusal(grpc.StatusCode.ABORTED, "the session ended while it was taken up: start a new one")
        known = [prompt.id for prompt in message.prompts if prompt.id in session.prompts]
        outbox = manager.attach(session, message.next_chunk, peer, known, resumed=True)
        for prompt in message.prompts:
            if prompt.id not in session.prompts:  # refused: this says so
                await manager.prompt(session, prompt)
    except BaseException:  # also where the call breaks meanwhile: nobody else would see the session's end
        manager.detach(session, outbox)
        raise
    return session, outbox


async def _find(manager: SessionManager, client: str, token: str) -> ServedSession:
    """The session of a resume token, from its snapshot if need be."""
    wanted = token_hash(token)
    session = next(
        (s for s in manager.sessions.values() if secrets.compare_digest(token_hash(s.token), wanted)), None
    )
    if session is None and manager.recovery is not None:
        session = await manager.recovery.restore(client, token)
    if session is None or session.terms.client != client or (session.over and not _kept(manager, session)):
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "no session has this resume token: it ended, or waited longer than it may; start a new one",
        )
    if session.over:
        text = "this session was given up, and what it holds is not free yet: reattach again to go on from its snapshot"
        raise Refusal(grpc.StatusCode.UNAVAILABLE, text, 1.0)
    return session


def _kept(manager: SessionManager, session: ServedSession) -> bool:
    """Whether a session that has ended can be taken up from a snapshot, now or soon."""
    return session.stored or (manager.recovery is not None and manager.recovery.writes(session))


def _check(session: ServedSession, next_chunk: int) -> None:
    """Raise Refusal where a session cannot go on with this chunk."""
    first = session.kept[0].index if session.kept else session.delivered
    if next_chunk < first:
        raise Refusal(
            grpc.StatusCode.OUT_OF_RANGE,
            f"chunk {next_chunk} is wanted and the first that is kept is {first}: "
            "chunks before credited ones cannot be sent again",
        )
    if next_chunk > session.delivered and not session.recovered:
        raise invalid(f"chunk {next_chunk} is wanted and only {session.delivered} were sent")
    if next_chunk > session.delivered + 100_000:
        raise invalid(f"chunk {next_chunk} is wanted and the session is at {session.delivered}")
