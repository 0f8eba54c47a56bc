"""The causal Wan backbone with its memory outside (algorithm.md, section 2).

Parameters carry the names of the original Wan checkpoints. The model keeps no cache: self-attention hands
queries and fresh keys and values to a callable, `attend`, that decides which keys are seen. The exported
graph passes a custom op there, the reference engine a gather over its cache, training a block mask.

Symbols: B batch, F latent frames, P tokens per frame, D width, n heads, d = D/n, L layers, T text length.
Weights may be bfloat16 or float16: norms, modulation, rotary embedding and time MLP compute in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from swiftvideo.runtime.errors import PromptError, SettingsError
from swiftvideo.runtime.geometry import Geometry

from .casts import added, scaled

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B,N,n,d], k [B,K,n,d], v [B,K,n,d]) -> o [B,N,n,d]."""

Tables = tuple[Tensor, Tensor]
"""(cos, sin), float32, one row per token or frame."""

ROPE_BASE = 10000.0
MOST_LAYERS = 1000
"""Of a network: more than any has, and few enough to be built before its weights are found missing."""


@dataclass(frozen=True, slots=True)
class BackboneConfig:
    """Shapes of a backbone."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    text_len: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.dim, self.ffn_dim, self.num_heads, self.num_layers, self.text_dim, self.text_len) < 1:
            raise SettingsError(f"every size of a backbone must be positive: {self}")
        if self.num_layers > MOST_LAYERS:
            raise SettingsError(f"num_layers is {self.num_layers}: it must be at most {MOST_LAYERS}")
        if self.dim % self.num_heads or self.head_dim % 2 or self.head_dim < 6:
            raise SettingsError(
                f"dim {self.dim} with {self.num_heads} heads: the head's width must be even and at least 6, "
                "for each of the three rotary axes needs a pair"
            )
        if self.freq_dim % 2 or self.freq_dim < 2:
            raise SettingsError(f"freq_dim is {self.freq_dim}: it must be even")
        whole = len(self.patch) == 3 and all(type(size) is int and size > 0 for size in self.patch)
        if not whole or self.patch[0] != 1:
            raise SettingsError(
                f"patch is {self.patch}: three whole numbers are needed, the first of them 1, for only one latent "
                "frame per patch is supported"
            )
        if not 0 < self.eps < math.inf:
            raise SettingsError(f"eps is {self.eps}: a positive number is needed")

    @property
    def head_dim(self) -> int:
        """d: width of a head."""
        return self.dim // self.num_heads

    @property
    def space_pairs(self) -> int:
        """Rotary pairs of a head for the row; as many for the column."""
        return self.head_dim // 2 // 3

    @property
    def time_pairs(self) -> int:
        """Rotary pairs of a head for the time."""
        return self.head_dim // 2 - 2 * self.space_pairs

    def geometry(self, latent_height: int, latent_width: int, **settings: int) -> Geometry:
        """Geometry at a latent size; `settings` are Geometry's window, sink, chunk and so on."""
        return Geometry(
            layers=self.num_layers,
            heads=self.num_heads,
            head_dim=self.head_dim,
            latent_channels=self.in_channels,
            latent_height=latent_height,
            latent_width=latent_width,
            text_len=self.text_len,
            text_dim=self.text_dim,
            patch=self.patch,
            **settings,
        )


PRESETS: dict[str, BackboneConfig] = {
    "wan2.1-t2v-1.3b": BackboneConfig(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096, text_len=512
    ),
}


def time_tables(frames: Tensor, pairs: int) -> Tables:
    """Time part of the rotary embedding.

    frames: latent frame indices [..., F], any dtype; pairs: `BackboneConfig.time_pairs`.
    Returns cos, sin, float32 [..., F, pairs], computed in float64. The numpy twin for the runtime is
    `swiftvideo.runtime.positions.time_tables`.
    """
    angles = frames.to(torch.float64).unsqueeze(-1) * _frequencies(pairs, frames.device)
    return angles.cos().float(), angles.sin().float()


