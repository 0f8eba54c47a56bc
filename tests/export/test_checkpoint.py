from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from swiftvideo.export.checkpoint import load_backbone
from swiftvideo.export.checkpoint_naming import from_diffusers, to_diffusers
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.runtime.errors import CheckpointError, SettingsError

from .wan import CONFIG, WAN_JSON, State, diffusers_model, prefixed, random_state, same


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


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
    save_file(state, tmp_path / "whole.safetensors")
    torch.save({"epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "none.pt")
    refused("no tensors; it holds epoch, optimizer. Save them alone, or below one of: generator,", "none.pt")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "other.pt")
    refused(
        "neither the original Wan nor the diffusers naming .* conv.weight; rename them to one", "other.pt"
    )
    torch.save({**state, "head.head.bias": state["head.head.bias"].to("meta")}, tmp_path / "meta.pt")
    refused(r"head.head.bias is meta, without values; save dense tensors", "meta.pt")
    torch.save({**state, "head.head.bias": state["head.head.bias"].to_sparse()}, tmp_path / "sparse.pt")
    refused(r"head.head.bias is torch.sparse_coo; save dense tensors", "sparse.pt")
    refused("head.head.bias is torch.sparse_coo", "whole.safetensors", lora=tmp_path / "sparse.pt")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)).save(tmp_path / "program.pt")
    refused("is a TorchScript program; open it with torch.jit.load", "program.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    refused("holds a list", "list.pt")
    (tmp_path / "weights.txt").write_text("x")
    refused("'.txt' is unknown", "weights.txt")
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


def test_containers_without_an_end_are_refused(tmp_path: Path) -> None:
    itself: dict[str, Any] = {"w": torch.zeros(1)}
    itself["model"] = itself
    deep: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(100):
        deep = {"model": deep}
    shared: dict[str, Any] = {}
    for _ in range(40):
        shared = {"model": shared, "ema": shared}
    for content, match in (
        (itself, "more than 8 containers within each other"),
        (deep, "more than 8 containers within each other"),
        (shared, "has no tensors"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=match):
            load_backbone(tmp_path / "x.pt", CONFIG)


def test_a_compressed_torch_file_is_refused(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name) + bytes(10**6 if name.endswith("data.pkl") else 0))
    with pytest.raises(CheckpointError, match=r"bomb\.pt holds \S+data\.pkl compressed"):
        load_backbone(tmp_path / "bomb.pt", CONFIG)


def test_sizes_beyond_64_bits_are_refused(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        load_backbone(tmp_path / "x.safetensors", CONFIG)


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
    flat = tmp_path / "flat.safetensors"
    for name in ("ema", "model_ema"):
        save_file(prefixed(state, f"{name}."), flat)
        same(load_backbone(flat, CONFIG), state)
        save_file({**prefixed(other, "model."), **prefixed(state, f"{name}."), "vae.x": torch.zeros(1)}, flat)
        same(load_backbone(flat, CONFIG), state)
        same(load_backbone(flat, CONFIG, ema=False), other)
        save_file({**prefixed(other, "model."), f"{name}.decay": torch.zeros(1)}, flat)
        with pytest.raises(CheckpointError, match=rf"surplus: {name}.decay"):
            load_backbone(flat, CONFIG)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.int8}, "dtype is torch.int8: use one of torch's"),
        ({"dtype": "fp16"}, "dtype is 'fp16'"),
        ({"lora_alpha": 3.0}, "lora_alpha is 3.0: give the lora that it is of"),
        ({"lora_alpha": float("nan"), "lora": "nowhere"}, "lora_alpha is nan: use a finite number"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_backbone("nowhere", CONFIG, **options)


def test_a_lora_that_makes_weights_infinite_is_named(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "base.safetensors")
    key = "blocks.0.self_attn.q"
    a, b = torch.ones(2, CONFIG.dim), torch.ones(CONFIG.dim, 2)
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, tmp_path / "lora.safetensors")
    options: dict[str, Any] = {"lora": tmp_path / "lora.safetensors", "lora_alpha": 1e39}
    with pytest.raises(CheckpointError, match=r"with LoRA \S*lora.safetensors, alpha 1e\+39: \S+ has values"):
        load_backbone(tmp_path / "base.safetensors", CONFIG, **options)
