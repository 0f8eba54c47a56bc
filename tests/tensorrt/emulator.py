"""A machine for the TensorRT engine on the CPU: the fake driver, and contexts that ONNX Runtime executes.

A "plan" here is the name of a graph of the same bundle. Contexts read and write the bare addresses that the engine
gives them, and obey captures; kernels of cache rows are computed in numpy. What the engine does around them is its own
code: arena, staging, streams, capture and replay, commits, placing, prompts, state.
"""

from __future__ import annotations

import ctypes
import hashlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from swiftvideo.export.tensorrt import sizes
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.plugins.kernel import COMMIT, PLACE, Axis, Kernel, KernelSpec

from .driver import FakeDriver, Launch

KINDS = {
    "tensor(float)": "FLOAT",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(uint8)": "UINT8",
}
NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}
ARGUMENTS = {
    COMMIT: "fresh_k fresh_v cache_k cache_v ranges queries rows words",
    PLACE: "source target cos sin source_rows target_rows target_first count heads pairs",
}
POINTERS = frozenset("fresh_k fresh_v cache_k cache_v ranges source target cos sin".split())  # noqa: SIM905


def kernel(op: str, head: int) -> Kernel:
    """A kernel that `compute` understands; the layout of its arguments is the real one's."""
    content = op.encode()
    axis = Axis(("items",))
    names = tuple((name, "ptr" if name in POINTERS else "i32") for name in ARGUMENTS[op].split())
    sha256 = hashlib.sha256(content).hexdigest()
    return Kernel(KernelSpec(op, op, 89, "fp32", head, 4, 0, names, 2, (axis, axis, axis), sha256), content)


def view(address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """An array over memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


def compute(launch: Launch, head: int) -> None:
    """commit_rows and place_rows in numpy."""
    op = launch.cubin.decode()
    names = ARGUMENTS[op].split()
    at: dict[str, Any] = dict(zip(names, launch.values(kernel(op, head).spec), strict=True))
    items = launch.grid[0]
    if op == COMMIT:
        width = at["words"]
        for which in "kv":
            fresh = view(at[f"fresh_{which}"], (items, at["queries"], width))
            cache = view(at[f"cache_{which}"], (items, at["rows"], width))
            for start, row, length in view(at["ranges"], (4, 3), np.int32).tolist():
                cache[:, row : row + length] = fresh[:, start : start + length]
        return
    heads, pairs, count, first = at["heads"], at["pairs"], at["count"], at["target_first"]
    # The last item ends `count` rows after its beginning: an address inside a tensor may be given.
    rows = (items - 1) * at["source_rows"] + count
    flat = view(at["source"], (rows, heads, head))
    source = np.stack([flat[i * at["source_rows"] :][:count] for i in range(items)])
    target = view(at["target"], (items, at["target_rows"], heads, head))
    turned = source.astype(np.float64)
    if pairs:
        cos, sin = (view(at[name], (pairs,)).astype(np.float64) for name in ("cos", "sin"))
        even, odd = turned[..., 0 : 2 * pairs : 2].copy(), turned[..., 1 : 2 * pairs : 2].copy()
        turned[..., 0 : 2 * pairs : 2] = even * cos - odd * sin
        turned[..., 1 : 2 * pairs : 2] = even * sin + odd * cos
    target[:, first : first + count] = turned


class Network:
    """What deserialising gives: a graph of the bundle."""

    name = "Unnamed Network 0"  # as the parser leaves it
    device_memory_size_v2 = 4100  # such that what follows it is not aligned by itself

    def __init__(self, graph: str, manifest: Manifest, driver: FakeDriver) -> None:
        self.driver = driver
        assert manifest.folder is not None
        bundle = manifest.folder
        self.sizes = sizes(manifest, graph)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        path = bundle / "onnx" / f"{graph}.onnx"
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.given = {item.name: item for item in self.session.get_inputs()}
        self.made = {item.name: item for item in self.session.get_outputs()}
        self.num_io_tensors = len(self.given) + len(self.made)

    def get_tensor_name(self, index: int) -> str:
        return [*self.given, *self.made][index]

    def get_tensor_mode(self, name: str) -> str:
        return "INPUT" if name in self.given else "OUTPUT"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in (self.given | self.made)[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=KINDS[(self.given | self.made)[name].type])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Context:
        assert config.strategy == "USER_MANAGED"
        return Context(self)


class RuntimeConfig:
    """How contexts are to be."""

    strategy = "STATIC"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class Context:
    """Runs a network on addresses."""

    def __init__(self, network: Network) -> None:
        self.engine, self.name = network, ""
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.captured: dict[str, tuple[int, ...]] | None = None
        self.memory = 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 512 == 0, "setDeviceMemory: memory must be aligned on 512 byte boundary"
        assert size >= self.engine.device_memory_size_v2
        self.memory = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """As the plan's profile allows; a context whose run was captured keeps its shapes."""
        known = self.engine.given[name].shape

        def takes(axis: Any, size: int) -> bool:
            least, _, most = self.engine.sizes[axis] if isinstance(axis, str) else (axis, axis, axis)
            return bool(least <= size <= most)

        fits = len(known) == len(shape) and all(map(takes, known, shape))
        assert self.captured is None or self.captured[name] == tuple(shape), (
            "it was captured with another shape"
        )
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Of an output once all inputs have theirs: what the graph makes of zeros of these shapes."""
        if name in self.shapes:
            return self.shapes[name]
        network = self.engine
        zeros = {n: np.zeros(self.shapes[n], NUMPY[network.get_tensor_dtype(n).name]) for n in network.given}
        (value,) = network.session.run([name], zeros)
        return tuple(value.shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % 4 == 0
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        assert set(addresses) == {*self.engine.given, *self.engine.made}, "a binding has no address"
        assert self.memory, "it has no memory to work in"
        if int(stream) in self.engine.driver.capturing:
            self.captured = shapes

        def run() -> None:
            network = self.engine
            kinds = {name: NUMPY[network.get_tensor_dtype(name).name] for name in addresses}
            feeds = {n: view(addresses[n], shapes[n], kinds[n]).copy() for n in network.given}
            results = network.session.run(list(network.made), feeds)
            for name, value in zip(network.made, results, strict=True):
                view(addresses[name], value.shape, kinds[name])[...] = value

        self.engine.driver.do(stream, run)
        return True


def fake_trt(manifest: Manifest, driver: FakeDriver) -> Any:
    """A module with what the engine uses of TensorRT."""

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: memoryview) -> Network:
            return Network(bytes(plan).decode(), manifest, driver)

    severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)
    logger = type("ILogger", (), {"Severity": severity, "__init__": lambda self: None})
    return SimpleNamespace(
        Runtime=Runtime,
        ILogger=logger,
        TensorIOMode=SimpleNamespace(INPUT="INPUT"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    )
