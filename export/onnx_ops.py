"""The two custom ops in ONNX: how a graph calls them, and their local functions of standard ops.

A graph holds nodes of domain `swift`. ONNX Runtime executes them by inlining the functions stored in the same file; a
TensorRT build deletes the functions and finds its plugins instead.

The attention masks all rows instead of gathering the listed ones: at the embedded model's size, gathering a data
dependent number of rows costs more than the few keys that it saves, and masks work for any batch.
"""

from __future__ import annotations

import onnx
import torch
from onnx import parser
from torch import Tensor

from . import ops

DOMAIN = "swift"
VERSION = 1
OPSET = 20

_ATTENTION = """
<domain: "swift", opset_import: ["" : 20]>
DynamicWindowAttention <layer, scale> (q, fresh_k, fresh_v, cache_k, cache_v, segments) => (o) {
    layer_index = Constant <value_int: int = @layer> ()
    layer_k = Gather <axis: int = 0> (cache_k, layer_index)
    layer_v = Gather <axis: int = 0> (cache_v, layer_index)
    k = Concat <axis: int = 1> (layer_k, fresh_k)
    v = Concat <axis: int = 1> (layer_v, fresh_v)
    row_axis = Constant <value_ints = [1]> ()
    one_item = Constant <value_int = 1> ()
    zero_item = Constant <value_int = 0> ()
    row_shape = Shape <start: int = 1, end: int = 2> (k)
    row_count = Squeeze (row_shape)
    row_list = Range (zero_item, row_count, one_item)
    row_ids = Cast <to: int = 6> (row_list)
    start, length = Split <axis: int = 2, num_outputs: int = 2> (segments)
    stop = Add (start, length)
    after = GreaterOrEqual (row_ids, start)
    until = Less (row_ids, stop)
    inside = And (after, until)
    inside_int = Cast <to: int = 6> (inside)
    seen_int = ReduceMax <keepdims: int = 1> (inside_int, row_axis)
    seen_rows = Cast <to: int = 9> (seen_int)
    seen = Unsqueeze (seen_rows, row_axis)
    scale_f = Constant <value_float: float = @scale> ()
    scale_q = CastLike (scale_f, q)
    q_scaled = Mul (q, scale_q)
    q_heads = Transpose <perm: ints = [0, 2, 1, 3]> (q_scaled)
    k_heads = Transpose <perm: ints = [0, 2, 3, 1]> (k)
    v_heads = Transpose <perm: ints = [0, 2, 1, 3]> (v)
    scores = MatMul (q_heads, k_heads)
    scores_f = Cast <to: int = 1> (scores)
    nothing = Constant <value_float: float = -inf> ()
    masked = Where (seen, scores_f, nothing)
    weights_f = Softmax <axis: int = -1> (masked)
    weights = CastLike (weights_f, v)
    o_heads = MatMul (weights, v_heads)
    o = Transpose <perm: ints = [0, 2, 1, 3]> (o_heads)
}
"""

