"""The VAE's decoder as a stream: diffusers' AutoencoderKLWan with its causal cache as explicit tensors.

diffusers decodes one latent frame after another and keeps, per causal convolution, the last two input frames
in a Python list. Here the same modules see any number of frames at once, and the cache goes in and out:

- a causal convolution over time takes the two frames before this call as prefix, zeros before the video;
- the very first latent frame skips the temporal upsamplers, whose caches then hold zeros. So the frames after
  it never see it there. That is how Wan was trained; `decode_first` is this case.

Latents are [B,F,C,h,w] as the backbone makes them: normalised per channel. Caches are
[B,channels,2,rows,columns].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftvideo.runtime.errors import CheckpointError, UsageError

from .casts import scaled

PREFIX = 2
"""Frames that a causal convolution of kernel 3 looks back."""
NARROW = 16
"""Channels below which ONNX Runtime is no faster at three convolutions than at one in three dimensions; torch is."""
EPSILON = 1e-12
"""Least length of a pixel's channels that its norm divides by, as in torch's `normalize`."""


class StreamingDecoder(nn.Module):
    """post_quant_conv and decoder of an AutoencoderKLWan (Wan 2.1 kind), decoding a stream chunk by chunk.

    vae: a `diffusers.AutoencoderKLWan`; its modules are shared, not copied. latents_mean, latents_std: per channel,
    else those of its config.
    Raises CheckpointError for the residual or patchified decoders of later versions.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(
        self,
        vae: Any,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        config = vae.config
        mean = config.latents_mean if latents_mean is None else latents_mean
        std = config.latents_std if latents_std is None else latents_std
        if getattr(config, "is_residual", False) or getattr(config, "patch_size", None) is not None:
            raise CheckpointError(
                f"this VAE has is_residual={config.is_residual} and patch_size={config.patch_size}: "
                "only the Wan 2.1 decoder is supported (is_residual false, no patch_size); use its VAE"
            )
        for name, values in (("latents_mean", mean), ("latents_std", std)):
            numbers = isinstance(values, list | tuple) and all(
                isinstance(value, int | float) for value in values
            )
            if not numbers or len(values) != config.z_dim:
                raise CheckpointError(
                    f"{name} is {values!r}: the VAE needs {config.z_dim} numbers; correct its config.json or model.json"
                )
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise CheckpointError(
                f"latents_mean is {mean!r} and latents_std {std!r}: finite numbers are needed, the latter positive; "
                "correct its config.json or model.json"
            )
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder.eval()
        self._statistics = {"latents_mean": tuple(mean), "latents_std": tuple(std)}
        kept = {name: value for name, value in dict(config).items() if not name.startswith("_")}
        self.config: dict[str, Any] = kept | self._statistics
        """What an AutoencoderKLWan with these statistics is built from."""
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))
        self.temporal_stride = 2 ** sum(bool(flag) for flag in config.temperal_downsample)
        self.spatial_stride = 2 ** (len(config.dim_mult) - 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StreamingDecoder:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in self._statistics.items():  # stay float32 when the weights become bfloat16
            moved = self._buffers[name]
            self._buffers[name] = torch.tensor(
                values, dtype=torch.float32, device=moved.device if moved is not None else None
            )
        return self

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights and of the caches."""
        dtype: torch.dtype = self.post_quant_conv.weight.dtype
        return dtype

    @property
    def latent_channels(self) -> int:
        """C: channels of a latent."""
        return int(self.decoder.conv_in.in_channels)

    def decode_first(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The first latent frame [B,1,C,h,w] -> frames uint8 [B,1,H,W,3] and the caches."""
        x, caches = self.decode_first_float(latents)
        return to_uint8(x), caches

    def decode(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Any later latents [B,F,C,h,w] -> frames uint8 [B,4F,H,W,3] and the new caches."""
        x, caches = self.decode_float(latents, caches)
        return to_uint8(x), caches

    def decode_first_float(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`decode_first` with float frames [B,1,3,H,W], clamped to -1..1."""
        return _Pass(None).run(self, latents)

    def decode_float(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """`decode` with float frames [B,4F,3,H,W], clamped to -1..1."""
        return _Pass(caches).run(self, latents)

    def cache_names(self) -> list[str]:
        """The module behind each cache, in order."""
        names = {module: name for name, module in self.decoder.named_modules()}
        return [names[module] for module in self._cached()]

    def _cached(self) -> list[nn.Module]:
        found: list[nn.Module] = [self.decoder.conv_in]
        for resnet in self.decoder.mid_block.resnets:
            found += [resnet.conv1, resnet.conv2]
        for up in self.decoder.up_blocks:
            for resnet in up.resnets:
                found += [resnet.conv1, resnet.conv2]
            if up.upsamplers is not None and up.upsamplers[0].mode == "upsample3d":
                found.append(up.upsamplers[0].time_conv)
        return [*found, self.decoder.conv_out]

    def cache_shapes(self, batch: int, height: int, width: int) -> list[tuple[int, ...]]:
        """Shapes of the caches for latents of height x width, in order."""
        shapes: list[tuple[int, ...]] = []
        for name, module in zip(self.cache_names(), self._cached(), strict=True):
            scale = 1
            if name.startswith("up_blocks."):
                scale = 2 ** int(name.split(".")[1])
            elif name == "conv_out":
                scale = self.spatial_stride
            assert isinstance(module, nn.Conv3d)
            shapes.append((batch, module.in_channels, PREFIX, height * scale, width * scale))
        return shapes


def to_uint8(x: Tensor) -> Tensor:
    """Frames [B,F,3,H,W] in -1..1 -> uint8 [B,F,H,W,3]."""
    pixels = ((x.float() + 1) / 2).clamp(0, 1) * 255
    # The cast comes last: TensorRT takes uint8 for a network's outputs only. Contiguous, as the outputs of graphs are.
    return pixels.round().permute(0, 1, 3, 4, 2).contiguous().to(torch.uint8)


class _Pass:
    """One walk over the decoder's modules: takes the caches in order and gives the new ones likewise."""

    def __init__(self, caches: Sequence[Tensor] | None) -> None:
        self.first = caches is None
        self.old = list(caches or ())
        self.new: list[Tensor] = []

    def run(self, model: StreamingDecoder, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """latents [B,F,C,h,w] -> clamped frames [B,frames,3,H,W] in the weights' dtype, new caches."""
        decoder = model.decoder
        mean, std = model.latents_mean.float()[:, None, None], model.latents_std.float()[:, None, None]
        z = latents.float() * std + mean
        x = self.convolve(decoder.conv_in, model.post_quant_conv(z.to(model.dtype).transpose(1, 2)))
        middle = decoder.mid_block
        x = self.residual(middle.resnets[0], x)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = self.residual(resnet, x if attention is None else attention(x))
        for up in decoder.up_blocks:
            for resnet in up.resnets:
                x = self.residual(resnet, x)
            for upsampler in up.upsamplers or ():
                x = self.upsample(upsampler, x)
        x = self.convolve(decoder.conv_out, decoder.nonlinearity(normed(decoder.norm_out, x)))
        if self.old:
            raise UsageError(f"{len(self.old)} caches too many: pass the list that the last call returned")
        return x.clamp(-1, 1).transpose(1, 2), self.new

    def convolve(self, conv: Any, x: Tensor) -> Tensor:
        """A causal convolution of kernel 3 in time over [B,C,F,rows,columns], and its cache."""
        x = torch.cat((self.take(x), x), dim=2)
        self.new.append(x[:, :, -PREFIX:])
        return over_time(x, conv)

    def take(self, x: Tensor) -> Tensor:
        """The next cache: zeros before the first frame."""
        if self.first:
            return x.new_zeros(x.shape[0], x.shape[1], PREFIX, x.shape[3], x.shape[4])
        if not self.old:
            raise UsageError("too few caches: pass the list that the last call returned")
        return self.old.pop(0)

    def residual(self, block: Any, x: Tensor) -> Tensor:
        """A WanResidualBlock."""
        y = self.convolve(block.conv1, block.nonlinearity(normed(block.norm1, x)))
        y = self.convolve(block.conv2, block.nonlinearity(normed(block.norm2, y)))
        shortcut: Tensor = block.conv_shortcut(x)
        return y + shortcut

    def upsample(self, module: Any, x: Tensor) -> Tensor:
        """A WanResample: twice the frames (not of the first frame), twice the rows and columns."""
        if module.mode == "upsample3d":
            if self.first:
                self.new.append(self.take(x))
            else:
                y = self.convolve(module.time_conv, x)  # [B,2C,F,...]: the halves are the even and odd frames
                x = torch.stack(y.chunk(2, dim=1), dim=3).flatten(2, 3)
        frames, conv = x.transpose(1, 2), module.resample[1]
        larger = doubled(frames.flatten(0, 1), conv.weight, conv.bias)
        return torch.unflatten(larger, 0, (frames.shape[0], -1)).transpose(1, 2)


def over_time(x: Tensor, conv: Any) -> Tensor:
    """A Conv3d of kernel 3 in time, which is not padded: x [B,C,F+2,rows,columns] -> [B,O,F,rows,columns].

    On a CPU, ONNX Runtime and torch are fast at convolutions in two dimensions only: there, and so in graphs of
    float32, it is the sum of three. What runs on a GPU is better off with one, whose sums stay in registers.
    """
    _, height, width = conv.kernel_size
    weight, padding = conv.weight, (height // 2, width // 2)
    if not _flat(x, conv.in_channels):
        return functional.conv3d(x, weight, conv.bias, padding=(0, *padding))
    frames = x.transpose(1, 2)
    count = frames.shape[1] - PREFIX
    y = functional.conv2d(frames[:, :count].flatten(0, 1), weight[:, :, 0], conv.bias, padding=padding)
    for tap in range(1, PREFIX + 1):
        shown = frames[:, tap : tap + count].flatten(0, 1)
        y = y + functional.conv2d(shown, weight[:, :, tap], padding=padding)
    return torch.unflatten(y, 0, (x.shape[0], -1)).transpose(1, 2)


def _flat(x: Tensor, channels: int) -> bool:
    narrow = channels < NARROW and torch.onnx.is_in_onnx_export()
    return x.device.type == "cpu" and x.dtype == torch.float32 and not narrow


def normed(norm: Any, x: Tensor) -> Tensor:
    """A WanRMS_norm over the channels of x [B,C,F,rows,columns]; float32 inside, cast back."""
    length = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)
    y = scaled(x, norm.scale / length.clamp_min(EPSILON)).to(x.dtype)
    result: Tensor = y * norm.gamma
    return result


def doubled(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows and columns repeated twice, then a convolution: x [N,C,H,W], weight [O,C,3,3], bias [O] -> [N,O,2H,2W].

    Under the nine taps of an output lie only four different inputs; which taps share one depends on whether its row
    and column are even or odd. So one 2x2 convolution of x as it is makes the four kinds of output, each as O
    channels, with 4/9 of the multiplications; nothing repeated is written.
    """
    height, width = x.shape[2:]
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    kinds = _pairs(_pairs(exact, -2), -1).flatten(0, 2).to(weight.dtype)  # channels: column, row, O
    y = functional.conv2d(x, kinds, bias.repeat(4), padding=1)
    y = y.permute(0, 2, 3, 1)  # on a GPU, as they lie in memory
    parts = [
        part[:, row : row + height, column : column + width]
        for (column, row), part in zip(product((0, 1), (0, 1)), y.chunk(4, dim=3), strict=True)
    ]
    rows = [torch.stack(parts[row::2], dim=3) for row in (0, 1)]
    return torch.stack(rows, dim=2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def _pairs(weight: Tensor, dim: int) -> Tensor:
    """Three taps along `dim` -> two for even outputs and two for odd ones, stacked in a new first dimension."""
    first, second, third = weight.unbind(dim)
    even, odd = (first, second + third), (first + second, third)
    return torch.stack((torch.stack(even, dim), torch.stack(odd, dim)))
