"""Names of a backbone's weights: original Wan, diffusers, training containers, and LoRA adapters in peft's naming.

Everything is turned into the original Wan names, which `CausalWanModel` uses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swiftvideo.runtime.errors import CheckpointError

State = dict[str, Tensor]
Naming = Literal["original Wan", "diffusers"]

SHOWN = 5
"""How many keys an error lists."""

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
PREFIX = re.compile(r"^(?:(?:base_model|model|module|diffusion_model|transformer)\.)+")
CONTAINERS = ("generator_lora", "state_dict", "model", "lora", "module")
"""Keys of a torch file below which the tensors may lie, besides generator and generator_ema."""

# diffusers pattern -> original Wan replacement, and back. Both apply to the start of a key.
_PAIRS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("proj_out", "head.head"),
    ("scale_shift_table", "head.modulation"),
    ("patch_embedding", "patch_embedding"),
)
_BLOCK_PAIRS = (
    *(
        (f"{theirs}.{a}", f"{ours}.{b}")
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for a, b in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    ),
    ("norm2", "norm3"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("scale_shift_table", "modulation"),
)
_BLOCK = re.compile(r"^(blocks\.\d+\.)(.*)$")


def _translate(key: str, back: bool) -> str | None:
    match = _BLOCK.match(key)
    start, rest = match.groups() if match else ("", key)
    for pair in _BLOCK_PAIRS if match else _PAIRS:
        source, target = pair[::-1] if back else pair
        if rest == source or rest.startswith(source + "."):
            return start + target + rest[len(source) :]
    return None


def from_diffusers(key: str) -> str | None:
    """The original Wan name of a diffusers key, None where there is none."""
    return _translate(key, back=False)


def to_diffusers(key: str) -> str | None:
    """The diffusers name of an original Wan key, None where there is none."""
    return _translate(key, back=True)


def recognise(keys: Iterable[str]) -> Naming | None:
    """Which naming the keys (without prefixes) follow."""
    for key in keys:
        if key.startswith(("condition_embedder.", "proj_out.")) or re.match(
            r"blocks\.\d+\.(attn[12]|norm2)\.", key
        ):
            return "diffusers"
        if re.match(r"((text|time)_embedding|time_projection|head)\.|blocks\.\d+\.(self|cross)_attn\.", key):
            return "original Wan"
    return None


def listed(keys: Iterable[str]) -> str:
    """The first few keys and how many more there are."""
    every = list(keys)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


@dataclass(frozen=True, slots=True)
class Named:
    """Weights under original Wan names, and how they were found."""

    state: State
    naming: Naming
    found: str
    """For messages: the naming, container and prefix recognised."""
    unknown: tuple[str, ...] = ()
    """Keys that this naming does not know."""


def unwrap(content: Any, source: str, ema: bool | None) -> tuple[State, str]:
    """Tensors of a file's content, and the container they were in ('' for none).

    content: a mapping of tensors, or of containers, as training writes them. ema: True takes `generator_ema`,
    False `generator`, None the averaged weights where there are any.
    Raises CheckpointError where there are no tensors, or not the container asked for.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, not named tensors; use a state dict"
        )
    content = _grouped(content)
    names = [name for name in ("generator_ema", "generator") if isinstance(content.get(name), Mapping)]
    if names:
        wanted = names[0] if ema is None else ("generator_ema" if ema else "generator")
        if wanted not in names:
            raise CheckpointError(f"{source} has no {wanted}, only {', '.join(names)}; ask for that one")
        inner, path = unwrap(content[wanted], source, None)
        return inner, f"{wanted}.{path}".rstrip(".")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors, ""
    for name in CONTAINERS:
        if isinstance(content.get(name), Mapping):
            inner, path = unwrap(content[name], source, ema)
            return inner, f"{name}.{path}".rstrip(".")
    keys = listed(str(key) for key in content) or "nothing"
    raise CheckpointError(
        f"{source} has no tensors; it holds {keys}. Containers looked for: generator, generator_ema, "
        f"{', '.join(CONTAINERS)}"
    )


def _grouped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flat keys `generator_ema.x` and `generator.x` (safetensors) as containers."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        container, _, rest = str(key).partition(".")
        if container in ("generator", "generator_ema") and rest:
            groups.setdefault(container, {})[rest] = value
    return groups or content


def strip(key: str) -> str:
    """A key without the prefixes of wrappers: `model.`, `module.`, `_fsdp_wrapped_module.` and so on."""
    return PREFIX.sub("", WRAPPERS.sub("", key))


