"""Compiles the kernels ahead of time, on any machine: no GPU, no CUDA toolkit.

    python -m swiftvideo.export.kernels.compiler --out cubins --capability 90 --dtype bf16 --head-dim 128

Block sizes are constants of this file, chosen by reasoning about shared memory and registers, and checked against the
limits of each capability; `python -m tests.gpu.kernels --tune` measures others on a GPU (sm90: docs/performance.md).
"""

from __future__ import annotations

import argparse
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.plugins.kernel import (
    ATTENTION,
    COMMIT,
    INJECTION,
    OPS,
    PLACE,
    Axis,
    Kernel,
    KernelSpec,
)

CAPABILITIES = (80, 86, 89, 90, 120)

SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}
"""Bytes of shared memory that one block may use, by compute capability."""

MERGED = 32
"""Queries of a split tile that one program merges."""

_TRITON = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
_INTEGERS = frozenset(
    (
        *("layer", "batch", "heads", "queries", "rows", "words", "count", "pairs"),
        *("source_rows", "target_rows", "target_first", "unsplit", "pieces", "merging"),
    )
)
_INT_POINTERS = frozenset(("segments", "spans", "ranges"))
_FLOAT_POINTERS = frozenset(("old_signature", "new_signature", "rho", "mix", "cos", "sin", "partial"))


@dataclass(frozen=True, slots=True)
class Tiles:
    """Block sizes of the attention: queries, keys, warps, and stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_tiles(capability: int, dtype: str, head_dim: int) -> Tiles:
    """Block sizes for a compute capability.

    Hopper: 128 x 128 keeps two warp groups' wgmma busy, and three stages of K and V fill its shared memory. The others
    take half as many keys a block, so that the pipeline fits. float32 is for small models and uses three tf32 products.
    """
    if dtype == "fp32":
        return Tiles(64, 32, 4, 2)
    if capability == 90:
        return Tiles(128, 128, 8, 3)
    return Tiles(128, 64, 8 if head_dim > 64 else 4, 3 if capability == 80 else 2)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel and the PTX that it was assembled from."""

    kernel: Kernel
    ptx: str


def compile_kernel(
    op: str, capability: int, dtype: str, head_dim: int, tiles: Tiles | None = None
) -> Compiled:
    """Compile one op.

    tiles: of the attention, `attention_tiles` by default.
    Raises SettingsError for an unknown op, capability or dtype, a head width that is no multiple of 8 up to 128, and
    tiles that need more shared memory than the capability has.
    """
    check_kernel(op, capability, dtype, head_dim)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants, grid, warps, stages = _recipe(op, capability, dtype, head_dim, tiles)
    names = [name for name in function.arg_names if name not in constants]
    kinds = {name: _kind(name) for name in names}
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(
        function,
        {name: _signature(op, name, dtype) if name in kinds else "constexpr" for name in function.arg_names},
        constants,
        # Every pointer is aligned to 16 bytes: rows are, and so are the tensors' beginnings.
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if kinds.get(name) == "ptr"
        },
    )
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        made: Any = triton.compile(source, target=target, options=options)
    cubin: bytes = made.asm["cubin"]
    ptx: str = made.asm["ptx"]
    shared = int(made.metadata.shared)
    if shared > SHARED_LIMITS[capability]:
        raise SettingsError(
            f"{op} with {tiles} needs {shared} bytes of shared memory, compute capability {capability} has "
            f"{SHARED_LIMITS[capability]}: use smaller tiles"
        )
    entry = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None, "the compiler made PTX without an entry"
    hidden = entry[2].count(".param") - len(names)
    assert hidden >= 0, f"{op}: {entry[2].count('.param')} parameters in the PTX for {len(names)} arguments"
    assert made.metadata.num_ctas == 1, "clusters need another way to launch"
    assert made.metadata.global_scratch_size == 0, (
        "the kernel wants scratch memory, which no launcher gives it"
    )
    tile = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "MERGED")
    spec = KernelSpec(
        op=op,
        entry=entry[1],
        capability=capability,
        dtype=dtype,
        head_dim=head_dim,
        warps=int(made.metadata.num_warps),
        shared=shared,
        arguments=tuple(kinds.items()),
        scratch=hidden,
        grid=grid,
        sha256=hashlib.sha256(cubin).hexdigest(),
        compiler=f"triton {triton.__version__}",
        tile=tuple(constants[name] for name in tile) if op == ATTENTION else (),
    )
    return Compiled(Kernel(spec, cubin), ptx)


