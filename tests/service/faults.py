"""Kills, fuzzing and churn, at any scale. Each returns its figures."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc

from swiftvideo.sdk import aio
from swiftvideo.v1 import generation_pb2 as pb

from .harness import METHOD, STOP, WORDS, Record, ServerProcess, credit, generate, prompt, start

MEBIBYTE = 1 << 20
ALLOWED = {
    "OK",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "RESOURCE_EXHAUSTED",
    "CANCELLED",
}
"""Statuses that strangers' messages may bring about."""


async def kills(bundle: Path, folder: Path, pipeline: Any, rounds: int, interval: int = 5) -> dict[str, Any]:
    """kill -9 while sessions run; a new server takes them up from their snapshots, byte for byte."""
    arguments = ("--max-load", "0", "--snapshots", str(folder), "--snapshot-chunks", str(interval))
    server = await asyncio.to_thread(ServerProcess, bundle, *arguments)
    lost: list[int] = []
    ids: dict[int, str] = {}
    records = [Record() for _ in range(3)]
    made = {seed: record.frames for seed, record in enumerate(records)}
    done = asyncio.Event()
    rng = random.Random(1)

    async def one(seed: int) -> None:
        async with aio.Client(server.address, timeout=120) as client:
            async with client.generate("w1 w2", seed, credits=4, linger=60) as video:
                async for chunk in video:
                    records[seed].take(video, chunk)
                    ids[seed] = video.state.started.session_id
                    if done.is_set():
                        return
                    if rng.random() < 0.2:
                        await video.prompt(" ".join(rng.sample(WORDS, 3)))

    tasks = [asyncio.create_task(one(seed)) for seed in made]
    try:
        for _ in range(rounds):
            before = {seed: len(chunks) for seed, chunks in made.items()}
            while any(len(made[seed]) < before[seed] + 3 * interval for seed in made) and not any(
                t.done() for t in tasks
            ):
                await asyncio.sleep(0.01)
            await written(folder, len(made))
            await asyncio.to_thread(server.kill)
            at_kill = {seed: len(chunks) for seed, chunks in made.items()}
            server.__exit__()
            server = await asyncio.to_thread(ServerProcess, bundle, *arguments, port=server.port)
            while any(len(made[seed]) < at_kill[seed] + 1 for seed in made) and not any(
                t.done() for t in tasks
            ):
                await asyncio.sleep(0.01)
            restored = await asyncio.to_thread(_restored, server, len(made))
            lost += [max(0, at_kill[seed] - restored[id]) for seed, id in ids.items()]
        done.set()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        server.__exit__()
    differing = [
        await asyncio.to_thread(record.differing, pipeline, seed) for seed, record in enumerate(records)
    ]
    return {
        "kills": rounds,
        "sessions": len(made),
        "chunks": sum(map(len, made.values())),
        "snapshot_every": interval,
        "most_made_again": 2 * interval,
        "chunks_made_again": lost,
        "sessions_that_differ": sum(map(bool, differing)),
    }


async def written(folder: Path, sessions: int, seconds: float = 60.0) -> None:
    """Wait until so many sessions have a snapshot: no chunk waits for it, so on a busy machine it comes late."""
    patience = time.monotonic() + seconds
    while (found := len(list(folder.glob("*.json")))) < sessions:
        assert time.monotonic() < patience, f"{found} of {sessions} sessions have a snapshot"
        await asyncio.sleep(0.02)


def _restored(server: ServerProcess, count: int) -> dict[str, int]:
    """Chunks in the snapshots that sessions were restored from, by session, from the server's log."""
    patience = time.monotonic() + 30
    while True:
        lines = [json.loads(line) for line in list(server.log) if '"session restored"' in line]
        if len(lines) >= count or time.monotonic() > patience:
            return {line["session"]: line["chunks"] for line in lines}
        time.sleep(0.05)  # written, but not read here yet


def _raw(channel: Any) -> Any:
    """A Generate call that sends bytes as they are."""
    return channel.stream_stream(METHOD + "Generate", bytes, pb.GenerateResponse.FromString)(timeout=60)


