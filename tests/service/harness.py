"""Servers in processes of their own, a proxy that cuts connections, and what the scenarios share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from swiftvideo.sdk.remote import VideoState
from swiftvideo.sdk.server.config import ServerConfig
from swiftvideo.sdk.server.server import Server
from swiftvideo.v1 import generation_pb2 as pb

ROOT = Path(__file__).parents[2]
METHOD = "/swiftvideo.v1.GenerationService/"
WORDS = [f"w{number}" for number in range(40)]
"""Of the small model (tests/export/small.py)."""


class ServerProcess:
    """`swiftvideo serve` on a free port, or another module with the same arguments."""

    def __init__(self, bundle: Path, *arguments: str, module: str = "", port: int = 0) -> None:
        program = [sys.executable, "-c", "from swiftvideo.sdk.cli import main; main()", "serve"]
        if module:
            program = [sys.executable, "-m", module]
        command = [
            *program,
            "--bundle",
            str(bundle),
            "--threads",
            "1",
            "--port",
            str(port),
            "--metrics-port",
            "0",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        for name in ("MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            environment.pop(name, None)
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        self._ready = threading.Event()
        self.port = self.metrics_port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(120) or not self.port:
            self.__exit__()
            raise RuntimeError("the server did not start:\n" + "\n".join(self.log[-20:]))
        self.address = f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            del self.log[:-2000]
            if '"message": "serving"' in line:
                fields = json.loads(line)
                self.port = int(fields["address"].rpartition(":")[2])
                self.metrics_port = int(fields["metrics"])
                self._ready.set()
        self._ready.set()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics by its name and labels, as written there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as response:
            text = response.read().decode()
        samples = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def counters(self) -> dict[str, float]:
        """What must not grow. Where there is no /proc, Prometheus's own metrics have nothing of the process."""
        process = psutil.Process(self.process.pid)
        descriptors = (
            process.num_fds()
        )  # asking for metrics opens one, which closes a moment after the answer
        found, states = self.metrics(), ("attached", "detached", "starting")
        return {
            "sessions": sum(found[f'swiftvideo_sessions{{state="{state}"}}'] for state in states),
            "caches": found["swiftvideo_session_caches"],
            "tasks": found["swiftvideo_tasks"],
            "threads": found["swiftvideo_threads"],
            "descriptors": descriptors,
            "rss": process.memory_info().rss,
            "after_cancel": found["swiftvideo_forwards_after_cancel"],
        }

    def idle(self, seconds: float = 30.0, still: float = 0.5) -> dict[str, float]:
        """The counters once no session is left, or after so long: of what may be late, the lowest.

        Tasks and connections of calls that have just ended still fall; what leaks does not. It ends when nothing has
        fallen for `still` seconds.
        """
        end = time.monotonic() + seconds
        found = self.counters()
        while (found["sessions"] or found["caches"]) and time.monotonic() < end:
            time.sleep(0.05)
            found = self.counters()
        lowest, fell = {name: found[name] for name in ("tasks", "threads", "descriptors")}, time.monotonic()
        while time.monotonic() < fell + still:
            time.sleep(0.05)
            found = self.counters()
            if any(found[name] < value for name, value in lowest.items()):
                lowest, fell = (
                    {name: min(found[name], value) for name, value in lowest.items()},
                    time.monotonic(),
                )
        return found | lowest

    def terminate(self) -> float:
        """SIGTERM; seconds until the process was gone."""
        begin = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - begin

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(30)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self._reader.join(10)
        if self.process.stderr is not None:
            self.process.stderr.close()


class CuttingProxy:
    """A TCP proxy whose connections can be cut at any byte, or fall silent."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._swallowing: set[asyncio.StreamWriter] = set()
        self.cuts = 0

    async def start(self) -> str:
        """Listen; the address."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 14):
                if writer not in self._swallowing:
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()
        self._writers.discard(writer)

    def cut(self) -> None:
        """Reset every connection; counts where there was one."""
        if self._writers:
            self.cuts += 1
        for writer in list(self._writers):
            sock = writer.get_extra_info("socket")
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            writer.transport.abort()
        self._writers.clear()

    def swallow(self) -> None:
        """Let every connection stay open and carry nothing any more; new ones do."""
        self._swallowing |= self._writers

    async def close(self) -> None:
        """End it."""
        self.cut()
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)


