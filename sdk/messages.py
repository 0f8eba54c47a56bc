"""What a client sends, checked before it is sent."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal, TypeVar

from google.protobuf.message import Message

from swiftvideo.runtime.errors import SettingsError
from swiftvideo.runtime.geometry import Policy
from swiftvideo.v1 import generation_pb2 as pb

from .protocol import MAX_PROMPTS, MAX_TEXT

M = TypeVar("M", bound=Message)
EncodingName = Literal["raw", "jpeg", "h264"]
ENCODINGS: dict[str, pb.Encoding] = {
    "raw": pb.ENCODING_RAW,
    "jpeg": pb.ENCODING_JPEG,
    "h264": pb.ENCODING_H264,
}
LONGEST = 4_000_000
"""Seconds that a time may have: 32 bits of milliseconds."""


def filled(kind: type[M], **fields: Any) -> M:
    """A message of these fields. Raises SettingsError where one cannot be sent."""
    message = kind()
    for name, value in fields.items():
        try:
            message.MergeFrom(kind(**{name: value}))
        except (ValueError, TypeError) as error:
            raise SettingsError(
                f"{kind.DESCRIPTOR.name.lower()}: {name} is {value!r:.60} ({error}): use whole numbers that are not "
                "negative, and text that UTF-8 can hold"
            ) from error
    return message


def check_seconds(name: str, value: object) -> None:
    """Raises SettingsError where a time is no number of seconds, or would not fit into a message."""
    if not isinstance(value, Real) or not 0 <= float(value) <= LONGEST:
        raise SettingsError(f"{name} is {value!r:.60}: use 0 to {LONGEST} seconds")


def check_text(name: str, text: object) -> None:
    """Raises SettingsError for what is no text or longer than the protocol has it: gRPC would end the call for some."""
    if not isinstance(text, str):
        raise SettingsError(f"the {name} is {text!r:.60}: give a text")
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT:
        raise SettingsError(f"the {name} has {size} bytes: use at most {MAX_TEXT}")


def prompt_of(text: str, at_chunk: int) -> pb.Prompt:
    """A prompt, with an id of its own. Raises SettingsError for one that cannot be sent."""
    check_text("prompt", text)
    return filled(pb.Prompt, id=uuid.uuid4().hex, text=text, at_chunk=at_chunk)


def known_ahead(prompts: Iterable[tuple[str, int]]) -> list[pb.Prompt]:
    """The prompts of a start. Raises SettingsError for what cannot be sent."""
    try:
        pairs = [(text, at_chunk) for text, at_chunk in prompts]
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"prompts is {prompts!r:.60}: give pairs of a text and the first chunk that it may apply to"
        ) from error
    if len(pairs) > MAX_PROMPTS:
        raise SettingsError(
            f"prompts has {len(pairs)} entries: give the first {MAX_PROMPTS}, and the others to the video's `prompt` "
            "while it plays"
        )
    return [prompt_of(text, at_chunk) for text, at_chunk in pairs]


def start_of(
    prompt: str,
    seed: int,
    credits: int,
    encoding: str,
    policy: pb.PolicySettings | Policy | None,
    linger: float,
    chunks: int,
    prompts: Iterable[tuple[str, int]] = (),
) -> pb.Start:
    """The message that begins a session. Raises SettingsError for values that no server would take."""
    if encoding not in ENCODINGS:
        raise SettingsError(f"encoding is {encoding!r}: use one of {', '.join(ENCODINGS)}")
    if isinstance(policy, str):
        kinds = {
            name.removeprefix("POLICY_KIND_").lower(): kind for name, kind in pb.PolicyKind.items() if kind
        }
        if policy not in kinds:
            raise SettingsError(f"policy is {policy!r}: use one of {', '.join(kinds)}")
        policy = pb.PolicySettings(kind=pb.PolicyKind.Name(kinds[policy]))
    if policy is not None and not isinstance(policy, pb.PolicySettings):
        raise SettingsError(
            f"policy is a {type(policy).__module__}.{type(policy).__name__}: give the name of one, or a PolicySettings "
            "of swiftvideo.v1.generation_pb2"
        )
    check_seconds("linger", linger)
    check_text("prompt", prompt)
    return filled(
        pb.Start,
        prompt=prompt,
        seed=seed,
        credits=credits,
        encoding=ENCODINGS[encoding],
        policy=policy,
        linger_ms=round(linger * 1000),
        chunks=chunks,
        prompts=known_ahead(prompts),
    )