def hostile(rng: random.Random) -> bytes:
    """Random bytes, or a valid message with some bytes changed, cut, doubled or inserted."""
    if rng.random() < 0.3:
        return rng.randbytes(rng.randrange(64))
    data = bytearray(sequence(rng, 1)[0].SerializeToString())
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        change = rng.randrange(4)
        if change == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif change == 1:
            del data[at : at + rng.randint(1, 4)]
        elif change == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 4))
        else:
            data[at:at] = data[: rng.randrange(16)]
    return bytes(data)


def sequence(rng: random.Random, length: int) -> list[pb.GenerateRequest]:
    """Valid messages in any order."""

    def text() -> str:
        return rng.choice(
            ("", "w1", "w2 w3 w4", "nonsense", "w1 " * 200, "\0é☃", " ".join(rng.sample(WORDS, 3)))
        )

    def policy() -> pb.PolicySettings:
        return pb.PolicySettings(
            kind=rng.randrange(7),  # type: ignore[arg-type]
            bridge=pb.Bridge(
                recent=rng.choice((0, 1, 2, 99)), tau_low=rng.uniform(-1, 2), decay=rng.uniform(-1, 2)
            ),
            anchors=pb.Anchors(
                max=rng.choice((0, 1, 2, 9)), mix=rng.choice((0.3, float("nan"), float("inf")))
            ),
            window=pb.Window(min_size=rng.choice((0, 3, 7, 4_000_000_000))),
        )

    def ahead() -> pb.Prompt:
        return pb.Prompt(
            id=f"{rng.randrange(9999)}", text=rng.choice(("w1", text())), at_chunk=rng.randrange(9)
        )

    def begin() -> pb.GenerateRequest:
        return start(
            rng.choice(("w1 w2", text())),
            seed=rng.choice((0, 7, (1 << 64) - 1)),
            credits=rng.choice((0, 1, 2, 16, 17, (1 << 32) - 1)) if rng.random() < 0.3 else 3,
            encoding=rng.choice((0, 1, 2, 3, 9)) if rng.random() < 0.3 else 0,
            policy=policy() if rng.random() < 0.3 else None,
            linger_ms=rng.choice((0, 0, 5)),
            chunks=rng.choice((0, 1, 3)),
            prompts=[ahead() for _ in range(rng.choice((1, 2, 3, 65)))] if rng.random() < 0.3 else (),
        )

    token = rng.choice(("", "x", "y" * 43))
    number = rng.choice((0, 1, 2, 5, 1 << 40, (1 << 64) - 1))
    kinds = (
        begin,
        lambda: pb.GenerateRequest(
            reattach=pb.Reattach(resume_token=token, next_chunk=number, prompts=[pb.Prompt()])
        ),
        lambda: prompt(rng.choice(("", "a", "b", "c" * 65)), text(), number),
        lambda: credit(rng.choice((0, 0, 1, number))),
        lambda: pb.GenerateRequest(pause=pb.Pause()),
        lambda: pb.GenerateRequest(resume=pb.Resume()),
        lambda: STOP,
        pb.GenerateRequest,
    )
    weights = (2, 1, 6, 6, 2, 2, 1, 1)
    return [rng.choices(kinds, weights)[0]() for _ in range(length)]


