"""Reads checkpoints: a backbone in any of its namings, or a whole folder as diffusers writes them.

    backbone = load_backbone("self_forcing.pt", PRESETS["wan2.1-t2v-1.3b"], lora="adapter.safetensors")
    checkpoint = load_checkpoint("Wan2.1-T2V-1.3B-Diffusers", backbone="longlive.pt")

A folder holds transformer/, vae/, text_encoder/, tokenizer.json (or tokenizer/tokenizer.json) and, optionally,
model.json with the sizes and settings to suggest (`ModelInfo`). `read_outline` reads the JSON files alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer

from swiftvideo.runtime.errors import BundleError, CheckpointError, SettingsError
from swiftvideo.runtime.geometry import Geometry
from swiftvideo.runtime.tokenizer import PromptTokenizer

from . import checkpoint_naming as naming
from .checkpoint_files import (
    check_dense,
    check_finite,
    check_floating,
    digest,
    find_weights,
    read_json,
    read_weights,
)
from .checkpoint_parts import check_dtype, load_text_encoder, load_vae, reading
from .lora import merge_lora, read_adapter
from .model_info import ModelInfo, plain_name
from .models.backbone import BackboneConfig, CausalWanModel
from .models.schedule import Schedule
from .models.text import TextEncoder
from .models.vae import StreamingDecoder

MAX_SIZE = 8192
"""Pixels of a video's side, more than any model's."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a checkpoint is by its small files alone, before any weights are read."""

    info: ModelInfo
    config: BackboneConfig
    temporal_stride: int
    """Video frames that the VAE makes of a latent one."""
    spatial_stride: int

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        """Geometry at a size in pixels, the checkpoint's own by default. Raises SettingsError for a wrong size."""
        info, stride = self.info, self.spatial_stride
        height = info.height if height is None else height
        width = info.width if width is None else width
        for name, size, patch in (
            ("height", height, self.config.patch[1]),
            ("width", width, self.config.patch[2]),
        ):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % (stride * patch):
                raise SettingsError(
                    f"{name} is {size!r} pixels: a positive multiple of {stride * patch} is needed, the VAE's stride "
                    f"{stride} times the backbone's patch {patch}"
                )
            if size > MAX_SIZE:
                raise SettingsError(f"{name} is {size} pixels: use at most {MAX_SIZE}")
        return self.config.geometry(
            height // stride,
            width // stride,
            window=info.window,
            sink=info.sink,
            chunk=info.chunk,
            max_anchors=info.max_anchors,
            temporal_stride=self.temporal_stride,
            spatial_stride=stride,
            fps=info.fps,
            steps=len(info.steps),
        )


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
        return self.info.schedule

    def geometry(self, height: int | None = None, width: int | None = None) -> Geometry:
        """See `Outline.geometry`."""
        vae = self.vae
        outline = Outline(self.info, self.backbone.config, vae.temporal_stride, vae.spatial_stride)
        return outline.geometry(height, width)


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
    except (SettingsError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{source}: {error}; use the config.json of the weights") from error


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
    lora: an adapter file, or a folder as peft or diffusers writes it, merged into the weights; lora_alpha: else that
    of its tensors or settings, else the rank (`merge_lora`). ema: True for averaged weights (generator_ema, model_ema
    or ema), False for the others, None for the averaged ones where there are any. dtype: of the weights, None keeps the
    file's. text_len: see `parse_config`.
    Raises CheckpointError, also where there are no averaged weights and ema is True; SettingsError for a dtype or a
    lora_alpha that cannot be.
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
    if dtype is not None:
        check_dtype(dtype)
    if lora_alpha is not None and (lora is None or not math.isfinite(lora_alpha)):
        remedy = "use a finite number" if lora else "give the lora that it is of, too"
        raise SettingsError(f"lora_alpha is {lora_alpha}: {remedy}")
    files = find_weights(path)
    if config is None:
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if not beside.is_file():
            raise CheckpointError(f"{path} has no config.json beside it; pass a config, such as a preset")
        config = parse_config(read_json(beside), str(beside), text_len)
        files.append(beside)
    tensors, container = naming.unwrap(read_weights(path), str(path), ema)
    check_dense(tensors, path)
    named = naming.to_wan(tensors, str(path), container)
    with torch.device("meta"):
        model = CausalWanModel(config)
    naming.check(named, {key: value.shape for key, value in model.state_dict().items()}, str(path))
    check_floating({key: value.dtype for key, value in named.state.items()}, path)
    state, kind, source = named.state, f"{named.found}, {files[0].name}", str(path)
    if lora is not None:
        adapter = read_adapter(Path(lora))
        state = merge_lora(state, adapter.state, str(lora), lora_alpha, adapter.config)
        files += adapter.files
        alpha = adapter.alpha if lora_alpha is None else lora_alpha
        kind += f" with LoRA {adapter.files[0].name}, alpha {alpha}"
        source += f" with LoRA {lora}, alpha {alpha}"
    state = {key: value.to(dtype or value.dtype).contiguous() for key, value in state.items()}
    check_finite(state, source)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), kind, files


