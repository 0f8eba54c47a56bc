"""Whole checkpoint folders: what a bundle is made of, and what is said where a part does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from swiftvideo.export.checkpoint import load_checkpoint, read_outline
from swiftvideo.export.checkpoint_parts import load_text_encoder
from swiftvideo.export.random import word_tokenizer
from swiftvideo.runtime.errors import CheckpointError, SettingsError

from .wan import WAN_JSON, State, prefixed, random_state, same


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


@pytest.fixture
def folder(state: State, tmp_path: Path) -> Path:
    """A whole checkpoint of the embedded model's layout."""
    root = tmp_path / "checkpoint"
    (root / "transformer").mkdir(parents=True)
    save_file(state, root / "transformer" / "diffusion_pytorch_model.safetensors")
    (root / "transformer" / "config.json").write_text(json.dumps(WAN_JSON))
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    vae.save_pretrained(root / "vae")
    UMT5EncoderModel(
        UMT5Config(vocab_size=9, d_model=24, d_kv=8, num_heads=3, d_ff=32, num_layers=1)
    ).save_pretrained(root / "text_encoder")
    (root / "tokenizer.json").write_bytes(word_tokenizer(6))
    info = {
        "name": "tiny",
        "height": 16,
        "width": 24,
        "fps": 12,
        "text_len": 8,
        "steps": [1000, 500],
        "latents_std": [2.0] * 4,
        "policy": {"policy": "swift", "window": {"min_size": 5}},
    }
    (root / "model.json").write_text(json.dumps(info))
    return root


