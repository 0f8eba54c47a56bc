"""Reads checkpoints: a backbone in any of its namings, or a whole folder as diffusers writes them.

    backbone = load_backbone("self_forcing.pt", PRESETS["wan2.1-t2v-1.3b"], lora="adapter.safetensors")
    checkpoint = load_checkpoint("Wan2.1-T2V-1.3B-Diffusers", backbone="longlive.pt")

A folder holds transformer/, vae/, text_encoder/, tokenizer.json (or tokenizer/tokenizer.json) and, optionally,
model.json with the sizes and settings to suggest (`ModelInfo`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel
from transformers.utils import logging

from swiftvideo.runtime.errors import CheckpointError, SettingsError
from swiftvideo.runtime.geometry import (
    AnchorSettings,
    BridgeSettings,
    Geometry,
    PolicySettings,
    WindowSettings,
)

from . import checkpoint_naming as naming
from .checkpoint_files import digest, find_weights, read_json, read_weights
from .models.backbone import BackboneConfig, CausalWanModel
from .models.schedule import DENOISING_INDICES, Schedule
from .models.text import TextEncoder
from .models.vae import StreamingDecoder


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """model.json: sizes in pixels, frames of the memory and steps, with the published model's as defaults."""

    name: str = "wan2.1-t2v-1.3b"
    height: int = 480
    width: int = 832
    fps: int = 16
    text_len: int = 512
    window: int = 12
    sink: int = 3
    chunk: int = 3
    max_anchors: int = 4
    shift: float = 5.0
    context_noise: float = 0.0
    steps: tuple[int, ...] = DENOISING_INDICES
    """Indices of the denoising steps, 1..1000, falling."""
    latents_mean: tuple[float, ...] | None = None
    """Per channel; None takes the VAE's config."""
    latents_std: tuple[float, ...] | None = None
    policy: PolicySettings = field(default_factory=PolicySettings)

    @classmethod
    def parse(cls, content: Mapping[str, Any], source: str) -> ModelInfo:
        """From model.json's content. Raises CheckpointError for unknown keys and values out of range."""
        values = _known(cls, content, source)
        for key in ("steps", "latents_mean", "latents_std"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        try:
            if "policy" in values:
                values["policy"] = _policy(values["policy"], source)
            info = cls(**values)
            Schedule(info.shift, info.steps, info.context_noise)
        except (SettingsError, TypeError) as error:
            raise CheckpointError(f"{source}: {error}") from error
        return info


def _known(cls: type, content: Any, source: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source}: {content!r} where an object is needed")
    known = {item.name for item in dataclasses.fields(cls)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise CheckpointError(
            f"{source}: unknown keys {naming.listed(unknown)}; known are {', '.join(sorted(known))}"
        )
    return dict(content)


def _policy(content: Any, source: str) -> PolicySettings:
    values = _known(PolicySettings, content, f"{source}: policy")
    groups = {"bridge": BridgeSettings, "window": WindowSettings, "anchors": AnchorSettings}
    for name, group in groups.items():
        if name in values:
            values[name] = group(**_known(group, values[name], f"{source}: policy.{name}"))
    return PolicySettings(**values)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything that a bundle is made of."""

    kind: str
    """How the backbone's weights were named and contained."""
    backbone: CausalWanModel
    text_encoder: TextEncoder
    vae: StreamingDecoder
    tokenizer: bytes
    """Content of tokenizer.json."""
    info: ModelInfo
    sha256: str
    """Of all files read, with their names."""

    @property
    def latents_mean(self) -> torch.Tensor:
        """float32 [C]: what the VAE's latents are less when normalised."""
        return self.vae.latents_mean

    @property
    def latents_std(self) -> torch.Tensor:
        """float32 [C]: what the VAE's latents are divided by when normalised."""
        return self.vae.latents_std

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return Schedule(self.info.shift, self.info.steps, self.info.context_noise)

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        """Geometry at a size in pixels, the checkpoint's own by default. Raises SettingsError for a wrong size."""
        stride, info = self.vae.spatial_stride, self.info
        height, width = height or info.height, width or info.width
        if height % stride or width % stride:
            raise SettingsError(
                f"{width}x{height} pixels: both must be multiples of the VAE's stride, {stride}"
            )
        return self.backbone.config.geometry(
            height // stride,
            width // stride,
            window=info.window,
            sink=info.sink,
            chunk=info.chunk,
            max_anchors=info.max_anchors,
            temporal_stride=self.vae.temporal_stride,
            spatial_stride=stride,
            fps=info.fps,
            steps=len(info.steps),
        )


def parse_config(content: Mapping[str, Any], source: str, text_len: int | None = None) -> BackboneConfig:
    """A BackboneConfig from a transformer's config.json, of diffusers or of the original Wan.

    text_len: for diffusers configs, which do not hold it (512 by default).
    Raises CheckpointError for what this backbone cannot do (image conditioning, other norms) and missing keys.
    """
    theirs = "attention_head_dim" in content
    expected: dict[str, Any] = {
        "qk_norm": "rms_norm_across_heads" if theirs else True,
        "cross_attn_norm": True,
    }
    expected |= {"image_dim": None, "added_kv_proj_dim": None, "model_type": "t2v"}
    for key, value in expected.items():
        if content.get(key, value) != value:
            raise CheckpointError(f"{source}: {key} is {content[key]!r}; only {value!r} is supported")
    try:
        heads = int(content["num_attention_heads" if theirs else "num_heads"])
        return BackboneConfig(
            dim=heads * int(content["attention_head_dim"]) if theirs else int(content["dim"]),
            ffn_dim=int(content["ffn_dim"]),
            num_heads=heads,
            num_layers=int(content["num_layers"]),
            text_dim=int(content.get("text_dim", 4096)),
            text_len=int(content.get("text_len") or text_len or 512),
            in_channels=int(content.get("in_channels" if theirs else "in_dim", 16)),
            out_channels=int(content.get("out_channels" if theirs else "out_dim", 16)),
            patch=tuple(content.get("patch_size", (1, 2, 2))),
            freq_dim=int(content.get("freq_dim", 256)),
            eps=float(content.get("eps", 1e-6)),
        )
    except KeyError as error:
        raise CheckpointError(f"{source} lacks {error}; use the config.json of the weights") from error
    except (SettingsError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def load_backbone(
    path: str | Path,
    config: BackboneConfig | None = None,
    *,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    ema: bool | None = None,
    dtype: torch.dtype | None = torch.float32,
    text_len: int | None = None,
) -> CausalWanModel:
    """A backbone from a file or folder, in evaluation mode and without gradients.

    path: safetensors, shards with an index, a torch file, or a folder that holds one of them; original Wan or
    diffusers names, with or without prefixes and containers. config: else read from config.json beside the weights.
    lora: an adapter file, or a folder as peft writes it, merged into the weights; lora_alpha: else its
    adapter_config.json, else the rank. ema: True for generator_ema, False for generator, None for the averaged
    weights where there are any. dtype: of the weights, None keeps the file's. text_len: see `parse_config`.
    Raises CheckpointError.
    """
    return _load_backbone(Path(path), config, lora, lora_alpha, ema, dtype, text_len)[0]


def _load_backbone(
    path: Path,
    config: BackboneConfig | None,
    lora: str | Path | None,
    lora_alpha: float | None,
    ema: bool | None,
    dtype: torch.dtype | None,
    text_len: int | None,
) -> tuple[CausalWanModel, str, list[Path]]:
    files = find_weights(path)
    if config is None:
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if not beside.is_file():
            raise CheckpointError(f"{path} has no config.json beside it; pass a config, such as a preset")
        config = parse_config(read_json(beside), str(beside), text_len)
        files.append(beside)
    tensors, container = naming.unwrap(read_weights(path), str(path), ema)
    named = naming.to_wan(tensors, str(path), container)
    with torch.device("meta"):
        model = CausalWanModel(config)
    naming.check(named, {key: value.shape for key, value in model.state_dict().items()}, str(path))
    state, kind = named.state, named.found
    if lora is not None:
        state, read = _merge(state, Path(lora), lora_alpha)
        files += read
        kind += " with LoRA"
    state = {key: value.to(dtype or value.dtype).contiguous() for key, value in state.items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), kind, files


def _merge(state: naming.State, lora: Path, alpha: float | None) -> tuple[naming.State, list[Path]]:
    files = find_weights(lora)
    config_file = (lora if lora.is_dir() else lora.parent) / "adapter_config.json"
    config = None
    if config_file.is_file():
        config = read_json(config_file)
        files.append(config_file)
    adapter, _ = naming.unwrap(read_weights(lora), str(lora), None)
    return naming.merge_lora(state, adapter, str(lora), alpha, config), files


def load_vae(
    folder: str | Path, info: ModelInfo | None = None, dtype: torch.dtype = torch.float32
) -> StreamingDecoder:
    """The decoder of a diffusers VAE folder. Raises CheckpointError."""
    vae = _pretrained(AutoencoderKLWan, Path(folder), dtype)
    info = info or ModelInfo()
    return StreamingDecoder(vae, info.latents_mean, info.latents_std)


def load_text_encoder(folder: str | Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The encoder of a transformers UMT5 folder; a decoder in the same files is left alone. Raises CheckpointError."""
    return TextEncoder(_pretrained(UMT5EncoderModel, Path(folder), dtype))


def _pretrained(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    find_weights(folder)
    read_json(folder / "config.json")
    keyword = "dtype" if cls is UMT5EncoderModel else "torch_dtype"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = cls.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **{keyword: dtype}
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be read as {cls.__name__}: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    surplus = [key for key in report["unexpected_keys"] if not key.startswith(("decoder.", "lm_head."))]
    if cls is AutoencoderKLWan:
        surplus = list(report["unexpected_keys"])
    problems = [
        f"{len(keys)} {title}: {naming.listed(sorted(map(str, keys)))}"
        for title, keys in (
            ("missing", report["missing_keys"]),
            ("surplus", surplus),
            ("of the wrong shape", report["mismatched_keys"]),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not fit {cls.__name__}: {'; '.join(problems)}. Use its own config.json"
        )
    return model.eval().requires_grad_(False)


def load_checkpoint(
    folder: str | Path,
    *,
    backbone: str | Path | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    ema: bool | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """A whole checkpoint folder (see the module's docstring).

    backbone: weights to use instead of those in transformer/, such as a Self-Forcing or LongLive file; its config.json
    is then transformer/config.json. dtype: of all weights. The other arguments are `load_backbone`'s.
    Raises CheckpointError where a part is missing or does not fit the others.
    """
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder; give one with transformer/, vae/ and text_encoder/")
    model_json = root / "model.json"
    info = ModelInfo(name=root.resolve().name)
    if model_json.is_file():
        info = ModelInfo.parse(read_json(model_json), str(model_json))
    tokenizer = next(
        (p for p in (root / "tokenizer.json", root / "tokenizer" / "tokenizer.json") if p.is_file()), None
    )
    if tokenizer is None:
        raise CheckpointError(
            f"{root} has neither tokenizer.json nor tokenizer/tokenizer.json; copy the tokenizer there"
        )
    config_file = root / "transformer" / "config.json"
    config = parse_config(read_json(config_file), str(config_file), info.text_len)
    if model_json.is_file() and config.text_len != info.text_len:
        raise CheckpointError(
            f"text_len is {info.text_len} in {model_json} and {config.text_len} in {config_file}; make them agree"
        )
    source = Path(backbone) if backbone else root / "transformer"
    model, kind, files = _load_backbone(source, config, lora, lora_alpha, ema, dtype, None)
    text_encoder = load_text_encoder(root / "text_encoder", dtype)
    vae = load_vae(root / "vae", info, dtype)
    for part, theirs, ours in (
        ("text_encoder: width", text_encoder.text_dim, config.text_dim),
        ("vae: latent channels", vae.latent_channels, config.in_channels),
    ):
        if theirs != ours:
            raise CheckpointError(
                f"{root}: {part} {theirs}, but the backbone takes {ours}; use the parts of one model"
            )
    files += [config_file, tokenizer, *([model_json] if model_json.is_file() else [])]
    for name in ("text_encoder", "vae"):
        files += [*find_weights(root / name), root / name / "config.json"]
    return Checkpoint(kind, model, text_encoder, vae, tokenizer.read_bytes(), info, digest(files, root))
