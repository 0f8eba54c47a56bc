"""What an engine is: the networks of a bundle and the tensors of a session, behind one small interface.

The policy (memory.py) decides which rows are keys; an engine runs the graphs and owns the arrays. Arrays that cross
this interface are numpy. Symbols: B batch, F latent frames, P tokens a frame, L layers, R cache rows, T text length,
n heads, d head width, D = n*d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import EngineError
from .geometry import Geometry

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Frames = NDArray[np.uint8]
"""Video: uint8 [B,n,H,W,3], RGB."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt that an engine has encoded; only that engine can use it.

    Raises EngineError where the signature is not finite: all video from it would be NaN.
    """

    text: str
    signature: Float32
    """[B,D] (algorithm.md, section 4)."""
    cross: Any
    """K and V of the text for every layer, as the engine keeps them."""

    def __post_init__(self) -> None:
        if not np.isfinite(self.signature).all():
            raise EngineError(
                "a prompt's signature is not finite: the text encoder overflowed or the weights are damaged; "
                "run `swiftvideo verify` on the bundle"
            )


class EngineSession(Protocol):
    """Tensors of one session: cache rows, the chunk being denoised, the VAE's causal cache."""

    def load(self, latents: Float32) -> None:
        """Take latents [B,F,C,h,w] as the input of the next `denoise`."""

    def denoise(
        self,
        step: int,
        noise: Float32 | None,
        time_cos: Float32,
        time_sin: Float32,
        segments: Int32,
        prompt: Prompt,
    ) -> None:
        """Run the backbone on the loaded latents; keep x0; load the re-noised latents.

        step: 0 to steps - 1, or steps for the context pass. noise: [B,F,C,h,w]; None for the last step and the
        context pass, after which x0 itself is loaded and the fresh K and V are kept for `commit`. time_cos, time_sin:
        [F,time_pairs]. segments: [6,2] (start, length) in the row space [cache 0..R | fresh R..R+F*P].
        """

    def x0(self) -> Float32:
        """Clean latents of the last `denoise`, [B,F,C,h,w]; the caller may keep them."""

    def commit(self, ranges: Int32) -> None:
        """Copy fresh K and V of the last `denoise`, one without noise, into the cache.

        ranges: [n,3] of (fresh start, row start, length).
        """

    def inject(
        self, spans: Int32, old: Float32, new: Float32, rho: Float32, mix: float
    ) -> tuple[Float32, Float32]:
        """Semantic injection from the cache's V (algorithm.md, sections 5 and 6).

        spans: [5,3,2]; old, new: signatures [B,D]; rho: [B]. Returns bridge [L,B,2,n,d] (sink, recent) and anchor
        [L,B,1,n,d], both unscaled.
        """

    def write_memory(self, row: int, tokens: Float32) -> None:
        """K = V = tokens [L,B,k,n,d] in rows row to row + k, before the sink; not rotated by `place_memory`."""

    def place_sink(self, cos: Float64, sin: Float64) -> None:
        """Set the sink's K to the committed ones, rotated in time by cos, sin [time_pairs].

        The committed K are kept apart, so that rotations never add up their errors.
        """

    def place_memory(self, cos: Float64, sin: Float64) -> None:
        """Set K of the rows before the sink to their V, rotated in time by cos, sin [time_pairs]."""

    def decode(self, latents: Float32) -> Frames:
        """Video of the next latents [B,F,C,h,w] of the stream; the stream's first latent frame gives one frame."""

    def export_state(self) -> dict[str, NDArray[Any]]:
        """All arrays that a later `import_state` needs, by name: copies, or what no later call changes.

        float32, float16, or uint16 for the bits of bfloat16, which numpy does not have: as the engine keeps them, for
        they may be gigabytes. Raises OutOfMemoryError where there is no room for them.
        """

    def import_state(self, state: dict[str, NDArray[Any]]) -> None:
        """Take the arrays of an `export_state` of an equal engine.

        Raises UsageError where they do not fit; nothing has changed then.
        """

    def close(self) -> None:
        """Free the arrays; twice is fine."""


class Engine(Protocol):
    """The networks of a bundle, shared by many sessions. `encode` and `open` may be called from any thread."""

    @property
    def name(self) -> str:
        """Short name, such as "onnxruntime"."""

    @property
    def geometry(self) -> Geometry:
        """Shapes of the model."""

    def encode(self, ids: Int64, mask: Int64, text: str) -> Prompt:
        """Encode token ids [B,T] with mask [B,T] (1 where used)."""

    def condition(self, embeds: Float32, text: str = "") -> Prompt:
        """Prompt from text embeddings [B,T,text_dim], zero where padded."""

    def open(self, batch: int = 1) -> EngineSession:
        """A new, empty session. Raises OutOfMemoryError when its arrays do not fit."""

    def close(self) -> None:
        """Free the weights; twice is fine."""
