"""Frozen descriptions of a model's shapes and of the policy's settings (algorithm.md, section 9)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from .errors import SettingsError
from .plain import fits

Policy = Literal["swift", "recache", "keep", "cut"]
Mode = Literal["bridge-only", "bridge+micro-recache", "full-recache", "keep", "cut"]
Positions = Literal["absolute", "windowed"]


_POSITIVE = (
    *("layers", "heads", "head_dim", "latent_channels", "text_len", "text_dim"),
    *("temporal_stride", "spatial_stride", "fps", "steps"),
)
LARGEST = 1 << 16
"""Of every size in a geometry: more than any model's, and so small that their products are still numbers of bytes."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a bundle. Frames are latent frames unless a name says video."""

    layers: int
    heads: int
    head_dim: int
    latent_channels: int
    latent_height: int
    latent_width: int
    text_len: int
    text_dim: int
    patch: tuple[int, int, int] = (1, 2, 2)
    window: int = 12
    """W: frames that a cache holds, sink included."""
    sink: int = 3
    """S: first frames, which stay in the cache for ever."""
    chunk: int = 3
    """c: frames that are denoised together."""
    max_anchors: int = 4
    temporal_stride: int = 4
    spatial_stride: int = 8
    fps: int = 16
    """Video frames per second."""
    steps: int = 4
    """Denoising steps; `step == steps` is the context pass."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if max(value if isinstance(value, tuple) else (value,), default=0) > LARGEST:
                raise SettingsError(f"{name} is {value}: it must be at most {LARGEST}")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.head_dim % 2:
            raise SettingsError(f"head_dim is {self.head_dim}: rotary embeddings need an even width")
        if self.patch[0] != 1 or min(self.patch) < 1:
            raise SettingsError(
                f"patch is {self.patch}: it must be (1, h, w), one latent frame, with h and w positive"
            )
        for axis, size, patch in (
            ("latent_height", self.latent_height, self.patch[1]),
            ("latent_width", self.latent_width, self.patch[2]),
        ):
            if size <= 0 or size % patch:
                raise SettingsError(f"{axis} is {size}: it must be a positive multiple of the patch, {patch}")
        if self.sink > self.chunk:
            raise SettingsError(
                f"sink is {self.sink} and chunk is {self.chunk}: a sink larger than a chunk would read "
                "cache rows that the first chunk has not written; lower the sink or raise the chunk"
            )
        if min(self.sink, self.max_anchors) < 0 or self.chunk < 1 or self.window < self.sink + self.chunk:
            raise SettingsError(
                f"window {self.window}, sink {self.sink}, chunk {self.chunk} and max_anchors {self.max_anchors}: "
                "need chunk >= 1, sink >= 0, max_anchors >= 0 and window >= sink + chunk"
            )

    @property
    def dim(self) -> int:
        """D: width of the backbone."""
        return self.heads * self.head_dim

    @property
    def frame_tokens(self) -> int:
        """P: tokens per latent frame."""
        return (self.latent_height // self.patch[1]) * (self.latent_width // self.patch[2])

    @property
    def memory_rows(self) -> int:
        """Rows before the sink: two of the bridge, then one per anchor."""
        return 2 + self.max_anchors

    @property
    def rows(self) -> int:
        """R: rows of a layer's cache: [2 bridge | max_anchors | sink S*P | ring (W-S)*P]."""
        return self.memory_rows + self.window * self.frame_tokens

    @property
    def time_pairs(self) -> int:
        """Pairs of a head that carry the time position (algorithm.md 2.7)."""
        half = self.head_dim // 2
        return half - 2 * (half // 3)

    @property
    def height(self) -> int:
        """Video height in pixels."""
        return self.latent_height * self.spatial_stride

    @property
    def width(self) -> int:
        """Video width in pixels."""
        return self.latent_width * self.spatial_stride

    def video_frames(self, start: int, frames: int) -> int:
        """Video frames of latent frames [start, start + frames): the very first gives one, any other four."""
        return video_frames(start, frames, self.temporal_stride)


def video_frames(start: int, frames: int, stride: int) -> int:
    """`Geometry.video_frames` of a VAE that makes `stride` video frames of a latent one."""
    return frames * stride - (stride - 1 if start == 0 and frames else 0)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


_WORDS = {bool: "True or False", int: "a whole number", float: "a number"}


def _check_types(settings: Any, name: str) -> None:
    """Whole numbers, numbers and switches where they are declared; None where that is."""
    for field_, hint in get_type_hints(type(settings)).items():
        value, kind = getattr(settings, field_), (get_args(hint) or (hint,))[0]
        _check(fits(hint, value), f"{name}.{field_} is {value!r}: use {_WORDS[kind]}")


LIMIT = 1e6
"""Scales of tokens stay below it, so that products are finite, and so do all settings that come over a network."""


def _check_scale(name: str, value: float) -> None:
    _check(0 < value < LIMIT, f"{name} is {value}: it must be positive and below a million")


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """Semantic bridge (algorithm.md, sections 5 and 8). `micro` None means one chunk."""

    enabled: bool = True
    recent: int = 2
    micro: int | None = None
    tau_low: float = 0.7
    tau_high: float = 0.8
    scale: float = 1.0
    decay: float = 0.85

    def __post_init__(self) -> None:
        _check_types(self, "bridge")
        _check(self.recent >= 1, f"bridge.recent is {self.recent}: use at least 1 frame")
        _check(
            self.micro is None or self.micro >= 1,
            f"bridge.micro is {self.micro}: use 1 or more, or None",
        )
        _check(
            0 <= self.tau_low <= self.tau_high,
            f"bridge.tau_low {self.tau_low}, tau_high {self.tau_high}: need 0 <= tau_low <= tau_high",
        )
        _check_scale("bridge.scale", self.scale)
        _check(0 <= self.decay <= 1, f"bridge.decay is {self.decay}: it must be in [0, 1]")


@dataclass(frozen=True, slots=True)
class WindowSettings:
    """Adaptive dynamic window, in frames (algorithm.md, 7). None means the published code's default."""

    enabled: bool = True
    min_size: int | None = 7
    tau_post: float | None = 18.0
    tau_pre: float | None = 9.0

    def __post_init__(self) -> None:
        _check_types(self, "window")
        _check(
            self.min_size is None or self.min_size >= 1, f"window.min_size is {self.min_size}: use 1 or more"
        )
        for name, value in (("tau_post", self.tau_post), ("tau_pre", self.tau_pre)):
            _check(value is None or value >= 0, f"window.{name} is {value}: it must not be negative")


@dataclass(frozen=True, slots=True)
class AnchorSettings:
    """Segment anchors (algorithm.md, section 6). `recent` None means one chunk."""

    enabled: bool = True
    recent: int | None = 6
    max: int = 4
    mix: float = 0.35
    scale: float = 0.8

    def __post_init__(self) -> None:
        _check_types(self, "anchors")
        _check(self.recent is None or self.recent >= 1, f"anchors.recent is {self.recent}: use 1 or more")
        _check(self.max >= 0, f"anchors.max is {self.max}: it must not be negative")
        _check(0 <= self.mix <= 1, f"anchors.mix is {self.mix}: it must be in [0, 1]")
        _check_scale("anchors.scale", self.scale)


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Everything that a session may decide about its memory. Defaults are the published configurations'."""

    policy: Policy = "swift"
    positions: Positions = "windowed"
    global_sink: bool = True
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    window: WindowSettings = field(default_factory=WindowSettings)
    anchors: AnchorSettings = field(default_factory=AnchorSettings)

    def __post_init__(self) -> None:
        for name, kind in (
            ("bridge", BridgeSettings),
            ("window", WindowSettings),
            ("anchors", AnchorSettings),
        ):
            value = getattr(self, name)
            _check(isinstance(value, kind), f"{name} is {value!r}: use {kind.__name__}")
        _check(
            isinstance(self.global_sink, bool),
            f"global_sink is {self.global_sink!r}: use True or False",
        )
        _check(
            self.policy in ("swift", "recache", "keep", "cut"),
            f"policy is {self.policy!r}: use 'swift', 'recache', 'keep' or 'cut'",
        )
        _check(
            self.positions in ("absolute", "windowed"),
            f"positions is {self.positions!r}: use 'absolute' or 'windowed'",
        )
