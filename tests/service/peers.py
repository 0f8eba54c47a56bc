"""A peer that speaks HTTP/2 byte by byte, and so can stop anywhere."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY = 0, 1, 3, 4, 6, 7
BODIES = (DATA, HEADERS)
END_STREAM, ACK, END_HEADERS = 1, 1, 4
EMPTY = b"\0\0\0\0\0"
"""gRPC's framing of a message of no bytes."""
HEALTH = "/grpc.health.v1.Health/"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame (RFC 9113, 4.1)."""
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream)
    return head + payload


def headers(path: str) -> bytes:
    """Of a call: literals without an index (RFC 7541, 6.2.2)."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields["content-type"] = "application/grpc"
    pairs = ((name.encode(), value.encode()) for name, value in fields.items())
    return b"".join(b"\0" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in pairs)


class Peer:
    """A connection that answers settings and pings, and otherwise sends what it is told to.

    window: bytes of an answer's body that it takes. greet: whether it begins HTTP/2 at all.
    """

    def __init__(self, port: int, window: int = 65_535, greet: bool = True) -> None:
        self.frames: list[tuple[int, int, int, bytes]] = []
        """Kind, flags, stream and payload of what came."""
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._greeted = greet
        self._closed = threading.Event()
        if greet:
            self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, window)))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, data: bytes) -> None:
        """Bytes."""
        self._socket.sendall(data)

    def call(self, path: str, stream: int = 1, body: bytes | None = None) -> None:
        """Begin a call; without a body it goes no further."""
        self.send(frame(HEADERS, END_HEADERS, stream, headers(path)))
        if body is not None:
            self.send(frame(DATA, END_STREAM, stream, body))

    def answered(self, stream: int = 1, seconds: float = 20.0) -> bool:
        """Whether a call has ended within so long."""
        end = time.monotonic() + seconds
        while True:
            over = time.monotonic() >= end or self._closed.is_set()
            ends = [
                flags & END_STREAM for kind, flags, of, _ in self.frames if of == stream and kind in BODIES
            ]
            if over or any(ends):
                return any(ends)
            time.sleep(0.01)

    def closed(self, seconds: float = 20.0) -> bool:
        """Whether the server closes the connection within so long."""
        return self._closed.wait(seconds)

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._socket.close()

    def _read(self) -> None:
        data = b""
        try:
            while more := self._socket.recv(1 << 16):
                data += more
                while len(data) >= 9 and len(data) >= (size := 9 + int.from_bytes(data[:3], "big")):
                    self._take(data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:size])
                    data = data[size:]
        except OSError:
            pass
        self._closed.set()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.frames.append((kind, flags, stream, payload))
        if self._greeted and kind in (SETTINGS, PING) and not flags & ACK:
            self.send(frame(kind, ACK, 0, payload if kind == PING else b""))
