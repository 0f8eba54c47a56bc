"""Endless video in the browser, whose prompt you change while it plays.

python samples/live.py    # then open http://localhost:8000; --bundle and --port for others
"""

import argparse
import base64
import io
import json
import secrets
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from swiftvideo.runtime import Pipeline, Session, SwiftVideoError, load

PAGE = Path(__file__).with_suffix(".html")


class Live(ThreadingHTTPServer):
    """One pipeline; a session for every page that is open."""

    daemon_threads = False  # at the end, sessions are closed by the threads that run them

    def __init__(self, pipeline: Pipeline, port: int) -> None:
        super().__init__(("localhost", port), Viewer)
        self.pipeline = pipeline
        self.sessions: dict[str, Session] = {}
        self.ending = Event()


class Viewer(BaseHTTPRequestHandler):
    """A page's requests: itself, its video, its prompts."""

    server: Live

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/video":
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.play(parse_qs(url.query).get("prompt", [""])[0])
            except SwiftVideoError as error:
                self.tell("failed", text=str(error))
            except ConnectionError:
                pass  # the page was closed
        else:
            self.answer(404, b"there is only a page here")

    def do_POST(self) -> None:
        session = self.server.sessions.get(self.path.removeprefix("/prompt/"))
        text = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 4096)).decode(errors="replace")
        if session is None:
            self.answer(404, b"this video has ended: load the page again")
            return
        try:
            session.prompt(text)  # takes effect at the next chunk
        except SwiftVideoError as error:
            self.answer(400, str(error).encode())
        else:
            self.answer(204, b"")

    def play(self, prompt: str) -> None:
        """Send a new session's frames at the speed at which they play, until the page closes."""
        geometry, ending = self.server.pipeline.geometry, self.server.ending
        name = secrets.token_hex(8)
        with self.server.pipeline.session(prompt, seed=secrets.randbits(64)) as session:
            self.server.sessions[name] = session
            try:
                self.tell("begin", session=name, width=geometry.width, height=geometry.height)
                due = time.monotonic()
                # A chunk is made once the last frame of the one before is out, so that a new prompt is seen soon.
                for chunk in session:
                    due = max(due, time.monotonic() - 1 / geometry.fps)  # what came late is not made up for
                    rho = None if chunk.rho is None else round(chunk.rho, 2)
                    self.tell("chunk", prompt=chunk.prompt, window=chunk.window, mode=chunk.mode, rho=rho)
                    for frame in chunk.frames:
                        if ending.wait(max(0.0, due - time.monotonic())):
                            return
                        file = io.BytesIO()
                        Image.fromarray(frame).save(file, "JPEG", quality=90)
                        self.tell("frame", jpeg=base64.b64encode(file.getvalue()).decode())
                        due += 1 / geometry.fps
            finally:
                del self.server.sessions[name]

    def tell(self, event: str, **data: object) -> None:
        self.wfile.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode())

    def answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of every request."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Endless video in the browser.")
    parser.add_argument("--bundle", help="the embedded model if absent")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    try:
        with load(given.bundle) as pipeline, Live(pipeline, given.port) as server:
            print(f"http://localhost:{server.server_port}   (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                server.ending.set()
    except (OSError, OverflowError, SwiftVideoError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
