"""How much work the graphs of a bundle are: floating-point operations and the bytes that have to move.

    work = BundleWork(Manifest.load("wan.bundle"))
    work.denoise(frames=3, keys=12 * 1560).flop

Counted from the graphs: shapes are inferred with numbers in the place of the dynamic axes. Matrix products and
convolutions count two operations for each multiplication; elementwise work is left out, as PyTorch's FlopCounterMode
does. The attention over the cache counts the keys that a table lists, not all rows, which ONNX Runtime masks.

Bytes are the least that any engine moves: every weight and input read once, every output written once, of the cache the
listed keys only. Weights are not read for this: a bundle of any size is counted in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from swiftvideo.runtime.errors import BundleError, BundleMissingError
from swiftvideo.runtime.manifest import Manifest

from .onnx_ops import DOMAIN

Shape = tuple[int, ...]

CACHES = frozenset(("cache_k", "cache_v"))
"""Inputs of which only the listed rows are read."""
FOLDED = {
    *("Add", "Cast", "Concat", "Div", "Gather", "Identity", "Mul", "Range"),
    *("Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"),
}
"""Ops that shapes are computed with."""
SMALL = 64
"""Most elements of a value that a shape is computed from."""


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations and least bytes."""

    flop: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Work:
        return Work(self.flop * times, self.bytes * times)


@dataclass(frozen=True, slots=True)
class GraphWork:
    """Work of one run of a graph: what it is whatever the keys, and what each key adds."""

    fixed: Work
    per_key: Work


class BundleWork:
    """Work of a bundle's graphs. Methods raise BundleError where a graph is missing or cannot be counted."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._known: dict[tuple[str, int, int], GraphWork] = {}

    def denoise(self, frames: int, keys: int, batch: int = 1) -> Work:
        """One run of the backbone over `frames` latent frames of which every token sees `keys` rows."""
        made = self._graph("denoise", frames, batch)
        return made.fixed + made.per_key * keys

    def decode(self, frames: int, batch: int = 1) -> Work:
        """Decoding `frames` latent frames, the video's first not among them."""
        return self._graph("decode", frames, batch).fixed

    def decode_first(self, batch: int = 1) -> Work:
        """Decoding the video's first latent frame."""
        return self._graph("decode_first", 1, batch).fixed

    def condition(self, batch: int = 1) -> Work:
        """K and V of a prompt's embeddings."""
        return self._graph("condition", 1, batch).fixed

    def text_encoder(self, batch: int = 1) -> Work:
        """Embeddings of a prompt of full length."""
        return self._graph("text_encoder", 1, batch).fixed

    def _graph(self, name: str, frames: int, batch: int) -> GraphWork:
        key = name, frames, batch
        if key not in self._known:
            file = f"onnx/{name}.onnx"
            if not self.manifest.has(file):
                raise BundleMissingError(
                    f"the bundle at {str(self.manifest.folder)!r} lists no {file}: export it again"
                )
            model = onnx.load_model_from_string(bytes(self.manifest.read_file(file)))
            sizes = {"B": batch, "F": frames, "R": self.manifest.geometry.rows}
            self._known[key] = count(model, sizes, name)
        return self._known[key]


