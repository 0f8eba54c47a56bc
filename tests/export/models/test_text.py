from __future__ import annotations

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


@pytest.mark.slow
def test_it_traces_with_any_batch_and_length(encoder: UMT5EncoderModel) -> None:
    ours, dim = TextEncoder(encoder), torch.export.Dim
    batch, length = dim("batch"), dim("length", max=64)
    example = torch.randint(2, 60, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    program = torch.export.export(ours, example, dynamic_shapes=({0: batch, 1: length},) * 2).module()
    ids, mask = torch.randint(2, 60, (3, 40)), torch.ones(3, 40, dtype=torch.long)
    mask[1, 9:] = 0
    torch.testing.assert_close(program(ids, mask), ours(ids, mask), atol=1e-6, rtol=0)
