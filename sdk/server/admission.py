"""Whether there is room for one more session: caps, the engine's time, memory."""

from __future__ import annotations

import random
from collections.abc import Collection

import grpc

from swiftvideo.runtime import Pipeline
from swiftvideo.runtime.engines.host import available_memory

from .config import ServerConfig
from .status import Reason, Refusal

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


class Admission:
    """Decides, and measures what deciding needs. Belongs to the event loop."""

    def __init__(self, config: ServerConfig, pipeline: Pipeline) -> None:
        self._config = config
        geometry = pipeline.geometry
        self.period = geometry.video_frames(1, geometry.chunk) / geometry.fps
        """Seconds that a chunk plays."""
        self.chunk_seconds = 0.0
        """That the engine takes for one, averaged over the last twenty or so; 0 until the server has warmed up."""
        rows = 2 * geometry.layers * geometry.rows * geometry.heads * geometry.head_dim
        self.cache_bytes = rows * BYTES.get(pipeline.manifest.dtype, 4)
        """Of a session's K and V, which are most of it."""
        self._frame_bytes = geometry.video_frames(1, geometry.chunk) * geometry.height * geometry.width * 3
        self._on_host = pipeline.engine.name == "onnxruntime"

    def measured(self, seconds: float) -> None:
        """A chunk took so long."""
        self.chunk_seconds += (seconds - self.chunk_seconds) * (0.05 if self.chunk_seconds else 1.0)

    def check(self, client: str, clients: Collection[str], credits: int) -> None:
        """Raise Refusal where a session of `client` does not fit beside those of `clients`."""
        config, count = self._config, len(clients)
        if count >= config.max_sessions:
            raise self._full("sessions", f"the server holds {count} sessions, its limit", count)
        own = sum(name == client for name in clients)
        if config.tokens is not None and own >= config.max_sessions_per_client:
            raise self._full("client", f"{client} has {own} sessions, the limit of one client", count)
        load = (count + 1) * self.chunk_seconds / self.period
        if config.max_load is not None and count and load > config.max_load:
            text = f"with one more session the engine would need {load:.2f} of its time, the limit is {config.max_load}"
            raise self._full("load", text, count)
        needed = (credits + 1) * self._frame_bytes + (self.cache_bytes if self._on_host else 0)
        free = available_memory()
        if free is not None and needed + config.memory_reserve > free:
            text = f"a session needs {needed / 2**20:.0f} MiB and {free / 2**20:.0f} MiB are free"
            raise self._full(
                "memory", f"{text}, of which {config.memory_reserve / 2**20:.0f} are kept back", count
            )

    def _full(self, reason: Reason, text: str, count: int) -> Refusal:
        """The hint grows with what is running, and is spread so that clients do not come back all at once."""
        hint = min(30.0, 1.0 + 2 * count * self.chunk_seconds) * random.uniform(0.8, 1.2)
        text = f"{text}: try again in {hint:.1f} s"
        return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, retry_after=hint, reason=reason)
