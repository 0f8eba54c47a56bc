"""A client of a swiftvideo server. Needs only grpcio and protobuf.

from swiftvideo.sdk.client import Client

with Client("localhost:50051", token="...") as client, client.generate("a red circle", seed=7) as video:
    for chunk in video:                    # chunk.frames: uint8 [n,H,W,3]
        video.prompt("a blue square")      # from the next chunk that is not made yet
        if chunk.index == 20:
            break

A broken connection is made again and the session goes on where it was, without a frame lost or doubled.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
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
    """A connection to a server.

    Args:
        address: "host:port".
        token: bearer token, if the server wants one.
        tls: whether to use TLS; None: where a root or a certificate is given.
        root: PEM file of the certificate authority; None: the system's.
        certificate, key: PEM files of this client, for mTLS.
        timeout: seconds for short calls and for connecting.
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
        self.address = address
        self.timeout = timeout
        self.metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._channel = open_channel(grpc, address, tls, root, certificate, key)

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
        """Start a session.

        credits: chunks that the server may make ahead of the last one taken. linger: seconds that the server keeps the
        session when the connection breaks; 0: no resume. chunks: end after so many; 0: endless. deadline: seconds that
        the next chunk may take, reconnects included; None: for ever while a server is there, and `timeout` without.

        Raises ServiceError, at the first chunk, where the server refuses; SettingsError for impossible values.
        """
        return Video(self, start_of(prompt, seed, credits, encoding, policy, linger, chunks), deadline)

    def describe(self) -> pb.DescribeResponse:
        """The model and the server's limits. Raises ServiceError."""
        response: pb.DescribeResponse = self._call("Describe", pb.DescribeRequest(), pb.DescribeResponse)
        return response

    def sessions(self) -> list[pb.SessionInfo]:
        """Running sessions; for operators. Raises ServiceError."""
        return list(self._call("ListSessions", pb.ListSessionsRequest(), pb.ListSessionsResponse).sessions)

    def stop_session(self, session_id: str) -> None:
        """End a session; for operators. Raises ServiceError."""
        self._call("StopSession", pb.StopSessionRequest(session_id=session_id), pb.StopSessionResponse)

    def _call(self, name: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(SERVICE + name, type(request).SerializeToString, response.FromString)
        try:
            return call(request, timeout=self.timeout, metadata=self.metadata)
        except grpc.RpcError as error:
            raise error_from(error) from error

    def open(self, requests: Iterator[pb.GenerateRequest]) -> Any:
        """The gRPC call of a session; used by `Video`."""
        call = self._channel.stream_stream(
            SERVICE + "Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString
        )
        return call(requests, metadata=self.metadata)

    def close(self) -> None:
        """Close the connection; twice is fine."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Video:
    """One session: iterate over its chunks, and close it or use it as a context.

    `prompt`, `pause`, `resume` and `close` may be called from any thread. A chunk counts as presented when the next one
    is asked for.
    """

    def __init__(self, client: Client, start: pb.Start, deadline: float | None = None) -> None:
        self.state = VideoState(start)
        self._client = client
        self._deadline = deadline
        self._lock = threading.RLock()
        self._closed = False
        self._requests: queue.SimpleQueue[pb.GenerateRequest | None] = queue.SimpleQueue()
        self._call: Any = None
        self._timer: threading.Timer | None = None
        self._connect()

    @property
    def session_id(self) -> str:
        """Of the server; empty until the first chunk."""
        return "" if self.state.started is None else self.state.started.session_id

    def prompt(self, text: str, at_chunk: int = 0) -> str:
        """Change the prompt, from chunk `at_chunk` or the next one that is not made yet; its id.

        A prompt that the model cannot read is in `state.rejected` afterwards. Raises ClosedError.
        """
        with self._lock:
            self._check_open()
            request = self.state.ask(text, at_chunk)
            self._requests.put(request)
            return request.prompt.id

    def pause(self) -> None:
        """Let the server make no more chunks. Raises ClosedError."""
        self._hold(True)

    def resume(self) -> None:
        """Go on after `pause`. Raises ClosedError."""
        self._hold(False)

    def __iter__(self) -> Video:
        return self

    def __next__(self) -> RemoteChunk:
        """The next chunk.

        Raises:
            StopIteration: the session is over.
            ServiceError: the server refused, the session is lost, or no server came back in time.
            ClosedError: the video was closed.
        """
        state = self.state
        since, attempt = time.monotonic(), 0
        with self._lock:
            self._check_open()
            credit = state.credit()
            if credit is not None:
                self._requests.put(credit)
        while True:
            error: ServiceError | None = None
            try:
                chunk = self._receive(since)
                if chunk is not None:
                    return chunk
                if state.finished():
                    raise StopIteration
            except grpc.RpcError as failure:
                error = error_from(failure)
            if self._closed:
                raise StopIteration
            waited = time.monotonic() - since
            time.sleep(state.pause_before(attempt, error, waited, self._client.timeout, self._deadline))
            self._connect()
            attempt += 1

    def _receive(self, since: float) -> RemoteChunk | None:
        """The next chunk of the call, or None at its end."""
        if self._deadline is not None:
            self._timer = threading.Timer(
                max(0.0, since + self._deadline - time.monotonic()), self._call.cancel
            )
            self._timer.daemon = True
            self._timer.start()
        try:
            for message in self._call:
                with self._lock:
                    chunk = self.state.take(message)
                if chunk is not None:
                    return chunk
            return None
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _connect(self) -> None:
        with self._lock:
            self._requests.put(None)  # ends the old call's iterator
            requests: queue.SimpleQueue[pb.GenerateRequest | None] = queue.SimpleQueue()
            self._requests = requests
            self.state.ended = None
            for message in self.state.opening():
                requests.put(message)
        self._call = self._client.open(iter(requests.get, None))

    def _hold(self, paused: bool) -> None:
        with self._lock:
            self._check_open()
            self.state.paused = paused
            message = (
                pb.GenerateRequest(pause=pb.Pause()) if paused else pb.GenerateRequest(resume=pb.Resume())
            )
            self._requests.put(message)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this video was closed: generate another one")

    def close(self) -> None:
        """End the session on the server; twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._requests.put(pb.GenerateRequest(stop=pb.Stop()))
            self._requests.put(None)
        if self.state.ended is None:
            wait = threading.Timer(2.0, self._call.cancel)
            wait.start()
            try:
                for message in self._call:  # so that stop arrives before the connection goes
                    self.state.take(message)
            except (grpc.RpcError, ServiceError):
                pass  # the session ends on the server by itself, at the latest after its linger time
            finally:
                wait.cancel()
        self._call.cancel()

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
