"""Launches compiled kernels through cuda-python. Knows nothing of TensorRT.

    launcher = Launcher(kernel)                        # after a CUDA context was made current
    launcher.launch(stream, {"queries": 4680, "heads": 12, "batch": 1}, q, fresh_k, ..., rows)

A launch allocates nothing on the device, does not synchronise, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Any

from swiftvideo.runtime.errors import EngineError, EngineUnavailableError, OutOfMemoryError, UsageError

from .kernel import Kernel

_CTYPES: dict[str, Any] = {"ptr": ctypes.c_uint64, "i32": ctypes.c_int32, "f32": ctypes.c_float}
_LOADED: dict[tuple[Any, int, str], tuple[Any, Any]] = {}
"""Library and kernel by driver, GPU and the cubin's SHA-256: loaded once, whatever the number of plugins."""

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""

STATIC_SHARED = 48 * 1024
"""Bytes of shared memory that a kernel may use without asking for more."""


def cuda_driver() -> Any:
    """The module `cuda.bindings.driver`. Raises EngineUnavailableError with the command that installs it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        remedy = "pip install 'swiftvideo[tensorrt]'" if sys.platform == "linux" else "NVIDIA GPUs need Linux"
        raise EngineUnavailableError(
            f"cuda-python is not installed ({error}): {remedy}; or use engine='onnxruntime'"
        ) from error
    return driver


def check(driver: Any, result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call's (code, value...) result.

    Raises EngineError naming the code and `what`; OutOfMemoryError where the driver has no memory left.
    """
    code, *values = result
    if int(code) == OUT_OF_MEMORY:
        raise OutOfMemoryError(
            f"{what} failed with {describe(driver, code)}: close other sessions, or use a smaller model or resolution"
        )
    if int(code):
        raise EngineError(f"{what} failed with {describe(driver, code)}")
    return values[0] if len(values) == 1 else tuple(values)


def describe(driver: Any, code: Any) -> str:
    """Such as "CUDA_ERROR_INVALID_IMAGE (200)"."""
    try:
        return f"{driver.CUresult(int(code)).name} ({int(code)})"
    except ValueError:
        return f"CUDA error {int(code)}"


class Launcher:
    """One kernel, loaded, with a buffer for its arguments. Use it from one thread at a time; making one is cheap.

    driver: cuda.bindings.driver, or what stands for it in tests.
    Raises EngineError when the driver refuses the cubin, as for another compute capability.
    """

    def __init__(self, kernel: Kernel, driver: Any = None) -> None:
        self.spec = kernel.spec
        self._driver = driver or cuda_driver()
        self._function = _load(self._driver, kernel)
        kinds = [kind for _, kind in kernel.spec.arguments] + ["ptr"] * kernel.spec.scratch
        self._values = [_CTYPES[kind](0) for kind in kinds]
        addresses = [ctypes.addressof(value) for value in self._values]
        self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self._count = len(kernel.spec.arguments)

    def launch(self, stream: int, sizes: Mapping[str, int], *values: float) -> int:
        """Put a launch into `stream`; return CUDA's result code, 0 for success.

        sizes: what the grid is made of; values: the arguments in the order of `spec.arguments`, pointers as integers.
        A grid with an empty axis launches nothing and succeeds.
        """
        if len(values) != self._count:
            names = ", ".join(name for name, _ in self.spec.arguments)
            raise UsageError(f"{self.spec.op} got {len(values)} arguments and takes {self._count}: {names}")
        x, y, z = self.spec.blocks(sizes)
        if not x * y * z:
            return 0
        for place, value in zip(self._values, values, strict=False):
            place.value = value
        (code,) = self._driver.cuLaunchKernel(
            self._function,
            *(x, y, z),
            *(32 * self.spec.warps, 1, 1),
            self.spec.shared,
            stream,
            ctypes.addressof(self._pointers),
            0,
        )
        return int(code)

    def slots(self) -> int:
        """Blocks of this kernel that the current GPU runs at once."""
        driver, what = self._driver, f"asking how many blocks of {self.spec.stem} fit the GPU"
        device = check(driver, driver.cuCtxGetDevice(), what)
        count = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        multiprocessors = check(driver, driver.cuDeviceGetAttribute(count, device), what)
        limits = self._function, 32 * self.spec.warps, self.spec.shared
        each = check(driver, driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(*limits), what)
        return int(multiprocessors) * max(1, int(each))

    def run(self, stream: int, sizes: Mapping[str, int], *values: float) -> None:
        """`launch`, raising EngineError when it fails."""
        check(self._driver, (self.launch(stream, sizes, *values),), f"launching {self.spec.stem}")


def _load(driver: Any, kernel: Kernel) -> Any:
    """The kernel's handle for cuLaunchKernel."""
    spec = kernel.spec
    device = check(driver, driver.cuCtxGetDevice(), "asking for the current GPU")
    key = (driver, int(device), spec.sha256)
    if key not in _LOADED:
        what = f"loading the cubin {spec.stem} (made for compute capability {spec.capability})"
        library = check(driver, driver.cuLibraryLoadData(kernel.cubin, [], [], 0, [], [], 0), what)
        handle = check(driver, driver.cuLibraryGetKernel(library, spec.entry.encode()), what)
        if spec.shared > STATIC_SHARED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver, driver.cuKernelSetAttribute(attribute, spec.shared, handle, device), what)
        _LOADED[key] = (library, handle)
    return driver.CUfunction(int(_LOADED[key][1]))
