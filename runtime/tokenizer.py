"""Prompts to token ids, strictly: what the model cannot read is an error, not a guess."""

from __future__ import annotations

import difflib
import json

import numpy as np
from tokenizers import Tokenizer

from .engine import Int64
from .errors import BundleIntegrityError, PromptError

SMALL_VOCABULARY = 200
"""Up to this many words an error lists them all."""


class PromptTokenizer:
    """A bundle's tokenizer.

    Args:
        data: bytes of tokenizer.json, as the `tokenizers` library writes it. Special tokens, such as an end token,
            are its post-processor's.
        text_len: tokens that the model takes.

    Raises:
        BundleIntegrityError: not a tokenizer.
    """

    def __init__(self, data: bytes | memoryview, text_len: int) -> None:
        text = bytes(data).decode("utf-8", "replace")
        try:
            self._tokenizer = Tokenizer.from_str(text)
            model = json.loads(text)["model"]
        except Exception as error:  # the library raises plain Exception
            raise BundleIntegrityError(
                f"tokenizer.json is no tokenizer ({error}); export the bundle again"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.text_len = text_len
        unknown = model.get("unk_id")
        if unknown is None and model.get("unk_token") is not None:
            unknown = self._tokenizer.token_to_id(model["unk_token"])
        added = self._tokenizer.get_added_tokens_decoder()
        self._refused = {unknown, *(token for token, item in added.items() if item.special)}
        """Ids that no word of a prompt may have."""
        pad = self._tokenizer.token_to_id("<pad>")
        self._pad = 0 if pad is None else pad

    @property
    def words(self) -> list[str]:
        """The vocabulary, without special tokens, sorted."""
        special = {item.content for item in self._tokenizer.get_added_tokens_decoder().values()}
        return sorted(word for word in self._tokenizer.get_vocab() if word not in special)

    def encode(self, prompt: str) -> tuple[Int64, Int64]:
        """ids and mask, int64 [1,text_len]; mask is 1 where a token is.

        Raises:
            PromptError: the prompt is not text, is empty or too long, or has a word without a token.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"the prompt is {type(prompt).__name__} {prompt!r}: a string is needed")
        text = " ".join(prompt.split())
        if not text:
            raise PromptError(f"the prompt {prompt!r} is empty: say what the video should show")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt {text[:40]!r} is no Unicode text ({error}): remove that"
            ) from error
        encoding = self._tokenizer.encode(text)
        ids = encoding.ids
        if all(encoding.special_tokens_mask):
            raise PromptError(f"the prompt {text[:40]!r} has no words: say what the video should show")
        unknown = {
            text[a:b]
            for token, (a, b), special in zip(
                ids, encoding.offsets, encoding.special_tokens_mask, strict=True
            )
            if token in self._refused and not special  # those that the tokenizer itself adds are fine
        }
        if unknown:
            raise PromptError(self._explain(sorted(unknown)))
        if len(ids) > self.text_len:
            raise PromptError(
                f"the prompt has {len(ids)} tokens and the model takes {self.text_len}: shorten it. "
                f"It begins {text[:40]!r}"
            )
        padded = np.full((1, self.text_len), self._pad, np.int64)
        mask = np.zeros((1, self.text_len), np.int64)
        padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        return padded, mask

    def _explain(self, unknown: list[str]) -> str:
        """What to write instead of words that are not known."""
        shown = [word if len(word) <= 40 else word[:39] + "…" for word in unknown[:20]]
        more = f" and {len(unknown) - len(shown)} more words" if len(unknown) > len(shown) else ""
        message = f"this model does not know {', '.join(map(repr, shown))}{more}: use other words"
        words = self.words
        near = sorted({hit for word in shown for hit in difflib.get_close_matches(word.lower(), words, 2)})
        if near:
            message += f", perhaps {' or '.join(map(repr, near))}"
        if len(words) <= SMALL_VOCABULARY:
            message += f". It knows: {', '.join(words)}"
        return message
