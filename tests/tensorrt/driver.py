"""A CUDA driver for tests: device memory is host memory, streams run at once, captures are lists of calls.

It has the functions of cuda.bindings.driver that the package uses, with their signatures and results. Launches are
recorded; what they compute is up to `on_launch`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from swiftvideo.runtime.plugins.kernel import KernelSpec


class Result(IntEnum):
    """Codes that tests meet."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209


@dataclass(frozen=True)
class Launch:
    """One cuLaunchKernel, its arguments still behind pointers."""

    cubin: bytes
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    pointers: int

    def values(self, spec: KernelSpec) -> tuple[float, ...]:
        """The arguments, read as the kernel would."""
        kinds = {"ptr": ctypes.c_uint64, "i32": ctypes.c_int32, "f32": ctypes.c_float}
        addresses = (ctypes.c_void_p * len(spec.arguments)).from_address(self.pointers)
        return tuple(
            kinds[kind].from_address(address or 0).value
            for (_, kind), address in zip(spec.arguments, addresses, strict=True)
        )


class FakeDriver:
    """See the module. Attributes say how the machine is, and what was asked of it."""

    CUresult = Result
    CUfunction = staticmethod(int)
    CUdevice = staticmethod(int)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    )

    def __init__(self) -> None:
        self.missing, self.init_code, self.count, self.capability = False, 0, 1, (8, 9)
        self.version, self.multiprocessors = 13000, 2
        self.free, self.load_code, self.launch_code = 4 << 30, 0, 0
        self.allocation_code, self.clearing_code = 0, 0
        self.allocated: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.libraries: list[bytes] = []
        self.shared_limits: list[int] = []
        self.launches: list[Launch] = []
        self.on_launch: Callable[[Launch], None] | None = None
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.recorded: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self._next = 1
        self._thread = threading.local()

    def do(self, stream: Any, work: Callable[[], None]) -> tuple[int]:
        """Run work now, or put it into the stream's capture."""
        if int(stream) in self.capturing:
            self.capturing[int(stream)].append(work)
        else:
            work()
        return (0,)

    def _handle(self) -> tuple[int, int]:
        self._next += 1
        return 0, self._next

    # -- machine

    def cuInit(self, _: int) -> tuple[int]:
        if self.missing:
            raise RuntimeError("libcuda.so.1 is not there")
        return (self.init_code,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, self.count

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDeviceGetAttribute(self, attribute: int, _: int) -> tuple[int, int]:
        return 0, self.multiprocessors if attribute == 16 else self.capability[attribute - 75]

    def cuDeviceGetName(self, length: int, _: int) -> tuple[int, bytes]:
        return 0, b"A test".ljust(length, b"\0")

    def cuDeviceTotalMem(self, _: int) -> tuple[int, int]:
        return 0, 8 << 30

    def cuDevicePrimaryCtxRetain(self, _: int) -> tuple[int, int]:
        return 0, 1

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self._thread.contexts = [context]
        return (0,)

    def cuCtxPushCurrent(self, context: int) -> tuple[int]:
        self._thread.contexts = [*self._contexts, context]
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, int]:
        *self._thread.contexts, last = self._contexts
        return 0, last

    @property
    def _contexts(self) -> list[int]:
        return getattr(self._thread, "contexts", [])

    def cuCtxGetDevice(self) -> tuple[int, int]:
        return 0, 0

    def cuMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.free, 8 << 30

    # -- memory

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        if self.allocation_code:
            return self.allocation_code, 0
        buffer = ctypes.create_string_buffer(b"\xab" * (size + 512), size + 512)
        address = -(-ctypes.addressof(buffer) // 512) * 512
        self.allocated[address] = buffer
        return 0, address

    def cuMemFree(self, address: int) -> tuple[int]:
        if not self._contexts:
            return (int(Result.CUDA_ERROR_INVALID_CONTEXT),)
        del self.allocated[address]
        return (0,)

    def cuMemHostAlloc(self, size: int, _: int) -> tuple[int, int]:
        code, address = self.cuMemAlloc(size)
        self.pinned.add(address)
        return code, address

    def cuMemFreeHost(self, address: int) -> tuple[int]:
        self.pinned.discard(address)
        return self.cuMemFree(address)

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: Any) -> tuple[int]:
        if self.clearing_code:
            return (self.clearing_code,)
        return self.do(stream, lambda: void(ctypes.memset(address, value, size)))

    def _copy(self, target: int, source: int, size: int, stream: Any) -> tuple[int]:
        for address in (target, source):
            assert any(a <= address < a + len(b) for a, b in self.allocated.items()), (
                "outside of any allocation"
            )
        return self.do(stream, lambda: void(ctypes.memmove(target, source, size)))

    cuMemcpyHtoDAsync = cuMemcpyDtoHAsync = cuMemcpyDtoDAsync = _copy

    # -- streams, events, graphs

    def cuStreamCreate(self, _: int) -> tuple[int, int]:
        return self._handle()

    def cuEventCreate(self, _: int) -> tuple[int, int]:
        return self._handle()

    def _succeed(self, *_: Any) -> tuple[int]:
        return (0,)

    cuCtxSynchronize = cuStreamDestroy = cuEventDestroy = cuEventRecord = cuEventSynchronize = _succeed

    def cuStreamSynchronize(self, stream: Any) -> tuple[int]:
        assert int(stream) not in self.capturing, "a capture must not wait"
        return (0,)

    def cuStreamBeginCapture(self, stream: Any, _: Any) -> tuple[int]:
        self.capturing[int(stream)] = []
        return (0,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[int, int]:
        code, handle = self._handle()
        self.recorded[handle] = self.capturing.pop(int(stream))
        return code, handle

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        del self.recorded[graph]
        return (0,)

    def cuGraphInstantiate(self, graph: int, _: int) -> tuple[int, int]:
        self.graphs[graph] = self.recorded[graph]
        return 0, graph

    def cuGraphLaunch(self, graph: int, _: Any) -> tuple[int]:
        for work in self.graphs[graph]:
            work()
        return (0,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[int]:
        del self.graphs[graph]
        return (0,)

    # -- kernels

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(
        self, _: Any, threads: int, shared: int
    ) -> tuple[int, int]:
        assert threads % 32 == 0
        return 0, min(1024 // threads, (100 << 10) // max(1, shared))

    def cuLibraryLoadData(self, code: bytes, *_: Any) -> tuple[int, int]:
        self.libraries.append(code)
        return self.load_code, len(self.libraries)

    def cuLibraryGetKernel(self, library: int, name: bytes) -> tuple[int, int]:
        assert name
        return 0, library

    def cuKernelSetAttribute(self, _: int, value: int, kernel: int, device: int) -> tuple[int]:
        self.shared_limits.append(value)
        return (0,)

    def cuLaunchKernel(self, function: int, *numbers: int) -> tuple[int]:
        grid, block, (shared, stream, pointers, _) = numbers[:3], numbers[3:6], numbers[6:]
        launch = Launch(self.libraries[function - 1], grid, block, shared, stream, pointers)  # type: ignore[arg-type]
        self.launches.append(launch)
        if self.on_launch is not None and not self.launch_code:
            self.on_launch(launch)
        return (self.launch_code,)


def void(_: Any) -> None:
    """Throw a result away, in a lambda."""