def to_wan(state: Mapping[str, Tensor], source: str, container: str = "") -> Named:
    """Weights under original Wan names from either naming, with or without prefixes.

    Raises CheckpointError where neither naming is recognised or two keys mean the same weight.
    """
    stripped: dict[str, Tensor] = {}
    for key, value in state.items():
        short = strip(key)
        if short in stripped:
            raise CheckpointError(f"{source}: two keys mean {short}, one is {key}; keep one set of weights")
        stripped[short] = value
    naming = recognise(stripped)
    if naming is None:
        raise CheckpointError(
            f"{source}: neither the original Wan nor the diffusers naming is recognised in its "
            f"{len(state)} keys: {listed(state)}"
        )
    prefixes = sorted({key[: len(key) - len(strip(key))] for key in state} - {""})
    found = f"{naming} naming" + (f", container {container}" if container else "")
    if prefixes:
        found += f", prefix {listed(prefixes)}"
    if naming == "original Wan":
        return Named(stripped, naming, found)
    renamed, unknown = {}, []
    for key, value in stripped.items():
        ours = from_diffusers(key)
        if ours is None:
            unknown.append(key)
        else:
            renamed[ours] = value
    return Named(renamed, naming, found, tuple(unknown))


def check(named: Named, expected: Mapping[str, torch.Size], source: str) -> None:
    """Raise CheckpointError unless the weights are exactly those expected, name by name and shape by shape."""
    state = named.state
    problems = []
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in expected] + list(named.unknown)
    wrong = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    for title, keys in (("missing", missing), ("surplus", surplus), ("of the wrong shape", wrong)):
        if keys:
            problems.append(f"{len(keys)} {title}: {listed(keys)}")
    if problems:
        raise CheckpointError(
            f"{source} ({named.found}) does not fit the backbone: {'; '.join(problems)}. "
            "Use the weights of this architecture, or correct the config"
        )


_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")


def merge_lora(
    base: Mapping[str, Tensor],
    adapter: Mapping[str, Tensor],
    source: str,
    alpha: float | None = None,
    config: Mapping[str, Any] | None = None,
) -> State:
    """Weights with an adapter merged in: W + alpha / rank * B A, computed in float32.

    base: original Wan names. adapter: peft's names, `...lora_A[.name].weight` [rank, in] and `...lora_B` [out, rank],
    over modules of either naming; `<module>.alpha` tensors are used where present. alpha: for all modules; else
    `lora_alpha` of config (an adapter_config.json); else the rank, that is, a scale of 1.
    Raises CheckpointError for halves without their partner, unknown modules, wrong shapes, or what is not plain LoRA.
    """
    config = config or {}
    for option in ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out"):
        if config.get(option):
            raise CheckpointError(
                f"{source}: {option} is {config[option]!r}, which is not supported; merge it with peft"
            )
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    surplus, names = [], set()
    for key, value in adapter.items():
        match = _LORA.match(key)
        if match:
            names.add(match["adapter"])
            halves.setdefault(_module(match["module"]), {})[match["half"]] = value
        elif key.endswith(".alpha") and value.numel() == 1:
            alphas[_module(key.removesuffix(".alpha"))] = float(value)
        else:
            surplus.append(key)
    if surplus or not halves:
        raise CheckpointError(
            f"{source}: not a LoRA in peft's naming; unknown keys: {listed(surplus) or 'it is empty'}"
        )
    if len(names) > 1:
        raise CheckpointError(
            f"{source} holds {len(names)} adapters, {listed(sorted(map(str, names)))}; keep one"
        )
    unknown = [
        module for module in [*halves, *alphas] if module + ".weight" not in base or module not in halves
    ]
    if unknown:
        raise CheckpointError(f"{source}: {len(unknown)} modules are not in the backbone: {listed(unknown)}")
    single = [module for module, pair in halves.items() if len(pair) != 2]
    if single:
        raise CheckpointError(f"{source}: {len(single)} modules lack lora_A or lora_B: {listed(single)}")
    merged = dict(base)
    for module, pair in halves.items():
        weight, a, b = base[module + ".weight"], pair["A"], pair["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or weight.shape != (b.shape[0], a.shape[1]):
            raise CheckpointError(
                f"{source}: {module} is {tuple(weight.shape)}, but lora_A is {tuple(a.shape)} and lora_B "
                f"{tuple(b.shape)}; the adapter belongs to another architecture"
            )
        rank = a.shape[0]
        strength = alphas.get(module, alpha if alpha is not None else float(config.get("lora_alpha", rank)))
        scale = strength / (math.sqrt(rank) if config.get("use_rslora") else rank)
        merged[module + ".weight"] = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
    return merged


def _module(name: str) -> str:
    """Original Wan name of a module that an adapter names."""
    short = strip(name)
    return from_diffusers(short) or short  # no original Wan name is also one of diffusers
