"""TensorRT and TensorRT-RTX on NVIDIA GPUs. Everything that can be refused is refused before a byte is allocated.

A session's tensors lie in one arena at fixed addresses, so `denoise` is captured once per number of frames as a CUDA
graph and replayed: window, step and time are contents of device memory. Denoising has one stream, decoding another.
What of this has run on a GPU, and what not yet, is said in docs/hardware.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
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
from swiftvideo.runtime.plugins.flavours import FLAVOURS, Flavour, install_one
from swiftvideo.runtime.plugins.kernel import ROW_OPS, read_kernel
from swiftvideo.runtime.plugins.launch import check, cuda_driver
from swiftvideo.runtime.plugins.plans import PlanInfo, choose_plans, plans_of
from swiftvideo.runtime.plugins.tensorrt import last_failure, register

from .cuda import Arena, Gpu, Pinned, PinnedPool, find_gpus, to_bits
from .tensorrt_session import TensorRTSession
from .tensorrt_texts import Texts

Array = NDArray[Any]
Shape = tuple[int, ...]

REQUIRED = ("condition", "denoise", "inject")
CUDA, DRIVER = 13, 580
"""Major version that both products are built for, and the first driver of it."""
TRT_DTYPES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
}


def check_driver(gpu: Gpu) -> None:
    """Raise EngineUnavailableError where the driver is older than what both products are built for."""
    if int(gpu.driver.partition(".")[0]) < CUDA:
        raise EngineUnavailableError(
            f"the NVIDIA driver supports CUDA {gpu.driver} and TensorRT needs {CUDA}.0: install driver {DRIVER} or "
            "newer; or use engine='onnxruntime'"
        )


def usable_plans(
    manifest: Manifest,
    gpu: Gpu,
    flavours: list[Flavour] | None = None,
    required: Sequence[str] = REQUIRED,
) -> tuple[Flavour, dict[str, PlanInfo]]:
    """The installed product, and the bundle's plans that it can load on `gpu`, checked.

    Raises:
        EngineUnavailableError: no product is installed, its plans are for other GPUs, or the driver is too old.
        BundleError: plans are missing, of other versions, or do not belong to this bundle.
    """
    check_driver(gpu)
    found = [flavour for flavour in flavours or FLAVOURS.values() if flavour.installed]
    if not found:
        raise EngineUnavailableError(
            f"neither tensorrt nor tensorrt_rtx is installed: {install_one(FLAVOURS.values())}"
        )
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
    except (EngineUnavailableError, BundleError, EngineError):
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
        self.context_handle = check(
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
        try:
            self._runtime = trt.Runtime(self._logger)
        except TypeError as error:  # its way to say that CUDA does not start
            raise EngineUnavailableError(f"TensorRT does not start: {self.why()}") from error
        assert not self._runtime.engine_host_code_allowed, "plans must not bring host code"
        self.networks = {graph: self._open(manifest, plan) for graph, plan in plans.items()}
        self.vae_caches = [name for name in self.inputs("decode") if name != "latents"]
        self._texts = Texts(self)
        self.pinned = PinnedPool(driver, self.context_handle)
        """For copies of sessions."""

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
        driver = self.driver
        with ExitStack() as made:
            stream = self.stream(made)
            scratch = made.enter_context(
                closing(Arena(driver, {"scratch": self.scratch(graph)}, stream, f"running {graph}"))
            )
            context = self.context(graph, scratch, "scratch")
            for name, value in feeds.items():
                self.set_shape(context, name, value.shape)
            names = [*feeds, *(name for name in self._bindings(graph) if name not in feeds)]
            shapes = {name: tuple(map(int, context.get_tensor_shape(name))) for name in names}
            tensors = {name: (shapes[name], self.dtype_of(graph, name)) for name in names}
            arena = made.enter_context(closing(Arena(driver, tensors, stream, f"running {graph}")))
            staging = made.enter_context(closing(Pinned(driver, max(map(arena.bytes_of, names)))))
            for name, value in feeds.items():
                size = staging.put(to_bits(value, tensors[name][1]))
                code = driver.cuMemcpyHtoDAsync(arena[name], staging.address, size, stream)
                check(driver, code, f"copying {name}")
                check(driver, driver.cuStreamSynchronize(stream), f"copying {name}")
            self.bind(context, {n: (arena[n], shapes[n] if n in feeds else None) for n in names})
            self.execute(context, stream)
            results = []
            for name in outputs:
                code = driver.cuMemcpyDtoHAsync(staging.address, arena[name], arena.bytes_of(name), stream)
                check(driver, code, f"copying {name}")
                check(driver, driver.cuStreamSynchronize(stream), f"running {graph}")
                results.append(staging.take(*tensors[name]))
        return results

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            self._closed = True
            self.enter()
            self._texts.close()  # waits for a prompt that is being made
            self.pinned.close()
            self.networks = {}

    def enter(self) -> None:
        """Make the GPU's context current in this thread."""
        check(self.driver, self.driver.cuCtxSetCurrent(self.context_handle), "entering the GPU's context")

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

    def stream(self, owner: ExitStack) -> Any:
        """A new stream that does not wait for the default one; `owner` destroys it."""
        driver = self.driver
        flag = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        stream = check(driver, driver.cuStreamCreate(flag), "making a stream")
        owner.callback(lambda: check(driver, driver.cuStreamDestroy(stream), "destroying a stream"))
        return stream

    def scratch(self, *graphs: str) -> tuple[Shape, str]:
        """(shape, dtype) of memory that contexts of these graphs can share if they run one after the other."""
        sizes = [
            int(self.networks[graph].device_memory_size_v2) for graph in graphs if graph in self.networks
        ]
        return (max(1, *sizes, 1),), "uint8"

    def context(self, graph: str, arena: Arena, scratch: str) -> Any:
        """A new context. It allocates nothing: what it needs while it runs lies in the arena's tensor `scratch`."""
        trt, network = self._trt, self.network(graph)
        config = network.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # TensorRT-RTX: it would swap in faster kernels while it runs, and a captured graph keep the first ones.
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
        context = network.create_execution_context(config)
        if context is None:
            raise OutOfMemoryError(f"TensorRT cannot prepare {graph}: {self.why()}")
        context.name = graph
        context.set_device_memory(arena[scratch], arena.bytes_of(scratch))
        return context

    def bind(self, context: Any, tensors: dict[str, tuple[int, Shape | None]]) -> None:
        """Give a context the address of every binding, and the shape of every input."""
        for name, (address, shape) in tensors.items():
            if shape is not None:
                self.set_shape(context, name, shape)
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the address of {name}: {self.why()}")

    def execute(self, context: Any, stream: Any) -> None:
        """Run a context whose bindings are set."""
        if not context.execute_async_v3(int(stream)):
            raise EngineError(f"TensorRT failed to run {context.name}: {self.why()}")

    def set_shape(self, context: Any, name: str, shape: Shape) -> None:
        """Of an input of a context. Raises EngineError where the plan has no room for it."""
        if not context.set_input_shape(name, shape):
            raise EngineError(f"TensorRT refuses {name} of shape {shape}: {self.why()}")

    def why(self) -> str:
        """The reason of the last failure, as far as TensorRT tells."""
        return "; ".join(text for text in (last_failure(), self._logger.last()) if text)

    def _open(self, manifest: Manifest, plan: PlanInfo) -> Any:
        network = self._runtime.deserialize_cuda_engine(manifest.read_file(plan.file))
        if network is None:
            raise EngineError(f"TensorRT cannot load {plan.file}: {self.why()}")
        return network


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
