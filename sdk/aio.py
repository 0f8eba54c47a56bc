"""The asynchronous client of a swiftvideo server. Needs only grpcio and protobuf.

from swiftvideo.sdk.aio import Client

async with Client("localhost:50051", token="...") as client, client.generate("a red circle", seed=7) as video:
    async for chunk in video:                    # chunk.frames: uint8 [n,H,W,3]
        await video.prompt("a blue square")
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import weakref
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from swiftvideo.runtime.errors import ClosedError, UsageError
from swiftvideo.runtime.geometry import Policy
from swiftvideo.v1 import generation_pb2 as pb

from .connection import metadata_of, open_channel, running_loop
from .messages import EncodingName, check_seconds, filled, start_of
from .remote import (
    BACKOFF,
    CLOSING,
    SERVICE,
    RemoteChunk,
    ServiceError,
    UnavailableError,
    VideoState,
    error_from,
    late,
)


class Client:
    """A connection to a server; arguments and errors as those of `swiftvideo.sdk.client.Client`.

    It belongs to the event loop that it is made in, with its videos. Raises UsageError where none runs, and in another
    one.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        *,
        tls: bool | None = None,
        root: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        timeout: float = 10.0,
    ) -> None:
        check_seconds("timeout", timeout)
        self.address = address
        self.timeout = timeout
        self.closed = False
        self.calls: set[_Call] = set()
        """Those that have not ended, of dropped videos too."""
        self.metadata = metadata_of(token)
        self._channel = open_channel(grpc.aio, address, token, tls, root, certificate, key, timeout)
        self.loop = running_loop()
        self._videos: weakref.WeakSet[Video] = weakref.WeakSet()

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        *,
        prompts: Iterable[tuple[str, int]] = (),
        credits: int = 3,
        encoding: EncodingName = "raw",
        policy: pb.PolicySettings | Policy | None = None,
        linger: float = 30.0,
        chunks: int = 0,
        deadline: float | None = None,
    ) -> Video:
        """Start a session; arguments and errors as those of `swiftvideo.sdk.client.Client.generate`."""
        start = start_of(prompt, seed, credits, encoding, policy, linger, chunks, prompts)
        return self._video(VideoState(start), deadline)

    def reattach(self, token: str, next_chunk: int = 0, *, deadline: float | None = None) -> Video:
        """Take up a session; arguments and errors as those of `swiftvideo.sdk.client.Client.reattach`."""
        return self._video(VideoState.taken_up(token, next_chunk), deadline)

    def _video(self, state: VideoState, deadline: float | None) -> Video:
        self.check_open()
        if deadline is not None:
            check_seconds("deadline", deadline)
        video = Video(self, state, deadline)
        self._videos.add(video)
        return video

    async def describe(self) -> pb.DescribeResponse:
        """The model and the server's limits. Raises ServiceError."""
        response: pb.DescribeResponse = await self._call(
            "Describe", pb.DescribeRequest(), pb.DescribeResponse
        )
        return response

    async def sessions(self) -> list[pb.SessionInfo]:
        """Running sessions; for operators. Raises ServiceError."""
        response = await self._call("ListSessions", pb.ListSessionsRequest(), pb.ListSessionsResponse)
        return list(response.sessions)

    async def stop_session(self, session_id: str) -> None:
        """End a session; for operators. Raises ServiceError."""
        await self._call(
            "StopSession", filled(pb.StopSessionRequest, session_id=session_id), pb.StopSessionResponse
        )

    async def _call(self, name: str, request: Any, response: Any) -> Any:
        self.check_open()
        call = self._channel.unary_unary(SERVICE + name, type(request).SerializeToString, response.FromString)
        try:
            return await call(request, timeout=self.timeout, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # then `close` cancelled the call
                self.check_open()
            raise

    def open(self, requests: AsyncIterator[pb.GenerateRequest]) -> Any:
        """The gRPC call of a session; used by `Video`."""
        call = self._channel.stream_stream(
            SERVICE + "Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        return call(requests, metadata=self.metadata)

    def check_open(self) -> None:
        """Raises ClosedError after `close`, and as `check_loop`."""
        if self.closed:
            raise ClosedError(f"the client of {self.address} was closed: make another one")
        self.check_loop()

    def check_loop(self) -> None:
        """Raises UsageError in another event loop, whose waits nothing would end."""
        if running_loop() is not self.loop:
            raise UsageError(
                f"the client of {self.address} was made in another event loop: make one in each, and use it there alone"
            )

    async def close(self) -> None:
        """End the sessions of all videos, as `Video.close`, and close the connection; twice is fine.

        Where no server answers it takes two seconds at most.
        """
        self.check_loop()
        self.closed = True
        calls = list(self.calls)
        for call in calls:
            call.stop()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING):
                    closing = (video.close() for video in list(self._videos))
                    await asyncio.gather(*closing, *(call.join() for call in calls))
        finally:
            await self._channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Call:
    """A gRPC call that a task of its own reads: to cancel a read would be to cancel the call."""

    def __init__(self, client: Client, opening: list[pb.GenerateRequest]) -> None:
        self.error: ServiceError | None = None
        """How the call broke."""
        self._requests: asyncio.Queue[pb.GenerateRequest | None] = asyncio.Queue()
        self._inbox: asyncio.Queue[pb.GenerateResponse | None] = asyncio.Queue()
        for message in opening:
            self.send(message)
        self._call = client.open(_until_none(self._requests))
        self._running = client.calls
        self._running.add(self)
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self._inbox.put_nowait(message)
        except grpc.aio.AioRpcError as failure:
            self.error = error_from(failure)
        except asyncio.CancelledError:  # of the call, not of a task that waits for a chunk
            self.error = UnavailableError("the call was cancelled", grpc.StatusCode.UNAVAILABLE)
        finally:
            self._inbox.put_nowait(None)
            self._requests.put_nowait(None)  # ends the task that gRPC writes in
            self._running.discard(self)

    def send(self, message: pb.GenerateRequest) -> None:
        """Write. What a broken call loses is repeated by `VideoState.opening`, or means nothing there."""
        self._requests.put_nowait(message)

    async def receive(self) -> pb.GenerateResponse | None:
        """The next message, or None once the call has ended. Raises ServiceError where it broke."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)  # whoever asks again is told again
            if self.error is not None:
                raise self.error
        return message

    def stop(self) -> None:
        """Ask for the end of the session, and send nothing more."""
        self._requests.put_nowait(pb.GenerateRequest(stop=pb.Stop()))
        self._requests.put_nowait(None)

    async def join(self) -> None:
        """Wait for the call's end."""
        await asyncio.wait((self._reader,))

    def cancel(self) -> None:
        """End the call without a word."""
        self._call.cancel()


async def _until_none(
    requests: asyncio.Queue[pb.GenerateRequest | None],
) -> AsyncIterator[pb.GenerateRequest]:
    while (message := await requests.get()) is not None:
        yield message


class Video:
    """One session: iterate over its chunks, and close it or use it as a context.

    A chunk counts as presented when the next one is asked for.
    """

    def __init__(self, client: Client, state: VideoState, deadline: float | None = None) -> None:
        self.state = state
        self._client = client
        self._deadline = deadline
        self._turn = asyncio.Lock()
        """Of the task that waits for a chunk."""
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._call: _Call | None = None

    @property
    def session_id(self) -> str:
        """Of the server; empty until the first chunk."""
        return "" if self.state.started is None else self.state.started.session_id

    @property
    def resume_token(self) -> str:
        """For `Client.reattach`: a secret. Empty until the first chunk."""
        return "" if self.state.started is None else self.state.started.resume_token

    async def prompt(self, text: str, at_chunk: int = 0) -> str:
        """Change the prompt, from chunk `at_chunk` or the next one that is not made yet; its id.

        A prompt that the model cannot read is in `state.rejected` afterwards. Raises ClosedError, and SettingsError for
        what cannot be sent.
        """
        self._check_open()
        request = self.state.ask(text, at_chunk)
        self._send(request)
        return request.prompt.id

    async def pause(self) -> None:
        """Let the server make no more chunks. Raises ClosedError."""
        self._check_open()
        self.state.paused = True
        self._send(pb.GenerateRequest(pause=pb.Pause()))

    async def resume(self) -> None:
        """Go on after `pause`. Raises ClosedError."""
        self._check_open()
        self.state.paused = False
        self._send(pb.GenerateRequest(resume=pb.Resume()))

    def __aiter__(self) -> Video:
        return self

    async def __anext__(self) -> RemoteChunk:
        """The next chunk; errors as those of `swiftvideo.sdk.client.Video`, and StopAsyncIteration at the end.

        Where it is cancelled or too late, the next one goes on with the same chunk. Tasks that ask at once take turns.
        """
        loop = asyncio.get_running_loop()
        until = math.inf if self._deadline is None else loop.time() + self._deadline
        async with self._turn:
            self._check_open()
            credit = self.state.credit()
            if credit is not None:
                self._send(credit)
            error: ServiceError | None = None
            while True:
                try:
                    async with asyncio.timeout_at(None if until == math.inf else until):
                        chunk = await self._receive()
                    if chunk is not None:
                        return chunk
                    if self.state.finished():
                        raise StopAsyncIteration
                except ServiceError as failure:  # first, because a DeadlineError is a TimeoutError
                    error = failure
                except TimeoutError:
                    raise late(self._deadline) from error
                if self._closed:
                    raise StopAsyncIteration
                self._client.check_open()
                patience = self._client.timeout if until == math.inf else math.inf
                pause = self.state.pause_before(error, patience)
                await asyncio.sleep(min(pause, max(0.0, until - loop.time())))
                if self._closed:
                    raise StopAsyncIteration
                self._connect()

    async def _receive(self) -> RemoteChunk | None:
        """The next chunk of the call, or None at its end."""
        while (message := await self._connected().receive()) is not None:
            chunk = self.state.take(message)
            if chunk is not None:
                return chunk
        return None

    def _connected(self) -> _Call:
        """The call, which the first use of it opens."""
        return self._connect() if self._call is None else self._call

    def _connect(self) -> _Call:
        if self._call is not None:
            self._call.cancel()
        self.state.ended = None
        self._call = _Call(self._client, self.state.opening())
        return self._call

    def _send(self, message: pb.GenerateRequest) -> None:
        self._connected().send(message)

    def _check_open(self) -> None:
        self._client.check_open()
        if self._closed:
            raise ClosedError("this video was closed: generate another one")

    async def close(self) -> None:
        """End the session on the server, also from a task that is being cancelled; twice is fine.

        Where no server answers it takes two seconds at most.
        """
        self._client.check_loop()
        self._closed = True
        if self._closing is None:
            self._closing = asyncio.create_task(self._stop())
        await asyncio.shield(self._closing)

    async def _stop(self) -> None:
        if self._call is None:
            return
        if self.state.ended is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSING):
                    self._call.stop()
                    await self._call.join()
                    for pause in BACKOFF:
                        if not self.state.was_cut(self._call.error):
                            break
                        await asyncio.sleep(pause)
                        self._connect().stop()
                        await self._call.join()
        self._call.cancel()

    def __del__(self) -> None:
        if self._call is not None:  # its reader does not hold the video: nobody will ask for another chunk
            with contextlib.suppress(RuntimeError):  # the loop may be closed; any thread may collect garbage
                self._client.loop.call_soon_threadsafe(self._call.stop)

    async def __aenter__(self) -> Video:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
