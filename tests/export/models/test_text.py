from __future__ import annotations

import copy

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from swiftvideo.export.models.text import TextEncoder


@pytest.fixture(scope="module")
def encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=60, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2)
    model = UMT5EncoderModel(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name:
            weight.normal_()
    return model


def test_text_path_is_the_encoder_of_transformers(encoder: UMT5EncoderModel) -> None:
    ids = torch.randint(2, 60, (3, 11))
    mask = (torch.arange(11) < torch.tensor([[11], [4], [1]])).long()
    ids = ids * mask
    embeds = TextEncoder(encoder)(ids, mask)
    expected = encoder(ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate((11, 4, 1)):
        assert torch.equal(embeds[row, :length], expected[row, :length])
        assert not embeds[row, length:].any()
        alone = encoder(ids[row : row + 1, :length]).last_hidden_state  # no padding at all
        torch.testing.assert_close(embeds[row : row + 1, :length], alone, atol=1e-5, rtol=0)


def test_sizes_are_those_of_the_config(encoder: UMT5EncoderModel) -> None:
    ours = TextEncoder(encoder)
    assert (ours.text_dim, ours.layers, ours.vocabulary) == (32, 2, 60)


def test_float16_holds_what_overflows_there(encoder: UMT5EncoderModel) -> None:
    """Trained weights give the feed-forward parts more than 65504; transformers keeps them in float32 for that."""
    wide = copy.deepcopy(encoder)
    for name, weight in wide.named_parameters():
        if name.endswith("wo.weight"):
            weight.mul_(1e6)
    ids, mask = torch.randint(2, 60, (1, 11)), torch.ones(1, 11, dtype=torch.long)
    expected = TextEncoder(wide)(ids, mask)
    kept = {name: value.clone() for name, value in wide.named_parameters() if name.endswith("wo.weight")}
    half = TextEncoder(wide).half()
    for name, value in half.encoder.named_parameters():
        assert value.dtype == (torch.float32 if name in kept else torch.float16), name
        assert name not in kept or torch.equal(value, kept[name])
    embeds = half(ids, mask)
    assert embeds.dtype == torch.float16
    torch.testing.assert_close(embeds.float(), expected, atol=0.05, rtol=0)
    again = TextEncoder(copy.deepcopy(encoder).half())  # made in float16, as random weights are
    assert again.encoder.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert {value.dtype for value in half.bfloat16().parameters()} == {torch.bfloat16}
    assert {value.dtype for value in half.float().parameters()} == {torch.float32}


@pytest.mark.slow
def test_it_traces_with_any_batch_and_length(encoder: UMT5EncoderModel) -> None:
    ours, dim = TextEncoder(encoder), torch.export.Dim
    batch, length = dim("batch"), dim("length", max=64)
    example = torch.randint(2, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    program = torch.export.export(ours, example, dynamic_shapes=({0: batch, 1: length},) * 2).module()
    ids, mask = torch.randint(2, 60, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    mask[1, 9:] = 0
    torch.testing.assert_close(program(ids, mask), ours(ids, mask), atol=1e-6, rtol=0)