def compile_all(capability: int, dtype: str, head_dim: int) -> dict[str, Kernel]:
    """All kernels that a bundle needs on GPUs of one capability, by op."""
    return {op: compile_kernel(op, capability, dtype, head_dim).kernel for op in OPS}


def check_kernel(op: str, capability: int, dtype: str, head_dim: int) -> None:
    """Whether `compile_kernel` can make a kernel; raises its SettingsError where not."""
    if op not in OPS:
        raise SettingsError(f"no kernel {op!r}: there are {', '.join(OPS)}")
    if capability not in CAPABILITIES:
        raise SettingsError(
            f"no kernels for compute capability {capability}: {', '.join(map(str, CAPABILITIES))} are supported"
        )
    if dtype not in _TRITON:
        raise SettingsError(f"dtype is {dtype!r}: use {', '.join(_TRITON)}")
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise SettingsError(f"head width is {head_dim}: a multiple of 8 from 8 to 128 is needed")


def block_width(head_dim: int) -> int:
    """The power of two that holds a head, at least 16 (the tensor cores' smallest)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _recipe(
    op: str, capability: int, dtype: str, head_dim: int, tiles: Tiles | None
) -> tuple[Any, dict[str, int], tuple[Axis, Axis, Axis], int, int]:
    """(function, constants, grid, warps, stages) of an op."""
    from .attention import dynamic_window_attention
    from .injection import semantic_injection
    from .rows import commit_rows, place_rows

    head = {"HEAD": head_dim, "BLOCK_D": block_width(head_dim)}
    if op == ATTENTION:
        t = tiles or attention_tiles(capability, dtype, head_dim)
        constants = head | {"BLOCK_M": t.queries, "BLOCK_N": t.keys, "MERGED": MERGED}
        grid = (Axis(("programs",)), Axis(()), Axis(()))
        return dynamic_window_attention, constants, grid, t.warps, t.stages
    if op == INJECTION:
        grid = (Axis(("heads",)), Axis(("batch",)), Axis(("layers",)))
        return semantic_injection, head | {"BLOCK_R": 64}, grid, 8, 2
    if op == COMMIT:
        block = 4096
        grid = (Axis(("queries", "words"), block), Axis(("items",)), Axis(("copies",)))
        return commit_rows, {"BLOCK": block}, grid, 8, 1
    assert op == PLACE
    grid = (Axis(("count",), 32), Axis(("heads",)), Axis(("items",)))
    return place_rows, head | {"BLOCK_R": 32}, grid, 4, 1


def _kind(name: str) -> str:
    return "i32" if name in _INTEGERS else "f32" if name == "scale" else "ptr"


def _signature(op: str, name: str, dtype: str) -> str:
    """Triton's type of an argument."""
    if _kind(name) != "ptr":
        return {"i32": "i32", "f32": "fp32"}[_kind(name)]
    if name in _INT_POINTERS or op == COMMIT:
        return "*i32"
    return "*fp32" if name in _FLOAT_POINTERS else "*" + _TRITON[dtype]


def main() -> None:
    """Write cubins and their descriptions into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--capability", type=int, action="append", help="repeat it; all if absent")
    parser.add_argument("--dtype", default="bf16", choices=sorted(_TRITON))
    parser.add_argument("--head-dim", type=int, default=128)
    arguments = parser.parse_args()
    for capability in arguments.capability or CAPABILITIES:
        for kernel in compile_all(capability, arguments.dtype, arguments.head_dim).values():
            for name, content in kernel.files().items():
                path: Path = arguments.out / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            spec = kernel.spec
            print(f"{spec.stem}: {len(kernel.cubin)} bytes, {spec.warps} warps, {spec.shared} bytes shared")


if __name__ == "__main__":
    main()