async def fuzz(
    server: ServerProcess, count: int, sequences: int, seed: int = 0, width: int = 16
) -> dict[str, Any]:
    """Hostile bytes and valid messages in any order; which statuses came, and whether anything hung."""
    codes: Counter[str] = Counter()
    texts: list[str] = []
    rng = random.Random(seed)
    jobs: list[list[bytes]] = [[hostile(rng)] for _ in range(count)]
    for _ in range(sequences):
        items = sequence(rng, rng.randint(1, 8))
        if rng.random() < 0.8:
            items[:0] = [start(credits=2)]
        jobs.append([item.SerializeToString() for item in items])
    rng.shuffle(jobs)
    queue = iter(jobs)

    async def worker(channel: Any) -> None:
        for messages in queue:
            call = _raw(channel)
            try:
                for message in messages:
                    await call.write(message)
                await call.write(STOP.SerializeToString())
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the status says what it was
            code = (await call.code()).name
            if code == "INTERNAL" and await call.details() == "Internal error from Core":
                code = "OK"  # grpc.aio's own, for a write to a call that has ended
            codes[code] += 1
            if code not in ALLOWED:
                texts.append(f"{code}: {await call.details()}: {messages!r:.300}")

    async with grpc.aio.insecure_channel(server.address) as channel:
        await asyncio.gather(*(worker(channel) for _ in range(width)))
        alive = generate(channel)
        await alive.write(start())
        assert (await alive.read()).WhichOneof("message") == "started"
        alive.cancel()
    left = await asyncio.to_thread(server.idle)
    return {
        "inputs": count,
        "sequences": sequences,
        "codes": dict(codes),
        "not_allowed": len(texts),
        "examples": texts[:5],
        "sessions": left["sessions"],
        "caches": left["caches"],
        "alive": server.process.poll() is None,
    }


async def churn(server: ServerProcess, seconds: float, width: int = 4, samples: int = 20) -> dict[str, Any]:
    """Sessions of all kinds come and go; what the server uses, sampled while it is idle for a moment."""
    rng = random.Random(2)
    taken: list[dict[str, float]] = []
    sessions = 0

    async def one() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = generate(channel)
            await call.write(
                start(
                    seed=rng.randrange(1 << 32), encoding=rng.choice((1, 2, 3)), linger_ms=rng.choice((0, 50))
                )
            )
            try:
                for number in range(rng.randrange(12)):
                    message = await call.read()
                    if message is grpc.aio.EOF:
                        return
                    if message.WhichOneof("message") == "chunk":
                        await call.write(credit(message.chunk.index))
                    if rng.random() < 0.3:
                        await call.write(prompt(f"{number}", " ".join(rng.sample(WORDS, 3))))
                if rng.random() < 0.5:
                    await call.write(STOP)
                    while await call.read() is not grpc.aio.EOF:
                        pass
            finally:
                call.cancel()

    for sample in range(samples + 1):
        end = time.monotonic() + seconds / samples
        while time.monotonic() < end:
            await asyncio.gather(*(one() for _ in range(width)))
            sessions += width
        if sample:  # the first one warms up
            taken.append(await asyncio.to_thread(server.idle))
    report = {"seconds": seconds, "sessions": sessions, **growth(taken)}
    report["pid_alive"] = server.process.poll() is None
    return report


def growth(taken: list[dict[str, float]]) -> dict[str, Any]:
    """From the median of the first quarter to that of the last, and the largest of what must be flat."""
    quarter = max(1, len(taken) // 4)

    def median(part: list[dict[str, float]], name: str) -> float:
        values = sorted(sample[name] for sample in part)
        return values[len(values) // 2]

    names = ("rss", "descriptors", "threads", "tasks", "sessions", "caches")
    return {
        f"{name}_growth": median(taken[-quarter:], name) - median(taken[:quarter], name) for name in names
    }


def leaks(report: dict[str, Any]) -> list[str]:
    """What a churn's figures say against the server; empty where all is well."""
    limits = {"rss": 5 * MEBIBYTE, "descriptors": 0, "threads": 0, "tasks": 0, "sessions": 0, "caches": 0}
    found = [
        f"{name} grew by {report[f'{name}_growth']:g}, the limit is {limit:g}"
        for name, limit in limits.items()
        if report[f"{name}_growth"] > limit
    ]
    return found if report["pid_alive"] else [*found, "the server died"]


def leaky() -> None:
    """`swiftvideo serve` with a leak: every session that ends leaves a descriptor and half a MiB behind."""
    from swiftvideo.sdk.cli import main
    from swiftvideo.sdk.server.manager import SessionManager

    kept: list[Any] = []
    gone = SessionManager._gone

    def leaking(self: SessionManager, session: Any) -> None:
        kept.append((os.dup(2), os.urandom(MEBIBYTE // 2)))
        gone(self, session)

    SessionManager._gone = leaking  # type: ignore[method-assign]
    main()
