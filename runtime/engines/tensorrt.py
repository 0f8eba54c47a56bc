"""TensorRT and TensorRT-RTX on NVIDIA GPUs. Everything that can be refused is refused before a byte is allocated.

A session's tensors lie in one arena at fixed addresses, so `denoise` is captured once per number of frames as a CUDA
graph and replayed: window, step and time are contents of device memory. Denoising has one stream, decoding another.
What of this has run on a GPU, and what not yet, is said in docs/hardware.md.
"""

from __future__ import annotations

import weakref
from typing import Any

from numpy.typing import NDArray

from swiftvideo.runtime.engine import Float32, Int64, Prompt
from swiftvideo.runtime.errors import (
    BundleError,
    ClosedError,
    EngineError,
    EngineUnavailableError,
    OutOfMemoryError,
    SettingsError,
    SwiftVideoError,
)
from swiftvideo.runtime.geometry import Geometry
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.plugins.flavours import FLAVOURS, Flavour
from swiftvideo.runtime.plugins.kernel import COMMIT, PLACE, read_kernel
from swiftvideo.runtime.plugins.launch import check, cuda_driver
from swiftvideo.runtime.plugins.plans import PlanInfo, choose_plans, plans_of
from swiftvideo.runtime.plugins.tensorrt import register

from .cuda import Arena, Gpu, Pinned, find_gpus, to_bits
from .tensorrt_session import TensorRTSession

Array = NDArray[Any]
Shape = tuple[int, ...]

REQUIRED = ("condition", "denoise", "inject")
TRT_DTYPES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}


def usable_plans(
    manifest: Manifest, gpu: Gpu, flavours: list[Flavour] | None = None
) -> tuple[Flavour, dict[str, PlanInfo]]:
    """The installed product, and the bundle's plans that it can load on `gpu`, checked.

    Raises:
        EngineUnavailableError: no product is installed, or its plans are for other GPUs.
        BundleError: plans are missing, of other versions, or do not belong to this bundle.
    """
    found = [flavour for flavour in flavours or FLAVOURS.values() if flavour.installed]
    if not found:
        commands = " or ".join(flavour.install for flavour in FLAVOURS.values())
        raise EngineUnavailableError(f"neither tensorrt nor tensorrt_rtx is installed: {commands}")
    listed = {plan.flavour for plan in plans_of(manifest)}
    found.sort(key=lambda flavour: flavour.name not in listed)
    problems: list[SwiftVideoError] = []
    for flavour in found:
        try:
            plans = choose_plans(manifest, flavour.name, str(flavour.installed), gpu.capability)
        except SwiftVideoError as error:
            problems.append(error)
            continue
        missing = [graph for graph in REQUIRED if graph not in plans]
        if not missing:
            return flavour, plans
        problems.append(
            BundleError(
                f"the bundle has no plan of {missing[0]} for {flavour.name}, compute capability {gpu.capability}"
            )
        )
    raise problems[0]


def runs(manifest: Manifest, device: int = 0) -> bool:
    """Whether this machine can run the bundle's plans, as far as can be told without loading them."""
    try:
        usable_plans(manifest, find_gpus()[device])
    except (EngineUnavailableError, BundleError):
        return False
    return True


