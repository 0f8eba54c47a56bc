"""The asynchronous client of a swiftvideo server. Needs only grpcio and protobuf.

from swiftvideo.sdk.aio import Client

async with Client("localhost:50051", token="...") as client, client.generate("a red circle", seed=7) as video:
    async for chunk in video:                    # chunk.frames: uint8 [n,H,W,3]
        await video.prompt("a blue square")
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from swiftvideo.runtime.errors import ClosedError
from swiftvideo.v1 import generation_pb2 as pb

from .remote import (
    SERVICE,
    EncodingName,
    RemoteChunk,
    ServiceError,
    VideoState,
    error_from,
    open_channel,
    start_of,
)


class Client:
    """A connection to a server; arguments as those of `swiftvideo.sdk.client.Client`. Make it in a running loop."""

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
        self.address = address
        self.timeout = timeout
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._channel = open_channel(grpc.aio, address, tls, root, certificate, key)

    def generate(
        self,
        prompt: str,
        seed: int = 0,
        *,
        credits: int = 3,
        encoding: EncodingName = "raw",
        policy: pb.PolicySettings | str | None = None,
        linger: float = 30.0,
        chunks: int = 0,
        deadline: float | None = None,
    ) -> Video:
        """Start a session; arguments and errors as those of `swiftvideo.sdk.client.Client.generate`."""
        return Video(self, start_of(prompt, seed, credits, encoding, policy, linger, chunks), deadline)

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
        await self._call("StopSession", pb.StopSessionRequest(session_id=session_id), pb.StopSessionResponse)

    async def _call(self, name: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(SERVICE + name, type(request).SerializeToString, response.FromString)
        try:
            return await call(request, timeout=self.timeout, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error

    def open(self) -> Any:
        """The gRPC call of a session; used by `Video`."""
        call = self._channel.stream_stream(
            SERVICE + "Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        return call(metadata=self.metadata)

    async def close(self) -> None:
        """Close the connection; twice is fine."""
        await self._channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Video:
    """One session: iterate over its chunks, and close it or use it as a context.

    A chunk counts as presented when the next one is asked for.
    """

    def __init__(self, client: Client, start: pb.Start, deadline: float | None = None) -> None:
        self.state = VideoState(start)
        self._client = client
        self._deadline = deadline
        self._closed = False
        self._call: Any = None

    @property
    def session_id(self) -> str:
        """Of the server; empty until the first chunk."""
        return "" if self.state.started is None else self.state.started.session_id

    async def prompt(self, text: str, at_chunk: int = 0) -> str:
        """Change the prompt, from chunk `at_chunk` or the next one that is not made yet; its id.

        A prompt that the model cannot read is in `state.rejected` afterwards. Raises ClosedError.
        """
        self._check_open()
        request = self.state.ask(text, at_chunk)
        await self._send(request)
        return request.prompt.id

    async def pause(self) -> None:
        """Let the server make no more chunks. Raises ClosedError."""
        self._check_open()
        self.state.paused = True
        await self._send(pb.GenerateRequest(pause=pb.Pause()))

    async def resume(self) -> None:
        """Go on after `pause`. Raises ClosedError."""
        self._check_open()
        self.state.paused = False
        await self._send(pb.GenerateRequest(resume=pb.Resume()))

    def __aiter__(self) -> Video:
        return self

    async def __anext__(self) -> RemoteChunk:
        """The next chunk; errors as those of `swiftvideo.sdk.client.Video`, and StopAsyncIteration at the end."""
        self._check_open()
        state = self.state
        since, attempt = time.monotonic(), 0
        credit = state.credit()
        if credit is not None:
            await self._send(credit)
        while True:
            error: ServiceError | None = None
            try:
                left = None if self._deadline is None else max(0.0, since + self._deadline - time.monotonic())
                chunk = await asyncio.wait_for(self._receive(), left)
                if chunk is not None:
                    return chunk
                if state.finished():
                    raise StopAsyncIteration
            except grpc.aio.AioRpcError as failure:
                error = error_from(failure)
            except TimeoutError:
                error = None
            if self._closed:
                raise StopAsyncIteration
            waited = time.monotonic() - since
            await asyncio.sleep(
                state.pause_before(attempt, error, waited, self._client.timeout, self._deadline)
            )
            await self._connect()
            attempt += 1

    async def _receive(self) -> RemoteChunk | None:
        """The next chunk of the call, or None at its end."""
        if self._call is None:
            await self._connect()
        while (message := await self._call.read()) is not grpc.aio.EOF:
            chunk = self.state.take(message)
            if chunk is not None:
                return chunk
        return None

    async def _connect(self) -> None:
        if self._call is not None:
            self._call.cancel()
        self.state.ended = None
        self._call = self._client.open()
        for message in self.state.opening():
            await self._send(message)

    async def _send(self, message: pb.GenerateRequest) -> None:
        """Write, if the call is open. What a broken call loses is repeated by `opening`, or means nothing there."""
        if self._call is None:
            await self._connect()
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reading side learns why, and reconnects

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this video was closed: generate another one")

    async def close(self) -> None:
        """End the session on the server; twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._call is None:
            return
        if self.state.ended is None:
            await self._send(pb.GenerateRequest(stop=pb.Stop()))
            try:
                async with asyncio.timeout(2):
                    while (message := await self._call.read()) is not grpc.aio.EOF:
                        self.state.take(message)
            except (grpc.aio.AioRpcError, ServiceError, TimeoutError):
                pass  # the session ends on the server by itself, at the latest after its linger time
        self._call.cancel()

    async def __aenter__(self) -> Video:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