def count(model: onnx.ModelProto, sizes: dict[str, int], name: str = "the graph") -> GraphWork:
    """Work of a graph whose dynamic axes are `sizes`; the model is used up.

    Raises BundleError where an axis has no size, or the shape of something that counts does not follow from them.
    """
    attentions = _simplify(model, sizes, name)
    shapes = _shapes(model)

    def shape(value: str) -> Shape:
        if value not in shapes:
            raise BundleError(
                f"{name}: the shape of {value} does not follow from {sizes}: export the bundle again"
            )
        return shapes[value]

    flop = sum(
        COUNTED[n.op_type](n, shape) for n in model.graph.node if n.op_type in COUNTED and not n.domain
    )
    weights = {
        tensor.name: _bytes(tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer
    }
    looked_up: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[0] in weights:
            size = weights[node.input[0]] // max(1, math.prod(shape(node.input[0])))
            looked_up[node.input[0]] = math.prod(shape(node.output[0])) * size
    ends = [*model.graph.input, *model.graph.output]
    moved = sum((weights | looked_up).values()) + sum(
        _bytes(value.type.tensor_type.elem_type, shape(value.name))
        for value in ends
        if value.name not in CACHES
    )
    per_key = 0
    for q in attentions:
        batch, queries, heads, width = shape(q)
        per_key += 4 * batch * queries * heads * width
    cache = next((value for value in model.graph.input if value.name == "cache_k"), None)
    row = 0
    if cache is not None:
        layers, batch, _, heads, width = shape("cache_k")
        row = _bytes(cache.type.tensor_type.elem_type, (2, layers, batch, heads, width))
    return GraphWork(Work(flop, moved), Work(per_key, row))


def _matmul(node: onnx.NodeProto, shape: Callable[[str], Shape]) -> int:
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[-1]


def _gemm(node: onnx.NodeProto, shape: Callable[[str], Shape]) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(shape(node.output[0])) * shape(node.input[0])[0 if transposed else 1]


def _conv(node: onnx.NodeProto, shape: Callable[[str], Shape]) -> int:
    """The weight is [out, in/groups, kernel...]."""
    return 2 * math.prod(shape(node.output[0])) * math.prod(shape(node.input[1])[1:])


COUNTED: dict[str, Callable[[onnx.NodeProto, Callable[[str], Shape]], int]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
}


def _simplify(model: onnx.ModelProto, sizes: dict[str, int], name: str) -> list[str]:
    """Give the axes numbers and make our ops ones that have shape inference; return the attentions' queries."""
    graph = model.graph
    for value in graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                if axis.dim_param not in sizes:
                    raise BundleError(
                        f"{name}: input {value.name} has an axis {axis.dim_param}, known are {sizes}"
                    )
                axis.dim_value = sizes[axis.dim_param]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    queries = []
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type == "DynamicWindowAttention":
            queries.append(node.input[0])
            node.CopyFrom(helper.make_node("Identity", [node.input[0]], list(node.output)))
    del model.functions[:]
    return queries


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of all values that have one. What computes shapes is folded, round by round, until nothing is added."""
    graph = model.graph
    while True:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        for value in (*inferred.input, *inferred.value_info, *inferred.output):
            axes = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
                shapes[value.name] = tuple(axis.dim_value for axis in axes)
        if not _fold(graph, shapes):
            return shapes


def _fold(graph: onnx.GraphProto, shapes: dict[str, Shape]) -> bool:
    """Replace nodes that compute small integers from known ones by their values; whether any was."""
    values: dict[str, NDArray[Any]] = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32)
        and not tensor.external_data
        and math.prod(tensor.dims) <= SMALL
    }
    kept, made = [], []
    for node in graph.node:
        result = _value(node, values, shapes)
        if result is None:
            kept.append(node)
            continue
        values[node.output[0]] = result
        made.append(numpy_helper.from_array(result, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(made)
    return bool(made)


def _value(
    node: onnx.NodeProto, values: dict[str, NDArray[Any]], shapes: dict[str, Shape]
) -> NDArray[Any] | None:
    if node.op_type == "Shape" and node.input[0] in shapes:
        given = {a.name: a.i for a in node.attribute}
        return np.array(shapes[node.input[0]][given.get("start", 0) : given.get("end")], np.int64)
    if node.op_type not in FOLDED or len(node.output) != 1 or any(n and n not in values for n in node.input):
        return None
    feeds = {n: values[n] for n in node.input if n}
    evaluated: Any = ReferenceEvaluator(node).run(None, feeds)
    result = np.asarray(evaluated[0])
    return result if result.size <= SMALL and result.dtype.kind == "i" else None


def _bytes(element: int, shape: Shape) -> int:
    size: int = helper.tensor_dtype_to_np_dtype(element).itemsize
    return math.prod(shape) * size