def read_outline(folder: str | Path) -> Outline:
    """The outline of a checkpoint folder, read from its JSON files. Raises CheckpointError where one does not fit."""
    root = Path(folder)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a folder; give one with transformer/, vae/ and text_encoder/")
    _refuse_other_layouts(root)
    model_json = root / "model.json"
    content = read_json(model_json) if model_json.is_file() else {}
    info = ModelInfo.parse({"name": plain_name(root.resolve().name)} | content, str(model_json))
    config_file, vae_file = root / "transformer" / "config.json", root / "vae" / "config.json"
    config = parse_config(read_json(config_file), str(config_file), info.text_len)
    if content and config.text_len != info.text_len:
        raise CheckpointError(
            f"text_len is {info.text_len} in {model_json} and {config.text_len} in {config_file}; make them agree"
        )
    settings = read_json(vae_file)
    with reading(AutoencoderKLWan, vae_file.parent), torch.device("meta"):
        vae = AutoencoderKLWan.from_config(settings)
    decoder = StreamingDecoder(vae, info.latents_mean, info.latents_std)
    if decoder.latent_channels != config.in_channels:
        raise CheckpointError(
            f"{root}: vae: latent channels {decoder.latent_channels}, but the backbone takes {config.in_channels}; use "
            "the parts of one model"
        )
    return Outline(info, config, decoder.temporal_stride, decoder.spatial_stride)


def _refuse_other_layouts(root: Path) -> None:
    """Raise CheckpointError for the original Wan's folders, and for a second backbone, which would be left out."""
    if not (root / "transformer").exists() and (root / "config.json").is_file():
        raise CheckpointError(
            f"{root} is laid out as the original Wan publishes it, without transformer/, vae/ and text_encoder/: give "
            f"the model's folder for diffusers (its name ends in -Diffusers), and these weights with --backbone {root}"
        )
    index = root / "model_index.json"
    listed = read_json(index) if index.is_file() else {}
    second = [str(root / "transformer_2")] if (root / "transformer_2").exists() else []
    if listed.get("boundary_ratio") is not None:
        second.append(f"boundary_ratio {listed['boundary_ratio']!r} in {index}")
    if second:
        raise CheckpointError(
            f"{' and '.join(second)}: a second backbone for part of the noise levels, as Wan2.2-A14B has, is not "
            "supported; use a model of one transformer, such as Wan2.1-T2V-1.3B or one distilled from it"
        )


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
    Raises CheckpointError where a part is missing or does not fit the others, SettingsError as `load_backbone`.
    """
    outline, root = read_outline(folder), Path(folder)
    info, config = outline.info, outline.config
    tokenizer = next(
        (p for p in (root / "tokenizer.json", root / "tokenizer" / "tokenizer.json") if p.is_file()), None
    )
    if tokenizer is None:
        raise CheckpointError(
            f"{root} has neither tokenizer.json nor tokenizer/tokenizer.json; copy the tokenizer there"
        )
    words = _largest_token(tokenizer, config.text_len)
    source = Path(backbone) if backbone else root / "transformer"
    model, kind, files = _load_backbone(source, config, lora, lora_alpha, ema, dtype, None)
    text_encoder = load_text_encoder(root / "text_encoder", dtype)
    vae = load_vae(root / "vae", info, dtype)
    if text_encoder.text_dim != config.text_dim:
        raise CheckpointError(
            f"{root}: text_encoder: width {text_encoder.text_dim}, but the backbone takes {config.text_dim}; use the "
            "parts of one model"
        )
    if words >= text_encoder.vocabulary:
        raise CheckpointError(
            f"{tokenizer} has the token {words}, and the text encoder knows {text_encoder.vocabulary} tokens; use the "
            "tokenizer of this text encoder"
        )
    files += [root / "transformer" / "config.json", tokenizer]
    files += [file for file in (root / "model.json",) if file.is_file()]
    for name in ("text_encoder", "vae"):
        files += [*find_weights(root / name), root / name / "config.json"]
    return Checkpoint(kind, model, text_encoder, vae, tokenizer.read_bytes(), info, digest(files, root))


def _largest_token(file: Path, text_len: int) -> int:
    """The largest token id of a tokenizer.json that the runtime can open."""
    content = file.read_bytes()
    try:
        PromptTokenizer(content, text_len)
    except BundleError as error:
        raise CheckpointError(f"{file} is no tokenizer that can be used ({error}); copy it again") from error
    vocabulary: dict[str, int] = Tokenizer.from_str(content.decode()).get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=0)