_INJECTION = """
<domain: "swift", opset_import: ["" : 20]>
SemanticInjection (cache_v, spans, old_signature, new_signature, rho, mix) => (bridge, anchor) {
    shape_l = Shape <start: int = 0, end: int = 1> (cache_v)
    shape_b = Shape <start: int = 1, end: int = 2> (cache_v)
    shape_r = Shape <start: int = 2, end: int = 3> (cache_v)
    shape_nd = Shape <start: int = 3, end: int = 5> (cache_v)
    minus = Constant <value_ints = [-1]> ()
    two_axis = Constant <value_ints = [2]> ()
    last_axis = Constant <value_ints = [-1]> ()
    one_i = Constant <value_int = 1> ()
    zero_i = Constant <value_int = 0> ()
    one_f = Constant <value_float = 1.0> ()
    zero_f = Constant <value_float = 0.0> ()
    floor_f = Constant <value_float = 0.000001> ()
    row_count = Squeeze (shape_r)
    row_list = Range (zero_i, row_count, one_i)
    row_ids = Cast <to: int = 6> (row_list)
    start, length = Split <axis: int = 3, num_outputs: int = 2> (spans)
    stop = Add (start, length)
    after = GreaterOrEqual (row_ids, start)
    until = Less (row_ids, stop)
    inside = And (after, until)
    inside_f = Cast <to: int = 1> (inside)
    member = ReduceSum <keepdims: int = 0> (inside_f, two_axis)
    count = ReduceSum <keepdims: int = 1> (member, last_axis)
    count_floor = Max (count, one_f)
    flat_shape = Concat <axis: int = 0> (shape_l, shape_b, shape_r, minus)
    flat = Reshape (cache_v, flat_shape)
    flat_f = Cast <to: int = 1> (flat)
    sums = MatMul (member, flat_f)
    means_flat = Div (sums, count_floor)
    five = Constant <value_ints = [5]> ()
    means_shape = Concat <axis: int = 0> (shape_l, shape_b, five, shape_nd)
    means = Reshape (means_flat, means_shape)
    last, before, recent, sink_own, tail = Split <axis: int = 2, num_outputs: int = 5> (means)
    count_shape = Constant <value_ints = [1, -1, 5, 1, 1]> ()
    counts = Reshape (count, count_shape)
    has = Greater (counts, zero_f)
    has_last, has_before, has_recent, has_sink, has_tail = Split <axis: int = 2, num_outputs: int = 5> (has)
    sink = Where (has_sink, sink_own, recent)
    head_lead = Constant <value_ints = [1, -1, 1]> ()
    head_shape = Concat <axis: int = 0> (head_lead, shape_nd)
    old = Reshape (old_signature, head_shape)
    new = Reshape (new_signature, head_shape)
    change = Sub (new, old)
    motion = Sub (last, before)
    motion_sq = Mul (motion, motion)
    squared = ReduceSum <keepdims: int = 1> (motion_sq, last_axis)
    change_motion = Mul (change, motion)
    dot = ReduceSum <keepdims: int = 1> (change_motion, last_axis)
    squared_floor = Add (squared, floor_f)
    along = Div (dot, squared_floor)
    part = Mul (along, motion)
    projected = Sub (change, part)
    moves = Greater (squared, floor_f)
    project = And (moves, has_before)
    delta = Where (project, projected, change)
    base = Concat <axis: int = 2> (sink, recent)
    base_sq = Mul (base, base)
    base_sum = ReduceSum <keepdims: int = 1> (base_sq, last_axis)
    base_norm = Sqrt (base_sum)
    base_floor = Max (base_norm, floor_f)
    delta_sq = Mul (delta, delta)
    delta_sum = ReduceSum <keepdims: int = 1> (delta_sq, last_axis)
    delta_norm = Sqrt (delta_sum)
    delta_floor = Max (delta_norm, floor_f)
    base_delta = Mul (base, delta)
    base_dot = ReduceSum <keepdims: int = 1> (base_delta, last_axis)
    norms = Mul (base_floor, delta_floor)
    cosine = Div (base_dot, norms)
    clamped = Clip (cosine, zero_f, one_f)
    item_shape = Constant <value_ints = [1, -1, 1, 1, 1]> ()
    rho_items = Reshape (rho, item_shape)
    gate = Mul (rho_items, clamped)
    rest = Sub (one_f, gate)
    kept = Mul (rest, base)
    injected = Mul (gate, delta)
    bridge_f = Add (kept, injected)
    bridge = CastLike (bridge_f, cache_v)
    mix_items = Reshape (mix, item_shape)
    mix_rest = Sub (one_f, mix_items)
    tail_part = Mul (mix_rest, tail)
    old_part = Mul (mix_items, old)
    anchor_f = Add (tail_part, old_part)
    anchor = CastLike (anchor_f, cache_v)
}
"""


def functions() -> dict[str, onnx.FunctionProto]:
    """The local functions by op name, opset 20."""
    parsed = {}
    for text in (_ATTENTION, _INJECTION):
        function = parser.parse_function(text.replace("-inf", "-3.4028234663852886e38"))
        parsed[function.name] = function
    return parsed


def attach(model: onnx.ModelProto) -> None:
    """Give a model the functions that its nodes call, in place."""
    used = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    known = functions()
    del model.functions[:]
    model.functions.extend(known[name] for name in sorted(used))
    if used and all(item.domain != DOMAIN for item in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


def window_attention(
    q: Tensor,
    fresh_k: Tensor,
    fresh_v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    segments: Tensor,
    layer: int,
    scale: float,
) -> Tensor:
    """`ops.dynamic_window_attention`, as a node where a graph is being exported."""
    if not torch.onnx.is_in_onnx_export():
        return ops.dynamic_window_attention(q, fresh_k, fresh_v, cache_k, cache_v, segments, layer, scale)
    node: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::DynamicWindowAttention",
        (q, fresh_k, fresh_v, cache_k, cache_v, segments),
        {"layer": layer, "scale": scale},
        dtype=q.dtype,
        shape=q.shape,
        version=VERSION,
    )
    return node


def injection(
    cache_v: Tensor, spans: Tensor, old_signature: Tensor, new_signature: Tensor, rho: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor]:
    """`ops.semantic_injection`, as a node where a graph is being exported."""
    if not torch.onnx.is_in_onnx_export():
        return ops.semantic_injection(cache_v, spans, old_signature, new_signature, rho, mix)
    layers, batch, _, heads, width = cache_v.shape
    bridge, anchor = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::SemanticInjection",
        (cache_v, spans, old_signature, new_signature, rho, mix),
        {},
        dtypes=(cache_v.dtype, cache_v.dtype),
        shapes=((layers, batch, 2, heads, width), (layers, batch, 1, heads, width)),
        version=VERSION,
    )
    return bridge, anchor