def test_the_canonical_name_counts_beside_a_variant(state: State, folder: Path, tmp_path: Path) -> None:
    half = {key: value.half() + 1 for key, value in state.items()}
    save_file(half, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    (folder / "text_encoder" / "model.fp16.safetensors.index.json").write_bytes(b"not read")
    same(load_checkpoint(folder).backbone, state)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(
        folder / "transformer" / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match="name the file itself"):
        load_checkpoint(folder)


PARTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_are_no_numbers_are_refused(folder: Path, part: str) -> None:
    file = folder / PARTS[part]
    good = load_file(file)
    name = next(key for key, value in good.items() if value.ndim == 2 or part == "vae")

    def refused(value: torch.Tensor, match: str, **options: Any) -> None:
        save_file({**good, name: value.contiguous()}, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder, **options)

    for bad in (float("nan"), float("inf"), -float("inf")):
        value = good[name].clone()
        value.view(-1)[1] = bad
        refused(value, "has values that are not finite in torch.float32; copy the file again")
    value = good[name].clone()
    value.view(-1)[1] = 1e9
    refused(value, "not finite in torch.float16; use bf16 or fp32", dtype=torch.float16)
    refused(good[name].to(torch.int8), "and quantised weights are not supported; use the fp32 or bf16 file")


def drop(state: State) -> None:
    del state[min(state)]


def add(state: State) -> None:
    state["odd.weight"] = torch.zeros(3)


def widen(state: State) -> None:
    name = next(key for key, value in sorted(state.items()) if value.ndim in (2, 5))
    state[name] = torch.cat([state[name], state[name]], -1)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"1 missing: \w+\.\S+\. Use"),
        (add, r"1 surplus: odd\.weight\. Use"),
        (widen, r"1 of the wrong shape: \S+ is \(.*\) and should be \(.*\)\. Use"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_what_does_not_fit_is_said_once_and_by_us(
    folder: Path, part: str, change: Callable[[State], None], message: str, said: list[str]
) -> None:
    """Both libraries would write a report of their own on stderr; they do again afterwards."""
    levels = [logger.get_verbosity() for logger in (transformers_logging, diffusers_logging)]
    weights = load_file(folder / PARTS[part])
    change(weights)
    save_file(weights, folder / PARTS[part], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{part} does not fit \w+: {message}"):
        load_checkpoint(folder)
    assert said == []
    assert levels == [logger.get_verbosity() for logger in (transformers_logging, diffusers_logging)]
    assert transformers_logging.is_progress_bar_enabled() and diffusers_logging.is_progress_bar_enabled()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_weights_under_another_name_are_said_with_what_to_do(folder: Path, part: str) -> None:
    file = folder / PARTS[part]

    def refused(match: str) -> None:
        with pytest.raises(
            CheckpointError, match=rf"{part} has no {file.name}, which alone is read there, but {match}"
        ):
            load_checkpoint(folder)

    variant = file.rename(file.with_name(file.name.replace(".", ".fp16.", 1)))
    refused(rf"{variant.name}: rename {variant.name} to {file.name}$")
    shards = [file.with_name(f"{file.stem}.fp16-0000{i}-of-00002.safetensors") for i in (1, 2)]
    index = file.with_name(f"{file.name}.index.fp16.json")
    for path in (*shards, index):
        path.write_text("")
    variant.unlink()
    refused(rf".*: rename {index.name} to {file.name}.index.json$")
    for path in (*shards, index):
        path.unlink()
    refused("no weights: copy")
    (folder / part / "pytorch_model.bin").write_bytes(b"")
    refused(r"pytorch_model.bin: write it with \w+\.from_pretrained\(\.\.\.\)\.save_pretrained")


def sharded(folder: Path, part: str) -> Path:
    """Store a part in two shards; the second of them."""
    file, model = folder / PARTS[part], folder / part
    weights = load_file(file)
    first = set(sorted(weights)[::2])
    names = [f"{file.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[key not in first] for key in weights}
    for name in names:
        save_file(
            {k: v for k, v in weights.items() if where[k] == name}, model / name, metadata={"format": "pt"}
        )
    size = sum(value.nbytes for value in weights.values())
    content = {"metadata": {"total_size": size}, "weight_map": where}
    (model / f"{file.name}.index.json").write_text(json.dumps(content))
    file.unlink()
    return model / names[1]


@pytest.mark.parametrize("part", PARTS)
def test_shards_are_read_in_silence_and_a_missing_one_is_said(
    folder: Path, part: str, capfd: pytest.CaptureFixture[str]
) -> None:
    last = sharded(folder, part)
    load_checkpoint(folder)
    assert capfd.readouterr().err == ""
    last.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{last.name} is missing, but \S+ lists it; download the shard"
    ):
        load_checkpoint(folder)


def test_a_second_backbone_is_refused(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps({"boundary_ratio": None, "transformer_2": [None, None]}))
    read_outline(folder)  # as diffusers writes it for one
    index.write_text(json.dumps({"boundary_ratio": 0.875}))
    with pytest.raises(
        CheckpointError, match=r"boundary_ratio 0\.875 in \S+: a second backbone .* is not supported; use"
    ):
        read_outline(folder)
    index.unlink()
    (folder / "transformer_2").mkdir()
    with pytest.raises(CheckpointError, match=r"transformer_2: a second backbone .* is not supported; use"):
        read_outline(folder)


def test_the_original_wans_layout_is_said(folder: Path, state: State, tmp_path: Path) -> None:
    original = tmp_path / "Wan2.1-T2V-1.3B"
    (folder / "transformer").rename(original)
    torch.save({}, original / "Wan2.1_VAE.pth")
    with pytest.raises(
        CheckpointError, match=rf"the original Wan .*-Diffusers.* with --backbone {original}$"
    ):
        load_checkpoint(original)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(WAN_JSON))
    same(load_checkpoint(folder, backbone=original).backbone, state)


@pytest.mark.parametrize("part", PARTS)
def test_a_file_cut_short_is_said(folder: Path, part: str) -> None:
    file = folder / PARTS[part]
    for size in (0, 10, file.stat().st_size // 2):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(CheckpointError, match=f"{file.name} cannot be read; it may be cut short"):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vae", {"latents_std": None}),
        ("vae", {"latents_mean": [0.0] * 3 + ["x"]}),
        ("vae", {"latents_std": [1.0, 1.0, 1.0, float("nan")]}),
        ("vae", {"dim_mult": "x"}),
        ("vae", {"z_dim": None}),
        ("text_encoder", {"d_kv": None}),
        ("text_encoder", {"num_layers": "x"}),
        ("text_encoder", {"num_layers": 10**9}),
        ("transformer", {"num_layers": 10**9}),
        ("transformer", {"num_attention_heads": None, "attention_head_dim": 3}),
        ("transformer", {"patch_size": [1, 2.0, 2]}),
        ("transformer", {"patch_size": [1, 2]}),
        ("transformer", {"patch_size": [1, 0, 2]}),
        ("transformer", {"eps": float("nan")}),
        ("transformer", {"eps": -1e-6}),
        ("transformer", {"ffn_dim": float("inf")}),
    ],
)
def test_odd_settings_of_a_part_are_said(folder: Path, part: str, change: dict[str, Any]) -> None:
    (folder / "model.json").write_text(json.dumps({"text_len": 8}))
    config = folder / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"config\.json|latents_"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "somebody/code"},
        {"_attn_implementation": "somebody/code"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"dtype": "nonsense"},
    ],
)
def test_settings_that_name_code_are_not_followed(folder: Path, change: dict[str, Any]) -> None:
    """transformers would fetch an implementation of attention from its hub and run it, where `kernels` is installed."""
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert load_text_encoder(folder / "text_encoder").encoder.config._attn_implementation != "somebody/code"


