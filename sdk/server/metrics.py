"""Prometheus metrics of a server, in a registry of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily

from swiftvideo.runtime.geometry import Mode
from swiftvideo.runtime.telemetry import STAGES

from .status import Reason

log = logging.getLogger(__name__)

FINE = (0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5)
SECONDS = (0.001, 0.002, 0.005, 0.01, *FINE, 5.0, 10.0, 20.0, 50.0, 100.0)
"""Upper ends of buckets: finest about the time that a chunk plays, and as long as the watchdog lets one take."""
REJECTED = (*get_args(Reason), "unauthenticated", "internal", "data_loss")
ENDED = (
    "stopped",
    "completed",
    "operator",
    "drained",
    "cancelled",
    "unauthenticated",
    "unavailable",
    "internal",
    "resource_exhausted",
    "data_loss",
)
"""The last four are what an operator wants to be woken for (deploy/alerts.yaml)."""
GPU = {
    "swiftvideo_gpu_memory_bytes": "Memory in use.",
    "swiftvideo_gpu_power_watts": "Power drawn.",
    "swiftvideo_gpu_utilisation_ratio": "Share of time in which a kernel ran.",
}
VALUES: tuple[Callable[[Any, int], float], ...] = (
    lambda nvml, index: nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used,
    lambda nvml, index: nvml.nvmlDeviceGetPowerUsage(nvml.nvmlDeviceGetHandleByIndex(index)) / 1000,
    lambda nvml, index: nvml.nvmlDeviceGetUtilizationRates(nvml.nvmlDeviceGetHandleByIndex(index)).gpu / 100,
)
"""Of NVML and a GPU's number, in the order of `GPU`."""


class Metrics:
    """All of a server's metrics."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.serving = Gauge("swiftvideo_serving", "1 while the health is SERVING, else 0.", registry=r)
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
            "From a prompt for the next chunk to the first chunk under it.",
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
        self.snapshot_failures = Counter(
            "swiftvideo_snapshot_failures", "Snapshots that were due and could not be written.", registry=r
        )
        self.snapshot = Histogram(
            "swiftvideo_snapshot_seconds",
            "From taking a snapshot to its being whole on the disk.",
            buckets=SECONDS,
            registry=r,
        )
        self.unsaved = Gauge(
            "swiftvideo_unsaved_chunks",
            "Most chunks of a session that its newest snapshot lacks, which a kill would have made again.",
            registry=r,
        )
        self.snapshot_bytes = Gauge("swiftvideo_snapshot_bytes", "All snapshots on disk.", registry=r)
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
        for metric, label, known in (
            (self.stage, "stage", (*STAGES, "encode")),
            (self.rejects, "reason", REJECTED),
            (self.ended, "reason", ENDED),
            (self.switches, "mode", get_args(Mode)),
        ):
            for value in known:  # from 0 on: Prometheus does not see a series' first value as an increase
                metric.labels(**{label: value})
        threads = Gauge("swiftvideo_threads", "Python threads.", registry=r)
        threads.set_function(threading.active_count)
        r.register(_Gpus())

    def watch(self, gauge: Gauge, value: Callable[[], float], **labels: str) -> None:
        """Let a gauge ask for its value when it is read."""
        (gauge.labels(**labels) if labels else gauge).set_function(value)


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
        """Of every GPU; what one cannot tell is left out."""
        families = {name: GaugeMetricFamily(name, text, labels=["gpu"]) for name, text in GPU.items()}
        for index in range(self._ask(lambda nvml: nvml.nvmlDeviceGetCount()) or 0):
            for family, value in zip(families.values(), VALUES, strict=True):
                found = self._ask(value, index)
                if found is not None:
                    family.add_metric([str(index)], found)
        yield from families.values()

    def _ask(self, value: Callable[..., Any], *arguments: int) -> Any:
        """What NVML says, or None."""
        if self._nvml is None:
            return None
        try:
            return value(self._nvml, *arguments)
        except self._nvml.NVMLError as error:
            log.debug("NVML: %s", error)
            return None
