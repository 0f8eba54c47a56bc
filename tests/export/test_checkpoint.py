from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from swiftvideo.export.checkpoint import load_backbone, load_checkpoint, read_outline
from swiftvideo.export.checkpoint_naming import from_diffusers, to_diffusers
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.export.random import word_tokenizer
from swiftvideo.runtime.errors import CheckpointError, SettingsError

from .wan import CONFIG, WAN_JSON, State, diffusers_model, prefixed, random_state


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


def same(model: CausalWanModel, expected: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model._fsdp_wrapped_module."])
def test_original_naming_with_any_prefix(state: State, tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(state, prefix), tmp_path / "weights.safetensors")
    same(load_backbone(tmp_path / "weights.safetensors", CONFIG), state)
    torch.save(prefixed(state, prefix), tmp_path / "weights.pt")
    same(load_backbone(tmp_path / "weights.pt", CONFIG), state)


def test_wrappers_inside_a_key(state: State, tmp_path: Path) -> None:
    wrapped = {
        key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): v for key, v in state.items()
    }
    torch.save({"generator": prefixed(wrapped, "model.")}, tmp_path / "weights.pt")
    same(load_backbone(tmp_path / "weights.pt", CONFIG), state)


def test_containers_and_averaged_weights(state: State, tmp_path: Path) -> None:
    averaged = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "weights.pt"
    content: dict[str, Any] = {
        "generator": prefixed(state, "model."),
        "critic": {"x": torch.zeros(1)},
        "step": 7,
    }
    torch.save(content, path)
    same(load_backbone(path, CONFIG), state)
    with pytest.raises(CheckpointError, match="no generator_ema, only generator"):
        load_backbone(path, CONFIG, ema=True)
    torch.save({**content, "generator_ema": prefixed(averaged, "model.")}, path)
    same(load_backbone(path, CONFIG), averaged)
    same(load_backbone(path, CONFIG, ema=True), averaged)
    same(load_backbone(path, CONFIG, ema=False), state)
    flat = {**prefixed(state, "generator.model."), **prefixed(averaged, "generator_ema.model.")}
    save_file(flat, tmp_path / "flat.safetensors")
    same(load_backbone(tmp_path / "flat.safetensors", CONFIG), averaged)
    same(load_backbone(tmp_path / "flat.safetensors", CONFIG, ema=False), state)


def test_diffusers_folder_as_diffusers_writes_it(state: State, tmp_path: Path) -> None:
    model = diffusers_model()
    model.load_state_dict({to_diffusers(key): value for key, value in state.items()})
    model.save_pretrained(tmp_path / "one")
    same(load_backbone(tmp_path / "one", CONFIG), state)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = load_backbone(tmp_path / "shards", text_len=8)
    same(loaded, state)
    assert loaded.config == CONFIG
    index = next((tmp_path / "shards").glob("*.index.json"))
    same(load_backbone(index, CONFIG), state)


def test_every_diffusers_name_has_one_of_ours_and_back() -> None:
    theirs = list(diffusers_model().state_dict())
    ours = [from_diffusers(key) for key in theirs]
    assert sorted(map(str, ours)) == sorted(CausalWanModel(CONFIG).state_dict())
    assert [to_diffusers(str(key)) for key in ours] == theirs
    assert from_diffusers("blocks.0.attn1.add_k_proj.weight") is None


def test_config_beside_the_weights_is_read(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(WAN_JSON))
    assert load_backbone(tmp_path).config == CONFIG
    (tmp_path / "config.json").write_text(json.dumps({**WAN_JSON, "model_type": "i2v"}))
    with pytest.raises(CheckpointError, match="model_type is 'i2v'"):
        load_backbone(tmp_path)


def test_dtype_is_converted_or_kept(state: State, tmp_path: Path) -> None:
    half = {key: value.bfloat16() for key, value in state.items()}
    save_file(half, tmp_path / "weights.safetensors")
    same(load_backbone(tmp_path, CONFIG, dtype=None), half)
    same(load_backbone(tmp_path, CONFIG), {key: value.float() for key, value in half.items()})