@pytest.mark.parametrize("part", PARTS)
def test_a_config_nested_without_end_is_said(folder: Path, part: str) -> None:
    (folder / part / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=rf"{part}\S+ is not JSON: .*; copy it again"):
        load_checkpoint(folder)


def test_a_whole_folder(state: State, folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    same(checkpoint.backbone, state)
    assert checkpoint.kind == "original Wan naming, diffusion_pytorch_model.safetensors"
    assert checkpoint.tokenizer == word_tokenizer(6)
    assert checkpoint.latents_mean.tolist() == [0.0] * 4 and checkpoint.latents_std.tolist() == [2.0] * 4
    assert checkpoint.info.policy.window.min_size == 5
    assert len(checkpoint.schedule.steps) == 2
    geometry = checkpoint.geometry()
    assert (geometry.height, geometry.width, geometry.fps, geometry.steps) == (16, 24, 12, 2)
    assert (geometry.temporal_stride, geometry.spatial_stride, geometry.text_dim) == (2, 2, 24)
    assert checkpoint.geometry(32, 32).latent_width == 16
    assert load_checkpoint(folder).sha256 == checkpoint.sha256
    (folder / "tokenizer.json").write_bytes(word_tokenizer(5))
    assert load_checkpoint(folder).sha256 != checkpoint.sha256


def test_another_backbone_in_the_same_folder(state: State, folder: Path, tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"generator_ema": prefixed(other, "model.")}, tmp_path / "other.pt")
    checkpoint = load_checkpoint(folder, backbone=tmp_path / "other.pt", dtype=torch.bfloat16)
    same(checkpoint.backbone, {key: value.bfloat16() for key, value in other.items()})
    assert "container generator_ema" in checkpoint.kind
    assert checkpoint.vae.dtype == torch.bfloat16 == next(checkpoint.text_encoder.parameters()).dtype


def test_the_alpha_that_was_used_is_recorded(folder: Path, tmp_path: Path) -> None:
    key, lora = "blocks.0.self_attn.q", tmp_path / "lora.safetensors"
    adapter = {f"{key}.lora_A.weight": torch.ones(2, 36), f"{key}.lora_B.weight": torch.ones(36, 2)}
    save_file(adapter, lora, metadata={"lora_adapter_metadata": '{"lora_alpha": 3}'})
    assert load_checkpoint(folder, lora=lora).kind.endswith("with LoRA lora.safetensors, alpha 3")
    save_file({**adapter, f"{key}.alpha": torch.tensor(8)}, lora)
    assert load_checkpoint(folder, lora=lora).kind.endswith("alpha its own")
    assert load_checkpoint(folder, lora=lora, lora_alpha=2.0).kind.endswith("alpha 2.0")


