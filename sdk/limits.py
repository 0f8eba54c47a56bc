"""What the machine reaches at its best: matrix products and copies, beside which an engine's figures stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from swiftvideo.runtime.engines.host import usable_cores
from swiftvideo.runtime.errors import EngineError
from swiftvideo.runtime.plugins.launch import check

CPU_PROGRAM = """
import json, sys, time
import numpy as np

def best(work, repeats=7):
    took = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return min(took)

size = 1024
a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
out = np.empty_like(a)
source = np.ones(1 << 25, np.float32)
target = np.zeros_like(source)
matmul = best(lambda: np.matmul(a, b, out=out))
copy = best(lambda: np.copyto(target, source))
print(json.dumps({"gflop_per_s": 2 * size**3 / matmul / 1e9, "gb_per_s": 2 * source.nbytes / copy / 1e9,
                  "measured_with": "float32 matmul of 1024 and copy of 128 MiB, numpy " + np.__version__}))
"""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
MATMUL = 8192
COPIED = 1 << 32


def cpu_limits(threads: int | None = None) -> dict[str, Any]:
    """GFLOP/s of a float32 matrix product and GB/s, read and written, of a copy on `threads` cores; best of seven.

    In a process of its own, whose BLAS has that many threads; the copy runs on one. Raises EngineError if it fails.
    """
    count = threads or usable_cores()
    environment = os.environ | {name: str(count) for name in THREADS}
    child = subprocess.run(
        [sys.executable, "-c", CPU_PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    if child.returncode:
        raise EngineError(f"measuring this machine's limits failed: {child.stderr.strip()[-400:]}")
    limits: dict[str, Any] = json.loads(child.stdout)
    return limits | {"threads": count}


class Gpu:
    """The NVIDIA GPU of a torch engine."""

    def __init__(self, device: Any) -> None:
        import torch

        self._torch: Any = torch
        self.device = device
        self.name: str = torch.cuda.get_device_name(device)

    def wait(self) -> None:
        """Until the GPU has done all that it was given."""
        self._torch.cuda.synchronize(self.device)

    def memory_mib(self) -> dict[str, float]:
        """`allocated`: tensors now; `peak`: the most so far; `reserved`: what the process holds."""
        cuda = self._torch.cuda
        values = {
            "allocated": cuda.memory_allocated(self.device),
            "peak": cuda.max_memory_allocated(self.device),
            "reserved": cuda.memory_reserved(self.device),
        }
        return {name: round(value / 2**20, 1) for name, value in values.items()}

    def limits(self, dtype: str) -> dict[str, Any] | None:
        """GFLOP/s of a matrix product of a bundle's dtype over a second, and GB/s, read and written, of twenty copies.

        `first_gflop_per_s`: of the first twenty products, at the clock that the GPU holds for some milliseconds only.
        """
        torch = self._torch
        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        a, b = (torch.randn(MATMUL, MATMUL, device=self.device).to(kind) for _ in range(2))
        first = self._seconds(lambda: a @ b)
        matmul = self._seconds(lambda: a @ b, max(20, int(1 / first) + 1))
        size = min(COPIED, torch.cuda.mem_get_info(self.device)[0] // 3)
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        copy = self._seconds(lambda: target.copy_(source))
        return {
            "gflop_per_s": 2 * MATMUL**3 / matmul / 1e9,
            "first_gflop_per_s": 2 * MATMUL**3 / first / 1e9,
            "gb_per_s": 2 * size / copy / 1e9,
            "measured_with": f"{dtype} matmul of {MATMUL} for a second and copy of {size / 2**30:.1f} GiB, "
            f"torch {torch.__version__}, {self.name}",
        }

    def _seconds(self, work: Callable[[], object], repeats: int = 20) -> float:
        from swiftvideo.export.lanes import milliseconds

        return milliseconds(work, repeats) / 1000


class PlanGpu(Gpu):
    """The NVIDIA GPU of a TensorRT engine. torch is needed for nothing but its limits."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.name = engine.gpu.name

    def wait(self) -> None:
        """See `Gpu.wait`."""
        self._engine.enter()
        check(self._engine.driver, self._engine.driver.cuCtxSynchronize(), "waiting for the GPU")

    def memory_mib(self) -> dict[str, float]:
        """`allocated`: on the whole GPU, now."""
        self._engine.enter()
        free, total = check(self._engine.driver, self._engine.driver.cuMemGetInfo(), "asking for free memory")
        return {"allocated": round((total - free) / 2**20, 1)}

    def limits(self, dtype: str) -> dict[str, Any] | None:
        """See `Gpu.limits`; None where no torch is installed that sees the GPU."""
        try:
            import torch
        except ModuleNotFoundError:
            return None
        if not torch.cuda.is_available():
            return None
        return Gpu(torch.device("cuda", self._engine.gpu.index)).limits(dtype)


def gpu_of(engine: Any) -> Gpu | None:
    """The GPU that an engine computes on, or None."""
    if getattr(engine, "name", None) == "tensorrt":
        return PlanGpu(engine)
    device = getattr(engine, "device", None)
    return Gpu(device) if getattr(device, "type", None) == "cuda" else None
