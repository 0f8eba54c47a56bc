"""Stories: which prompt holds from when. Read from options or from a YAML file.

seconds: 12
seed: 7
policy: swift
prompts:
  - prompt: a red circle moving right at night
  - prompt: a yellow square moving up in the fog
    at: 4s
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, get_args

import yaml

from swiftvideo.runtime.errors import UsageError
from swiftvideo.runtime.geometry import Policy

from .harmless import harmless

_TIME = re.compile(
    r"(?=[\d.])(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d*\.?\d+)s)?(?:(\d*\.?\d+)ms)?", re.ASCII | re.IGNORECASE
)
LONGEST = 366 * 86400.0
"""Seconds of a story or a time in one."""
LARGEST = 1 << 20
"""Bytes of a story's file: what reads it is slow."""
_KEYS = ("prompts", "seconds", "seed", "policy")
_TEXT = "tag:yaml.org,2002:str"
_LONGEST_VALUE = 40
"""Characters of a value that is no text. PyYAML takes numbers of any length, which take it minutes."""
_CUE_KEYS = ("prompt", "at")
POLICIES: tuple[str, ...] = get_args(Policy)
TAIL = 4.0
"""Seconds after the last prompt at which a story ends that does not say so."""


@dataclass(frozen=True, slots=True)
class Cue:
    """A prompt and the second from which it is asked for."""

    prompt: str
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Story:
    """Prompts in time, the first at second 0.

    Raises:
        UsageError: no prompts, times that do not rise, a prompt that starts after the end.
    """

    cues: tuple[Cue, ...]
    seconds: float
    seed: int = 0
    policy: Policy | None = None
    """None means the bundle's."""

    def __post_init__(self) -> None:
        if not self.cues:
            raise UsageError("a story without prompts: give at least one")
        if not 0 < self.seconds <= LONGEST:
            raise UsageError(
                f"seconds is {self.seconds:g}: it must be above 0 and at most {LONGEST:.0f}, a year"
            )
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"seed is {self.seed}: it must be in 0 to 2**64 - 1")
        if self.policy is not None and self.policy not in POLICIES:
            raise UsageError(f"policy is {self.policy!r}: use one of {', '.join(POLICIES)}")
        if self.cues[0].at != 0:
            raise UsageError(f"the first prompt starts at {self.cues[0].at:g} s: it must start at 0")
        for cue in self.cues:
            if not cue.prompt.strip():
                raise UsageError(f"the prompt at {cue.at:g} s is empty: say what to show")
            if harmless(cue.prompt) != cue.prompt:
                raise UsageError(
                    f"the prompt {cue.prompt[:40]!r} at {cue.at:g} s has control characters: remove them"
                )
        for before, after in zip(self.cues, self.cues[1:], strict=False):
            if after.at <= before.at:
                raise UsageError(
                    f"prompt {after.prompt!r} starts at {after.at:g} s, not after the one before it "
                    f"({before.at:g} s): times must rise"
                )
        if self.cues[-1].at >= self.seconds:
            raise UsageError(
                f"prompt {self.cues[-1].prompt!r} starts at {self.cues[-1].at:g} s and the video ends at "
                f"{self.seconds:g} s: raise seconds or start it earlier"
            )


def parse_time(text: str | float) -> float:
    """Seconds of a time such as `4s`, `1m30s`, `500ms`, `1h`, or a plain number of seconds.

    Raises:
        UsageError: anything else.
    """
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise UsageError(f"time {text!r}: write it like 4s, 1m30s or 500ms")
    if isinstance(text, str):
        stripped = text.strip()
        if match := _TIME.fullmatch(stripped):
            hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
            text = hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
        elif not re.fullmatch(r"\d*\.?\d+", stripped, re.ASCII):
            raise UsageError(f"time {text[:40]!r}: write it like 4s, 1m30s or 500ms")
    value = float(text)
    if not 0 <= value <= LONGEST:
        raise UsageError(f"time {str(text)[:40]!r}: it must be in 0 to {LONGEST:.0f} seconds, a year")
    return value


def story_from_options(
    prompts: Sequence[str], at: Sequence[str], seconds: str | None, seed: int, policy: str | None
) -> Story:
    """A story of n prompts and n - 1 times; without seconds it ends `TAIL` after the last prompt.

    Raises:
        UsageError: another number of times, or anything that `Story` refuses.
    """
    if len(at) != max(0, len(prompts) - 1):
        raise UsageError(
            f"{len(prompts)} --prompt and {len(at)} --at: the first prompt starts at 0, "
            "each other one needs one --at before it"
        )
    times = [0.0, *(parse_time(time) for time in at)]
    cues = tuple(Cue(prompt, time) for prompt, time in zip(prompts, times, strict=False))
    return Story(
        cues, _end(cues) if seconds is None else parse_time(seconds), seed, cast(Policy | None, policy)
    )


def override(story: Story, seconds: str | None, seed: int | None, policy: str | None) -> Story:
    """`story` with what is not None replaced. Raises UsageError as `Story`."""
    return Story(
        story.cues,
        story.seconds if seconds is None else parse_time(seconds),
        story.seed if seed is None else seed,
        story.policy if policy is None else cast(Policy, policy),
    )


def _end(cues: Sequence[Cue]) -> float:
    return (cues[-1].at if cues else 0.0) + TAIL


