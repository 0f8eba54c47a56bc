"""What the pages say that a machine can look up: files, links, options, defaults, counts."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from swiftvideo.runtime import PolicySettings, load
from swiftvideo.runtime.pipeline import EMBEDDED
from swiftvideo.sdk.cli import app
from swiftvideo.sdk.generate import Report, Switch
from swiftvideo.sdk.story import parse_story

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
COMMANDS = {
    name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    for name, command in vars(typer.main.get_command(app))["commands"].items()
}


def anchors(text: str) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(((?!https?:)[^)\s]+)\)", PAGES[page])
    assert page != "README.md" or len(links) > 5
    for link in links:
        name, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    folders = "runtime|export|sdk|protos|samples|tests|docs|deploy"
    names = re.findall(
        rf"(?<![\w/.-])(?:{folders})/[\w./-]*\.(?:py|md|c|js|sh|json|yaml|proto)\b", PAGES[page]
    )
    missing = [name for name in names if "NNNN" not in name and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_a_page(command: str) -> None:
    pages = "\n".join(text for page, text in PAGES.items() if page.startswith(("README", "docs/")))
    told = set(re.findall(r"--[a-z][a-z-]*", pages)) | {"--help"}
    assert not COMMANDS[command] - told


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_a_page_have_the_options_that_they_are_given(page: str) -> None:
    text = re.sub(r"\\\n\s*", " ", PAGES[page])
    for line in re.findall(r"^(?: {4}|\$ )?swiftvideo ([a-z]+ .*)$", text, re.M):
        name, *words = shlex.split(line, comments=True)
        assert {word for word in words if word.startswith("--")} <= COMMANDS[name], line


def test_the_policy_page_has_every_setting_and_its_default() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| (\S+) \|", PAGES["docs/policy.md"], re.M)
    settings = PolicySettings()
    expected: dict[str, object] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                expected[f"{field.name}.{inner.name}"] = getattr(value, inner.name)
        else:
            expected[field.name] = value
    assert {name: told.strip("`") for name, told in rows} == {name: str(it) for name, it in expected.items()}


def test_the_command_s_page_has_a_story_that_is_one_and_the_keys_of_the_report() -> None:
    page = PAGES["docs/cli.md"]
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    story = parse_story(block)
    assert (story.seconds, story.seed, story.policy) == (12, 7, "swift")
    assert [cue.at for cue in story.cues] == [0, 4]
    keys = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ", page.partition("## `generate --json`")[2], re.M)
    switch = Switch("", 0.0, 0.0, 0, "cut", None)
    report = Report(Path("a.mp4"), 64, 64, 12, 7, None, "onnxruntime", switches=[switch]).as_json()
    assert sorted(re.findall(r"\w+", " ".join(keys))) == sorted(report)
    (row,) = re.findall(r"^\| `switches` \| (.*)$", page, re.M)
    assert {"prompt", *report["switches"][0]} == set(re.findall(r"`(\w+)`", row))


def test_the_export_s_page_has_a_model_json_that_is_one_and_every_key() -> None:
    pytest.importorskip("torch", reason="models need torch: pip install 'swiftvideo[export]'")
    from swiftvideo.export.model_info import ModelInfo

    page = PAGES["docs/export.md"]
    (block,) = re.findall(r"```json\n(.*?)```", page, re.S)
    assert ModelInfo.parse(json.loads(block), "docs/export.md") == ModelInfo(name="longlive-1.3b")
    table = page.partition("| key | meaning | if absent |")[2].partition("\n\n")[0]
    rows = dict(re.findall(r"^\| (`.*?`) \| .* \| (.*?) \|$", table, re.M))
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == {
        field.name for field in dataclasses.fields(ModelInfo)
    }
    numbers = {
        name: value
        for names, told in rows.items()
        for name, value in zip(re.findall(r"\w+", names), told.split(", "), strict=False)
        if re.fullmatch(r"[\d.]+", value) and name != "steps"
    }
    assert len(numbers) == 10
    assert {name: str(getattr(ModelInfo(), name)) for name in numbers} == numbers


@pytest.mark.skipif(
    not (EMBEDDED / "manifest.json").is_file(), reason="this checkout holds no embedded model"
)
def test_the_embedded_model_knows_as_many_words_as_its_page_says() -> None:
    with load() as pipeline:
        words = pipeline.words
        (told,) = re.findall(r"(\d+) words", PAGES["docs/model.md"])
        assert int(told) == len(words)
        table = re.findall(r"^\| (?:colour|shape|motion|place) \| (.*) \|$", PAGES["docs/model.md"], re.M)
        listed = set(re.findall(r"[a-z]+", " ".join(table))) - {"or"}
        assert len(table) == 4 and listed <= set(words) and not set(words) - listed - {"a", "an", "the"}


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source archive has no .ci")
def test_contributors_are_told_all_that_ci_runs() -> None:
    runs = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)
    (step,) = re.findall(r"^4\. .*?(?=^5\. )", PAGES["CONTRIBUTING.md"], re.M | re.S)
    assert runs and not [target for target in runs if f"`make {target}`" not in step]


@pytest.mark.skipif("(not yet released)" not in PAGES["CHANGELOG.md"], reason="an index has it by now")
def test_nobody_is_sent_to_an_index_that_has_no_release() -> None:
    """In a checkout it is `pip install '.[serve]'`."""
    told = [f"{page}: {line}" for page in PAGES for line in re.findall(r".*'swiftvideo\[.*", PAGES[page])]
    assert not told
