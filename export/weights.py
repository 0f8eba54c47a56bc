"""Weights of exported graphs: where they lie, and which parameter of the model each one is.

Tensors go to a data file beside the graph. Graphs of one model may share a file; equal tensors are written once. A
graph's metadata records its parameters, because the exporter keeps the names of some and makes others, the transposed
matrices of linear layers above all, anonymous:

    swift.weights    {"parameter of the module": ["initialiser", whether it is transposed], ...}
    swift.config     what the module was built from

So a bundle's torch models can be built again from the bundle alone (`restore`), to compare engines with them.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from swiftvideo.runtime.errors import BundleError

WEIGHTS_KEY = "swift.weights"
CONFIG_KEY = "swift.config"

INLINE = 256
"""Tensors of fewer bytes stay in the .onnx file: shapes and scalars, which tools want to see."""
PAGE = 4096
"""Alignment of tensors of a page or more, so that a file can be mapped; smaller ones are aligned to 64 bytes."""
SAMPLE = 8
"""First elements of a tensor that stand for it until it is compared as a whole."""

DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}


M = TypeVar("M", bound=nn.Module)


class WeightFile:
    """A data file that grows by tensors; one that is already in it is found, not written again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[tuple[bytes, int], int] = {}
        self._end = 0

    def add(self, tensor: Tensor) -> tuple[int, int]:
        """Offset and length in bytes of the tensor's elements, in row-major order."""
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        key = hashlib.sha256(content.data).digest(), content.size
        if key not in self._known:
            alignment = PAGE if content.size >= PAGE else 64
            start = math.ceil(self._end / alignment) * alignment
            with self.path.open("ab") as file:
                file.write(bytes(start - self._end))
                file.write(content.data)
            self._known[key], self._end = start, start + content.size
        return self._known[key], content.size


def store(model: ir.Model, module: nn.Module, config: dict[str, Any], file: WeightFile) -> None:
    """Move the model's tensors to `file` and record in its metadata which parameters of `module` they are."""
    parameters = _Parameters(module)
    found: dict[str, tuple[str, bool]] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            continue
        tensor = _tensor(value.const_value)
        for parameter, transposed in parameters.find(tensor):
            if parameter not in found or parameter == name:
                found[parameter] = (name, transposed)
        if tensor.numel() * tensor.element_size() < INLINE:
            continue
        offset, length = file.add(tensor)
        value.const_value = ir.ExternalTensor(
            file.path.name,
            offset,
            length,
            value.const_value.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
            base_dir=file.path.parent,
        )
    model.metadata_props[WEIGHTS_KEY] = json.dumps(found)
    model.metadata_props[CONFIG_KEY] = json.dumps(config)


class _Parameters:
    """Finds the parameters and buffers of a module that hold a tensor's values."""

    def __init__(self, module: nn.Module) -> None:
        self.state = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        self._by_sample: dict[tuple[int, bytes], list[tuple[str, bool]]] = defaultdict(list)
        for name, value in self.state.items():
            self._by_sample[_sample(value)].append((name, False))
            if value.ndim >= 2:
                self._by_sample[_sample(value.flatten(1).t())].append((name, True))

    def find(self, tensor: Tensor) -> list[tuple[str, bool]]:
        """(name, transposed) of every parameter with these values; a matrix of rank above 2 counts as flatten(1)."""
        if not tensor.is_floating_point():
            return []
        return [
            (name, transposed)
            for name, transposed in self._by_sample.get(_sample(tensor), [])
            if _equal(tensor, self.state[name], transposed)
        ]


def _sample(tensor: Tensor) -> tuple[int, bytes]:
    """Number of elements, and the first few in float32."""
    head = tensor
    if tensor.ndim == 2:
        head = tensor[:SAMPLE, :SAMPLE]
        if tensor.shape[1] > SAMPLE:
            head = head[:1]
    return tensor.numel(), head.flatten()[:SAMPLE].float().numpy().tobytes()


def _equal(tensor: Tensor, parameter: Tensor, transposed: bool) -> bool:
    expected = parameter.flatten(1).t() if transposed else parameter
    if transposed and tensor.shape != expected.shape:
        return False
    if tensor.dtype != expected.dtype:  # a parameter that was cast to float32 when constants were folded
        tensor, expected = tensor.float(), expected.float()
    return torch.equal(tensor.reshape(expected.shape), expected)


def _tensor(value: ir.TensorProtocol) -> Tensor:
    """A tensor of the exporter's model, not copied."""
    raw = getattr(value, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach()
    array = value.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and nobody writes to it
        if value.dtype == ir.DataType.BFLOAT16:
            return torch.from_numpy(array.view("uint16")).view(torch.bfloat16)
        return torch.from_numpy(array)


def blank(module: M) -> M:
    """Give a module on the meta device parameters that are not a number, in place; they take no memory.

    Whatever `restore` does not find stays so; `blanks` lists it.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            nothing = torch.full((), math.nan, dtype=parameter.dtype).expand(parameter.shape)
            setattr(owner, name, nn.Parameter(nothing, requires_grad=False))
    return module.eval()


def blanks(module: nn.Module) -> list[str]:
    """Names of the parameters that are as `blank` left them."""
    return [
        name
        for name, value in module.named_parameters()
        if value.numel() and not any(value.stride()) and bool(value[(0,) * value.ndim].isnan())
    ]


def config_of(model: onnx.ModelProto, name: str) -> dict[str, Any]:
    """What the module of a graph was built from. Raises BundleError where it is not recorded."""
    config: dict[str, Any] = json.loads(_metadata(model, CONFIG_KEY, name))
    return config


def restore(module: nn.Module, model: onnx.ModelProto, name: str, read: Callable[[str], memoryview]) -> None:
    """Load the recorded parameters of a graph into its module, in place, without copying the large ones.

    name: of the graph, for messages. read: bytes of a data file by its name beside the graph.
    Raises BundleError where the graph has no record, or one that does not fit the module.
    """
    recorded: dict[str, tuple[str, bool]] = json.loads(_metadata(model, WEIGHTS_KEY, name))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    state = module.state_dict()
    for parameter, (initialiser, transposed) in recorded.items():
        if parameter not in state or initialiser not in tensors:
            raise BundleError(
                f"{name} records that {parameter} is {initialiser}, and one of them is not there: "
                "export the bundle again with this version"
            )
        value = _read(tensors[initialiser], read)
        old = state[parameter]
        if value.numel() != old.numel():
            raise BundleError(
                f"{name}: {initialiser} has the shape {tuple(value.shape)}, which does not fit {parameter} "
                f"{tuple(old.shape)}: export the bundle again with this version"
            )
        state[parameter] = (value.t() if transposed else value).reshape(old.shape).to(old.dtype)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


def _read(tensor: onnx.TensorProto, read: Callable[[str], memoryview]) -> Tensor:
    dtype, count = DTYPES[tensor.data_type], math.prod(tensor.dims)
    buffer: bytes | memoryview = tensor.raw_data
    offset = 0
    if tensor.external_data:
        place = _external(tensor)
        buffer, offset = read(place["location"]), int(place["offset"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the bytes are read-only, and nobody writes to them
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(tuple(tensor.dims))


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _metadata(model: onnx.ModelProto, key: str, name: str) -> str:
    for entry in model.metadata_props:
        if entry.key == key:
            return entry.value
    raise BundleError(
        f"{name} does not record {key}: export the bundle again with this version, or compare it with its checkpoint "
        "(--checkpoint)"
    )