def read_story(path: str | Path) -> Story:
    """Read a story's YAML file. Unknown and repeated keys are errors.

    Raises:
        UsageError: with the file's name, the line and the value.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise UsageError(
                f"story {str(path)!r} is larger than {LARGEST} bytes: it should be a list of prompts"
            )
        text = data.decode()
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"story {str(path)!r} cannot be read: {error}") from error
    return parse_story(text, str(path))


def parse_story(text: str, name: str = "story") -> Story:
    """`read_story` from a string; `name` is what errors call it."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or "not YAML"
        raise UsageError(f"{name}, line {line}: {problem}") from error
    except RecursionError as error:
        raise UsageError(f"{name}: it is nested too deeply; a story has two levels") from error
    if root is None:
        raise UsageError(f"{name} is empty: it needs the key prompts")
    reader = _Reader(name)
    fields = reader.mapping(root, _KEYS)
    if "prompts" not in fields:
        raise UsageError(f"{name}: the key prompts is missing")
    node = fields["prompts"]
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise reader.error(node, "prompts must be a list of {prompt, at}")
    cues = tuple(reader.cue(item, number) for number, item in enumerate(node.value))
    seconds = reader.time(fields["seconds"]) if "seconds" in fields else _end(cues)
    seed = reader.scalar(fields["seed"]) if "seed" in fields else 0
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise reader.error(fields["seed"], f"seed is {seed!r}: a whole number is needed")
    policy = reader.scalar(fields["policy"]) if "policy" in fields else None
    try:
        return Story(cues, seconds, seed, policy)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error


class _Reader:
    """YAML nodes to values, with lines in the errors."""

    def __init__(self, name: str) -> None:
        self.name = name

    def error(self, node: yaml.Node, message: str) -> UsageError:
        return UsageError(f"{self.name}, line {node.start_mark.line + 1}: {message}")

    def mapping(self, node: yaml.Node, keys: tuple[str, ...]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self.error(node, f"the keys {', '.join(keys)} are expected here")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value not in keys:
                shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "that is no word"
                raise self.error(key, f"unknown key {shown}: use {', '.join(keys)}")
            if key.value in found:
                raise self.error(key, f"the key {key.value!r} is there twice")
            found[key.value] = value
        return found

    def scalar(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "one value is expected here")
        if node.tag != _TEXT and len(node.value) > _LONGEST_VALUE:
            raise self.error(node, f"{node.value[:_LONGEST_VALUE]!r}... is too long for a number")
        try:
            return yaml.safe_load(yaml.serialize(node))
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
            # The last two where a tag such as !!bool does not fit, which PyYAML does not look at.
            raise self.error(node, f"{node.value!r} cannot be read: {error}") from error

    def time(self, node: yaml.Node) -> float:
        value = self.scalar(node)
        try:
            return parse_time(value)
        except UsageError as error:
            raise self.error(node, str(error)) from error

    def cue(self, node: yaml.Node, number: int) -> Cue:
        fields = self.mapping(node, _CUE_KEYS)
        if "prompt" not in fields:
            raise self.error(node, "the key prompt is missing")
        prompt = self.scalar(fields["prompt"])
        if not isinstance(prompt, str) or not prompt.strip():
            raise self.error(fields["prompt"], f"prompt is {prompt!r}: a text is needed")
        if "at" not in fields and number:
            raise self.error(node, f"prompt {prompt!r} has no time: add at, such as at: 4s")
        return Cue(prompt, self.time(fields["at"]) if "at" in fields else 0.0)


@dataclass(frozen=True, slots=True)
class Shot:
    """A cue on a model's clock."""

    cue: Cue
    boundary: int
    """Latent frame of the chunk boundary at which it takes effect, and for which it is asked."""
    first_frame: int
    """Video frame shown first under this prompt."""


class Clock(Protocol):
    """How a model divides time; `Geometry` is one."""

    @property
    def fps(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def temporal_stride(self) -> int: ...
    def video_frames(self, start: int, frames: int) -> int: ...


def schedule(story: Story, geometry: Clock) -> tuple[Shot, ...]:
    """When each prompt takes effect: at the first chunk boundary at or after its time, one prompt per boundary.

    Raises:
        UsageError: a prompt would take effect only after the end of the video.
    """
    shots: list[Shot] = []
    total = video_frames(story, geometry)
    stride, chunk = geometry.temporal_stride, geometry.chunk
    for cue in story.cues:
        wanted = round(cue.at * geometry.fps)
        frame = -(-(wanted + stride - 1) // stride) if wanted else 0
        boundary = -(-frame // chunk) * chunk
        if shots:
            boundary = max(boundary, shots[-1].boundary + chunk)
        first = geometry.video_frames(0, boundary)
        if first >= total:
            raise UsageError(
                f"prompt {cue.prompt!r} at {cue.at:g} s would take effect at {first / geometry.fps:.2f} s, the next "
                f"chunk boundary, and the video ends at {story.seconds:g} s: raise seconds or start it earlier"
            )
        shots.append(Shot(cue, boundary, first))
    return tuple(shots)


def video_frames(story: Story, geometry: Clock) -> int:
    """Video frames of the whole story, at least one."""
    return max(1, round(story.seconds * geometry.fps))
