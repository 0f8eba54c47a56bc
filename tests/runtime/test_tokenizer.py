from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from swiftvideo.runtime import BundleIntegrityError, Pipeline, PromptError
from swiftvideo.runtime.tokenizer import PromptTokenizer

WORDS = ("red", "blue", "circle", "square")


def tokenizer(text_len: int = 4, end: bool = True) -> PromptTokenizer:
    """<pad> is 3, so that padding with zeros would be seen."""
    vocabulary = {"<unk>": 0, "</s>": 1, "red": 2, "<pad>": 3, "blue": 4, "circle": 5, "square": 6}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("!", "")])
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.add_special_tokens(["<unk>", "</s>", "<pad>"])
    if end:
        made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(2)
    made.enable_padding(length=9)
    return PromptTokenizer(made.to_str().encode(), text_len)


def test_ids_are_padded_and_masked() -> None:
    ids, mask = tokenizer().encode("  Red\n circle ")
    assert ids.dtype == mask.dtype == np.int64
    assert ids.tolist() == [[2, 5, 1, 3]] and mask.tolist() == [[1, 1, 1, 0]]


def test_a_prompt_may_fill_the_text_length() -> None:
    assert tokenizer().encode("red blue circle")[1].tolist() == [[1, 1, 1, 1]]


def test_words_are_the_vocabulary_without_special_tokens() -> None:
    assert tokenizer().words == sorted(WORDS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", r"prompt '' is empty: say"),
        (" \n\t", r"is empty: say"),
        (
            "red blue circle square",
            r"has 5 tokens and the model takes 4: shorten it.*'red blue circle square'",
        ),
        ("!!", r"'!!' has no words: say"),
        ("red </s>", r"does not know '</s>'"),
        ("red \ud800", r"no Unicode text"),
        (
            "a Cirkle",
            r"does not know 'Cirkle', 'a': use other words, perhaps 'circle'.*It knows: blue, circle",
        ),
        ("red " + "z" * 99, r"does not know 'z{39}…': use other words"),
        (" ".join(f"z{number}" for number in range(30)), r"'z\d+' and 10 more words: use other words"),
        (7, r"the prompt is int 7: a string is needed"),
        (None, r"the prompt is NoneType None"),
    ],
)
def test_what_the_model_cannot_read_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        tokenizer().encode(prompt)


def test_unknown_tokens_of_a_unigram_model_are_seen() -> None:
    model = models.Unigram([("<pad>", 0.0), ("<unk>", 0.0), ("▁red", -1.0)], unk_id=1, byte_fallback=False)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    read = PromptTokenizer(made.to_str().encode(), 4)
    assert read.encode("red")[0].tolist() == [[2, 0, 0, 0]]
    with pytest.raises(PromptError, match="does not know"):
        read.encode("red zebra")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\x00", b'{"model": 1}'])
def test_bytes_that_are_no_tokenizer_are_refused(data: bytes) -> None:
    with pytest.raises(BundleIntegrityError, match=r"tokenizer.json is no tokenizer .*export"):
        PromptTokenizer(data, 4)


def test_a_bundle_refuses_long_prompts(pipeline: Pipeline) -> None:
    length = pipeline.geometry.text_len
    with pytest.raises(PromptError, match=rf"has \d+ tokens and the model takes {length}: shorten"):
        pipeline.session("red " * (length + 1))
