"""Sessions that are cancelled, switched, cut or drained, at any scale: the suite runs them small, `make soak` at full
size. Each returns its figures."""

from __future__ import annotations

import asyncio
import queue
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from swiftvideo.sdk import aio
from swiftvideo.v1 import generation_pb2 as pb

from .harness import (
    STOP,
    WORDS,
    CuttingProxy,
    Record,
    ServerProcess,
    credit,
    generate,
    messages,
    prompt,
    start,
)

CREDITS = 4


async def cancels(server: ServerProcess, count: int, seed: int = 0) -> dict[str, Any]:
    """Cancel calls at random moments, some in a switch; then look at what is left."""
    rng = random.Random(seed)
    await asyncio.gather(*(_cancelled(server, rng) for _ in range(4)))
    before = await asyncio.to_thread(server.idle)
    for _ in range(0, count, 4):
        await asyncio.gather(*(_cancelled(server, rng) for _ in range(4)))
    after = await asyncio.to_thread(server.idle)
    growth = {name: after[name] - before[name] for name in ("tasks", "threads", "descriptors", "rss")}
    left = {name: after[name] for name in ("sessions", "caches", "after_cancel")}
    return {"cancels": count, "growth": growth, **left}


async def _cancelled(server: ServerProcess, rng: random.Random) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = generate(channel)
        await call.write(start(seed=rng.randrange(1 << 32)))
        for _ in range(rng.randrange(5)):
            await call.read()
        if rng.random() < 0.3:
            await call.write(prompt("a", " ".join(rng.sample(WORDS, 3))))
        await asyncio.sleep(rng.random() * 0.04)
        call.cancel()


