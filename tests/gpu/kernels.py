"""The kernels on a GPU, at the real shapes: numbers against float64, speed against what the machine can do.

    python -m tests.gpu.kernels --json kernels.json            # compiles here; --cubins FOLDER takes ready ones
    python -m tests.gpu.kernels --tune --json tuning.json      # other block sizes of the attention instead

Launches go through cuda-python, as the TensorRT plugins make them; TensorRT itself is not needed. Shapes are those of
the 1.3B model at 832x480: 4680 queries, 12 heads of 128, windows of 7 to 12 frames of 1560 tokens, anchors and bridge.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from swiftvideo.export.kernels.compiler import Tiles, attention_tiles, compile_kernel
from swiftvideo.export.lanes import milliseconds
from swiftvideo.export.ops import semantic_injection
from swiftvideo.runtime.plugins.kernel import ATTENTION, COMMIT, INJECTION, OPS, PLACE, Kernel, KernelSpec
from swiftvideo.runtime.plugins.launch import Launcher
from swiftvideo.sdk.limits import Gpu
from swiftvideo.sdk.machine import commit

from .attention import (
    ANCHORS,
    DEVICE,
    HEAD,
    HEADS,
    LIMIT,
    QUERIES,
    ROWS,
    SINK,
    TUNING,
    WINDOW,
    P,
    huge_logits,
    replayed,
    stream,
    tuned,
    windowed,
)
from .record import Record


def injection(kernel: Kernel, layers: int = 30) -> dict[str, Any]:
    """Error against the torch reference in float64 arithmetic of one layer, and bytes a second."""
    torch.manual_seed(1)
    cache = torch.randn(layers, 1, ROWS, HEADS, HEAD, device=DEVICE).bfloat16()
    first = 2 + ANCHORS + SINK * P
    table = torch.zeros(1, 5, 3, 2, dtype=torch.int32, device=DEVICE)
    for index, (start, count) in enumerate(((5, P), (4, P), (4, 2 * P), (None, SINK * P), (0, 6 * P))):
        begin = 2 + ANCHORS if start is None else first + start * P
        table[0, index, 0] = torch.tensor([begin, count])
    old, new = torch.randn(2, 1, HEADS * HEAD, device=DEVICE)
    rho, mix = torch.full((1,), 0.6, device=DEVICE), torch.full((1,), 0.35, device=DEVICE)
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
    fresh = [torch.randn(layers, 1, QUERIES, HEADS, HEAD, device=DEVICE).bfloat16() for _ in range(2)]
    cache = [torch.zeros(layers, 1, ROWS, HEADS, HEAD, device=DEVICE).bfloat16() for _ in range(2)]
    table = torch.tensor([[0, ROWS - P, P], [P, 6 + SINK * P, 2 * P], [0, 0, 0], [0, 0, 0]])
    table = table.int().to(DEVICE)
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
    angles = torch.rand(22, device=DEVICE, dtype=torch.float64)
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
    """The GPU and what drives it."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": 10 * major + minor,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def limits() -> dict[str, Any]:
    """What the GPU reaches, beside which our figures stand (swiftvideo.sdk.limits)."""
    made = Gpu(torch.device(DEVICE)).limits("bf16")
    assert made is not None
    return made


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


def read_cubin(folder: Path, op: str, capability: int) -> Kernel:
    """A kernel that `python -m swiftvideo.export.kernels.compiler` wrote, for this GPU."""
    path = folder / "kernels" / f"{op}-bf16-d{HEAD}-sm{capability}.json"
    spec = KernelSpec.from_json(path.read_bytes(), str(path))
    return Kernel(spec, path.with_suffix(".cubin").read_bytes())


def label(tiles: Tiles) -> str:
    """Block sizes as the name of an entry."""
    return f"{tiles.queries}x{tiles.keys}, {tiles.warps} warps, {tiles.stages} stages"


def tune(record: Record, capability: int) -> None:
    """Other block sizes of the attention, each by itself; the fastest that is right is named."""
    for tiles in TUNING:
        record.add("tuning", label(tiles), work=lambda tiles=tiles: tuned(tiles, capability))  # type: ignore[misc]
    times = {name: row["ms"] for name, row in record.figures["tuning"].items() if row.get("right")}
    record.put("fastest", value=min(times, key=lambda name: times[name], default=None))
    record.save()


def measure(record: Record, capability: int, cubins: Path | None) -> None:
    """All kernels: numbers and speed."""
    found = record.add("limits", work=limits)
    rate = None if found is None else found["gflop_per_s"] / 1000
    kernels: dict[str, Kernel] = {}

    def compiled(op: str) -> str:
        kernels[op] = (
            compile_kernel(op, capability, "bf16", HEAD).kernel
            if cubins is None
            else read_cubin(cubins, op, capability)
        )
        return kernels[op].spec.compiler

    for op in OPS:
        record.add("compiled", op, work=lambda op=op: compiled(op))  # type: ignore[misc]
    record.put("tiles", value=asdict(attention_tiles(capability, "bf16", HEAD)))
    for window in range(7, WINDOW + 1):
        record.add(
            "attention",
            f"window {window}",
            work=lambda window=window: windowed(kernels[ATTENTION], window, rate),  # type: ignore[misc]
        )
    record.add("graph_replay", work=lambda: replayed(kernels[ATTENTION]))
    record.add("huge_logits", work=lambda: huge_logits(kernels[ATTENTION]))
    record.add("injection", work=lambda: injection(kernels[INJECTION]))
    record.add("rows", work=lambda: rows(kernels))
    record.add("tensorrt_rtx", work=rtx)
    record.put("passed", value=not record.failed and passed(record.figures))
    record.save()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print JSON, entry by entry; exit code 2 without a GPU, 1 when a number is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--cubins", type=Path, help="a folder of the compiler's instead of compiling here")
    parser.add_argument("--tune", action="store_true", help="time other block sizes of the attention instead")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"tests.gpu.kernels needs an NVIDIA GPU and a torch that uses it; torch is {torch.__version__} and sees "
            "none: run it on a machine with one (docs/hardware.md)",
            file=sys.stderr,
        )
        return 2
    torch.zeros(1, device=DEVICE)  # the context that launches go to
    record = Record(given.json, {"commit": commit(), "machine": machine(), "passed": True})
    capability = record.figures["machine"]["capability"]
    if given.tune:
        tune(record, capability)
    else:
        measure(record, capability, given.cubins)
    return 0 if record.figures["passed"] and not record.failed else 1


def passed(figures: dict[str, Any]) -> bool:
    """Whether all numbers are right; speed is not judged."""
    attention = all(row["relative_rms_error"] < LIMIT for row in figures["attention"].values())
    replay = all(error < LIMIT for error in figures["graph_replay"]["relative_rms_error_by_window"].values())
    injected = figures["injection"]["max_error"] < 2e-2
    moved = figures["rows"]["commit"]["exact"] and figures["rows"]["place"]["max_error"] < 4e-2
    return bool(attention and replay and injected and moved and figures["huge_logits"]["max_error"] < 8e-2)


if __name__ == "__main__":
    sys.exit(main())
