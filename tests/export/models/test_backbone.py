from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from swiftvideo.export.checkpoint_naming import to_diffusers
from swiftvideo.export.models.backbone import (
    PRESETS,
    BackboneConfig,
    CausalWanModel,
    full_attention,
    rotate,
    time_tables,
)
from swiftvideo.runtime import positions
from swiftvideo.runtime.errors import PromptError, SettingsError
from tests.export.models import golden

FRAME = 16  # tokens of a frame in the recorded data


def run(tag: str, attend=None):  # type: ignore[no-untyped-def]
    """A forward of single_chunk.npz: flow, K, V."""
    data, model = golden.arrays("single_chunk"), golden.backbone()
    start, latents = int(data[f"{tag}_start_frame"]), data[f"{tag}_input"]
    frames = latents.shape[1]
    cos, sin = time_tables(torch.arange(start, start + frames)[None], model.config.time_pairs)
    e, e0 = model.time_embed(data[f"{tag}_t"].expand(1, frames))
    cross = model.cross_kv(model.embed_text(data["prompt_embeds"]))
    return model(latents, e, e0, cos, sin, *cross, **({"attend": attend} if attend else {}))


def with_window(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The recorded cache of 12 frames, full, without the three frames after the sink that the chunk evicts."""
    data = golden.arrays("single_chunk")
    kept = torch.cat((torch.arange(3 * FRAME), torch.arange(6 * FRAME, 12 * FRAME)))
    stored_k, stored_v = data["state12_cache_k"][layer][:, kept], data["state12_cache_v"][layer][:, kept]
    return full_attention(q, torch.cat((stored_k, k), 1), torch.cat((stored_v, v), 1))


def matches(tag: str, flow: Tensor, k: Tensor, v: Tensor) -> None:
    data = golden.arrays("single_chunk")
    golden.close(flow, data[f"{tag}_flow"])
    golden.close(k, data[f"{tag}_new_k"])
    golden.close(v, data[f"{tag}_new_v"])


def test_first_chunk_is_the_recorded_one() -> None:
    matches("first", *run("first"))


def test_chunk_over_a_full_cache_is_the_recorded_one() -> None:
    matches("plain", *run("plain", with_window))


def test_every_intermediate_is_the_recorded_one() -> None:
    data, model = golden.arrays("single_chunk"), golden.backbone()
    latents = data["plain_input"]
    patches = model.embed_patches(latents)
    golden.close(patches, data["plain_mid_patch"].flatten(2).transpose(1, 2))
    _, e0 = model.time_embed(data["plain_t"].expand(1, 3))
    golden.close(e0.flatten(2)[0], data["plain_mid_timeproj"])
    context = model.embed_text(data["prompt_embeds"])
    golden.close(context, data["plain_mid_text"])
    cross_k, cross_v = model.cross_kv(context)
    start = int(data["plain_start_frame"])
    tables = time_tables(torch.arange(start, start + 3)[None], model.config.time_pairs)
    cos, sin = model.rope(*tables, model.space_rope(4, 4))
    x = patches.unflatten(1, (3, FRAME))
    for layer, block in enumerate(model.layers):
        o = with_window(layer, *block.qkv(x, e0, cos, sin))
        golden.close(block.self_attn.output(o), data[f"plain_mid_selfattn{layer}"])
        x, q = block.after_self(x, o, e0)
        o = full_attention(q, cross_k[layer], cross_v[layer])
        golden.close(block.cross_attn.output(o), data[f"plain_mid_crossattn{layer}"])
        x = block.after_cross(x, o, e0)
        golden.close(x.flatten(1, 2), data[f"plain_mid_block{layer}"])


def test_time_embedding_is_the_recorded_one() -> None:
    units, model = golden.arrays("units"), golden.backbone()
    golden.close(model.sinusoid(units["time_t"]), units["time_sinusoid"], 1e-6)
    e, e0 = model.time_embed(units["time_t"][None])
    golden.close(e[0], units["time_e"])
    golden.close(e0[0], units["time_e0"])


@pytest.mark.parametrize("start", [0, 12, 1000])
def test_rotary_embedding_is_the_recorded_one(start: int) -> None:
    units, model = golden.arrays("units"), golden.backbone()
    cos, sin = time_tables(torch.arange(start, start + 3)[None], model.config.time_pairs)
    cos, sin = model.rope(cos, sin, model.space_rope(4, 4))
    turned = rotate(units["rope_in"], cos, sin, torch.float32)
    golden.close(turned, units[f"rope_out_{start}"], 1e-5)


def test_patching_is_the_recorded_one() -> None:
    units, model = golden.arrays("units"), golden.backbone()
    golden.close(model.embed_patches(units["patch_in"]), units["patch_out"])
    golden.close(model.unpatch(units["unpatch_in"], 4, 4), units["unpatch_out"], 0)


def test_signatures_and_their_distances_are_the_recorded_ones() -> None:
    units, model = golden.arrays("units"), golden.backbone()
    signature = model.signature(units["prompt_table"])
    golden.close(signature, units["prompt_signature"])
    for a, b in itertools.product(range(3), repeat=2):
        old, new = signature[a], signature[b]
        cosine = old @ new / (old.norm().clamp(min=1e-6) * new.norm().clamp(min=1e-6))
        golden.close((1 - cosine).clamp(0, 1), units["prompt_rho"][a, b])


def test_signature_ignores_padding_and_survives_an_empty_prompt() -> None:
    model = golden.backbone()
    embeds = torch.randn(2, 5, 32)
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 6))
    golden.close(model.signature(padded), model.signature(embeds), 1e-6)
    assert not model.signature(torch.zeros(1, 4, 32)).any()


def test_too_long_a_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="17 tokens"):
        golden.backbone().embed_text(torch.zeros(1, 17, 32))


def random_backbone(config: BackboneConfig, seed: int = 0) -> CausalWanModel:
    """Weights large enough that every part of the model matters."""
    torch.manual_seed(seed)
    model = CausalWanModel(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(1 + 0.2 * torch.randn_like(weight))
        elif "modulation" in name:
            weight.copy_(0.3 * torch.randn_like(weight))
        elif name.endswith("weight"):
            weight.copy_(torch.randn_like(weight) / weight[0].numel() ** 0.5)
    return model


@pytest.mark.parametrize("head_dim", [24, 32])
def test_backbone_is_that_of_diffusers_without_a_cache(head_dim: int) -> None:
    config = BackboneConfig(
        dim=3 * head_dim, ffn_dim=160, num_heads=3, num_layers=2, text_dim=20, text_len=12, freq_dim=32
    )
    ours = random_backbone(config)
    theirs = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=head_dim,
        text_dim=20,
        freq_dim=32,
        ffn_dim=160,
        num_layers=2,
    ).eval()
    theirs.load_state_dict({to_diffusers(key): value for key, value in ours.state_dict().items()})

    latents, embeds, t = torch.randn(2, 4, 16, 6, 10), torch.randn(2, 12, 20), torch.tensor([731.5, 52.0])
    with torch.no_grad():
        expected = theirs(latents.transpose(1, 2), t, embeds).sample.transpose(1, 2)
    cos, sin = time_tables(torch.arange(4).expand(2, 4), config.time_pairs)
    flow, k, v = ours(
        latents, *ours.time_embed(t[:, None].expand(2, 4)), cos, sin, *ours.cross_kv(ours.embed_text(embeds))
    )
    golden.close(flow, expected)
    assert expected.std() > 0.3
    assert k.shape == v.shape == (2, 2, 4 * 15, 3, head_dim)


def test_half_precision_weights_stay_close_to_single_precision() -> None:
    full = golden.backbone()
    half = CausalWanModel(golden.CONFIG).eval().requires_grad_(False)
    half.load_state_dict(full.state_dict())
    half = half.to(torch.bfloat16)
    e, e0 = half.time_embed(torch.full((1, 3), 937.5))
    assert e.dtype == e0.dtype == torch.float32
    cos, sin = time_tables(torch.arange(3)[None], full.config.time_pairs)
    data = golden.arrays("single_chunk")
    cross = half.cross_kv(half.embed_text(data["prompt_embeds"]))
    flow, k, v = half(data["first_input"], *half.time_embed(data["first_t"].expand(1, 3)), cos, sin, *cross)
    assert flow.dtype == k.dtype == v.dtype == torch.bfloat16
    scale = float(data["first_flow"].std())
    assert float((flow.float() - data["first_flow"]).square().mean().sqrt()) < 0.02 * scale


def test_every_parameter_gets_a_gradient() -> None:
    model = CausalWanModel(
        BackboneConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4)
    )
    cos, sin = time_tables(torch.arange(2)[None], model.config.time_pairs)
    cross = model.cross_kv(model.embed_text(torch.randn(1, 4, 8)))
    flow, _, _ = model(
        torch.randn(1, 2, 16, 4, 4), *model.time_embed(torch.full((1, 2), 500.0)), cos, sin, *cross
    )
    flow.square().mean().backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.slow
def test_forward_traces_with_any_batch_frames_and_text_length() -> None:
    model = random_backbone(
        BackboneConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=6, freq_dim=16)
    )

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latents: Tensor, t: Tensor, cos: Tensor, sin: Tensor, embeds: Tensor):  # type: ignore[no-untyped-def]
            context = self.model.embed_text(embeds)
            cross = self.model.cross_kv(context)
            signature = self.model.signature(embeds, context)
            return *self.model(latents, *self.model.time_embed(t), cos, sin, *cross), signature

    def inputs(batch: int, frames: int, text: int) -> tuple[Tensor, ...]:
        t = torch.rand(batch, frames) * 1000
        tables = time_tables(torch.arange(frames).expand(batch, frames), model.config.time_pairs)
        return torch.randn(batch, frames, 16, 4, 6), t, *tables, torch.randn(batch, text, 8)

    dim = torch.export.Dim
    batch, frames = dim("batch"), dim("frames")
    shapes = (*({0: batch, 1: frames},) * 4, {0: batch, 1: dim("text", max=6)})
    program = torch.export.export(Whole(), inputs(2, 3, 4), dynamic_shapes=shapes).module()
    for sizes in ((2, 2, 2), (3, 12, 6)):
        given = inputs(*sizes)
        for actual, expected in zip(program(*given), Whole()(*given), strict=True):
            golden.close(actual, expected, 1e-6)


@pytest.mark.parametrize("start", [0, 1021, 10_000_000])
def test_torch_and_numpy_time_tables_are_the_same(start: int) -> None:
    ours = time_tables(torch.arange(start, start + 5), 22)
    for a, b in zip(ours, positions.time_tables(start, 5, 22), strict=True):
        golden.close(a, torch.from_numpy(b), 1e-7)


def test_the_published_size() -> None:
    with torch.device("meta"):
        model = CausalWanModel(PRESETS["wan2.1-t2v-1.3b"])
    assert sum(weight.numel() for weight in model.parameters()) == 1_418_996_800
    assert (model.config.head_dim, model.config.time_pairs, model.config.space_pairs) == (128, 22, 21)
    geometry = model.config.geometry(60, 104)
    assert geometry.time_pairs == model.config.time_pairs and geometry.frame_tokens == 1560


@pytest.mark.parametrize(
    "wrong", [{"dim": 25}, {"num_heads": 8}, {"freq_dim": 15}, {"patch": (2, 2, 2)}, {"num_layers": 0}]
)
def test_impossible_shapes_are_refused(wrong: dict[str, object]) -> None:
    sizes = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1, "text_dim": 8, "text_len": 4}
    with pytest.raises(SettingsError):
        BackboneConfig(**{**sizes, **wrong})  # type: ignore[arg-type]
