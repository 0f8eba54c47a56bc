from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from swiftvideo.export.checkpoint import load_backbone, load_checkpoint
from swiftvideo.export.checkpoint_naming import from_diffusers, merge_lora, to_diffusers
from swiftvideo.export.models.backbone import BackboneConfig, CausalWanModel
from swiftvideo.runtime.errors import CheckpointError

State = dict[str, Tensor]

CONFIG = BackboneConfig(
    dim=36,
    ffn_dim=40,
    num_heads=3,
    num_layers=2,
    text_dim=24,
    text_len=8,
    in_channels=4,
    out_channels=4,
    freq_dim=16,
)
WAN_JSON = {
    "_class_name": "WanModel",
    "dim": 36,
    "ffn_dim": 40,
    "num_heads": 3,
    "num_layers": 2,
    "text_dim": 24,
    "text_len": 8,
    "in_dim": 4,
    "out_dim": 4,
    "freq_dim": 16,
}


@pytest.fixture(scope="module")
def state() -> State:
    """Random weights under original Wan names."""
    torch.manual_seed(0)
    return {key: torch.randn_like(value) for key, value in CausalWanModel(CONFIG).state_dict().items()}


def same(model: CausalWanModel, expected: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(loaded[key], value), key
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())


def diffusers_model() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
    )


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


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


def lora_of(state: State, rank: int) -> State:
    """Adapter over every matrix of the blocks, under original Wan names without prefix."""
    adapter = {}
    for key, value in state.items():
        if key.startswith("blocks.") and value.ndim == 2:
            module = key.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = torch.randn(rank, value.shape[1])
            adapter[f"{module}.lora_B.weight"] = torch.randn(value.shape[0], rank)
    return adapter


def merged_by_hand(state: State, adapter: State, scale: float) -> State:
    merged = dict(state)
    for key in state:
        module = key.removesuffix(".weight")
        if f"{module}.lora_A.weight" in adapter:
            a, b = adapter[f"{module}.lora_A.weight"].double(), adapter[f"{module}.lora_B.weight"].double()
            merged[key] = (state[key].double() + scale * b @ a).float()
    return merged


def near(model: CausalWanModel, expected: State) -> None:
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("rank", [4, 256])
@pytest.mark.parametrize("name", ["", ".default"])
def test_lora_in_both_spellings_and_namings(state: State, tmp_path: Path, rank: int, name: str) -> None:
    torch.manual_seed(1)
    adapter = lora_of(state, rank)
    save_file(state, tmp_path / "base.safetensors")
    ours = {
        "base_model.model." + key.replace(".weight", f"{name}.weight"): value
        for key, value in adapter.items()
    }
    torch.save({"generator_lora": ours, "step": 3}, tmp_path / "ours.pt")
    theirs = {}
    for key, value in adapter.items():
        module, half = key.removesuffix(".weight").rsplit(".", 1)
        theirs[f"base_model.model.model.{to_diffusers(module)}.{half}{name}.weight"] = value
    save_file(theirs, tmp_path / "theirs.safetensors")
    for file in ("ours.pt", "theirs.safetensors"):
        plain = load_backbone(tmp_path / "base.safetensors", CONFIG, lora=tmp_path / file)
        near(plain, merged_by_hand(state, adapter, 1.0))
        double = load_backbone(
            tmp_path / "base.safetensors", CONFIG, lora=tmp_path / file, lora_alpha=2.0 * rank
        )
        near(double, merged_by_hand(state, adapter, 2.0))


def test_lora_merge_is_that_of_peft(state: State, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = CausalWanModel(CONFIG)
    base.load_state_dict(state)
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "k", "v", "o", "ffn.0", "ffn.2"])
    wrapped = peft.get_peft_model(base, settings)
    torch.manual_seed(2)
    for key, weight in wrapped.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight)
    wrapped.save_pretrained(tmp_path / "adapter")
    save_file(state, tmp_path / "base.safetensors")
    ours = load_backbone(tmp_path / "base.safetensors", CONFIG, lora=tmp_path / "adapter")
    near(ours, wrapped.merge_and_unload().state_dict())
    assert not torch.equal(ours.state_dict()["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"])


