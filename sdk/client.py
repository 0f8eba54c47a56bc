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

import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from swiftvideo.runtime.errors import ClosedError
from swiftvideo.runtime.geometry import Policy
from swiftvideo.v1 import generation_pb2 as pb

from .connection import metadata_of, open_channel
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
    """A connection to a server.

    Args:
        address: "host:port".
        token: bearer token, if the server wants one.
        tls: whether to use TLS; None: where a PEM file is given, or a token would leave this machine.
        root: PEM file of the certificate authority; None: the system's.
        certificate, key: PEM files of this client, for mTLS.
        timeout: seconds for short calls and for connecting.

    Raises SettingsError where the address is none, a file cannot be read or is no PEM file, the token cannot be one, or
    settings contradict each other.
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
        self._channel = open_channel(grpc, address, token, tls, root, certificate, key, timeout)
        self._videos: weakref.WeakSet[Video] = weakref.WeakSet()
        self._lock = threading.Lock()
        """Held while a video is begun: `close` sees it, or it is refused."""

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
        """Start a session.

        prompts: at most 64 that are known ahead, as pairs (text, at_chunk) of what `Video.prompt` takes; they are heard
        before chunk 0, so that the same video comes each time. Their ids are the keys of `video.state.prompts`, in that
        order. Where the server refuses one it refuses all. credits: chunks that the server may make ahead of the last
        one taken. linger: seconds that the server keeps the session when the connection breaks; 0: no resume. chunks:
        end after so many; 0: endless. deadline: seconds that the next chunk may take, reconnects included; None: for
        ever while a server is there, and `timeout` seconds of reconnects without.

        Raises ServiceError, at the first chunk, where the server refuses; SettingsError for impossible values;
        ClosedError after `close`.
        """
        start = start_of(prompt, seed, credits, encoding, policy, linger, chunks, prompts)
        return self._video(VideoState(start), deadline)

    def reattach(self, token: str, next_chunk: int = 0, *, deadline: float | None = None) -> Video:
        """Take up a session that another client began, here or in another process, with the prompts it has.

        token: its `Video.resume_token`. next_chunk: the first one that was not received there; those before it count as
        presented. The call that has it ends with SessionLostError. Raises that, too, at the first chunk, where the
        session is over; RefusedError for a chunk that is not kept; else as `generate`.
        """
        return self._video(VideoState.taken_up(token, next_chunk), deadline)

    def _video(self, state: VideoState, deadline: float | None) -> Video:
        if deadline is not None:
            check_seconds("deadline", deadline)
        with self._lock:
            self.check_open()
            video = Video(self, state, deadline)
            self._videos.add(video)
        return video

    def describe(self) -> pb.DescribeResponse:
        """The model and the server's limits. Raises ServiceError."""
        response: pb.DescribeResponse = self._call("Describe", pb.DescribeRequest(), pb.DescribeResponse)
        return response

    def sessions(self) -> list[pb.SessionInfo]:
        """Running sessions; for operators. Raises ServiceError."""
        return list(self._call("ListSessions", pb.ListSessionsRequest(), pb.ListSessionsResponse).sessions)

    def stop_session(self, session_id: str) -> None:
        """End a session; for operators. Raises ServiceError."""
        self._call(
            "StopSession", filled(pb.StopSessionRequest, session_id=session_id), pb.StopSessionResponse
        )

    def _call(self, name: str, request: Any, response: Any) -> Any:
        self.check_open()
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

    def check_open(self) -> None:
        """Raises ClosedError after `close`."""
        if self.closed:
            raise ClosedError(f"the client of {self.address} was closed: make another one")

    def close(self) -> None:
        """End the sessions of all videos, as `Video.close`, and close the connection; twice is fine.

        Where no server answers it takes two seconds at most.
        """
        end = time.monotonic() + CLOSING
        with self._lock:
            self.closed = True
            videos, calls = list(self._videos), list(self.calls)
        try:
            for call in calls:  # all of them before the first wait: they end side by side
                call.stop()
            for video in videos:
                video.end(end)
            for call in calls:
                call.join(end - time.monotonic())
        finally:
            self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Call:
    """A gRPC call that a thread of its own reads: neither a deadline nor a close from elsewhere disturbs a read."""

    def __init__(self, client: Client, opening: list[pb.GenerateRequest]) -> None:
        self.error: ServiceError | None = None
        """How the call broke."""
        self._requests: queue.SimpleQueue[pb.GenerateRequest | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[pb.GenerateResponse | None] = queue.SimpleQueue()
        for message in opening:
            self.send(message)
        self._call: Any = None
        self._cancelled = False
        self._reader = threading.Thread(target=self._read, args=(client.open,), daemon=True)
        self._running = client.calls
        self._running.add(self)
        self._reader.start()

    def _read(self, make: Callable[[Iterator[pb.GenerateRequest]], Any]) -> None:
        """Make the call and read it. Ctrl-C never comes here: a channel with a call that is half made never closes."""
        try:
            self._call = make(iter(self._requests.get, None))
            if self._cancelled:
                self._call.cancel()
            for message in self._call:
                self._inbox.put(message)
        except grpc.RpcError as failure:
            self.error = error_from(failure)
        except ValueError as failure:  # of a channel that is closed
            self.error = UnavailableError(str(failure), grpc.StatusCode.UNAVAILABLE)
        finally:
            self._inbox.put(None)
            self._requests.put(None)  # ends the thread that gRPC writes in
            self._running.discard(self)

    def send(self, message: pb.GenerateRequest) -> None:
        """Write. What a broken call loses is repeated by `VideoState.opening`, or means nothing there."""
        self._requests.put(message)

    def receive(self, seconds: float | None) -> pb.GenerateResponse | None:
        """The next message, or None once the call has ended. Raises queue.Empty, and ServiceError where it broke."""
        message = self._inbox.get(timeout=seconds)
        if message is None:
            self._inbox.put(None)  # whoever asks again is told again
            if self.error is not None:
                raise self.error
        return message

    def stop(self) -> None:
        """Ask for the end of the session, and send nothing more."""
        self._requests.put(pb.GenerateRequest(stop=pb.Stop()))
        self._requests.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the call's end."""
        if self._reader.is_alive():  # Ctrl-C may have come before it was started
            self._reader.join(max(0.0, seconds))

    def cancel(self) -> None:
        """End the call without a word."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()


class Video:
    """One session: iterate over its chunks, and close it or use it as a context.

    `prompt`, `pause`, `resume` and `close` may be called from any thread. A chunk counts as presented when the next one
    is asked for.
    """

    def __init__(self, client: Client, state: VideoState, deadline: float | None = None) -> None:
        self.state = state
        self._client = client
        self._deadline = deadline
        self._lock = threading.RLock()
        self._turn = threading.Lock()
        """Of the thread that waits for a chunk."""
        self._closed = False
        self._call: _Call | None = None
        self._connect()

    @property
    def session_id(self) -> str:
        """Of the server; empty until the first chunk."""
        return "" if self.state.started is None else self.state.started.session_id

    @property
    def resume_token(self) -> str:
        """For `Client.reattach`: a secret. Empty until the first chunk."""
        return "" if self.state.started is None else self.state.started.resume_token

    def prompt(self, text: str, at_chunk: int = 0) -> str:
        """Change the prompt, from chunk `at_chunk` or the next one that is not made yet; its id.

        A prompt that the model cannot read is in `state.rejected` afterwards. Raises ClosedError, and SettingsError for
        what cannot be sent.
        """
        with self._lock:
            self._check_open()
            request = self.state.ask(text, at_chunk)
            self._send(request)
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
        """The next chunk. Threads that ask at once take turns.

        Raises:
            StopIteration: the session is over.
            DeadlineError: it did not come in time; it may be asked for again.
            ServiceError: the server refused, the session is lost, or no server came back in time.
            ClosedError: the video or its client was closed.
        """
        asked = time.monotonic()
        until = math.inf if self._deadline is None else asked + self._deadline
        with self._turn:
            with self._lock:
                self._check_open()
                credit = self.state.credit()
                if credit is not None:
                    self._send(credit)
            error: ServiceError | None = None
            while True:
                try:
                    chunk = self._receive(until)
                    if chunk is not None:
                        return chunk
                    if self.state.finished():
                        raise StopIteration
                except queue.Empty:
                    raise late(self._deadline) from error
                except ServiceError as failure:
                    error = failure
                self._reconnect(error, until)

    def _receive(self, until: float) -> RemoteChunk | None:
        """The next chunk of the call, or None at its end."""
        assert self._call is not None
        while True:
            left = None if until == math.inf else max(0.0, until - time.monotonic())
            message = self._call.receive(left)
            if message is None:
                return None
            with self._lock:
                chunk = self.state.take(message)
            if chunk is not None:
                return chunk

    def _reconnect(self, error: ServiceError | None, until: float) -> None:
        """Wait a little and call again. Raises StopIteration where the video was closed, and as `pause_before`."""
        if not self._closed:
            self._client.check_open()
            pause = self.state.pause_before(error, self._client.timeout if until == math.inf else math.inf)
            time.sleep(min(pause, max(0.0, until - time.monotonic())))
        with self._lock:
            if self._closed:
                raise StopIteration
            self._connect()

    def _connect(self) -> None:
        with self._lock:
            if self._call is not None:
                self._call.cancel()
            self.state.ended = None
            self._call = _Call(self._client, self.state.opening())

    def _send(self, message: pb.GenerateRequest) -> None:
        assert self._call is not None
        self._call.send(message)

    def _hold(self, paused: bool) -> None:
        with self._lock:
            self._check_open()
            self.state.paused = paused
            message = (
                pb.GenerateRequest(pause=pb.Pause()) if paused else pb.GenerateRequest(resume=pb.Resume())
            )
            self._send(message)

    def _check_open(self) -> None:
        self._client.check_open()
        if self._closed:
            raise ClosedError("this video was closed: generate another one")

    def close(self) -> None:
        """End the session on the server; twice is fine. Where no server answers it takes two seconds at most."""
        self.end(time.monotonic() + CLOSING)

    def end(self, until: float) -> None:
        """`close`, waiting until that moment of the monotonic clock at most."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        assert self._call is not None
        if self.state.ended is None:
            self._call.stop()
            self._call.join(until - time.monotonic())
            for pause in BACKOFF:
                if not self.state.was_cut(self._call.error) or time.monotonic() + pause > until:
                    break
                time.sleep(pause)
                self._connect()
                self._call.stop()
                self._call.join(until - time.monotonic())
        self._call.cancel()

    def __del__(self) -> None:
        if self._call is not None:
            self._call.stop()  # its reader does not hold the video: nobody will ask for another chunk

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
