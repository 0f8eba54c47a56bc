"""Load on a server: a client that stops reading, too many sessions, latency. Each returns its figures."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import numpy as np

from swiftvideo.sdk import aio
from swiftvideo.v1 import generation_pb2 as pb

from .harness import METHOD, ServerProcess, credit, generate, messages, percentiles, start


async def reading(
    server: ServerProcess, count: int, chunks: int, text: str = "w1 w2"
) -> tuple[list[float], float]:
    """Gaps between chunks of `count` sessions that read all they get, and their chunks per second together."""
    begin = time.perf_counter()

    async def one(index: int) -> list[float]:
        gaps, last = [], None
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generate(channel, timeout=None)
            await call.write(start(text, seed=index, chunks=chunks))
            async for message in messages(call):
                if message.WhichOneof("message") == "chunk":
                    now = time.perf_counter()
                    if last is not None:
                        gaps.append(now - last)
                    last = now
                    await call.write(credit(message.chunk.index))
        return gaps

    gaps = await asyncio.gather(*(one(index) for index in range(count)))
    return [gap for found in gaps for gap in found], count * chunks / (time.perf_counter() - begin)


async def stalled(
    server: ServerProcess, chunks: int, rounds: int = 1, credits: int = 16, text: str = "w1 w2"
) -> dict[str, Any]:
    """A client that stops reading beside three that read: the server's memory, and the others' gaps.

    Rounds, each with another such client, because a shared machine's speed drifts; the change of p99 is the median
    round's. Its session is there all the time: paused at first, so that what memory is seen later are its unread
    chunks; then it uses up its credits, for which it takes its turns of the engine as any other; then it is stalled.
    """
    for _ in range(
        6
    ):  # until the allocator's reserves have grown: sessions that end leave a little behind at first
        await reading(server, 3, 20, text)
    gaps: dict[str, list[float]] = {"alone": [], "filling": [], "beside": []}
    growth: list[float] = []
    changes: list[float] = []
    left = 0
    for _ in range(rounds):
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generate(channel, timeout=None)
            await call.write(start(text, credits=credits))
            size, session = 0, ""
            async for message in messages(call):
                if message.WhichOneof("message") == "started":
                    session = message.started.session_id
                elif message.WhichOneof("message") == "chunk":
                    size = sum(map(len, message.chunk.payloads))
                    if message.chunk.index == 1:
                        await call.write(pb.GenerateRequest(pause=pb.Pause()))
                        break
            alone, _ = await reading(server, 3, chunks, text)
            before = (await asyncio.to_thread(server.counters))["rss"]
            await call.write(credit(1))
            await call.write(pb.GenerateRequest(resume=pb.Resume()))
            gaps["filling"] += (await reading(server, 3, credits + 4, text))[0]
            left = max(left, await _credits_left(channel, session))
            beside, _ = await reading(server, 3, chunks, text)
            growth.append((await asyncio.to_thread(server.counters))["rss"] - before)
            call.cancel()
        gaps["alone"] += alone
        gaps["beside"] += beside
        changes.append(percentiles(beside)["p99_ms"] / percentiles(alone)["p99_ms"] - 1)
    return {
        "rounds": rounds,
        "chunk_bytes": size,
        "credits_bytes": size * credits,
        "rss_growth": max(growth),
        "credits_left": left,
        **{name: percentiles(values) for name, values in gaps.items()},
        "p99_change": round(float(np.median(changes)), 4),
        "p99_change_of_rounds": [round(change, 3) for change in sorted(changes)],
    }


async def _credits_left(channel: Any, session: str) -> int:
    """Of one session once it has used them up, or after half a minute: on a busy machine it lags behind.

    The gauge in /metrics is of all sessions, those included that wait for a reattach.
    """
    call = channel.unary_unary(
        METHOD + "ListSessions",
        pb.ListSessionsRequest.SerializeToString,
        pb.ListSessionsResponse.FromString,
    )
    patience = time.monotonic() + 30
    while True:
        listed = await call(pb.ListSessionsRequest(), timeout=30)
        left = int(next(item.credits_left for item in listed.sessions if item.session_id == session))
        if not left or time.monotonic() > patience:
            return left
        await asyncio.sleep(0.1)


async def overload(server: ServerProcess, capacity: int, chunks: int, rounds: int = 1) -> dict[str, Any]:
    """Four times as many sessions as fit keep asking: how fast they are refused, and the rate of those admitted.

    Rounds, each alone first and then crowded, because a shared machine's speed drifts; the rate kept is the median
    round's.
    """
    waits: list[float] = []
    hints: list[int] = []
    codes: set[str] = set()
    kept: list[float] = []

    async def stranger(work: asyncio.Task[Any]) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            await channel.channel_ready()
            while not work.done():
                begin = time.perf_counter()
                call = generate(channel)
                await call.write(start())
                code = await call.code()
                if work.done():
                    return
                waits.append(time.perf_counter() - begin)
                codes.add(code.name)
                hints.extend(
                    int(value) for key, value in await call.trailing_metadata() if key == "retry-after-ms"
                )
                await asyncio.sleep(1.0)  # what the hints ask for, at least

    for _ in range(rounds):
        await asyncio.to_thread(server.idle)  # a session that has just ended still has its place
        _, alone = await reading(server, capacity, chunks)
        await asyncio.to_thread(server.idle)
        work = asyncio.create_task(reading(server, capacity, chunks))
        while (await asyncio.to_thread(server.counters))["sessions"] < capacity and not work.done():
            await asyncio.sleep(0.02)
        strangers = [asyncio.create_task(stranger(work)) for _ in range(3 * capacity)]
        _, crowded = await work
        await asyncio.gather(*strangers)
        kept.append(crowded / alone)
    return {
        "capacity": capacity,
        "rejects": percentiles(waits),
        "slowest_reject_ms": round(max(waits) * 1000, 3),
        "codes": sorted(codes),
        "hints": len(hints),
        "chunks_per_second_alone": round(alone, 2),
        "rate_kept": round(float(np.median(kept)), 4),
        "rate_kept_in_rounds": [round(rate, 3) for rate in sorted(kept)],
    }


async def latency(server: ServerProcess, pipeline: Any, rounds: int, text: str, other: str) -> dict[str, Any]:
    """First frame, chunk and switch: embedded and through the service, in turns."""
    times: dict[str, dict[str, list[float]]] = {
        side: {"first_frame": [], "chunk": [], "switch": []} for side in ("embedded", "service")
    }
    async with aio.Client(server.address) as client:
        for seed in range(rounds):
            await asyncio.to_thread(_embedded, pipeline, seed, text, other, times["embedded"])
            begin = time.perf_counter()
            async with client.generate(text, seed, credits=1, linger=0) as video:
                for index in range(8):
                    if index == 6:
                        begin = time.perf_counter()
                        await video.prompt(other)
                    elif index:
                        begin = time.perf_counter()
                    chunk = await anext(video)
                    name = "first_frame" if index == 0 else "switch" if chunk.mode else "chunk"
                    if index != 6 or chunk.mode:
                        times["service"][name].append(time.perf_counter() - begin)
    report: dict[str, Any] = {side: {k: percentiles(v) for k, v in times[side].items()} for side in times}
    report["added_p50_ms"] = {
        name: round(float(np.median(times["service"][name]) - np.median(times["embedded"][name])) * 1000, 3)
        for name in times["service"]
    }
    return report


def _embedded(pipeline: Any, seed: int, text: str, other: str, times: dict[str, list[float]]) -> None:
    begin = time.perf_counter()
    with pipeline.session(text, seed) as session:
        for index in range(8):
            if index:
                begin = time.perf_counter()
            if index == 6:
                session.prompt(other)
            chunk = next(session)
            chunk.frames.tobytes()
            name = "first_frame" if index == 0 else "switch" if chunk.mode else "chunk"
            times[name].append(time.perf_counter() - begin)
