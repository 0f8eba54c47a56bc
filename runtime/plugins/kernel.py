"""A compiled kernel: its cubin, and the description that says how to launch it.

Both lie in a bundle as `kernels/<stem>.cubin` and `kernels/<stem>.json`, listed in the manifest; in a TensorRT plan
they travel inside the plugins. Nothing here needs a GPU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swiftvideo.runtime.errors import BundleIntegrityError, BundleMissingError, SettingsError
from swiftvideo.runtime.manifest import Manifest

ATTENTION = "DynamicWindowAttention"
INJECTION = "SemanticInjection"
COMMIT = "CommitRows"
PLACE = "PlaceRows"
ROW_OPS = (COMMIT, PLACE)
"""Those that the engine launches itself, whatever is in the plans."""
OPS = (ATTENTION, INJECTION, *ROW_OPS)

DTYPES = ("fp32", "fp16", "bf16")
KINDS = ("ptr", "i32", "f32")
FOLDER = "kernels"


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the grid: the product of the named sizes, divided by `per` and rounded up; 1 without sizes."""

    sizes: tuple[str, ...]
    per: int = 1

    def __post_init__(self) -> None:
        if self.per < 1:
            raise SettingsError(f"grid axis {self.sizes} per {self.per}: a positive number is needed")


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """How to launch a cubin's entry."""

    op: str
    entry: str
    capability: int
    """Compute capability it was compiled for, such as 90."""
    dtype: str
    head_dim: int
    warps: int
    shared: int
    """Bytes of dynamic shared memory."""
    arguments: tuple[tuple[str, str], ...]
    """(name, kind) in the entry's order; kinds are "ptr", "i32" and "f32"."""
    scratch: int
    """Pointers after the arguments, which the compiler adds and these kernels do not use: passed as null."""
    grid: tuple[Axis, Axis, Axis]
    sha256: str
    """Of the cubin."""
    compiler: str = ""
    tile: tuple[int, ...] = ()
    """Of the attention: queries, keys, width of a row, and queries that one merging program takes (split.py)."""

    def __post_init__(self) -> None:
        wrong = [kind for _, kind in self.arguments if kind not in KINDS]
        if self.op not in OPS or self.dtype not in DTYPES or wrong or len(self.grid) != 3:
            raise SettingsError(
                f"kernel {self.op!r} of {self.dtype!r} with {len(self.grid)} axes and arguments {wrong}: "
                f"ops are {', '.join(OPS)}, dtypes {', '.join(DTYPES)}, kinds {', '.join(KINDS)}"
            )
        if len(self.tile) != (4 if self.op == ATTENTION else 0) or min(self.tile, default=1) < 1:
            raise SettingsError(
                f"kernel {self.op} has tile {self.tile}: the attention's has four sizes, others none"
            )
        if self.tile and self.tile[0] % self.tile[3]:
            raise SettingsError(
                f"kernel {self.op}: programs that merge {self.tile[3]} of {self.tile[0]} queries"
            )
        if min(self.warps, self.head_dim, self.capability) < 1 or min(self.shared, self.scratch) < 0:
            raise SettingsError(
                f"kernel {self.op}: warps {self.warps}, head_dim {self.head_dim}, shared {self.shared}"
            )

    @property
    def stem(self) -> str:
        """Name of its files, without folder and suffix."""
        return f"{self.op}-{self.dtype}-d{self.head_dim}-sm{self.capability}"

    def blocks(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """The grid for `sizes`, such as {"queries": 4680, "heads": 12, "batch": 1}."""
        x, y, z = (-(-math.prod(sizes[name] for name in axis.sizes) // axis.per) for axis in self.grid)
        return x, y, z

    def to_json(self) -> str:
        """The description as JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> KernelSpec:
        """Read `to_json`'s text. Raises BundleIntegrityError naming `where`."""
        try:
            data: dict[str, Any] = json.loads(text)
            data["grid"] = tuple(Axis(tuple(axis["sizes"]), axis["per"]) for axis in data["grid"])
            data["arguments"] = tuple((str(name), str(kind)) for name, kind in data["arguments"])
            data["tile"] = tuple(map(int, data["tile"]))
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleIntegrityError(
                f"{where} describes no kernel of this version ({error}): export the bundle again"
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A cubin with its description."""

    spec: KernelSpec
    cubin: bytes

    def __post_init__(self) -> None:
        seen = hashlib.sha256(self.cubin).hexdigest()
        if seen != self.spec.sha256:
            raise BundleIntegrityError(
                f"the cubin of {self.spec.stem} has SHA-256 {seen[:12]}... and its description lists "
                f"{self.spec.sha256[:12]}...: export the bundle again"
            )

    def files(self) -> dict[str, bytes]:
        """Its files in a bundle, by name."""
        stem = f"{FOLDER}/{self.spec.stem}"
        return {f"{stem}.cubin": self.cubin, f"{stem}.json": self.spec.to_json().encode()}


def read_kernel(manifest: Manifest, op: str, capability: int) -> Kernel:
    """The kernel of an op from a bundle, for a GPU of `capability`, verified.

    Raises:
        BundleMissingError: the bundle has none for this capability.
        BundleIntegrityError: its files were changed, or do not belong together.
    """
    g = manifest.geometry
    stem = f"{FOLDER}/{op}-{manifest.dtype}-d{g.head_dim}-sm{capability}"
    if not manifest.has(f"{stem}.cubin") or not manifest.has(f"{stem}.json"):
        have = sorted(
            {name.rpartition("-sm")[2].partition(".")[0] for name in manifest.files if FOLDER in name}
        )
        raise BundleMissingError(
            f"the bundle has no {op} kernel for compute capability {capability} (it has kernels for "
            f"{', '.join(have) or 'none'}): add them with `swiftvideo export --target`"
        )
    spec = KernelSpec.from_json(bytes(manifest.read_file(f"{stem}.json")), f"{stem}.json")
    if (spec.op, spec.dtype, spec.head_dim, spec.capability) != (op, manifest.dtype, g.head_dim, capability):
        raise BundleIntegrityError(f"{stem}.json describes {spec.stem}: export the bundle again")
    return Kernel(spec, bytes(manifest.read_file(f"{stem}.cubin")))
