"""The prompt grammar of the embedded model, its vocabulary and its word-level tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("left", "right", "up", "down", "bouncing", "still")
BACKGROUNDS = ("night", "snow", "fog", "dawn")
TEXT_LEN = 16

WORDS = (
    *("<pad>", "</s>", "<unk>", "a", "an"),
    *COLOURS,
    *("circle", "ball", "square", "box", "triangle", "cross", "plus"),
    *("moving", "drifting", "left", "right", "up", "down", "bouncing", "standing", "still"),
    *("at", "in", "the", "night", "snow", "fog", "dawn"),
)
"""The vocabulary; a word's place is its id."""
SYNONYMS = {
    "circle": ("circle", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
}
PLACES = {"night": "at night", "snow": "in the snow", "fog": "in the fog", "dawn": "at dawn"}
_IDS = {word: number for number, word in enumerate(WORDS)}


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a prompt asks for and what a judge sees."""

    colour: str
    shape: str
    motion: str
    background: str

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The four attributes, in the order of the fields."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def random(cls, rng: np.random.Generator) -> Attributes:
        """One of the 768 combinations, uniformly."""
        choices = (COLOURS, SHAPES, MOTIONS, BACKGROUNDS)
        return cls(*(names[int(rng.integers(len(names)))] for names in choices))

    def mixed(self, other: Attributes, rng: np.random.Generator) -> Attributes:
        """`other`, with each attribute kept from `self` with probability one half."""
        kept = {name: getattr(self, name) for name in self.names() if rng.random() < 0.5}
        return replace(other, **kept)

    def indices(self) -> tuple[int, int, int, int]:
        """The attributes as numbers, for compact storage."""
        return (
            COLOURS.index(self.colour),
            SHAPES.index(self.shape),
            MOTIONS.index(self.motion),
            BACKGROUNDS.index(self.background),
        )

    @classmethod
    def from_indices(cls, colour: int, shape: int, motion: int, background: int) -> Attributes:
        """The inverse of `indices`."""
        return cls(COLOURS[colour], SHAPES[shape], MOTIONS[motion], BACKGROUNDS[background])

    def prompt(self, rng: np.random.Generator | None = None) -> str:
        """The sentence of the grammar; with `rng` also its synonyms.

        >>> Attributes("orange", "circle", "left", "fog").prompt()
        'an orange circle moving left in the fog'
        """

        def pick(words: tuple[str, ...]) -> str:
            return words[0] if rng is None else words[int(rng.integers(len(words)))]

        if self.motion == "bouncing":
            motion = "bouncing"
        elif self.motion == "still":
            motion = "standing still"
        else:
            motion = f"{pick(('moving', 'drifting'))} {self.motion}"
        article = "an" if self.colour == "orange" else "a"
        return f"{article} {self.colour} {pick(SYNONYMS[self.shape])} {motion} {PLACES[self.background]}"


def encode(prompt: str) -> tuple[list[int], list[int]]:
    """Ids and mask, each of TEXT_LEN numbers; the same as the tokenizer of `save_tokenizer`, padded."""
    ids = [_IDS[word] for word in prompt.split()] + [_IDS["</s>"]]
    rest = TEXT_LEN - len(ids)
    return ids + [0] * rest, [1] * len(ids) + [0] * rest


def save_tokenizer(path: Path) -> None:
    """Write `tokenizer.json`: lower case, words split at white space and punctuation, `</s>` appended.

    A word outside the vocabulary becomes `<unk>`, which the runtime refuses.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(vocab=_IDS, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _IDS["</s>"])]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(path))
