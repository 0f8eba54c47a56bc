"""The training forward equals inference chunk by chunk over a cache."""

import pytest
import torch

from swiftvideo.export.models.backbone import BackboneConfig, full_attention, time_tables
from swiftvideo.export.toy import teacher_forcing as forcing
from swiftvideo.export.toy.network import Network

CONFIG = BackboneConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=2, text_dim=16, text_len=16, freq_dim=16)
TOKENS = 3 * 16


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    network = Network(CONFIG).eval()
    torch.nn.init.normal_(network.wan.head.head.weight)
    return network


def cached(
    network: Network, latents: torch.Tensor, t: float, first: int, embeds: torch.Tensor, cache, visible: int
):
    """One pass of a chunk at frame `first` over `cache`, a list of (k, v) of earlier chunks, [L,B,48,n,d] each."""
    wan = network.wan

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        def keys(which: int, own: torch.Tensor) -> torch.Tensor:
            past = [chunk[which][layer] for chunk in cache]
            recent = torch.cat(past[1:], 1)[:, -visible:] if past[1:] else own[:, :0]
            return torch.cat([*past[:1], recent, own], 1)

        return full_attention(q, keys(0, k), keys(1, v))

    e, e0 = wan.time_embed(torch.full((1, 3), t))
    cos, sin = time_tables(torch.arange(first, first + 3)[None], CONFIG.time_pairs)
    cross = wan.cross_kv(wan.embed_text(embeds))
    return wan(latents, e, e0, cos, sin, *cross, attend)


@pytest.mark.parametrize("visible", [2 * TOKENS, 37])
@torch.no_grad()
def test_every_noisy_chunk_equals_a_pass_over_the_cache(network: Network, visible: int) -> None:
    torch.manual_seed(1)
    sentences = ["a red circle moving left at night", "a blue box standing still at dawn"]
    embeds = network.embeds([sentences[0], sentences[0], sentences[1]])
    clean, noisy = torch.randn(3, 1, 3, 16, 8, 8), torch.randn(3, 1, 3, 16, 8, 8)
    times = (1000.0, 625.0, 833.0)

    mask = forcing.block_mask(3, range(3), visible, TOKENS, memory=False, rows=0)[None]
    t = torch.cat([torch.zeros(9), torch.tensor(times).repeat_interleave(3)])[None]
    frames = torch.cat([torch.arange(9), torch.arange(9)])
    latents = torch.cat([*clean, *noisy], 1)
    flow = forcing.forward(network.wan, latents, t, frames, torch.cat([embeds, embeds])[None], mask)

    cache: list[tuple[torch.Tensor, torch.Tensor]] = []
    for chunk in range(3):
        text = embeds[chunk : chunk + 1]
        alone, _, _ = cached(network, noisy[chunk], times[chunk], 3 * chunk, text, cache, visible)
        torch.testing.assert_close(flow[:, 9 + 3 * chunk : 12 + 3 * chunk], alone, atol=2e-5, rtol=2e-5)
        _, k, v = cached(network, clean[chunk], 0.0, 3 * chunk, text, cache, visible)
        cache.append((k, v))


def test_the_mask_counts_keys_as_the_window_does() -> None:
    mask = forcing.block_mask(3, range(4), 40, TOKENS, memory=True)
    keys = mask.sum(1)[::TOKENS].tolist()
    # sink and own chunk are one for chunk 0; chunk 1 has both; later ones also 40 tokens and the memory.
    assert keys[:3] == [48, 96, 96 + 40 + 4]
    assert keys[3:] == [48, 96, 96 + 40 + 4, 96 + 40 + 4]
    assert not mask[: 2 * TOKENS, : forcing.MEMORY].any()


def test_memory_tokens_are_scaled_means_of_the_values() -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, 6 * TOKENS, 2, 16)
    tokens = forcing.memory_tokens(TOKENS, 2, generator)(v)
    assert tokens.shape == (2, forcing.MEMORY, 2, 16)
    ratio = tokens[:, 0] / v[:, :TOKENS].mean(1)
    assert torch.allclose(ratio, ratio[:, :1, :1].expand_as(ratio), atol=1e-4)
    assert ((ratio > 0.29) & (ratio < 1.01)).all()
