"""Prometheus metrics of a server, in a registry of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily

log = logging.getLogger(__name__)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
GPU = {
    "swiftvideo_gpu_memory_bytes": "Memory in use.",
    "swiftvideo_gpu_power_watts": "Power drawn.",
    "swiftvideo_gpu_utilisation_ratio": "Share of time in which a kernel ran.",
}


class Metrics:
    """All of a server's metrics. `endpoint` serves them over HTTP."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.sessions = Gauge("swiftvideo_sessions", "Sessions that hold a slot.", ["state"], registry=r)
        self.queue = Gauge("swiftvideo_queue_depth", "Sessions that wait for the engine.", registry=r)
        self.stage = Histogram(
            "swiftvideo_stage_seconds", "A chunk's stages.", ["stage"], buckets=SECONDS, registry=r
        )
        self.chunk = Histogram(
            "swiftvideo_chunk_seconds", "The engine's work for a chunk.", buckets=SECONDS, registry=r
        )
        self.first_frame = Histogram(
            "swiftvideo_first_frame_seconds", "From start to the first chunk.", buckets=SECONDS, registry=r
        )
        self.switch = Histogram(
            "swiftvideo_switch_seconds",
            "From a prompt to the first chunk under it.",
            buckets=SECONDS,
            registry=r,
        )
        self.frames = Counter("swiftvideo_frames", "Video frames sent.", registry=r)
        self.fps = Gauge("swiftvideo_fps", "Video frames per second of the engine, lately.", registry=r)
        self.credits = Gauge(
            "swiftvideo_credits", "Chunks that may be made before clients give credit.", registry=r
        )
        self.rejects = Counter("swiftvideo_rejects", "Refused calls.", ["reason"], registry=r)
        self.ended = Counter("swiftvideo_sessions_ended", "Sessions that ended.", ["reason"], registry=r)
        self.switches = Counter("swiftvideo_switches", "Prompts applied.", ["mode"], registry=r)
        self.snapshots = Counter("swiftvideo_snapshots", "Snapshots written.", registry=r)
        self.engine_crashes = Counter(
            "swiftvideo_engine_crashes", "Times the engine's thread ended.", registry=r
        )
        self.tasks = Gauge("swiftvideo_tasks", "Tasks of the event loop.", registry=r)
        self.caches = Gauge("swiftvideo_session_caches", "Memory caches that are alive.", registry=r)
        self.after_cancel = Gauge(
            "swiftvideo_forwards_after_cancel",
            "Most runs of the backbone that ended after a cancel.",
            registry=r,
        )
        threads = Gauge("swiftvideo_threads", "Python threads.", registry=r)
        threads.set_function(threading.active_count)
        r.register(_Gpus())
        self._endpoint: Any = None

    def watch(self, gauge: Gauge, value: Callable[[], float], **labels: str) -> None:
        """Let a gauge ask for its value when it is read."""
        (gauge.labels(**labels) if labels else gauge).set_function(value)

    def endpoint(self, host: str, port: int) -> int:
        """Serve /metrics; the port."""
        self._endpoint = start_http_server(port, host, self.registry)
        return int(self._endpoint[0].server_port)

    def close(self) -> None:
        """End the endpoint."""
        if self._endpoint is not None:
            server, thread = self._endpoint
            self._endpoint = None
            server.shutdown()
            server.server_close()
            thread.join(5)


class _Gpus:
    """Reads NVML where it is there; else the families are empty."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml
        except ModuleNotFoundError:
            return
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
        except pynvml.NVMLError as error:  # no driver, or no GPU
            log.info("no GPU metrics: %s", error)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Of every GPU."""
        families = {name: GaugeMetricFamily(name, text, labels=["gpu"]) for name, text in GPU.items()}
        if self._nvml is not None:
            for index in range(self._nvml.nvmlDeviceGetCount()):
                self._read(str(index), families)
        yield from families.values()

    def _read(self, gpu: str, families: dict[str, GaugeMetricFamily]) -> None:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(int(gpu))
        values = (
            nvml.nvmlDeviceGetMemoryInfo(handle).used,
            nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        )
        for family, value in zip(families.values(), values, strict=True):
            family.add_metric([gpu], value)
