"""LoRA adapters in peft's naming, merged into a backbone's weights.

What scales an adapter is its alpha. peft keeps it in adapter_config.json, diffusers in the metadata of the weights
file, others in a tensor beside each pair of matrices, and some nowhere. One that is given comes before all of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from swiftvideo.runtime.errors import CheckpointError

from .checkpoint_files import (
    check_dense,
    check_finite,
    check_floating,
    find_weights,
    read_json,
    read_metadata,
    read_weights,
)
from .checkpoint_naming import State, from_diffusers, listed, strip, unwrap

METADATA = "lora_adapter_metadata"
"""Key of a safetensors file's metadata under which diffusers keeps what peft keeps in adapter_config.json."""
MERGED = "merge it into the backbone with peft (merge_and_unload) and give the result as --backbone, without --lora"
CONVERTED = "load it with diffusers' WanPipeline.load_lora_weights and give what save_lora_weights writes"
REMEDY = "pass the alpha that it was trained with (--lora-alpha)"

_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its files have it."""

    state: State
    config: dict[str, Any]
    """peft's settings; empty where there are none."""
    files: list[Path]
    """All that were read."""

    @property
    def alpha(self) -> str:
        """What its files say of its alpha, for records: one number, or that there are several or none."""
        several = any(key.endswith(".alpha") for key in self.state) or self.config.get("alpha_pattern")
        return "its own" if several else str(self.config.get("lora_alpha", "its own"))


def read_adapter(path: Path) -> Adapter:
    """An adapter from a weights file or a folder that holds one (`find_weights`). Raises CheckpointError."""
    files = find_weights(path)
    beside = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if beside.is_file():
        config = read_json(beside)
        files.append(beside)
    else:
        config = _saved_config(files[0])
    state, _ = unwrap(read_weights(path), str(path), None)
    check_dense(state, path)
    return Adapter(state, config, files)


def _saved_config(file: Path) -> dict[str, Any]:
    text = read_metadata(file).get(METADATA)
    if text is None:
        return {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {METADATA} is not JSON ({error}); save the adapter again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: {METADATA} holds {content!r} and should hold an object")
    return {key.removeprefix("transformer."): value for key, value in content.items()}


def merge_lora(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    source: str,
    alpha: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> State:
    """Weights with an adapter merged in: W + alpha / rank * B A, computed in float32.

    base: original Wan names. adapter: peft's names, `...lora_A[.name].weight` [rank, in] and `...lora_B` [out, rank],
    over modules of either naming. alpha: for all modules; else `<module>.alpha` tensors, of any number's dtype; else
    `alpha_pattern` and `lora_alpha` of config (peft's settings); else the rank, that is, a scale of 1.
    Raises CheckpointError for halves without their partner, unknown modules, wrong shapes, an alpha that is no number,
    weights that are none, or what is not plain LoRA.
    """
    config = config or {}
    for option in ("use_dora", "fan_in_fan_out"):
        if config.get(option):
            raise CheckpointError(
                f"{source}: {option} is {config[option]!r}, which is not supported; {MERGED}"
            )
    halves: dict[str, dict[str, Tensor]] = {}
    matrices: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    surplus, names = [], set()
    for key, value in adapter.items():
        match = _KEY.match(key)
        if match:
            names.add(match["adapter"])
            matrices[key] = value
            module = _module(match["module"])
            halves.setdefault(module, {})[match["half"]] = value
            patterned = _patterned(config, strip(match["module"]), source)
            if patterned is not None and alpha is None:
                alphas.setdefault(module, patterned)
        elif key.endswith(".alpha") and value.numel() == 1:
            own = _number(value.item(), key, source) if alpha is None else alpha
            alphas[_module(key.removesuffix(".alpha"))] = own
        else:
            surplus.append(key)
    if dora := [key for key in surplus if "magnitude" in key or key.endswith("dora_scale")]:
        raise CheckpointError(f"{source}: {dora[0]} is of DoRA, which is not supported; {MERGED}")
    if surplus or not halves:
        raise CheckpointError(
            f"{source}: not a LoRA in peft's naming; unknown keys: {listed(surplus) or 'it is empty'}; {CONVERTED}"
        )
    if len(names) > 1:
        raise CheckpointError(
            f"{source} holds {len(names)} adapters, {listed(sorted(map(str, names)))}; keep one"
        )
    modules = {**halves, **alphas}
    if unknown := [module for module in modules if module + ".weight" not in base]:
        raise CheckpointError(
            f"{source}: {len(unknown)} modules are not in the backbone: {listed(unknown)}; use an adapter of its "
            "architecture"
        )
    if single := [module for module in modules if len(halves.get(module, {})) != 2]:
        raise CheckpointError(
            f"{source}: {len(single)} modules lack lora_A or lora_B: {listed(single)}; save or copy the adapter again"
        )
    check_floating({key: value.dtype for key, value in matrices.items()}, source)
    check_finite(matrices, source)
    if alpha is None and "lora_alpha" in config:
        alpha = _number(config["lora_alpha"], "lora_alpha", source)
    merged = dict(base)
    for module, pair in halves.items():
        weight, a, b = base[module + ".weight"], pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or weight.shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"{source}: {module} is {tuple(weight.shape)}, but lora_A is {tuple(a.shape)} and lora_B "
                f"{tuple(b.shape)}; the adapter belongs to another architecture"
            )
        rank = a.shape[0]
        if not rank:
            raise CheckpointError(f"{source}: {module} is of rank 0, which changes nothing; use another file")
        strength = alphas.get(module, rank if alpha is None else alpha)
        scale = strength / (math.sqrt(rank) if config.get("use_rslora") else rank)
        merged[module + ".weight"] = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
    return merged


def _module(name: str) -> str:
    """Original Wan name of a module that an adapter names."""
    short = strip(name)
    return from_diffusers(short) or short  # no original Wan name is also one of diffusers


def _patterned(config: Mapping[str, Any], name: str, source: str) -> float | None:
    """The alpha that `alpha_pattern` has for a module, under the adapter's own name of it, as peft matches them."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{source}: alpha_pattern is {patterns!r} and should be an object; {REMEDY}")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise CheckpointError(f"{source}: alpha_pattern has {pattern!r} ({error}); {REMEDY}") from error
        if found:
            return _number(value, f"alpha_pattern[{pattern!r}]", source)
    return None


def _number(value: Any, what: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CheckpointError(f"{source}: {what} is {value!r} and should be a number; {REMEDY}")
    return float(value)
