"""The little of CUDA that an engine needs: which GPU is there, and one block of its memory cut into named tensors.

Everything goes through a `driver`, the module cuda.bindings.driver or what stands for it in tests.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swiftvideo.runtime.errors import EngineError, EngineUnavailableError, OutOfMemoryError
from swiftvideo.runtime.plugins.launch import check, cuda_driver

from .state import widened

Array = NDArray[Any]

ALIGNMENT = 512
"""Bytes; what TensorRT asks of the memory that a context works in: else it keeps none, and says so in its log alone."""

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "int32": 4, "int64": 8, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as the driver describes it."""

    index: int
    name: str
    capability: int
    """Such as 90."""
    driver: str
    """The highest CUDA version that the driver supports."""
    total: int
    """Bytes of memory."""


def find_gpus(driver: Any = None) -> list[Gpu]:
    """All GPUs. Raises EngineUnavailableError without cuda-python, without a driver, or without any GPU."""
    driver = driver or cuda_driver()
    try:
        (code,) = driver.cuInit(0)
    except (RuntimeError, OSError) as error:  # cuda-python found no libcuda
        raise EngineUnavailableError(
            "there is no NVIDIA driver on this machine: install it (https://www.nvidia.com/drivers), or in a container "
            "run with --gpus all; or use engine='onnxruntime'"
        ) from error
    if int(code):
        raise EngineUnavailableError(
            f"the NVIDIA driver does not start (CUDA error {int(code)}): see nvidia-smi; or use engine='onnxruntime'"
        )
    count = check(driver, driver.cuDeviceGetCount(), "counting GPUs")
    if not count:
        raise EngineUnavailableError(
            "the NVIDIA driver sees no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    version = check(driver, driver.cuDriverGetVersion(), "asking for the driver's version")
    names = driver.CUdevice_attribute
    found = []
    for index in range(count):
        device = check(driver, driver.cuDeviceGet(index), f"opening GPU {index}")

        def ask(name: str, device: Any = device) -> int:
            attribute = getattr(names, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{name}")
            return int(check(driver, driver.cuDeviceGetAttribute(attribute, device), "asking a GPU"))

        label: bytes = check(driver, driver.cuDeviceGetName(128, device), "asking a GPU")
        total = int(check(driver, driver.cuDeviceTotalMem(device), "asking a GPU"))
        found.append(
            Gpu(
                index,
                label.split(b"\0")[0].decode(errors="replace"),
                10 * ask("MAJOR") + ask("MINOR"),
                f"{version // 1000}.{version % 1000 // 10}",
                total,
            )
        )
    return found


def layout(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> tuple[dict[str, int], int]:
    """(offset of each tensor, bytes in all) for tensors of (shape, dtype) in one block."""
    offsets, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        offsets[name] = end
        size = int(np.prod(shape, dtype=np.int64)) * ITEMSIZE[dtype]
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, end


class Arena:
    """Named tensors in one allocation of device memory, zeroed.

    tensors: (shape, dtype) by name. Raises OutOfMemoryError when they do not fit: before allocating, or where another
    was quicker.
    """

    def __init__(
        self, driver: Any, tensors: Mapping[str, tuple[tuple[int, ...], str]], stream: Any, what: str
    ) -> None:
        self.tensors = dict(tensors)
        self._driver = driver
        offsets, self.size = layout(tensors)
        free, _ = check(driver, driver.cuMemGetInfo(), "asking for free memory")
        if self.size > free:
            raise OutOfMemoryError(
                f"{what} needs {self.size / 2**20:.0f} MiB of GPU memory and {free / 2**20:.0f} MiB are free: "
                "close other sessions, or use a smaller model or resolution"
            )
        base = int(check(driver, driver.cuMemAlloc(self.size), f"allocating {self.size} bytes for {what}"))
        self._base: int | None = base
        self._address = {name: base + offset for name, offset in offsets.items()}
        try:
            check(driver, driver.cuMemsetD8Async(base, 0, self.size, stream), "clearing memory")
        except EngineError:
            self.close()
            raise

    def __getitem__(self, name: str) -> int:
        """Address of a tensor."""
        return self._address[name]

    def bytes_of(self, name: str) -> int:
        """Size of a tensor."""
        shape, dtype = self.tensors[name]
        return int(np.prod(shape, dtype=np.int64)) * ITEMSIZE[dtype]

    def close(self) -> None:
        """Free the memory; twice is fine."""
        if self._base is not None:
            check(self._driver, self._driver.cuMemFree(self._base), "freeing memory")
            self._base = None


class Pinned:
    """Page-locked host memory: copies from and to it are asynchronous. Raises OutOfMemoryError when there is none."""

    def __init__(self, driver: Any, size: int) -> None:
        self._driver = driver
        self.address = int(check(driver, driver.cuMemHostAlloc(size, 0), f"pinning {size} bytes"))
        self.size = size
        self.array: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def put(self, value: Array) -> int:
        """Copy a contiguous array to the beginning; return its size in bytes."""
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        if len(flat) > self.size:
            raise EngineError(f"{len(flat)} bytes do not fit the staging buffer of {self.size}")
        self.array[: len(flat)] = flat
        return len(flat)

    def take(self, shape: tuple[int, ...], dtype: str) -> Array:
        """A copy of the array of `dtype` at the beginning; bf16 comes as float32."""
        count = int(np.prod(shape)) * ITEMSIZE[dtype]
        return from_bits(self.array[:count].copy(), dtype).reshape(shape)

    def close(self) -> None:
        """Free the memory; twice is fine."""
        if self.address:
            self.array = np.empty(0, np.uint8)
            check(self._driver, self._driver.cuMemFreeHost(self.address), "freeing pinned memory")
            self.address = 0


class PinnedPool:
    """Page-locked arrays that live on after what made them. To lock memory takes many times what a copy does, so what
    they leave is kept for the next ones. Any thread may drop an array.

    context: of the GPU, as the driver knows it.
    """

    def __init__(self, driver: Any, context: Any) -> None:
        self._driver, self._context = driver, context
        self._lock = threading.RLock()  # a collection may drop an array in the thread that holds it
        self._idle: list[Pinned] = []
        self._closed = False

    def take(self, size: int) -> tuple[int, Array]:
        """Address and bytes of an array; both are the caller's until the array and all views of it are gone."""
        with self._lock:
            fitting = [block for block in self._idle if block.size >= size]
            block = min(fitting, key=lambda block: block.size, default=None)
            if block is not None:
                self._idle.remove(block)
        block = block or Pinned(self._driver, size)
        memory = (ctypes.c_uint8 * size).from_address(block.address)
        weakref.finalize(memory, self._back, block).atexit = False
        return block.address, np.frombuffer(memoryview(memory), np.uint8)

    def _back(self, block: Pinned) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(block)
                return
        driver = self._driver
        check(driver, driver.cuCtxPushCurrent(self._context), "freeing pinned memory")
        try:
            block.close()
        finally:
            check(driver, driver.cuCtxPopCurrent(), "freeing pinned memory")

    def close(self) -> None:
        """Free what is idle, and the rest when it is dropped."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for block in idle:
            block.close()


_NUMPY = {"fp32": np.float32, "fp16": np.float16, "int32": np.int32, "int64": np.int64, "uint8": np.uint8}


def to_bits(value: Array, dtype: str) -> Array:
    """`value` in a dtype of the device, contiguous; bf16 (rounded to nearest even) as uint16."""
    if dtype != "bf16":
        return np.ascontiguousarray(value, _NUMPY[dtype])
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )


def from_bits(raw: Array, dtype: str) -> Array:
    """The array in `raw` bytes; bf16 as float32."""
    found = as_kept(raw, dtype)
    return widened(found) if dtype == "bf16" else found


def as_kept(raw: Array, dtype: str) -> Array:
    """The array in `raw` bytes, without a copy; bf16 as uint16."""
    return raw.view(np.uint16 if dtype == "bf16" else _NUMPY[dtype])
