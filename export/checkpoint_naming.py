"""Names of a backbone's weights: original Wan, diffusers, training containers.

Everything is turned into the original Wan names, which `CausalWanModel` uses.
"""

from __future__ import annotations

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
AVERAGED = ("generator_ema", "model_ema", "ema")
"""Keys of a torch file below which averaged weights may lie."""
DEEPEST = 8
"""Containers within each other."""
CONTAINERS = ("generator", "generator_lora", "state_dict", "model", "lora", "module")
"""Keys of a torch file below which other tensors may lie; the first of them counts."""

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


def unwrap(content: Any, source: str, ema: bool | None, depth: int = 0) -> tuple[State, str]:
    """Tensors of a file's content, and the container they were in ('' for none).

    content: a mapping of tensors, or of containers, as training writes them, with what else it notes beside them. ema:
    True takes the averaged weights (`generator_ema` or another of AVERAGED), False those that training goes on with or
    that are in no container, None the averaged ones where there are any.
    depth: of containers around this one.
    Raises CheckpointError where there are no tensors, not the container asked for, or two to choose from.
    """
    if depth > DEEPEST:  # or one holds itself
        raise CheckpointError(
            f"{source} has more than {DEEPEST} containers within each other; save the tensors alone"
        )
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, not named tensors; use a state dict"
        )
    content = _grouped(content)
    averaged = [name for name in AVERAGED if _holds_tensors(content.get(name))]
    plain = [name for name in CONTAINERS if _holds_tensors(content.get(name))]
    if len(averaged) > 1 and ema is not False:
        raise CheckpointError(f"{source} has averaged weights in {listed(averaged)}; keep one of them")
    if averaged or "generator" in plain:
        names = averaged if ema or (ema is None and averaged) else plain
        if not names:
            wanted = "generator_ema" if ema else "generator"
            raise CheckpointError(
                f"{source} has no {wanted}, only {listed(averaged or plain)}; ask for that one"
            )
        inner, path = unwrap(content[names[0]], source, None, depth + 1)
        return inner, f"{names[0]}.{path}".rstrip(".")
    if plain:
        inner, path = unwrap(content[plain[0]], source, ema, depth + 1)
        return inner, f"{plain[0]}.{path}".rstrip(".")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and ema:
        raise CheckpointError(
            f"{source} has no averaged weights (containers looked for: {', '.join(AVERAGED)}); leave ema out to take "
            "those that it has"
        )
    if tensors:
        return tensors, ""
    keys = listed(str(key) for key in content) or "nothing"
    raise CheckpointError(
        f"{source} has no tensors; it holds {keys}. Save them alone, or below one of: "
        f"{', '.join((*CONTAINERS, *AVERAGED))}"
    )


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a container of tensors, at any depth. Each is looked at once: one may hold itself."""
    waiting, seen = [value], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Mapping) and id(item) not in seen:
            seen.add(id(item))
            if any(isinstance(inner, Tensor) for inner in item.values()):
                return True
            waiting.extend(item.values())
    return False


def _grouped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flat keys such as `model_ema.x` and `model.x` (safetensors) as containers, where one tells them apart."""
    groups: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        container, _, rest = str(key).partition(".")
        if container in (*CONTAINERS, *AVERAGED) and rest:
            groups.setdefault(container, {})[rest] = value
    averaged = any(recognise(map(strip, groups.get(name, ()))) for name in AVERAGED)  # not its decay alone
    return groups if averaged or "generator" in groups else content


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
            f"{source}: neither the original Wan nor the diffusers naming is recognised in its {len(state)} keys: "
            f"{listed(state)}; rename them to one of these, such as blocks.0.self_attn.q.weight with nothing before it"
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
    shapes = {key: value.shape for key, value in named.state.items()}
    problems = misfit(
        [key for key in expected if key not in shapes],
        [key for key in shapes if key not in expected] + list(named.unknown),
        wrong_shapes(shapes, expected),
    )
    if problems:
        raise CheckpointError(
            f"{source} ({named.found}) does not fit the backbone: {problems}. "
            "Use the weights of this architecture, or correct the config"
        )


def wrong_shapes(shapes: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> list[str]:
    """Of the weights that are expected and there, those that have another shape, with both shapes."""
    return [
        f"{key} is {tuple(shapes[key])} and should be {tuple(shape)}"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]


def misfit(missing: Iterable[str], surplus: Iterable[str], wrong: Iterable[str]) -> str:
    """How weights do not fit, for messages; empty where they do."""
    kinds = {"missing": list(missing), "surplus": list(surplus), "of the wrong shape": list(wrong)}
    return "; ".join(f"{len(keys)} {title}: {listed(keys)}" for title, keys in kinds.items() if keys)
