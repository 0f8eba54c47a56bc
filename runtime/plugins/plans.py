"""What a manifest says of a TensorRT plan, and every check that a plan must pass before it is deserialised.

A plan is native code for one product version and one compute capability. `check_plan` needs no GPU: what runs here is
given to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swiftvideo.runtime.errors import (
    BundleIntegrityError,
    BundleMissingError,
    BundleVersionError,
    EngineUnavailableError,
)
from swiftvideo.runtime.manifest import Manifest
from swiftvideo.runtime.plain import PlainError, decode

from .flavours import FLAVOURS
from .kernel import FOLDER


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """One plan of a bundle, as the manifest's `plans` lists it."""

    graph: str
    target: str
    """As given to `swiftvideo export --target`."""
    flavour: str
    version: str
    """Of the product that built it."""
    capability: int
    dtype: str
    file: str
    layers: str
    """File with the builder's layer report."""
    source: str
    """`graph_source` of the ONNX graph that it was built from."""
    plugins: Mapping[str, str]
    """SHA-256 of the cubin in each of its plugins, by op; empty where the graph has none of our ops."""
    functions: bool = False
    """Whether our ops were left as standard layers (`--no-plugins`)."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> PlanInfo:
        """From a manifest's entry. Raises BundleVersionError where it is no such entry."""
        try:
            info = decode(cls, data, "its entry")
        except PlainError as error:
            raise BundleVersionError(
                f"the manifest's plan {data.get('file')!r:.100} has other fields than this version writes ({error}): "
                "build the plans again with `swiftvideo export --target`"
            ) from error
        if info.flavour not in FLAVOURS:
            raise BundleVersionError(
                f"the manifest's plan {info.file!r} is of flavour {info.flavour!r}: unknown"
            )
        return info

    def serves_as(self, other: PlanInfo) -> bool:
        """Whether both would be chosen in the same places, whatever the names of their targets."""
        mine, theirs = ((p.graph, p.flavour, p.capability, p.functions) for p in (self, other))
        return mine == theirs

    def entry(self) -> dict[str, Any]:
        """The manifest's entry."""
        return dataclasses.asdict(self)


def graph_source(manifest: Manifest, graph: str) -> str:
    """SHA-256 over the hashes of a graph and of all weights: what a plan of it was built from."""
    own = f"onnx/{graph}.onnx"
    names = sorted(n for n in manifest.files if n == own or (n.startswith("onnx/") and n.endswith(".data")))
    text = "\n".join(f"{name} {manifest.files[name].sha256}" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()


def plans_of(manifest: Manifest) -> list[PlanInfo]:
    """All plans that a manifest lists."""
    return [PlanInfo.of(entry) for entry in manifest.plans]


def choose_plans(manifest: Manifest, flavour: str, version: str, capability: int) -> dict[str, PlanInfo]:
    """The plans of a bundle for what runs here, checked, by graph; those with plugins where there is a choice.

    Raises as `check_plan`, and BundleMissingError where the bundle has no plans at all.
    """
    plans = plans_of(manifest)
    if not plans:
        raise BundleMissingError(
            f"the bundle has no TensorRT plans: build them with `swiftvideo export --target`, "
            f"such as --target {_target_for(flavour, capability)}"
        )
    fitting = [p for p in plans if (p.flavour, p.version, p.capability) == (flavour, version, capability)]
    if not fitting:
        # Nothing fits: say why by the nearest one.
        nearest = min(
            plans, key=lambda p: (p.flavour != flavour, p.capability != capability, p.version != version)
        )
        check_plan(manifest, nearest, flavour, version, capability)
    chosen: dict[str, PlanInfo] = {}
    for plan in fitting:
        check_plan(manifest, plan, flavour, version, capability)
        if plan.graph not in chosen or not plan.functions:
            chosen[plan.graph] = plan
    return chosen


def check_plan(manifest: Manifest, plan: PlanInfo, flavour: str, version: str, capability: int) -> None:
    """Whether a plan may be loaded by this product, on this GPU, from this bundle. The file's hash comes on reading.

    Raises:
        EngineUnavailableError: built for another product or another GPU.
        BundleVersionError: built by another version of the product.
        BundleIntegrityError: built from other graphs, or with other kernels, than the bundle has.
        BundleMissingError: the plan or a plugin's kernel is not in the bundle.
    """
    again = f"build it with `swiftvideo export --target {_target_for(flavour, capability)}`"
    if plan.flavour != flavour:
        raise EngineUnavailableError(
            f"{plan.file} is a plan of {plan.flavour} and {flavour} runs here: {again}"
        )
    if plan.capability != capability:
        raise EngineUnavailableError(
            f"{plan.file} is for GPUs of compute capability {plan.capability} and this one has {capability}: {again}"
        )
    if plan.version != version:
        raise BundleVersionError(
            f"{plan.file} was built by {flavour} {plan.version} and {version} runs here: install that version, "
            f"or {again}"
        )
    if plan.dtype != manifest.dtype or plan.source != graph_source(manifest, plan.graph):
        raise BundleIntegrityError(
            f"{plan.file} was built from another {plan.graph} graph than the bundle has; it belongs to another "
            f"bundle: {again}"
        )
    if not manifest.has(plan.file):
        raise BundleMissingError(f"the manifest names the plan {plan.file} and does not list it: {again}")
    for op, sha256 in plan.plugins.items():
        name = f"{FOLDER}/{op}-{manifest.dtype}-d{manifest.geometry.head_dim}-sm{capability}.cubin"
        if not manifest.has(name):
            raise BundleMissingError(
                f"{plan.file} needs the plugin {op} and the bundle has no {name}: {again}"
            )
        if manifest.files[name].sha256 != sha256:
            raise BundleIntegrityError(
                f"{plan.file} holds the {op} kernel {sha256[:12]}... and the bundle "
                f"{manifest.files[name].sha256[:12]}...: {again}"
            )


def _target_for(flavour: str, capability: int) -> str:
    return f"rtx:sm{capability}" if flavour == "tensorrt_rtx" else {90: "h200"}.get(capability, "h100")