def test_missing_surplus_and_wrong_shapes_are_listed(state: State, tmp_path: Path) -> None:
    wrong = {key: value for key, value in state.items() if "blocks.1.cross_attn" not in key}
    wrong["img_emb.proj.0.weight"] = torch.zeros(3)
    wrong["head.head.weight"] = torch.zeros(5, 36)
    torch.save({"generator": prefixed(wrong, "model.")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(tmp_path / "x.pt", CONFIG)
    message = str(caught.value)
    for part in (
        "original Wan naming, container generator, prefix model.",
        "10 missing: blocks.1.cross_attn.q.weight, ",
        "and 5 more",
        "1 surplus: img_emb.proj.0.weight",
        "head.head.weight is (5, 36) and should be (16, 36)",
    ):
        assert part in message, message


def test_surplus_keys_of_diffusers_are_listed(state: State, tmp_path: Path) -> None:
    theirs = {str(to_diffusers(key)): value for key, value in state.items()}
    theirs["blocks.0.attn2.add_k_proj.weight"] = torch.zeros(2)
    save_file(theirs, tmp_path / "x.safetensors")
    with pytest.raises(
        CheckpointError, match=r"diffusers naming.*1 surplus: blocks\.0\.attn2\.add_k_proj\.weight"
    ):
        load_backbone(tmp_path, CONFIG)


def test_files_that_are_no_checkpoints_are_refused(state: State, tmp_path: Path) -> None:
    def refused(match: str, name: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_backbone(tmp_path / name, CONFIG, **options)

    refused("does not exist", "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds none", "empty")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "none.pt")
    refused("no tensors; it holds epoch, optimizer", "none.pt")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    refused("neither the original Wan nor the diffusers naming", "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    refused("holds a list", "list.pt")
    (tmp_path / "weights.txt").write_text("x")
    refused("'.txt' is unknown", "weights.txt")
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    refused("cut short", "cut.safetensors")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "none.pt").read_bytes()[:300])
    refused("cannot be read|not plain tensors", "cut.pt")
    torch.save({**state, **prefixed(state, "model.")}, tmp_path / "twice.pt")
    refused("two keys mean", "twice.pt")


class Attack:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_torch_file_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"generator": Attack(tmp_path / "ran")}, tmp_path / "attack.pt")
    with pytest.raises(
        CheckpointError, match=r"^.*attack\.pt would run code when read: it names \S+; [^\n]*$"
    ):
        load_backbone(tmp_path / "attack.pt", CONFIG)
    assert not (tmp_path / "ran").exists()


def test_a_shard_outside_the_folder_is_refused(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "secret.safetensors")
    (tmp_path / "x").mkdir()
    weight_map = dict.fromkeys(state, "../secret.safetensors")
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="beside it"):
        load_backbone(tmp_path / "x", CONFIG)


def test_containers_of_other_trainings(state: State, tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "weights.pt"

    def saved(content: dict[str, Any]) -> Path:
        torch.save(content, path)
        return path

    same(load_backbone(saved({"model": state, "step": torch.tensor(3)}), CONFIG), state)
    for name in ("ema", "model_ema"):
        same(load_backbone(saved({name: state, "decay": torch.tensor(0.9)}), CONFIG), state)
        both = saved({"model": other, name: state})
        same(load_backbone(both, CONFIG), state)
        same(load_backbone(both, CONFIG, ema=False), other)
    noted = {"model": state, "ema": {"decay": 0.99}}
    save_file(state, tmp_path / "plain.safetensors")
    for content in (None, state, {"state_dict": state}, noted):
        file = tmp_path / "plain.safetensors" if content is None else saved(content)
        with pytest.raises(CheckpointError, match=r"no averaged weights \(.*model_ema, ema\); leave ema out"):
            load_backbone(file, CONFIG, ema=True)
        same(load_backbone(file, CONFIG, ema=False), state)
    same(load_backbone(saved(noted), CONFIG), state)
    with pytest.raises(CheckpointError, match="averaged weights in model_ema, ema; keep one"):
        load_backbone(saved({"ema": state, "model_ema": other}), CONFIG)
    with pytest.raises(CheckpointError, match="no generator, only ema"):
        load_backbone(saved({"ema": state}), CONFIG, ema=False)


def test_what_downloads_leave_in_the_place_of_weights(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        for content, match in (
            (pointer, "git-lfs pointer.*git lfs pull"),
            (b"\n<!DOCTYPE html>", "is a web page"),
        ):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=match):
                load_backbone(path, CONFIG)


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
        ("transformer", {"num_attention_heads": None, "attention_head_dim": 3}),
    ],
)
def test_odd_settings_of_a_part_are_said(folder: Path, part: str, change: dict[str, Any]) -> None:
    (folder / "model.json").write_text(json.dumps({"text_len": 8}))
    config = folder / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"config\.json|latents_"):
        load_checkpoint(folder)


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
    for size in (0, -4, 34, 33):  # 34: of the VAE's stride, not of the patch
        with pytest.raises(
            SettingsError, match=f"height is {size} pixels: a positive multiple of 4 is needed"
        ):
            outline.geometry(size)


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
        ({"steps": [1000, 500.5]}, r"steps\[1\] is 500\.5, which is no <class 'int'>"),
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