def _frequencies(pairs: int, device: torch.device | None = None) -> Tensor:
    """10000^(-j/pairs), float64 [pairs]."""
    exponents = torch.arange(pairs, dtype=torch.float64, device=device) / pairs
    return torch.exp(exponents * -math.log(ROPE_BASE))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotate interleaved pairs (2j, 2j+1) of x [B,N,n,d] by cos, sin [B,N,1,d/2]; [B,N,n,d] in `dtype`.

    The halves are cast before they are stacked: Inductor writes what is stacked, and would write it in float32.
    Swapping the pairs with `flip` would fuse wholly, but ONNX Runtime takes three times as long for it.
    """
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)
    halves = (even * cos - odd * sin).to(dtype), (even * sin + odd * cos).to(dtype)
    return torch.stack(halves, dim=-1).flatten(-2)


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every key: q [B,N,n,d], k, v [B,K,n,d] -> [B,N,n,d]; scale 1/sqrt(d)."""
    o: Tensor = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return o.transpose(1, 2)


def attend_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Attend` of a forward without a cache: the fresh keys, all of them."""
    return full_attention(q, k, v)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """A Linear in float32, whatever its weights' dtype."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    return functional.linear(x.float(), weight.float(), bias.float())


class RMSNorm(nn.Module):
    """RMS norm over the last axis with a weight; float32 inside and out."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim] -> float32 [..., dim]."""
        factor = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return scaled(x, factor) * self.weight.float()


class Attention(nn.Module):
    """Projections of one attention, with q and k normalised over the whole width."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, config.eps)
        self.norm_k = RMSNorm(dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B,N,D] -> [B,N,n,d]."""
        return torch.unflatten(x, -1, (self.heads, -1))

    def query(self, x: Tensor) -> Tensor:
        """Normalised queries before any rotation, float32: x [B,N,D] -> [B,N,n,d]."""
        return self.split(self.norm_q(self.q(x)))

    def key(self, x: Tensor) -> Tensor:
        """Normalised keys before any rotation, float32: x [B,N,D] -> [B,N,n,d]."""
        return self.split(self.norm_k(self.k(x)))

    def value(self, x: Tensor) -> Tensor:
        """Values: x [B,N,D] -> [B,N,n,d]."""
        return self.split(self.v(x))

    def output(self, o: Tensor) -> Tensor:
        """Output projection: o [B,N,n,d] -> [B,N,D]."""
        projected: Tensor = self.o(o.flatten(2))
        return projected


class Block(nn.Module):
    """One transformer block (algorithm.md, 2.4), in pieces, so that attention can be anything."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def modulations(self, e0: Tensor) -> tuple[Tensor, ...]:
        """m_0..m_5, float32 [B,F,1,D] each, from e0 [B,F,6,D]."""
        return torch.unbind((self.modulation.float() + e0.float()).unsqueeze(3), dim=2)

    def qkv(self, x: Tensor, e0: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k after the rotary embedding, v: [B,F*P,n,d] in x's dtype.

        x [B,F,P,D]; e0 [B,F,6,D] from `CausalWanModel.time_embed`; cos, sin [B,F*P,1,d/2].
        """
        m = self.modulations(e0)
        y = modulated(x, m[0], m[1], self.eps).flatten(1, 2)
        attention = self.self_attn
        q = rotate(attention.query(y), cos, sin, x.dtype)
        k = rotate(attention.key(y), cos, sin, x.dtype)
        return q, k, attention.value(y)

    def qkv_into(
        self, x: Tensor, e0: Tensor, cos: Tensor, sin: Tensor, k_out: Tensor, v_out: Tensor
    ) -> Tensor:
        """`qkv` with k and v written into k_out and v_out [B,F*P,n,d]; returns q. An engine may put its own here."""
        q, k, v = self.qkv(x, e0, cos, sin)
        k_out.copy_(k)
        v_out.copy_(v)
        return q

    def after_self(self, x: Tensor, o: Tensor, e0: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,F,P,D] plus the gated self-attention o [B,F*P,n,d]; queries of the cross-attention, shaped as o."""
        x = _gated(x, torch.unflatten(self.self_attn.output(o), 1, (-1, x.shape[2])), self.modulations(e0)[2])
        weight, bias = self.norm3.weight.float(), self.norm3.bias.float()
        y = functional.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps).to(x.dtype)
        return x, self.cross_attn.query(y.flatten(1, 2)).to(x.dtype)

    def after_cross(self, x: Tensor, o: Tensor, e0: Tensor) -> Tensor:
        """x [B,F,P,D] plus the cross-attention o [B,F*P,n,d], which has no gate; then the gated feed-forward."""
        m = self.modulations(e0)
        x = x + torch.unflatten(self.cross_attn.output(o), 1, (-1, x.shape[2]))
        return _gated(x, self.ffn(modulated(x, m[3], m[4], self.eps)), m[5])

    def cross_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt: context [B,T,D] -> [B,T,n,d] each, in its dtype."""
        return self.cross_attn.key(context).to(context.dtype), self.cross_attn.value(context)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LN(x)(1+scale)+shift in float32, cast back: x [B,F,P,D], shift and scale [B,F,1,D]."""
    return (functional.layer_norm(x.float(), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def _gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y gate in float32, cast back: x, y [B,F,P,D], gate [B,F,1,D]."""
    return added(x, y.float() * gate).to(x.dtype)


class Head(nn.Module):
    """Final projection to patches (algorithm.md, 2.8)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = nn.Linear(config.dim, math.prod(config.patch) * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B,F,P,D], e [B,F,D] -> tokens [B,F,P,ph*pw*C]."""
        shift, scale = (self.modulation.float() + e.float().unsqueeze(2)).unsqueeze(3).unbind(2)
        tokens: Tensor = self.head(modulated(x, shift, scale, self.eps))
        return tokens


class CausalWanModel(nn.Module):
    """The causal Wan backbone. Tensors in and out are documented per method; see the module's docstring."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, stride=config.patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the weights, of K and V and of the flow."""
        return self.patch_embedding.weight.dtype

    def embed_patches(self, latents: Tensor) -> Tensor:
        """latents [B,F,C,h,w] -> tokens [B,F*P,D] in raster order (frame, row, column)."""
        _, height, width = self.config.patch
        x = torch.unflatten(torch.unflatten(latents.to(self.dtype), 4, (-1, width)), 3, (-1, height))
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)  # [B, F*rows*columns, C*ph*pw]
        weight = self.patch_embedding.weight.flatten(1)
        return functional.linear(x, weight, self.patch_embedding.bias)

    def unpatch(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Head's tokens [B,F,rows*columns,ph*pw*C] -> [B,F,C,h,w]; in a token the channel is fastest."""
        _, height, width = self.config.patch
        x = torch.unflatten(tokens, 3, (height, width, self.config.out_channels))
        x = torch.unflatten(x, 2, (rows, columns))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def sinusoid(self, t: Tensor) -> Tensor:
        """[cos(t w_k), sin(t w_k)], float32 [..., freq_dim], computed in float64; t [...] in 0..1000."""
        angles = t.to(torch.float64).unsqueeze(-1) * _frequencies(self.config.freq_dim // 2, t.device)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()

    def time_embed(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """t [B,F] in 0..1000 -> e [B,F,D], e0 [B,F,6,D]; float32 whatever the weights."""
        first, second = self.time_embedding[0], self.time_embedding[2]
        e = _linear(second, functional.silu(_linear(first, self.sinusoid(t))))
        e0 = _linear(self.time_projection[1], functional.silu(e))
        return e, torch.unflatten(e0, -1, (6, self.config.dim))

    def pad_text(self, embeds: Tensor) -> Tensor:
        """embeds [B,T,text_dim], T <= text_len -> [B,text_len,text_dim], zeros appended."""
        missing = self.config.text_len - embeds.shape[1]
        if missing < 0:
            raise PromptError(
                f"a prompt of {embeds.shape[1]} tokens: this model takes {self.config.text_len}; shorten it"
            )
        return functional.pad(embeds, (0, 0, 0, missing))

    def embed_text(self, embeds: Tensor) -> Tensor:
        """embeds [B,T,text_dim], T <= text_len, zero where padded -> context [B,text_len,D]."""
        context: Tensor = self.text_embedding(self.pad_text(embeds).to(self.dtype))
        return context

    def signature(self, embeds: Tensor, context: Tensor | None = None) -> Tensor:
        """Prompt signature (algorithm.md, section 4), float32 [B,D].

        embeds [B,T,text_dim]; context: `embed_text(embeds)` where it is already there.
        """
        if context is None:
            context = self.embed_text(embeds)
        used = (self.pad_text(embeds) != 0).any(-1, keepdim=True).float()  # [B,text_len,1]
        return (context.float() * used).sum(1) / used.sum(1).clamp(min=1.0)

    def cross_kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt for every layer: context [B,text_len,D] -> [L,B,text_len,n,d] each."""
        pairs = [block.cross_kv(context) for block in self.layers]
        return torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs])

    def space_rope(self, rows: int, columns: int, device: torch.device | None = None) -> Tables:
        """Row and column part of the rotary embedding on a grid of patches.

        Returns cos, sin, float32 [P, 2*space_pairs], rows first, computed in float64.
        """
        frequencies = _frequencies(self.config.space_pairs, device)
        row = torch.arange(rows, dtype=torch.float64, device=device)[:, None, None] * frequencies
        column = torch.arange(columns, dtype=torch.float64, device=device)[None, :, None] * frequencies
        shape = (rows, columns, self.config.space_pairs)
        angles = torch.cat((row.expand(shape), column.expand(shape)), dim=-1).flatten(0, 1)
        return angles.cos().float(), angles.sin().float()

    def rope(self, time_cos: Tensor, time_sin: Tensor, space: Tables) -> Tables:
        """Tables of all tokens, [B,F*P,1,d/2]: time_cos, time_sin [B,F,time_pairs], space as `space_rope`."""

        def join(time: Tensor, grid: Tensor) -> Tensor:
            shape = (time.shape[0], time.shape[1], grid.shape[0])
            parts = (time.unsqueeze(2).expand(*shape, -1), grid.expand(*shape, -1))
            return torch.cat(parts, dim=-1).flatten(1, 2).unsqueeze(2)

        return join(time_cos, space[0]), join(time_sin, space[1])

    def forward(
        self,
        latents: Tensor,
        e: Tensor,
        e0: Tensor,
        time_cos: Tensor,
        time_sin: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        attend: Attend = attend_all,
        cross_attend: Attend = attend_all,
        space: Tables | None = None,
        fresh: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over F frames.

        latents [B,F,C,h,w]; e [B,F,D] and e0 [B,F,6,D] from `time_embed`; time_cos, time_sin float32
        [B,F,time_pairs]; cross_k, cross_v [L,B,text_len,n,d] from `cross_kv`; attend and cross_attend choose
        the keys of self- and cross-attention; space: `space_rope` where it is already there; fresh: where K and V
        of these frames go, written before `attend` is called, instead of new tensors.
        Returns flow [B,F,C,h,w], and K (rotated) and V of these frames, [L,B,F*P,n,d], in the weights' dtype.
        """
        rows, columns = latents.shape[3] // self.config.patch[1], latents.shape[4] // self.config.patch[2]
        if space is None:
            space = self.space_rope(rows, columns, latents.device)
        cos, sin = self.rope(time_cos, time_sin, space)
        x = torch.unflatten(self.embed_patches(latents), 1, (-1, rows * columns))
        keys, values = [], []
        for layer, block in enumerate(self.layers):
            if fresh is None:
                q, k, v = block.qkv(x, e0, cos, sin)
                keys.append(k)
                values.append(v)
            else:
                k, v = fresh[0][layer], fresh[1][layer]
                q = block.qkv_into(x, e0, cos, sin, k, v)
            x, q = block.after_self(x, attend(layer, q, k, v), e0)
            x = block.after_cross(x, cross_attend(layer, q, cross_k[layer], cross_v[layer]), e0)
        flow = self.unpatch(self.head(x, e), rows, columns)
        made_k, made_v = fresh or (torch.stack(keys), torch.stack(values))
        return flow, made_k, made_v
