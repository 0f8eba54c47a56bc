"""Streams of a GPU, as the torch engine uses them: ordered work, copies that nobody waits for, captured graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swiftvideo.runtime.engines.capturing import uncollected

T = TypeVar("T")


class Lane:
    """A stream of the GPU; on the CPU, which has none, whoever calls.

    Any thread may use it. One at a time puts work in, so what is captured is the capturing thread's alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held = RLock()
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Work inside goes to this stream; other threads wait with theirs."""
        with self._held, nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            yield

    @property
    def handle(self) -> int:
        """CUDA's, for launches."""
        return int(self.stream.cuda_stream)

    def upload(self, target: Tensor, value: NDArray[Any]) -> None:
        """Copy into a tensor of this lane without waiting; `value` may change afterwards."""
        with self():
            target.copy_(self._host(value), non_blocking=True)

    def send(self, value: NDArray[Any]) -> Tensor:
        """A new tensor of this lane, without waiting; `value` may change afterwards."""
        with self():
            return self._host(value).to(self.device, non_blocking=True)

    def download(self, value: Tensor) -> Tensor:
        """A copy in (pinned) host memory, there when this returns."""
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=self.stream is not None)
        with self():
            host.copy_(value, non_blocking=True)
        self.wait()
        return host

    def borrow(self, *values: Tensor) -> None:
        """Tensors of another lane that this one reads from now on: their memory is not given away before it has."""
        if self.stream is not None:
            for value in values:
                value.record_stream(self.stream)

    def follow(self) -> None:
        """What comes next begins after what the caller's own stream has to do so far."""
        if self.stream is not None:
            with self._held:
                self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Until all work so far is done."""
        if self.stream is not None:
            with self():  # not while another thread captures
                done = self.stream.record_event()
            done.synchronize()

    def pool(self) -> Any:
        """Memory that graphs captured with it share, which are never replayed at the same time; None on the CPU."""
        return None if self.stream is None else torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None], pool: Any = None, runs: int = 3) -> Callable[[], None]:
        """`work` as one CUDA graph. It runs `runs` times before that, which compiles and chooses algorithms."""
        if self.stream is None:
            return work
        with self():
            for _ in range(runs):
                work()
            self.wait()
            graph = torch.cuda.CUDAGraph()
            with (
                uncollected(),
                torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                work()
        return graph.replay

    def milliseconds(self, work: Callable[[], object], repeats: int) -> float:
        """See `milliseconds`; other threads wait."""
        with self():
            return milliseconds(work, repeats)

    def _host(self, value: NDArray[Any]) -> Tensor:
        """A copy that the GPU can read by itself."""
        host = torch.from_numpy(np.array(value, order="C"))
        return host if self.stream is None else host.pin_memory()


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Mean time of `work` in the GPU's current stream by its events, after three runs that do not count."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def alone(device: torch.device, work: Callable[[], T]) -> T:
    """What `work` returns or raises, done by the one thread that a device has for this, whoever calls.

    For what libraries keep by thread. Not inside a lane that `work` enters.
    """
    waiting = _thread(device).submit(work)
    try:
        return waiting.result()
    finally:
        del waiting  # else an error and its traceback hold each other, and all that is in them


@functools.cache
def _thread(device: torch.device) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, f"swiftvideo-{device}")
