from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swiftvideo.export.models.vae import StreamingDecoder, over_time, to_uint8
from swiftvideo.runtime.errors import CheckpointError, UsageError


@cache
def autoencoder(
    mult: tuple[int, ...] = (1, 2, 2, 4),
    blocks: int = 1,
    temporal: tuple[bool, ...] = (False, True, True),
) -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, dim_mult=list(mult), num_res_blocks=blocks, temperal_downsample=list(temporal)
    )
    for name, weight in vae.named_parameters():
        if weight.ndim == 1:
            weight.data.normal_(0, 0.1)  # biases matter
        elif "gamma" not in name:
            weight.data.mul_(1.7)  # pictures with contrast
    return vae.eval().requires_grad_(False)


class CountedConvolutions(TorchDispatchMode):
    """Ranks of what is convolved inside."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.ranks.append(args[0].ndim)
        return func(*args, **(kwargs or {}))


def whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """diffusers' decode of all frames, from normalised latents [B,F,C,h,w] to [B,frames,3,H,W]."""
    mean, std = (torch.tensor(vae.config[f"latents_{name}"])[:, None, None] for name in ("mean", "std"))
    return vae.decode((latents * std + mean).transpose(1, 2)).sample.transpose(1, 2)


def stream(decoder: StreamingDecoder, latents: Tensor, cuts: tuple[int, ...]) -> Tensor:
    frames, caches = decoder.decode_first_float(latents[:, :1])
    parts = [frames]
    for start, end in pairwise((1, *cuts)):
        frames, caches = decoder.decode_float(latents[:, start:end], caches)
        parts.append(frames)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("cuts", [(3, 6, 9), (2, 3, 7, 9), (9,)])
def test_streaming_by_chunks_is_the_decode_of_the_whole(cuts: tuple[int, ...]) -> None:
    vae = autoencoder()
    latents = torch.randn(2, 9, 16, 4, 6)
    expected = whole(vae, latents)
    assert expected.shape == (2, 33, 3, 32, 48)
    assert expected.std() > 0.2
    torch.testing.assert_close(stream(StreamingDecoder(vae), latents, cuts), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("mult", "blocks", "temporal"),
    [((1, 2, 4, 4), 2, (False, True, True)), ((1, 2), 1, (True,)), ((1, 2, 2), 1, (True, False))],
)
def test_other_shapes_of_the_decoder(mult: tuple[int, ...], blocks: int, temporal: tuple[bool, ...]) -> None:
    vae = autoencoder(mult, blocks, temporal)
    latents = torch.randn(1, 4, 16, 4, 4)
    decoder = StreamingDecoder(vae)
    torch.testing.assert_close(stream(decoder, latents, (4,)), whole(vae, latents), atol=1e-4, rtol=0)
    assert (decoder.temporal_stride, decoder.spatial_stride) == (2 ** sum(temporal), 2 ** (len(mult) - 1))


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)])
def test_three_convolutions_in_two_dimensions_are_one_in_three(kernel: tuple[int, int, int]) -> None:
    conv = torch.nn.Conv3d(5, 7, kernel)
    x = torch.randn(2, 5, 6, 4, 9)
    with CountedConvolutions() as seen:
        made = over_time(x, conv)
    expected = torch.nn.functional.conv3d(
        x.double(), conv.weight.double(), conv.bias.double(), padding=(0, kernel[1] // 2, kernel[2] // 2)
    )
    torch.testing.assert_close(made.double(), expected, atol=1e-5, rtol=0)
    assert seen.ranks == [4, 4, 4]
    with CountedConvolutions() as seen:
        half = over_time(x.bfloat16(), conv.bfloat16())
    torch.testing.assert_close(half.double(), expected, atol=0.05, rtol=0)
    assert seen.ranks == [5]


def test_caches_have_the_announced_shapes() -> None:
    decoder = StreamingDecoder(autoencoder())
    _, caches = decoder.decode_first(torch.randn(2, 1, 16, 4, 6))
    assert [tuple(held.shape) for held in caches] == decoder.cache_shapes(2, 4, 6)
    for name, held in zip(decoder.cache_names(), caches, strict=True):
        assert not held[:, :, 0].any()
        assert held[:, :, 1].any() == ("time_conv" not in name), name
    _, later = decoder.decode(torch.randn(2, 1, 16, 4, 6), caches)
    assert [held.shape for held in later] == [held.shape for held in caches]


def test_frames_are_rounded_to_bytes() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0])[None, None, None, None].expand(1, 1, 3, 1, 6)
    frames = to_uint8(x)
    assert frames.dtype == torch.uint8 and frames.shape == (1, 1, 1, 6, 3)
    assert frames[0, 0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_statistics_of_the_latents_can_be_given_and_stay_in_single_precision() -> None:
    vae = autoencoder((1, 2), 1, (True,))
    latents = torch.randn(1, 1, 16, 4, 4)
    plain = StreamingDecoder(vae, [0.0] * 16, [1.0] * 16)
    expected = vae.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
    torch.testing.assert_close(plain.decode_first_float(latents)[0], expected, atol=1e-4, rtol=0)
    decoder = StreamingDecoder(
        AutoencoderKLWan(base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    )
    before = decoder.latents_mean.clone()
    assert torch.equal(decoder.to(torch.bfloat16).latents_mean, before)
    frames, caches = decoder.decode_first(latents)
    assert decoder.dtype == torch.bfloat16 == caches[0].dtype and frames.dtype == torch.uint8


@pytest.mark.parametrize("change", [{"is_residual": True}, {"patch_size": 2}, {"latents_std": [1.0] * 3}])
def test_other_kinds_of_vae_are_refused(change: dict[str, object]) -> None:
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    vae.register_to_config(**change)
    with pytest.raises(CheckpointError):
        StreamingDecoder(vae)


def test_a_wrong_number_of_caches_is_refused() -> None:
    decoder = StreamingDecoder(autoencoder((1, 2), 1, (True,)))
    latents = torch.randn(1, 1, 16, 4, 4)
    _, caches = decoder.decode_first(latents)
    with pytest.raises(UsageError, match="too few"):
        decoder.decode(latents, caches[:-1])
    with pytest.raises(UsageError, match="too many"):
        decoder.decode(latents, [*caches, caches[0]])


@pytest.mark.slow
def test_decode_traces_with_any_batch_and_frames() -> None:
    decoder, dim = StreamingDecoder(autoencoder((1, 2), 1, (True,))), torch.export.Dim

    class Decode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder

        def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
            frames, new = self.decoder.decode_float(latents, caches)
            return frames, *new

    def inputs(batch: int, frames: int) -> tuple[Tensor, ...]:
        _, caches = decoder.decode_first(torch.randn(batch, 1, 16, 4, 4))
        return torch.randn(batch, frames, 16, 4, 4), *caches

    batch, frames = dim("batch"), dim("frames")
    given = inputs(2, 3)
    shapes = {"latents": {0: batch, 1: frames}, "caches": ({0: batch},) * (len(given) - 1)}
    program = torch.export.export(Decode(), given, dynamic_shapes=shapes).module()
    other = inputs(3, 5)
    for actual, expected in zip(program(*other), Decode()(*other), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
