"""The end of a server: sessions run on for the grace time, are saved, and end between two chunks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from swiftvideo.v1 import generation_pb2 as pb

from .session import ServedSession

if TYPE_CHECKING:
    from .manager import SessionManager

SAVING = 5.0
"""Seconds after the grace time within which last snapshots are begun."""


async def drain(manager: SessionManager) -> None:
    """Refuse new sessions, let those that run go on for the grace time, then end them between two chunks."""
    manager.draining = True
    grace = manager.config.grace
    end = manager.loop.time() + grace
    notice = pb.Notice(
        kind=pb.Notice.KIND_DRAINING,
        text=f"this server shuts down in {grace:g} s",
        milliseconds=round(grace * 1000),
    )
    for session in list(manager.sessions.values()):
        session.send(pb.GenerateResponse(notice=notice))
    while any(not session.over for session in manager.sessions.values()) and manager.loop.time() < end:
        alone = [s for s in manager.sessions.values() if s.outbox is None and not s.over]
        await _save(manager, alone, end)
        for session in alone:
            manager.give_up(session, "the server shuts down")
        await asyncio.sleep(min(0.05, max(0.0, end - manager.loop.time())))
    rest = list(manager.sessions.values())
    await _save(manager, rest, manager.loop.time() + SAVING)
    for session in rest:
        end_drained(session)


async def _save(manager: SessionManager, sessions: Iterable[ServedSession], deadline: float) -> None:
    """Write a last snapshot of each session that keeps any."""
    if manager.recovery is None:
        return
    for session in sessions:
        session.stop()
    await asyncio.gather(*(manager.recovery.final(session, deadline) for session in sessions))


def end_drained(session: ServedSession) -> None:
    """End a session because the server shuts down; its snapshot stays."""
    if not session.over:
        text = "the server has shut down" + ("; reattach to go on" if session.stored else "")
        session.finish(pb.Ended(reason=pb.Ended.REASON_DRAINED, text=text, resumable=session.stored))
