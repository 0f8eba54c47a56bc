"""The kernels on a GPU, at the real shapes: numbers against float64, speed against what the machine can do.

    python -m tests.gpu.kernels --json kernels.json            # compiles here; --cubins FOLDER takes ready ones
    python -m tests.gpu.kernels --tune                         # other block sizes of the attention too

Launches go through cuda-python, as the TensorRT plugins make them; TensorRT itself is not needed. Shapes are those of
the 1.3B model at 832x480: 4680 queries, 12 heads of 128, windows of 7 to 12 frames of 1560 tokens, anchors and bridge.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from swiftvideo.export.kernels.compiler import Tiles, attention_tiles, compile_kernel
from swiftvideo.export.ops import semantic_injection
from swiftvideo.runtime.plugins.kernel import ATTENTION, COMMIT, INJECTION, OPS, PLACE, Kernel, KernelSpec
from swiftvideo.runtime.plugins.launch import Launcher
from swiftvideo.sdk.limits import Gpu

P, CHUNK, WINDOW, SINK, ANCHORS = 1560, 3, 12, 3, 4
HEADS, HEAD = 12, 128
ROWS = 2 + ANCHORS + WINDOW * P
QUERIES = CHUNK * P
TUNING = [
    *(Tiles(128, 128, 8, s) for s in (2, 3)),
    *(Tiles(128, 64, w, s) for w in (4, 8) for s in (2, 3, 4)),
    *(Tiles(64, 128, 4, s) for s in (2, 3)),
    *(Tiles(64, 64, 4, s) for s in (3, 4)),
    *(Tiles(128, 64, 8, s, ahead=True) for s in (3, 4)),
    *(Tiles(128, 256, 8, 2), Tiles(256, 64, 8, 3)),
    *(Tiles(128, 128, 8, 2, ahead=True), Tiles(64, 64, 4, 3, ahead=True)),
]


def segments(window: int) -> list[tuple[int, int]]:
    """The table of a late chunk: bridge and anchors, sink, the ring in two pieces, the chunk itself.

    Memory displaces the oldest tokens of the window, so the ring's oldest frame is cut (algorithm.md, 3.4).
    """
    memory = 2 + ANCHORS
    ring = window * P - SINK * P - memory - QUERIES
    first = memory + SINK * P
    if ring <= 0:
        fresh = QUERIES + ring
        return [(0, memory), (memory, SINK * P), (ROWS + QUERIES - fresh, fresh)]
    head = min(ring, 2 * P + 700)  # where the ring wraps
    pieces = [(ROWS - (ring - head), ring - head), (first, head)]
    return [(0, memory), (memory, SINK * P), *[p for p in pieces if p[1]], (ROWS, QUERIES)]


def table_of(pieces: list[tuple[int, int]]) -> Tensor:
    """int32 [1,6,2] on the GPU."""
    padded = pieces + [(0, 0)] * (6 - len(pieces))
    return torch.tensor([padded], dtype=torch.int32, device="cuda")


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Mean time of `work` by CUDA events, after three runs that do not count."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / repeats


def stream() -> int:
    """The current stream's handle."""
    return int(torch.cuda.current_stream().cuda_stream)