def test_alpha_tensors_and_rank_stabilised_scale(state: State) -> None:
    adapter = lora_of(state, 4)
    key = "blocks.1.self_attn.q"
    with_alpha = {**adapter, f"{key}.alpha": torch.tensor(8.0)}
    expected = merged_by_hand(state, adapter, 2.0)[f"{key}.weight"]
    torch.testing.assert_close(merge_lora(state, with_alpha, "x")[f"{key}.weight"], expected)
    stabilised = merge_lora(state, adapter, "x", alpha=6.0, config={"use_rslora": True})[f"{key}.weight"]
    torch.testing.assert_close(stabilised, merged_by_hand(state, adapter, 3.0)[f"{key}.weight"])


def test_wrong_adapters_are_refused(state: State) -> None:
    adapter = lora_of(state, 4)
    a, b = "blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"
    without = {key: value for key, value in adapter.items() if key != b}
    cases: dict[str, State] = {
        "1 modules lack lora_A or lora_B: blocks.0.self_attn.q": without,
        "not in the backbone: blocks.9.self_attn.q": {
            "blocks.9.self_attn.q.lora_A.weight": adapter[a],
            **adapter,
        },
        r"blocks.0.self_attn.q is \(36, 36\), but lora_A is \(4, 35\)": {**adapter, a: torch.zeros(4, 35)},
        "unknown keys: blocks.0.self_attn.q.lora_magnitude_vector": {
            **adapter,
            "blocks.0.self_attn.q.lora_magnitude_vector": torch.zeros(36),
        },
        "it is empty": {},
        "2 adapters": {**adapter, "blocks.0.self_attn.q.lora_A.other.weight": adapter[a]},
    }
    for message, wrong in cases.items():
        with pytest.raises(CheckpointError, match=message):
            merge_lora(state, wrong, "adapter")
    with pytest.raises(CheckpointError, match="use_dora"):
        merge_lora(state, adapter, "adapter", config={"use_dora": True})


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
    with pytest.raises(CheckpointError, match="would run code"):
        load_backbone(tmp_path / "attack.pt", CONFIG)
    assert not (tmp_path / "ran").exists()


def test_a_shard_outside_the_folder_is_refused(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "secret.safetensors")
    (tmp_path / "x").mkdir()
    weight_map = dict.fromkeys(state, "../secret.safetensors")
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="beside it"):
        load_backbone(tmp_path / "x", CONFIG)


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
    (root / "tokenizer.json").write_text("{}")
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
    assert checkpoint.kind == "original Wan naming"
    assert checkpoint.tokenizer == b"{}"
    assert checkpoint.latents_mean.tolist() == [0.0] * 4 and checkpoint.latents_std.tolist() == [2.0] * 4
    assert checkpoint.info.policy.window.min_size == 5
    assert len(checkpoint.schedule.steps) == 2
    geometry = checkpoint.geometry()
    assert (geometry.height, geometry.width, geometry.fps, geometry.steps) == (16, 24, 12, 2)
    assert (geometry.temporal_stride, geometry.spatial_stride, geometry.text_dim) == (2, 2, 24)
    assert checkpoint.geometry(32, 32).latent_width == 16
    assert load_checkpoint(folder).sha256 == checkpoint.sha256
    (folder / "tokenizer.json").write_text("{ }")
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


def test_incomplete_or_contradictory_folders_are_refused(folder: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            load_checkpoint(folder)

    info = json.loads((folder / "model.json").read_text())
    for change, match in (
        ({"tempo": 3}, "unknown keys tempo"),
        ({"policy": {"windw": 3}}, "unknown keys windw"),
        ({"policy": {"policy": "none"}}, "policy is 'none'"),
        ({"steps": [0]}, "denoising indices"),
        ({"text_len": 9}, "text_len is 9"),
        ({"latents_mean": [0.0]}, "latents_mean has 1"),
    ):
        (folder / "model.json").write_text(json.dumps({**info, **change}))
        refused(match)
    (folder / "model.json").write_text(json.dumps(info))
    vae = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**vae, "num_res_blocks": 2}))
    refused("vae.*missing")
    (folder / "vae" / "config.json").write_text(json.dumps(vae))
    (folder / "text_encoder" / "config.json").unlink()
    refused(r"text_encoder.config\.json is missing")
    (folder / "tokenizer.json").unlink()
    refused("neither tokenizer.json")