@contextlib.contextmanager
def proxied(port: int) -> Iterator[tuple[str, CuttingProxy, asyncio.AbstractEventLoop]]:
    """A proxy for code without an event loop: its address, itself, and the loop for `call_soon_threadsafe`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        proxy = CuttingProxy(port)
        address = asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(20)
        try:
            yield address, proxy, loop
        finally:
            asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()


def generate(
    channel: Any,
    metadata: Sequence[tuple[str, str]] = (),
    timeout: float | None = 120,
    requests: Iterator[pb.GenerateRequest] | None = None,
) -> Any:
    """A raw Generate call. requests: as channels of threads want them."""
    return channel.stream_stream(
        METHOD + "Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
    )(requests, metadata=metadata, timeout=timeout)


def start(prompt: str = "w1 w2", **fields: Any) -> pb.GenerateRequest:
    """A start message."""
    return pb.GenerateRequest(start=pb.Start(prompt=prompt, **{"credits": 4, **fields}))


def credit(index: int) -> pb.GenerateRequest:
    """A credit message."""
    return pb.GenerateRequest(credit=pb.Credit(presented_chunk=index))


def prompt(id: str, text: str, at_chunk: int = 0) -> pb.GenerateRequest:
    """A prompt message."""
    return pb.GenerateRequest(prompt=pb.Prompt(id=id, text=text, at_chunk=at_chunk))


STOP = pb.GenerateRequest(stop=pb.Stop())


async def messages(call: Any) -> AsyncIterator[pb.GenerateResponse]:
    """Everything the server sends, until it ends the call."""
    while (message := await call.read()) is not grpc.aio.EOF:
        yield message


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds, and how many there were."""
    data = np.array(values) * 1000
    return {
        "p50_ms": round(float(np.percentile(data, 50)), 3),
        "p99_ms": round(float(np.percentile(data, 99)), 3),
        "count": len(values),
    }


@contextlib.contextmanager
def embedded(bundle: Path) -> Iterator[Any]:
    """The bundle in this process."""
    from swiftvideo.runtime import load

    with load(bundle, threads=1) as pipeline:
        yield pipeline


def heard(state: VideoState) -> dict[str, pb.Prompt]:
    """Prompts that the server heard, in its order, with the chunk; no chunk that came was made with any other."""
    return {
        known.id: pb.Prompt(
            text=state.prompts[known.id].text,
            at_chunk=state.prompts[known.id].at_chunk,
            heard_chunk=known.heard_chunk,
        )
        for known in sorted(state.accepted.values(), key=lambda known: known.number)
    }


class Record:
    """What a client received of a session: its frames, and the prompts that they were made with."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.prompts: dict[str, pb.Prompt] = {}
        """By id; more than the client remembers."""

    def take(self, video: Any, chunk: Any) -> None:
        """A chunk has come: the next one. A prompt's acceptance comes before the first chunk made with it, so this
        belongs right after the receiving, for the last chunk too."""
        assert chunk.index == len(self.frames)
        self.frames.append(bytes(chunk.frames))
        self.prompts.update(heard(video.state))

    def differing(self, pipeline: Any, seed: int) -> list[int]:
        """Chunks that an uninterrupted session makes otherwise."""
        prompts = sorted(self.prompts.values(), key=lambda item: item.heard_chunk)
        expected = reference(pipeline, seed, len(self.frames), prompts)
        pairs = zip(self.frames, expected, strict=True)
        return [index for index, (got, wanted) in enumerate(pairs) if got != wanted]


def reference(pipeline: Any, seed: int, chunks: int, prompts: list[pb.Prompt]) -> list[bytes]:
    """Frames of an uninterrupted session that hears the same prompts before the same chunks."""
    made = []
    waiting = list(prompts)
    with pipeline.session("w1 w2", seed) as session:
        for index in range(chunks):
            while waiting and waiting[0].heard_chunk <= index:
                item = waiting.pop(0)
                ahead = item.at_chunk > index
                session.prompt(item.text, item.at_chunk * session.geometry.chunk if ahead else None)
            made.append(next(session).frames.tobytes())
    return made


def serving(pipeline: Any, config: ServerConfig, talk: Callable[[Server, str], None]) -> Server:
    """Run a server in this process while `talk` speaks with it in a thread."""

    async def run() -> Server:
        server = Server(pipeline, config)
        await server.start()
        try:
            await asyncio.to_thread(talk, server, f"127.0.0.1:{server.port}")
        finally:
            await server.close()
        return server

    return asyncio.run(run())