class Attention:
    """Tensors of one attention and the launcher that computes it."""

    def __init__(self, kernel: Kernel, layers: int = 2) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device="cuda").bfloat16()

        self.q, self.fresh_k, self.fresh_v = (normal(1, QUERIES, HEADS, HEAD) for _ in range(3))
        self.cache_k, self.cache_v = (normal(layers, 1, ROWS, HEADS, HEAD) for _ in range(2))
        self.o = torch.empty_like(self.q)
        self.table = table_of([])
        self.layer = layers - 1
        self.launcher = Launcher(kernel)

    def __call__(self) -> None:
        """Put one launch into the current stream."""
        tensors = (self.q, self.fresh_k, self.fresh_v, self.cache_k, self.cache_v, self.table, self.o)
        sizes = {"queries": QUERIES, "heads": HEADS, "batch": 1}
        scalars = (self.layer, HEAD**-0.5, 1, HEADS, QUERIES, ROWS)
        self.launcher.run(stream(), sizes, *(t.data_ptr() for t in tensors), *scalars)

    def gathered(self, pieces: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """K and V of the listed rows, [1,n,keys,d]."""

        def pick(cache: Tensor, fresh: Tensor) -> Tensor:
            parts = []
            for start, length in pieces:
                source = cache[self.layer, 0] if start < ROWS else fresh[0]
                begin = start if start < ROWS else start - ROWS
                parts.append(source[begin : begin + length])
            return torch.cat(parts).transpose(0, 1)[None]

        return pick(self.cache_k, self.fresh_k), pick(self.cache_v, self.fresh_v)

    def exact(self, pieces: list[tuple[int, int]]) -> Tensor:
        """The result in float64, head by head, [1,N,n,d]."""
        k, v = self.gathered(pieces)
        heads = []
        for head in range(HEADS):
            logits = self.q[0, :, head].double() @ k[0, head].double().T * HEAD**-0.5
            heads.append(torch.softmax(logits, -1) @ v[0, head].double())
        return torch.stack(heads, 1)[None]


def attention(kernel: Kernel, rate: float) -> list[dict[str, Any]]:
    """Errors and speed for every window, beside scaled_dot_product_attention."""
    work, rows = Attention(kernel), []
    for window in range(7, WINDOW + 1):
        pieces = segments(window)
        keys = sum(length for _, length in pieces)
        assert keys == window * P
        work.table.copy_(table_of(pieces))
        work.o.fill_(float("nan"))
        work()
        exact = work.exact(pieces)
        q = work.q.transpose(1, 2)
        k, v = (x.contiguous() for x in work.gathered(pieces))
        theirs = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        def gather_too(q: Tensor = q, pieces: list[tuple[int, int]] = pieces) -> Tensor:
            return functional.scaled_dot_product_attention(q, *work.gathered(pieces))

        ours_ms = milliseconds(work)
        torch_ms = milliseconds(lambda q=q, k=k, v=v: functional.scaled_dot_product_attention(q, k, v))  # type: ignore[misc]
        flop = 4 * QUERIES * keys * HEADS * HEAD
        rows.append(
            {
                "window": window,
                "keys": keys,
                "largest_value": float(exact.abs().max()),
                "rms_value": float(exact.square().mean().sqrt()),
                "max_error": float((work.o.double() - exact).abs().max()),
                "rms_error": float((work.o.double() - exact).square().mean().sqrt()),
                "torch_max_error": float((theirs.double() - exact).abs().max()),
                "torch_rms_error": float((theirs.double() - exact).square().mean().sqrt()),
                "ms": ours_ms,
                "tflops": flop / ours_ms / 1e9,
                "share_of_matmul": flop / ours_ms / 1e9 / rate,
                "torch_ms": torch_ms,
                "torch_tflops": flop / torch_ms / 1e9,
                "torch_with_gather_ms": milliseconds(gather_too),
            }
        )
    return rows


def replayed(kernel: Kernel) -> dict[str, Any]:
    """One captured CUDA graph over two windows: only device memory changes in between."""
    work = Attention(kernel)
    work.table.copy_(table_of(segments(12)))
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    errors = {}
    for window in (7, 12, 9):
        work.table.copy_(table_of(segments(window)))
        work.o.fill_(float("nan"))
        graph.replay()
        exact = work.exact(segments(window))
        errors[str(window)] = float(
            (work.o.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        )
    return {"rms_error_by_window": errors}


def huge_logits(kernel: Kernel) -> dict[str, Any]:
    """Logits of thousands: the softmax is nearly one-hot, and nothing overflows."""
    work = Attention(kernel)
    work.q *= 100
    pieces = segments(9)
    work.table.copy_(table_of(pieces))
    work()
    return {"max_error": float((work.o.double() - work.exact(pieces)).abs().max())}


def injection(kernel: Kernel, layers: int = 30) -> dict[str, Any]:
    """Error against the torch reference in float64 arithmetic of one layer, and bytes a second."""
    torch.manual_seed(1)
    cache = torch.randn(layers, 1, ROWS, HEADS, HEAD, device="cuda").bfloat16()
    first = 2 + ANCHORS + SINK * P
    table = torch.zeros(1, 5, 3, 2, dtype=torch.int32, device="cuda")
    for index, (start, count) in enumerate(((5, P), (4, P), (4, 2 * P), (None, SINK * P), (0, 6 * P))):
        begin = 2 + ANCHORS if start is None else first + start * P
        table[0, index, 0] = torch.tensor([begin, count])
    old, new = torch.randn(2, 1, HEADS * HEAD, device="cuda")
    rho, mix = torch.full((1,), 0.6, device="cuda"), torch.full((1,), 0.35, device="cuda")
    bridge = cache.new_empty(layers, 1, 2, HEADS, HEAD)
    anchor = cache.new_empty(layers, 1, 1, HEADS, HEAD)
    launcher = Launcher(kernel)
    tensors = (cache, table, old, new, rho, mix, bridge, anchor)

    def work() -> None:
        sizes = {"heads": HEADS, "batch": 1, "layers": layers}
        launcher.run(stream(), sizes, *(t.data_ptr() for t in tensors), 1, HEADS, ROWS)

    work()
    wanted = semantic_injection(cache[-1:].double().float(), table, old, new, rho, mix)
    errors = [float((a[-1:].float() - b).abs().max()) for a, b in zip((bridge, anchor), wanted, strict=True)]
    took = milliseconds(work)
    read = int(table[0, :, :, 1].sum()) * HEADS * HEAD * 2 * layers
    return {"max_error": max(errors), "ms": took, "bytes": read, "gb_per_s": read / took / 1e6}


def rows(kernels: dict[str, Kernel], layers: int = 30) -> dict[str, Any]:
    """Commit and place: exact copies, and bytes a second (read and written)."""
    torch.manual_seed(2)
    fresh = [torch.randn(layers, 1, QUERIES, HEADS, HEAD, device="cuda").bfloat16() for _ in range(2)]
    cache = [torch.zeros(layers, 1, ROWS, HEADS, HEAD, device="cuda").bfloat16() for _ in range(2)]
    table = torch.tensor([[0, ROWS - P, P], [P, 6 + SINK * P, 2 * P], [0, 0, 0], [0, 0, 0]])
    table = table.int().cuda()
    words = HEADS * HEAD // 2
    commit = Launcher(kernels[COMMIT])

    def work() -> None:
        sizes = {"queries": QUERIES, "words": words, "items": layers, "copies": 8}
        pointers = [t.data_ptr() for t in (*fresh, *cache, table)]
        commit.run(stream(), sizes, *pointers, QUERIES, ROWS, words)

    work()
    same = all(
        torch.equal(c[:, :, ROWS - P :], f[:, :, :P])
        and torch.equal(c[:, :, 6 + SINK * P : 6 + SINK * P + 2 * P], f[:, :, P:])
        and not c[:, :, : 6 + SINK * P].any()
        for f, c in zip(fresh, cache, strict=True)
    )
    took = milliseconds(work)
    moved = 2 * sum(t.numel() * 2 for t in fresh)
    place = Launcher(kernels[PLACE])
    angles = torch.rand(22, device="cuda", dtype=torch.float64)
    cos, sin = angles.cos().float(), angles.sin().float()
    sink = fresh[0]

    def turn() -> None:
        pointers = [t.data_ptr() for t in (sink, cache[0], cos, sin)]
        sizes = {"count": SINK * P, "heads": HEADS, "items": layers}
        place.run(stream(), sizes, *pointers, QUERIES, ROWS, 6, SINK * P, HEADS, 22)

    turn()
    even, odd = sink[..., 0:44:2].double(), sink[..., 1:44:2].double()
    seen = cache[0][:, :, 6 : 6 + SINK * P, :, :44].double()
    error = max(
        float((seen[..., 0::2] - (even * angles.cos() - odd * angles.sin())).abs().max()),
        float((seen[..., 1::2] - (even * angles.sin() + odd * angles.cos())).abs().max()),
    )
    turned = milliseconds(turn)
    return {
        "commit": {"exact": same, "ms": took, "gb_per_s": moved / took / 1e6},
        "place": {"max_error": error, "ms": turned, "gb_per_s": moved / 2 / turned / 1e6},
    }


def machine() -> dict[str, Any]:
    """What the GPU reaches: bf16 matmul and a device copy, as the figures beside which ours stand."""
    limits = Gpu(torch.device("cuda")).limits("bf16")
    assert limits is not None
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": 10 * major + minor,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "matmul_tflops": limits["gflop_per_s"] / 1000,
        "copy_gb_per_s": limits["gb_per_s"],
    }


RTX_PROGRAM = """
import tensorrt_rtx_bindings as trt
logger = trt.Logger(trt.ILogger.Severity.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
x = network.add_input("x", trt.DataType.HALF, (64, 64))
network.mark_output(network.add_matrix_multiply(x, trt.MatrixOperation.NONE, x, trt.MatrixOperation.NONE).get_output(0))
plan = builder.build_serialized_network(network, builder.create_builder_config())
assert plan is not None, "no plan was built"
engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
assert engine is not None, "the plan was not loaded"
assert engine.create_execution_context() is not None, "there is no context"
print("runs", trt.__version__)
"""


def rtx() -> dict[str, Any]:
    """Whether TensorRT-RTX builds and loads a plan on this GPU; in a child, which it may take down."""
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        return {"installed": False}
    child = subprocess.run([sys.executable, "-c", RTX_PROGRAM], capture_output=True, text=True, check=False)
    return {"installed": True, "runs": child.returncode == 0, "said": (child.stdout + child.stderr)[-800:]}


def tuned(capability: int) -> list[dict[str, Any]]:
    """Time of the attention over nine frames for other block sizes; the fastest first."""
    found = []
    for tiles in TUNING:
        row: dict[str, Any] = {"tiles": asdict(tiles)}
        try:
            work = Attention(compile_kernel(ATTENTION, capability, "bf16", HEAD, tiles).kernel)
            work.table.copy_(table_of(segments(9)))
            took = milliseconds(work)
        except Exception as error:  # noqa: BLE001  # a size that does not compile or run is a result
            found.append(row | {"error": str(error)[:200]})
            continue
        found.append(row | {"ms": took, "tflops": 4 * QUERIES * 9 * P * HEADS * HEAD / took / 1e9})
    return sorted(found, key=lambda row: row.get("ms", float("inf")))


def read_cubins(folder: Path, capability: int) -> dict[str, Kernel]:
    """Kernels that `python -m swiftvideo.export.kernels.compiler` wrote, for this GPU."""
    kernels = {}
    for op in OPS:
        path = folder / "kernels" / f"{op}-bf16-d{HEAD}-sm{capability}.json"
        spec = KernelSpec.from_json(path.read_bytes(), str(path))
        kernels[op] = Kernel(spec, path.with_suffix(".cubin").read_bytes())
    return kernels


def main() -> int:
    """Measure everything and print it as JSON; exit code 2 without a GPU, 1 when a number is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--cubins", type=Path, help="a folder of the compiler's instead of compiling here")
    parser.add_argument("--tune", action="store_true", help="also time other block sizes of the attention")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"tests.gpu.kernels needs an NVIDIA GPU and a torch that uses it; torch is {torch.__version__} and sees "
            "none: run it on a machine with one (docs/hardware.md)",
            file=sys.stderr,
        )
        return 2
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # the context that launches go to
    result: dict[str, Any] = {"machine": machine()}
    capability = result["machine"]["capability"]
    if arguments.cubins:
        kernels = read_cubins(arguments.cubins, capability)
    else:
        kernels = {op: compile_kernel(op, capability, "bf16", HEAD).kernel for op in OPS}
    result["tiles"] = asdict(attention_tiles(capability, "bf16", HEAD))
    result["compiler"] = kernels[ATTENTION].spec.compiler
    result["attention"] = attention(kernels[ATTENTION], result["machine"]["matmul_tflops"])
    result["graph_replay"] = replayed(kernels[ATTENTION])
    result["huge_logits"] = huge_logits(kernels[ATTENTION])
    result["injection"] = injection(kernels[INJECTION])
    result["rows"] = rows(kernels)
    result["tensorrt_rtx"] = rtx()
    result["passed"] = passed(result)
    if arguments.tune:
        if arguments.json:  # a size that brings the GPU down leaves the rest
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        result["tuning"] = tuned(capability)
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)
    return 0 if result["passed"] else 1


def passed(result: dict[str, Any]) -> bool:
    """Whether all numbers are right; speed is not judged. bfloat16 keeps 8 bits: half a unit of the last is 2^-9.

    One row of keys that is lost in a window of twelve frames is an error of 6e-3 in the mean of squares.
    """
    exact = all(r["rms_error"] < 4e-3 * r["rms_value"] for r in result["attention"])
    replay = all(error < 4e-3 for error in result["graph_replay"]["rms_error_by_window"].values())
    injected = result["injection"]["max_error"] < 2e-2
    moved = result["rows"]["commit"]["exact"] and result["rows"]["place"]["max_error"] < 4e-2
    return bool(exact and replay and injected and moved and result["huge_logits"]["max_error"] < 8e-2)


if __name__ == "__main__":
    sys.exit(main())