def test_a_folder_of_diffusers_without_model_json(state: State, folder: Path) -> None:
    (folder / "model.json").unlink()
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer.json").rename(folder / "tokenizer" / "tokenizer.json")
    checkpoint = load_checkpoint(folder)
    assert checkpoint.info.name == "checkpoint" and checkpoint.info.steps == (1000, 750, 500, 250)


def test_a_model_without_a_name_has_its_folders(folder: Path) -> None:
    info = json.loads((folder / "model.json").read_text())
    del info["name"]
    (folder / "model.json").write_text(json.dumps(info))
    named = folder.rename(folder.with_name("my model/é".replace("/", ":")))
    assert load_checkpoint(named).info.name == "my_model_é"


def test_the_outline_reads_no_weights(folder: Path) -> None:
    expected = load_checkpoint(folder).geometry(32, 32)
    for file in PARTS.values():
        (folder / file).unlink()
    outline = read_outline(folder)
    assert outline.geometry(32, 32) == expected
    sizes: list[Any] = [0, -4, 34, 33, 32.0, "32"]  # 34: of the VAE's stride, not of the patch
    for size in sizes:
        with pytest.raises(
            SettingsError, match=f"height is {size!r} pixels: a positive multiple of 4 is needed"
        ):
            outline.geometry(size)
    with pytest.raises(SettingsError, match="height is 1000000000000 pixels: use at most 8192"):
        outline.geometry(10**12)


def test_incomplete_or_contradictory_folders_are_refused(folder: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder)

    info = json.loads((folder / "model.json").read_text())
    for change, match in (
        ({"tempo": 3}, r"model\.json: unknown keys 'tempo'; known are chunk, "),
        ({"policy": {"windw": 3}}, r"model\.json: policy: unknown keys 'windw'"),
        ({"policy": {"policy": "none"}}, "policy is 'none'"),
        ({"steps": [0]}, "denoising indices"),
        ({"text_len": 9}, "text_len is 9"),
        ({"steps": [1000, 500.5]}, r"steps\[1\] is 500\.5, which is no int"),
        ({"steps": 4}, "steps is 4"),
        ({"fps": "12"}, "fps is '12'"),
        ({"height": True}, "height is True"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"context_noise": -1.0}, "context_noise is -1.0"),
        ({"shift": 10**400}, "shift is 1000"),
        ({"context_noise": 1001}, "context_noise is 1001"),
        ({"name": " "}, "name is ' '"),
        ({"name": "a\nb"}, "printable characters"),
        ({"max_anchors": 3}, "policy.anchors.max is 4 and max_anchors is 3"),
        ({"latents_mean": [0.0]}, r"latents_mean is \(0\.0,\): the VAE needs 4 numbers"),
    ):
        (folder / "model.json").write_text(json.dumps({**info, **change}))
        refused(match)
    (folder / "model.json").write_text(json.dumps(info))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**vae, "num_res_blocks": 2}))
    refused("vae.*missing")
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    for tokenizer, match in (
        (b"{}", "no tokenizer that can be used"),
        (word_tokenizer(7), "has the token 9, and"),
    ):
        (folder / "tokenizer.json").write_bytes(tokenizer)
        refused(match)
    (folder / "tokenizer.json").write_bytes(word_tokenizer(6))
    (folder / "text_encoder" / "config.json").unlink()
    refused(r"text_encoder.config\.json is missing")
    (folder / "tokenizer.json").unlink()
    refused("neither tokenizer.json")