async def switches(server: ServerProcess, count: int, sessions: int = 8) -> dict[str, Any]:
    """Prompts over several sessions, one at a time and in bursts; every message is checked."""
    results = await asyncio.gather(*(_switching(server, count // sessions, seed) for seed in range(sessions)))
    problems = [problem for found, _ in results for problem in found]
    return {
        "switches": sum(applied for _, applied in results),
        "problems": len(problems),
        "examples": problems[:5],
    }


async def _switching(server: ServerProcess, count: int, seed: int) -> tuple[list[str], int]:
    rng = random.Random(seed)
    problems: list[str] = []
    sent: list[str] = []
    accepted: list[str] = []
    applied: list[str] = []
    heard: dict[str, int] = {}  # first chunk that was not begun when the prompt was accepted
    newest = last = -1  # chunk received, chunk with a switch
    expected: str | None = None  # prompt of the next chunk
    running, stopped = "", False
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = generate(channel, timeout=None)
        await call.write(start(seed=seed, credits=CREDITS))
        async for message in messages(call):
            kind = message.WhichOneof("message")
            if kind == "prompt_accepted":
                known = message.prompt_accepted
                accepted.append(known.id)
                heard[known.id] = known.heard_chunk
                if not newest < known.heard_chunk <= newest + 1 + CREDITS:  # more cannot have been begun
                    problems.append(f"{known.id} was heard at chunk {known.heard_chunk}, after {newest} came")
            elif kind == "prompt_applied":
                item = message.prompt_applied
                applied.append(item.id)
                due = max(heard.get(item.id, -1), last + 1)  # one switch a chunk
                if item.chunk_index != due:
                    problems.append(f"{item.id} was applied at chunk {item.chunk_index}, not {due}")
                last = item.chunk_index
                expected = item.id
            elif kind == "chunk":
                chunk = message.chunk
                running = expected or running
                if chunk.prompt_id != running or bool(chunk.mode) != (expected is not None):
                    problems.append(f"chunk {chunk.index} is of {chunk.prompt_id!r}, not {running!r}")
                expected, newest = None, chunk.index
                if stopped:
                    continue  # it was under way when the server heard of the stop, and the call may have ended
                await call.write(credit(chunk.index))
                if len(applied) >= count:
                    stopped = True
                    await call.write(STOP)
                elif len(sent) == len(applied):
                    for _ in range(min(rng.choice((1, 2, 8)), count - len(sent))):
                        sent.append(f"{seed}.{len(sent)}")
                        await call.write(prompt(sent[-1], " ".join(rng.sample(WORDS, 3))))
            elif kind == "prompt_rejected":
                problems.append(
                    f"{message.prompt_rejected.id} was rejected: {message.prompt_rejected.reason}"
                )
    if not sent == accepted == applied:
        problems.append(
            f"sent {len(sent)}, accepted {len(accepted)}, applied {len(applied)}, or another order"
        )
    return problems, len(applied)


async def cuts(server: ServerProcess, pipeline: Any, count: int, clients: int = 4) -> dict[str, Any]:
    """Connections that break at random moments; every session's bytes against an uninterrupted one's."""
    cut = await asyncio.gather(
        *(_cut(server, pipeline, -(-count // clients), seed) for seed in range(clients))
    )
    return {
        **{name: sum(one[name] for one in cut) for name in ("cuts", "reconnects", "chunks", "prompts")},
        "sessions_that_differ": sum(bool(one["differing"]) for one in cut),
        "differing": {seed: one["differing"] for seed, one in enumerate(cut) if one["differing"]},
    }


async def _cut(server: ServerProcess, pipeline: Any, count: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    proxy = CuttingProxy(server.port)
    address = await proxy.start()
    record = Record()
    calls = 0
    async with aio.Client(address, timeout=60) as client:
        video = client.generate("w1 w2", seed, credits=4, linger=60)
        connect = video._connect

        def counted() -> Any:
            nonlocal calls
            calls += 1
            return connect()

        video._connect = counted  # type: ignore[method-assign]
        async with video:
            async for chunk in video:
                record.take(video, chunk)
                if proxy.cuts >= count and len(record.frames) > 10:
                    break
                if rng.random() < 0.3:  # at once, or ahead, which widens the window before it
                    at = rng.choice((0, chunk.index + rng.randint(1, 9)))
                    await video.prompt(" ".join(rng.sample(WORDS, 3)), at_chunk=at)
                if rng.random() < 0.5:
                    asyncio.get_running_loop().call_later(rng.random() * 0.05, proxy.cut)
    await proxy.close()
    differing = await asyncio.to_thread(record.differing, pipeline, seed)
    return {
        "cuts": proxy.cuts,
        "reconnects": calls - 1,
        "chunks": len(record.frames),
        "prompts": len(record.prompts),
        "differing": differing,
    }


async def sigterm(server: ServerProcess, sessions: int, grace: float) -> dict[str, Any]:
    """SIGTERM while sessions run: health, whole chunks, the way they end, the time until exit."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    running, loop = asyncio.Semaphore(0), asyncio.get_running_loop()

    def one(seed: int) -> tuple[list[str], int]:
        """Reasons of the end, what was broken. By threads: in grpc.aio a credit that comes too late hides the end."""
        reasons: list[str] = []
        broken = following = pixels = 0
        requests = queue.SimpleQueue[pb.GenerateRequest | None]()
        requests.put(start(seed=seed))
        with grpc.insecure_channel(server.address) as channel:
            call = generate(channel, requests=iter(requests.get, None))
            for message in call:
                kind = message.WhichOneof("message")
                if kind == "chunk":
                    size = message.chunk.frame_count * pixels * 3
                    broken += message.chunk.index != following or len(message.chunk.payloads[0]) != size
                    if not following:
                        loop.call_soon_threadsafe(running.release)
                    following += 1
                    requests.put(credit(message.chunk.index))
                elif kind == "started":
                    pixels = message.started.geometry.width * message.started.geometry.height
                elif kind == "ended":
                    reasons.append(pb.Ended.Reason.Name(message.ended.reason))
            requests.put(None)
            return reasons, broken + (call.code() is not grpc.StatusCode.OK)

    async with grpc.aio.insecure_channel(server.address) as channel:
        pool = ThreadPoolExecutor(sessions)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        tasks = [loop.run_in_executor(pool, one, seed) for seed in range(sessions)]
        for _ in range(sessions):
            await running.acquire()
        begin = time.perf_counter()
        leaving = asyncio.create_task(asyncio.to_thread(server.terminate))
        state = (await watch.read()).status
        told = time.perf_counter() - begin
        watch.cancel()
        found = await asyncio.gather(*tasks)
        exit_seconds = await leaving
        pool.shutdown()
    reasons = [reason for ended, _ in found for reason in ended]
    return {
        "not_serving_after_ms": round(told * 1000, 3),
        "not_serving": state == health_pb2.HealthCheckResponse.NOT_SERVING,
        "grace": grace,
        "exit_seconds": round(exit_seconds, 3),
        "exit_code": server.process.returncode,
        "broken_chunks": sum(broken for _, broken in found),
        "reasons": sorted(set(reasons)),
        "ended": len(reasons),
    }
