"""The grammar, its vocabulary and its tokenizer agree."""

import itertools
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from swiftvideo.export.toy import prompts
from swiftvideo.export.toy.prompts import Attributes

EVERY = [
    Attributes(*names)
    for names in itertools.product(prompts.COLOURS, prompts.SHAPES, prompts.MOTIONS, prompts.BACKGROUNDS)
]


def test_every_combination_has_its_own_prompt() -> None:
    assert len({attributes.prompt() for attributes in EVERY}) == len(EVERY) == 768


def test_indices_and_back() -> None:
    assert all(Attributes.from_indices(*attributes.indices()) == attributes for attributes in EVERY)


def test_mixed_attributes_come_from_either_side() -> None:
    rng = np.random.default_rng(0)
    a, b = Attributes("red", "circle", "left", "night"), Attributes("blue", "cross", "up", "fog")
    seen = {a.mixed(b, rng) for _ in range(400)}
    assert len(seen) == 16
    for mixed in seen:
        assert all(
            getattr(mixed, name) in (getattr(a, name), getattr(b, name)) for name in Attributes.names()
        )


def test_the_tokenizer_file_gives_the_ids_of_training(tmp_path: Path) -> None:
    prompts.save_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = np.random.default_rng(1)
    for attributes in EVERY[::7]:
        sentence = attributes.prompt(rng)
        ids, mask = prompts.encode(sentence)
        assert tokenizer.encode(sentence).ids == ids[: sum(mask)]
        assert tokenizer.encode("  " + sentence.upper()).ids == ids[: sum(mask)]
        assert len(ids) == len(mask) == prompts.TEXT_LEN


def test_an_unknown_word_is_the_unknown_token(tmp_path: Path) -> None:
    prompts.save_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a red elephant").ids == [3, 5, prompts.WORDS.index("<unk>"), 1]
