"""TensorRT and TensorRT-RTX on NVIDIA GPUs. Everything that can be refused is refused before a byte is allocated.

A session's tensors lie in one arena at fixed addresses, so `denoise` is captured once per number of frames as a CUDA
graph and replayed: window, step and time are contents of device memory. Denoising has one stream, decoding another.
What of this has run on a GPU, and what not yet, is said in docs/hardware.md.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
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
from swiftvideo.runtime.plugins.kernel import ROW_OPS, read_kernel
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
    manifest: Manifest,
    gpu: Gpu,
    flavours: list[Flavour] | None = None,
    required: Sequence[str] = REQUIRED,
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
        missing = [graph for graph in required if graph not in plans]
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
        graphs: load the plans of these only, for `run`; None: what sessions need, and all else that is there.

    Raises:
        EngineUnavailableError: no driver, no such GPU, no TensorRT, or plans for other GPUs.
        BundleError: plans or kernels are missing, were changed, or are of another version or bundle.
        OutOfMemoryError: the plans do not fit the GPU's memory.
    """

    name = "tensorrt"

    def __init__(self, manifest: Manifest, device: int = 0, graphs: Sequence[str] | None = None) -> None:
        self._closed = False
        self.driver = cuda_driver()
        gpus = find_gpus(self.driver)
        if not 0 <= device < len(gpus):
            raise EngineUnavailableError(f"there is no GPU {device}: there are {len(gpus)}, counted from 0")
        self.gpu = gpus[device]
        self.geometry: Geometry = manifest.geometry
        self.dtype = manifest.dtype
        flavour, plans = usable_plans(manifest, self.gpu, required=REQUIRED if graphs is None else graphs)
        if graphs is not None:
            plans = {graph: plans[graph] for graph in graphs}
        self.kernels = {op: read_kernel(manifest, op, self.gpu.capability) for op in ROW_OPS}
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
        self._texts = _Texts(self)

    def encode(self, ids: Int64, mask: Int64, text: str) -> Prompt:
        """See `Engine.encode`."""
        return self._texts.prompt(text, {"ids": ids, "mask": mask}, "text_encoder", "condition")

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """See `Engine.condition`."""
        return self._texts.prompt(text, {"embeds": embeds}, "condition")

    def open(self, batch: int = 1) -> TensorRTSession:
        """See `Engine.open`."""
        self.enter()
        if batch != 1:
            raise SettingsError(f"batch is {batch}: plans are built for one session at a time, use 1")
        return TensorRTSession(self)

    def run(self, graph: str, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Run a plan once, with memory of its own: what it made, by name. bfloat16 comes and goes as float32."""
        self.enter()
        driver, context = self.driver, self.network(graph).create_execution_context()
        for name, value in feeds.items():
            self.set_shape(context, name, value.shape)
        names = [*feeds, *(name for name in self._bindings(graph) if name not in feeds)]
        shapes = {name: tuple(map(int, context.get_tensor_shape(name))) for name in names}
        tensors = {name: (shapes[name], self.dtype_of(graph, name)) for name in names}
        stream = self.stream()
        arena = Arena(driver, tensors, stream, f"a run of {graph}")
        staging = Pinned(driver, max(arena.bytes_of(name) for name in names))
        try:
            for name, value in feeds.items():
                size = staging.put(to_bits(value, tensors[name][1]))
                code = driver.cuMemcpyHtoDAsync(arena[name], staging.address, size, stream)
                check(driver, code, f"copying {name}")
                check(driver, driver.cuStreamSynchronize(stream), f"copying {name}")
            given = {name: (arena[name], shapes[name] if name in feeds else None) for name in names}
            self.enqueue(context, stream, given)
            results = []
            for name in outputs:
                code = driver.cuMemcpyDtoHAsync(staging.address, arena[name], arena.bytes_of(name), stream)
                check(driver, code, f"copying {name}")
                check(driver, driver.cuStreamSynchronize(stream), f"running {graph}")
                results.append(staging.take(*tensors[name]))
        finally:
            staging.close()
            arena.close()
            check(driver, driver.cuStreamDestroy(stream), f"running {graph}")
        return results

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            self._closed = True
            self.enter()
            self.networks = {}
            self._texts.close()

    def enter(self) -> None:
        """Make the GPU's context current in this thread."""
        check(self.driver, self.driver.cuCtxSetCurrent(self.context), "entering the GPU's context")

    def network(self, graph: str) -> Any:
        """The deserialised plan of a graph."""
        if self._closed:
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
        return [name for name in self._bindings(graph) if network.get_tensor_mode(name) == mode]

    def _bindings(self, graph: str) -> list[str]:
        network = self.network(graph)
        return [network.get_tensor_name(index) for index in range(network.num_io_tensors)]

    def described(self, graph: str, name: str, dynamic: dict[int, int]) -> tuple[Shape, str]:
        """(shape, dtype) of a binding; `dynamic` gives the sizes of dynamic axes."""
        shape = tuple(self.network(graph).get_tensor_shape(name))
        sized = tuple(dynamic.get(axis, 1) if size < 0 else int(size) for axis, size in enumerate(shape))
        return sized, self.dtype_of(graph, name)

    def dtype_of(self, graph: str, name: str) -> str:
        """Of a binding, such as "bf16"."""
        return TRT_DTYPES[self.network(graph).get_tensor_dtype(name).name]

    def stream(self) -> Any:
        """A new stream that does not wait for the default one."""
        flag = int(self.driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        return check(self.driver, self.driver.cuStreamCreate(flag), "making a stream")

    def enqueue(self, context: Any, stream: Any, tensors: dict[str, tuple[int, Shape | None]]) -> None:
        """Run a context: address of every binding, and shape of every input."""
        for name, (address, shape) in tensors.items():
            if shape is not None:
                self.set_shape(context, name, shape)
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(int(stream)):
            raise EngineError(f"TensorRT failed to run {context.engine.name}: {self._logger.last()}")

    def set_shape(self, context: Any, name: str, shape: Shape) -> None:
        """Of an input of a context. Raises EngineError where the plan has no room for it."""
        if not context.set_input_shape(name, shape):
            raise EngineError(f"TensorRT refuses {name} of shape {shape}: {self._logger.last()}")

    def _open(self, manifest: Manifest, plan: PlanInfo) -> Any:
        network = self._runtime.deserialize_cuda_engine(manifest.read_file(plan.file))
        if network is None:
            raise EngineError(f"TensorRT cannot load {plan.file}: {self._logger.last()}")
        return network


class _Texts:
    """The graphs that make prompts, with contexts and buffers that are made once.

    A context takes its time, and freeing device memory waits for every stream: neither belongs into a prompt switch.
    """

    def __init__(self, engine: TensorRTEngine) -> None:
        self._engine, self._driver, self._stream = engine, engine.driver, engine.stream()
        self._lock = threading.Lock()
        graphs = [graph for graph in ("text_encoder", "condition") if graph in engine.networks]
        self._contexts: dict[str, Any] = {g: engine.network(g).create_execution_context() for g in graphs}
        tensors = {n: engine.described(graph, n, {0: 1}) for graph in graphs for n in engine.inputs(graph)}
        tensors["signature"] = ((1, engine.geometry.dim), "fp32")
        self._work = Arena(engine.driver, tensors, self._stream, "encoding prompts")
        self._staging = Pinned(engine.driver, self._work.size)

    def prompt(self, text: str, feeds: dict[str, Array], *graphs: str) -> Prompt:
        """Run graphs one after the other; K and V of the text stay on the GPU as long as the prompt lives."""
        engine, g, driver = self._engine, self._engine.geometry, self._driver
        for graph in graphs:
            engine.network(graph)  # is there, and the engine is open
        cross = (g.layers, 1, g.text_len, g.heads, g.head_dim)
        with self._lock:
            engine.enter()
            tensors = {"cross_k": (cross, engine.dtype), "cross_v": (cross, engine.dtype)}
            kept = Arena(driver, tensors, self._stream, "a prompt")
            try:
                signature = self._run(feeds, graphs, kept)
            except BaseException:
                kept.close()
                raise
        prompt = Prompt(text, signature, kept)
        weakref.finalize(kept, _free, driver, engine.context, kept["cross_k"]).atexit = False
        return prompt

    def _run(self, feeds: dict[str, Array], graphs: tuple[str, ...], kept: Arena) -> Array:
        """The signature; `kept` has the K and V afterwards."""
        engine, driver, work, stream = self._engine, self._driver, self._work, self._stream
        for name, value in feeds.items():
            size = self._staging.put(to_bits(value, work.tensors[name][1]))
            code = driver.cuMemcpyHtoDAsync(work[name], self._staging.address, size, stream)
            check(driver, code, "copying a prompt")
            check(driver, driver.cuStreamSynchronize(stream), "copying a prompt")
        for graph in graphs:
            tensors: dict[str, tuple[int, Shape | None]] = {
                n: (work[n], work.tensors[n][0]) for n in engine.inputs(graph)
            }
            made = ["embeds"] if graph == "text_encoder" else ["cross_k", "cross_v", "signature"]
            tensors |= {n: ((kept if n.startswith("cross") else work)[n], None) for n in made}
            engine.enqueue(self._contexts[graph], stream, tensors)
        size = work.bytes_of("signature")
        code = driver.cuMemcpyDtoHAsync(self._staging.address, work["signature"], size, stream)
        check(driver, code, "copying back")
        check(driver, driver.cuStreamSynchronize(stream), "encoding a prompt")
        return self._staging.take(*work.tensors["signature"])

    def close(self) -> None:
        """Free everything but prompts that live."""
        with self._lock:
            self._contexts = {}
            self._work.close()
            self._staging.close()
            check(self._driver, self._driver.cuStreamDestroy(self._stream), "closing the engine")


def _free(driver: Any, context: Any, address: int) -> None:
    """Free a prompt's memory, in whatever thread its last reference went."""
    check(driver, driver.cuCtxPushCurrent(context), "freeing a prompt")
    try:
        check(driver, driver.cuMemFree(address), "freeing a prompt")
    finally:
        check(driver, driver.cuCtxPopCurrent(), "freeing a prompt")


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