class TensorRTEngine:
    """Engine over a bundle's plans (see `swiftvideo.runtime.engine.Engine`).

    Args:
        manifest: of the bundle.
        device: the GPU's number.

    Raises:
        EngineUnavailableError: no driver, no such GPU, no TensorRT, or plans for other GPUs.
        BundleError: plans or kernels are missing, were changed, or are of another version or bundle.
        OutOfMemoryError: the plans do not fit the GPU's memory.
    """

    name = "tensorrt"

    def __init__(self, manifest: Manifest, device: int = 0) -> None:
        self.driver = cuda_driver()
        gpus = find_gpus(self.driver)
        if not 0 <= device < len(gpus):
            raise EngineUnavailableError(f"there is no GPU {device}: there are {len(gpus)}, counted from 0")
        self.gpu = gpus[device]
        self.geometry: Geometry = manifest.geometry
        self.dtype = manifest.dtype
        flavour, plans = usable_plans(manifest, self.gpu)
        self.kernels = {op: read_kernel(manifest, op, self.gpu.capability) for op in (COMMIT, PLACE)}
        driver = self.driver
        self.context = check(
            driver, driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)), "opening the GPU"
        )
        self.enter()
        need = sum(manifest.files[plan.file].size for plan in plans.values())
        free, _ = check(driver, driver.cuMemGetInfo(), "asking for free memory")
        if need > free:
            raise OutOfMemoryError(
                f"the plans need {need / 2**20:.0f} MiB on {self.gpu.name} and {free / 2**20:.0f} MiB are free: "
                "close other programs, or use a smaller model"
            )
        trt = flavour.load()
        self._trt, self._logger = trt, _logger(trt)
        register(trt)
        self._runtime = trt.Runtime(self._logger)
        assert not self._runtime.engine_host_code_allowed, "plans must not bring host code"
        self.networks = {graph: self._open(manifest, plan) for graph, plan in plans.items()}
        self.vae_caches = [name for name in self.inputs("decode") if name != "latents"]
        self._scratch = self.stream()

    def encode(self, ids: Int64, mask: Int64, text: str) -> Prompt:
        """See `Engine.encode`."""
        return self._prompt(text, {"ids": ids, "mask": mask}, ["text_encoder", "condition"])

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`."""
        return self._prompt(text, {"embeds": embeds}, ["condition"])

    def open(self, batch: int = 1) -> TensorRTSession:
        """See `Engine.open`."""
        self.enter()
        if batch != 1:
            raise SettingsError(f"batch is {batch}: plans are built for one session at a time, use 1")
        return TensorRTSession(self)

    def close(self) -> None:
        """See `Engine.close`."""
        self.networks = {}

    def enter(self) -> None:
        """Make the GPU's context current in this thread."""
        check(self.driver, self.driver.cuCtxSetCurrent(self.context), "entering the GPU's context")

    def network(self, graph: str) -> Any:
        """The deserialised plan of a graph."""
        if not self.networks:
            raise ClosedError("this engine was closed: load the bundle again")
        if graph not in self.networks:
            raise BundleError(
                f"the bundle has no plan of {graph}: build it with `swiftvideo export --target`"
            )
        return self.networks[graph]

    def inputs(self, graph: str) -> list[str]:
        """Names of a graph's inputs; none where it has no plan."""
        if graph not in self.networks:
            return []
        network, mode = self.networks[graph], self._trt.TensorIOMode.INPUT
        names = [network.get_tensor_name(index) for index in range(network.num_io_tensors)]
        return [name for name in names if network.get_tensor_mode(name) == mode]

    def described(self, graph: str, name: str, dynamic: dict[int, int]) -> tuple[Shape, str]:
        """(shape, dtype) of a binding; `dynamic` gives the sizes of dynamic axes."""
        network = self.network(graph)
        shape = tuple(network.get_tensor_shape(name))
        sized = tuple(dynamic.get(axis, 1) if size < 0 else int(size) for axis, size in enumerate(shape))
        return sized, TRT_DTYPES[network.get_tensor_dtype(name).name]

    def stream(self) -> Any:
        """A new stream that does not wait for the default one."""
        flag = int(self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return check(self.driver, self.driver.cuStreamCreate(flag), "making a stream")

    def enqueue(self, context: Any, stream: Any, tensors: dict[str, tuple[int, Shape | None]]) -> None:
        """Run a context: address of every binding, and shape of every input."""
        for name, (address, shape) in tensors.items():
            if shape is not None and not context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT refuses {name} of shape {shape}: {self._logger.last()}")
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(int(stream)):
            raise EngineError(f"TensorRT failed to run {context.engine.name}: {self._logger.last()}")

    def _open(self, manifest: Manifest, plan: PlanInfo) -> Any:
        network = self._runtime.deserialize_cuda_engine(manifest.read_file(plan.file))
        if network is None:
            raise EngineError(f"TensorRT cannot load {plan.file}: {self._logger.last()}")
        return network

    def _prompt(self, text: str, feeds: dict[str, Array], graphs: list[str]) -> Prompt:
        """Run the text graphs one after the other; K and V of the text stay on the GPU as long as the prompt lives."""
        self.enter()
        g, driver, stream = self.geometry, self.driver, self._scratch
        cross = (g.layers, 1, g.text_len, g.heads, g.head_dim)
        kept = Arena(
            driver, {"cross_k": (cross, self.dtype), "cross_v": (cross, self.dtype)}, stream, "a prompt"
        )
        shapes = {name: self.described(graphs[0], name, {0: 1}) for name in feeds}
        shapes |= {"embeds": self.described("condition", "embeds", {0: 1}), "signature": ((1, g.dim), "fp32")}
        work = Arena(driver, shapes, stream, "encoding a prompt")
        staging = Pinned(driver, work.size)
        try:
            for name, value in feeds.items():
                size = staging.put(to_bits(value, shapes[name][1]))
                check(
                    driver,
                    driver.cuMemcpyHtoDAsync(work[name], staging.address, size, stream),
                    "copying a prompt",
                )
                check(driver, driver.cuStreamSynchronize(stream), "copying a prompt")
            for graph in graphs:
                tensors: dict[str, tuple[int, Shape | None]] = {
                    n: (work[n], shapes[n][0]) for n in self.inputs(graph)
                }
                made = ["embeds"] if graph == "text_encoder" else ["cross_k", "cross_v", "signature"]
                tensors |= {n: ((kept if n.startswith("cross") else work)[n], None) for n in made}
                self.enqueue(self.network(graph).create_execution_context(), stream, tensors)
            size = work.bytes_of("signature")
            check(
                driver,
                driver.cuMemcpyDtoHAsync(staging.address, work["signature"], size, stream),
                "copying back",
            )
            check(driver, driver.cuStreamSynchronize(stream), "encoding a prompt")
            prompt = Prompt(text, staging.take(*shapes["signature"]), kept)
        finally:
            staging.close()
            work.close()
        weakref.finalize(prompt.cross, driver.cuMemFree, kept["cross_k"]).atexit = False
        return prompt


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps the last errors for our messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors = [*self.errors[-7:], text]

        def last(self) -> str:
            return self.errors[-1] if self.errors else "it gave no reason"

    return Logger()
