"""Adapters are merged as peft and diffusers merge them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from swiftvideo.export.checkpoint import load_backbone
from swiftvideo.export.checkpoint_naming import from_diffusers, to_diffusers
from swiftvideo.export.lora import Adapter, merge_lora, read_adapter
from swiftvideo.export.models.backbone import CausalWanModel
from swiftvideo.runtime.errors import CheckpointError

from .wan import CONFIG, State, diffusers_model, random_state


@pytest.fixture(scope="module")
def state() -> State:
    return random_state()


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


@pytest.mark.parametrize("alpha", [torch.tensor(8.0), torch.tensor([8]), torch.tensor(8, dtype=torch.uint8)])
def test_a_given_alpha_comes_before_tensors_and_settings(
    state: State, tmp_path: Path, alpha: torch.Tensor
) -> None:
    adapter = lora_of(state, 4)
    modules = {key.split(".lora_")[0] for key in adapter}
    with_alpha = {**adapter, **{f"{module}.alpha": alpha.clone() for module in modules}}
    save_file(state, tmp_path / "base.safetensors")
    save_file(
        with_alpha, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": '{"lora_alpha": 3}'}
    )

    for given, scale in ((None, 2.0), (2.0, 0.5), (0.0, 0.0)):
        model = load_backbone(
            tmp_path / "base.safetensors", CONFIG, lora=tmp_path / "lora.safetensors", lora_alpha=given
        )
        near(model, merged_by_hand(state, adapter, scale))


def test_the_settings_alpha_is_recorded_unless_modules_differ(state: State) -> None:
    adapter = lora_of(state, 4)
    assert Adapter(adapter, {"lora_alpha": 3}, []).alpha == "3"
    assert Adapter(adapter, {"lora_alpha": 3, "alpha_pattern": {"q": 1}}, []).alpha == "its own"
    assert Adapter(adapter, {}, []).alpha == "its own"
    with_alpha = {**adapter, "blocks.1.self_attn.q.alpha": torch.tensor(8.0)}
    assert Adapter(with_alpha, {"lora_alpha": 3}, []).alpha == "its own"


def test_settings_beside_a_file_are_its_own(state: State, tmp_path: Path) -> None:
    save_file(lora_of(state, 4), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 3}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = read_adapter(path)
        assert found.config == {"lora_alpha": 3}
        assert [file.name for file in found.files] == ["adapter_model.safetensors", "adapter_config.json"]


def test_wrong_adapters_are_refused(state: State) -> None:
    adapter = lora_of(state, 4)
    a, b = "blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"
    without = {key: value for key, value in adapter.items() if key != b}
    cases: dict[str, State] = {
        "1 modules lack lora_A or lora_B: blocks.0.self_attn.q; save or copy": without,
        " 1 modules lack lora_A or lora_B: blocks.0.self_attn.q; ": {
            **{key: value for key, value in without.items() if key != a},
            "blocks.0.self_attn.q.alpha": torch.tensor(8.0),
        },
        "1 modules are not in the backbone: blocks.9.self_attn.q; ": {
            **adapter,
            "blocks.9.self_attn.q.lora_A.weight": adapter[a],
            "blocks.9.self_attn.q.alpha": torch.tensor(8.0),
        },
        "not in the backbone: blocks.9.self_attn.q; use an adapter of its architecture": {
            "blocks.9.self_attn.q.lora_A.weight": adapter[a],
            **adapter,
        },
        r"blocks.0.self_attn.q is \(36, 36\), but lora_A is \(4, 35\)": {**adapter, a: torch.zeros(4, 35)},
        r"lora_A is \(4,\) and lora_B \(36, 4\)": {**adapter, a: torch.zeros(4)},
        r"lora_A is \(4, 36\) and lora_B \(36,\)": {**adapter, b: torch.zeros(36)},
        "lora_magnitude_vector is of DoRA, which is not supported; merge it into the backbone with peft": {
            **adapter,
            "blocks.0.self_attn.q.lora_magnitude_vector": torch.zeros(36),
        },
        "it is empty; load it with diffusers": {},
        r"unknown keys: lora_unet_blocks_0_ffn_0\.lora_down\.weight; load it with diffusers' WanPipeline": {
            "lora_unet_blocks_0_ffn_0.lora_down.weight": adapter[a]
        },
        "2 adapters": {**adapter, "blocks.0.self_attn.q.lora_A.other.weight": adapter[a]},
    }
    for message, wrong in cases.items():
        with pytest.raises(CheckpointError, match=message):
            merge_lora(state, wrong, "adapter")
    with pytest.raises(CheckpointError, match="use_dora"):
        merge_lora(state, adapter, "adapter", config={"use_dora": True})
    zero = {**adapter, a: torch.zeros(0, 36), b: torch.zeros(36, 0)}
    numbers: dict[str, tuple[State, dict[str, Any]]] = {
        "blocks.0.self_attn.q is of rank 0": (zero, {}),
        "lora_alpha is None and should be a number; pass the alpha": (adapter, {"lora_alpha": None}),
        "lora_alpha is 'x'": (adapter, {"lora_alpha": "x"}),
        "lora_alpha is True": (adapter, {"lora_alpha": True}),
        "lora_alpha is inf": (adapter, {"lora_alpha": math.inf}),
        "alpha_pattern is 3": (adapter, {"alpha_pattern": 3}),
        r"alpha_pattern\['q'\] is None": (adapter, {"alpha_pattern": {"q": None}}),
        r"alpha_pattern has '\('": (adapter, {"alpha_pattern": {"(": 1}}),
        "blocks.0.self_attn.q.alpha is nan and should be a number": (
            {**adapter, "blocks.0.self_attn.q.alpha": torch.tensor(math.nan)},
            {},
        ),
        f"{a} is torch.int8": ({**adapter, a: adapter[a].to(torch.int8)}, {}),
        f"adapter: {b} has values that are not finite": ({**adapter, b: adapter[b] * math.nan}, {}),
    }
    for message, (wrong, config) in numbers.items():
        with pytest.raises(CheckpointError, match=message):
            merge_lora(state, wrong, "adapter", config=config)
    merge_lora(state, adapter, "adapter", alpha=4, config={"lora_alpha": None})  # is not asked for


@pytest.mark.parametrize("writer", ["adapter", "pipeline"])
@pytest.mark.parametrize("patterned", [False, True])
def test_lora_merge_is_that_of_diffusers(state: State, tmp_path: Path, writer: str, patterned: bool) -> None:
    peft = pytest.importorskip("peft")
    model = diffusers_model()
    model.load_state_dict({to_diffusers(key): value for key, value in state.items()})
    patterns = (
        {"alpha_pattern": {"attn2.to_q": 9}, "rank_pattern": {"blocks.1.attn1.to_q": 2}} if patterned else {}
    )
    model.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=16, target_modules=["to_q", "net.2"], init_lora_weights=False, **patterns
        )
    )
    if writer == "adapter":
        model.save_lora_adapter(tmp_path / "lora")
    else:
        WanPipeline.save_lora_weights(
            tmp_path / "lora",
            transformer_lora_layers=peft.get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    save_file(state, tmp_path / "base.safetensors")
    ours = load_backbone(tmp_path / "base.safetensors", CONFIG, lora=tmp_path / "lora")
    model.fuse_lora()
    fused = {
        str(from_diffusers(key.replace(".base_layer", ""))): value
        for key, value in model.state_dict().items()
        if "lora_" not in key
    }
    near(ours, fused)
    assert not torch.equal(ours.state_dict()["blocks.0.ffn.2.weight"], state["blocks.0.ffn.2.weight"])


def test_settings_of_a_file_that_are_none_are_said(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "base.safetensors")
    for text, match in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "should hold an object"),
        ('{"lora_alpha": null}', "is None"),
    ):
        save_file(lora_of(state, 4), tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
        with pytest.raises(CheckpointError, match=match):
            load_backbone(tmp_path / "base.safetensors", CONFIG, lora=tmp_path / "x.safetensors")
