"""Cubins for every capability, made without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import triton

from swiftvideo.export.kernels.compiler import (
    CAPABILITIES,
    SHARED_LIMITS,
    Tiles,
    attention_tiles,
    compile_all,
    compile_kernel,
)
from swiftvideo.runtime.errors import BundleIntegrityError, SettingsError
from swiftvideo.runtime.plugins.kernel import ATTENTION, COMMIT, INJECTION, OPS, PLACE, Kernel, KernelSpec

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassembled(cubin: bytes, folder: Path, *flags: str) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(NVIDIA / "cuobjdump"), *flags, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_kernels_compile(capability: int, tmp_path: Path) -> None:
    kernels = compile_all(capability, "bf16", 128)
    assert set(kernels) == set(OPS)
    for op, kernel in kernels.items():
        spec = kernel.spec
        assert spec.shared <= SHARED_LIMITS[capability]
        assert spec.capability == capability and spec.op == op
        listing = disassembled(kernel.cubin, tmp_path, "-elf")
        assert f".text.{spec.entry}" in listing
        assert KernelSpec.from_json(spec.to_json(), "here") == spec


def test_hopper_uses_its_own_tensor_cores(tmp_path: Path) -> None:
    made = compile_kernel(ATTENTION, 90, "bf16", 128)
    assert "wgmma.mma_async" in made.ptx
    assert "sm_90a" in made.ptx
    listing = disassembled(made.kernel.cubin, tmp_path, "-sass")
    products, waits = listing.count("HGMMA"), listing.count("WARPGROUP.DEPBAR")
    assert products >= 32 and waits <= products // 4, "the assembler waits for every single product"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_keys_and_values_are_loaded_asynchronously(capability: int) -> None:
    """The pipeline copies 16 bytes at a time past the registers, whatever row space a block lies in."""
    ptx = compile_kernel(ATTENTION, capability, "bf16", 128).ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "ld.global.b16" not in ptx


@pytest.mark.parametrize(("dtype", "head"), [("fp32", 24), ("fp16", 64), ("bf16", 8)])
def test_other_heads_and_dtypes(dtype: str, head: int) -> None:
    for op in (ATTENTION, INJECTION):
        spec = compile_kernel(op, 89, dtype, head).kernel.spec
        assert (spec.dtype, spec.head_dim) == (dtype, head)


def test_grids_and_arguments() -> None:
    attention = compile_kernel(ATTENTION, 90, "bf16", 128).kernel.spec
    assert attention.blocks({"programs": 636}) == (636, 1, 1) and attention.tile == (128, 128, 128, 32)
    assert [name for name, _ in attention.arguments][-3:] == ["unsplit", "pieces", "merging"]
    assert dict(attention.arguments)["scale"] == "f32" and dict(attention.arguments)["layer"] == "i32"
    injection = compile_kernel(INJECTION, 90, "bf16", 128).kernel.spec
    assert injection.blocks({"heads": 12, "batch": 1, "layers": 30}) == (12, 1, 30)
    commit = compile_kernel(COMMIT, 90, "bf16", 128).kernel.spec
    assert commit.blocks({"queries": 4680, "words": 768, "items": 30, "copies": 8}) == (878, 30, 8)
    place = compile_kernel(PLACE, 90, "bf16", 128).kernel.spec
    assert place.blocks({"count": 6, "heads": 12, "items": 30}) == (1, 12, 30)


def test_wrong_settings() -> None:
    for arguments, message in (
        (("Convolution", 90, "bf16", 128), "no kernel 'Convolution'"),
        ((ATTENTION, 70, "bf16", 128), "no kernels for compute capability 70"),
        ((ATTENTION, 90, "int8", 128), "dtype is 'int8'"),
        ((ATTENTION, 90, "bf16", 12), "head width is 12: a multiple of 8"),
        ((ATTENTION, 90, "bf16", 136), "head width is 136"),
    ):
        with pytest.raises(SettingsError, match=message):
            compile_kernel(*arguments)


def test_tiles_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingsError, match="bytes of shared memory, compute capability 89 has 101376"):
        compile_kernel(ATTENTION, 89, "bf16", 128, Tiles(128, 128, 8, 4))
    assert attention_tiles(90, "bf16", 128) == Tiles(128, 128, 8, 3)


def test_a_cubin_must_have_its_description_s_hash() -> None:
    kernel = compile_kernel(PLACE, 80, "fp16", 64).kernel
    changed = bytearray(kernel.cubin)
    changed[100] ^= 1
    with pytest.raises(BundleIntegrityError, match="PlaceRows-fp16-d64-sm80"):
        Kernel(kernel.spec, bytes(changed))
