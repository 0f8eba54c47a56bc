"""Stories: files and options, strictly read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from swiftvideo.runtime import Geometry
from swiftvideo.runtime.errors import UsageError
from swiftvideo.sdk.story import (
    Cue,
    Story,
    override,
    parse_story,
    parse_time,
    read_story,
    schedule,
    story_from_options,
    video_frames,
)

GEOMETRY = Geometry(2, 2, 12, 16, 8, 8, 16, 64, fps=12)

TEXT = """\
seconds: 12s
seed: 7
policy: recache
prompts:
  - prompt: a red circle
  - prompt: a blue square
    at: 4s
  - {prompt: "a cross: still", at: 8.5}
"""


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4s", 4),
        ("1m30s", 90),
        ("500ms", 0.5),
        ("1h", 3600),
        ("2.5s", 2.5),
        ("1m", 60),
        ("7", 7),
        (0.25, 0.25),
        ("1h2m3s4ms", 3723.004),
        (" 3s ", 3),
        (".5", 0.5),
        (".5s", 0.5),
        ("1S", 1),
        ("8784h", 366 * 86400),
    ],
)
def test_times(text: str | float, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "4 s",
        "-1s",
        "1s1m",
        "4sec",
        -1,
        "nan",
        True,
        "1e3s",
        ".",
        "1.",
        "1.s",
        "\u0661s",
        "9" * 300,
        "9999h",
        "8784h1ms",
        None,
    ],
)
def test_what_is_no_time_is_refused_with_the_value(text: Any) -> None:
    with pytest.raises(UsageError, match="time"):
        parse_time(text)


def test_a_story_file(tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text(TEXT)
    story = read_story(tmp_path / "story.yaml")
    cues = (Cue("a red circle"), Cue("a blue square", 4.0), Cue("a cross: still", 8.5))
    assert story == Story(cues, 12.0, 7, "recache")


def test_what_a_file_leaves_out() -> None:
    story = parse_story("prompts: [{prompt: a}, {prompt: b, at: 3s}]")
    assert (story.seconds, story.seed, story.policy) == (7.0, 0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("seconds: 3", "prompts is missing"),
        ("prompts: []", "line 1: prompts must be a list"),
        ("prompts: a red circle", "line 1: prompts must be a list"),
        ("- prompt: a", "line 1: the keys"),
        ("prompts:\n- a red circle", "line 2: the keys prompt, at"),
        ("prompts:\n- prompt: a\n- prompt: b", "line 3: prompt 'b' has no time"),
        ("prompts:\n- prompt: a\n- at: 3s", "line 3: the key prompt is missing"),
        ("prompts:\n- prompt: 7", "line 2: prompt is 7"),
        ("prompts:\n- prompt: [a]", "line 2: one value"),
        ("prompts:\n- prompt: '  '", "line 2: prompt is '  '"),
        ("seed: 2001-99-99\nprompts:\n- prompt: a", "line 1: '2001-99-99' cannot be read"),
        ("prompts:\n- prompt: a\n- prompt: b\n  at: soon", "line 4: time 'soon'"),
        ("prompts:\n- prompt: a\n  til: 3s", "line 3: unknown key 'til'"),
        ("colour: red\nprompts:\n- prompt: a", "line 1: unknown key 'colour'"),
        ("seed: 1\nseed: 2\nprompts:\n- prompt: a", "line 2: the key 'seed' is there twice"),
        ("seed: x\nprompts:\n- prompt: a", "line 1: seed is 'x'"),
        ("seed: true\nprompts:\n- prompt: a", "line 1: seed is True"),
        ("policy: fast\nprompts:\n- prompt: a", "policy is 'fast'"),
        ("seconds: 3\nprompts:\n- prompt: a\n- prompt: b\n  at: 3s", "ends at 3 s"),
        ("prompts:\n- prompt: a\n  at: 1s", "must start at 0"),
        ("prompts:\n- prompt: a\n- prompt: b\n  at: 3s\n- prompt: c\n  at: 2s", "must rise"),
        ("prompts:\n- prompt: a\n- prompt: b\n  at: 3s\n- prompt: c\n  at: 3s", "must rise"),
        ("prompts:\n- prompt: a\n -", "line 3"),
        ("prompts: !!python/object:os.system [x]", "line 1"),
        ("? [a, b]\n: 3\nprompts:\n- prompt: a", "line 1: unknown key that is no word"),
        ("[" * 5000, "nested too deeply"),
        *(
            (f"seed: !!{tag}\nprompts: [{{prompt: a}}]", "line 1: '")
            for tag in ("bool x", "int ''", "int '-'", "float ''", "timestamp foo")
        ),
        *(
            (f"{key}: {value}\nprompts: [{{prompt: a}}]", "line 1: '")
            for key in ("seed", "seconds")
            for value in ("0x" + "f" * 400, "1" + ":59" * 100_000, "9" * 5000)
        ),
        ('prompts: [{prompt: "a\\e[2J"}]', r"the prompt 'a\x1b[2J' at 0 s has control characters"),
        ('prompts: [{prompt: "a\\u009b2J"}]', "has control characters"),
        ("seconds: 1e30\nprompts:\n- prompt: a", "line 1: time '1e30'"),
    ],
)
def test_errors_name_the_file_the_line_and_the_value(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^tale\.yaml") as caught:
        parse_story(text, "tale.yaml")
    assert message in str(caught.value)


def test_a_file_that_is_missing_or_no_utf8_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml"):
        read_story(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("prompts: [{prompt: caf\u00e9}]".encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.yaml' cannot be read"):
        read_story(tmp_path / "latin.yaml")


def test_a_file_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match=r"endless\.yaml' is larger than 1048576 bytes"):
        read_story(tmp_path / "endless.yaml")


def test_prompts_may_have_several_lines() -> None:
    assert parse_story("prompts:\n- prompt: |\n    a\n    \tb\n").cues[0].prompt == "a\n\tb\n"


def test_options_need_a_time_for_each_later_prompt() -> None:
    story = story_from_options(["a", "b"], ["4s"], "12", 3, "keep")
    assert story == Story((Cue("a"), Cue("b", 4.0)), 12.0, 3, "keep")
    assert story_from_options(["a"], [], None, 0, None).seconds == 4.0
    with pytest.raises(UsageError, match="2 --prompt and 0 --at"):
        story_from_options(["a", "b"], [], "12", 0, None)
    with pytest.raises(UsageError, match="without prompts"):
        story_from_options([], [], None, 0, None)


def test_options_replace_what_a_file_says() -> None:
    story = override(parse_story(TEXT), "20s", None, "cut")
    assert (story.seconds, story.seed, story.policy) == (20.0, 7, "cut")
    story = override(parse_story(TEXT), None, 0, None)
    assert (story.seconds, story.seed, story.policy) == (12.0, 0, "recache")
    with pytest.raises(UsageError, match="ends at 2 s"):
        override(parse_story(TEXT), "2s", None, None)


def test_prompts_take_effect_at_the_next_chunk_boundary() -> None:
    # Boundaries of chunks of 3 latent frames lie at video frames 0, 9, 21, 33, 45, ...
    boundaries = [0, 9, 21, 33, 45, 57]
    for asked in range(1, 46):
        story = Story((Cue("a"), Cue("b", asked / 12)), 10.0)
        shot = schedule(story, GEOMETRY)[1]
        assert shot.first_frame == min(frame for frame in boundaries if frame >= asked)
        assert boundaries[shot.boundary // 3] == shot.first_frame


def test_one_prompt_takes_over_per_boundary() -> None:
    story = Story((Cue("a"), Cue("b", 1.0), Cue("c", 1.1)), 10.0)
    assert [shot.first_frame for shot in schedule(story, GEOMETRY)] == [0, 21, 33]


def test_a_prompt_that_would_never_be_seen_is_refused() -> None:
    with pytest.raises(UsageError, match=r"take effect at 3\.75 s"):
        schedule(Story((Cue("a"), Cue("b", 3.0)), 3.5), GEOMETRY)
    with pytest.raises(UsageError, match=r"take effect at 2\.75 s"):
        schedule(Story((Cue("a"), Cue("b", 2.7)), 2.75), GEOMETRY)
    assert schedule(Story((Cue("a"), Cue("b", 2.7)), 2.75 + 1 / 12), GEOMETRY)[1].first_frame == 33


def test_the_number_of_frames_is_exact() -> None:
    assert video_frames(Story((Cue("a"),), 2.5), GEOMETRY) == 30
    assert video_frames(Story((Cue("a"),), 0.001), GEOMETRY) == 1


def test_stories_check_themselves() -> None:
    story = Story((Cue("a"),), 1.0)
    year = 366 * 24 * 3600.0
    for change in (
        {"cues": ()},
        {"seconds": 0.0},
        {"seconds": year + 1},
        {"seed": -1},
        {"seed": 2**64},
        {"cues": (Cue("  "),)},
    ):
        with pytest.raises(UsageError):
            dataclasses.replace(story, **change)
    assert dataclasses.replace(story, seconds=year, seed=2**64 - 1).seed == 2**64 - 1
