"""WordPiece tokenization (as in BERT) from plain data: no transformers, no tokenizers library.

A text becomes token ids in these steps; the tables are data (`Characters`), measured by
`anabranch.edge.export.tokenizer` on the tokenizer the model was trained with. So ids do not
depend on the Unicode version of the Python that runs on the device.

    split off special tokens written in the text, such as [SEP]
    drop control characters, blanks -> " ", a space around each CJK ideograph
    decompose (NFD), drop accents, lower case
    cut into words at spaces; every punctuation mark is a word
    cut each word greedily into the longest pieces of the vocabulary, or take [UNK]
    truncate, and put [CLS] before and [SEP] after
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from anabranch.protocols.errors import ReleaseError

Ranges = tuple[tuple[int, int], ...]  # of code points, first and last, ascending
Ids = NDArray[np.int64]


class Characters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to single characters, in the order of the fields."""

    drop: Ranges  # removed
    blank: Ranges  # become a space
    apart: Ranges  # get a space on both sides
    decompose: bool  # then the text is brought into NFD
    marks: Ranges  # removed after that
    lower: dict[str, str]  # replaced; what is not in here stays
    split: Ranges  # end a word
    punctuation: Ranges  # are words of their own


class TokenizerData(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a WordPiece tokenizer is made of: the content of tokenizer.json."""

    kind: Literal["wordpiece"] = "wordpiece"
    vocabulary: tuple[str, ...]  # position = id
    unknown: int  # ids of [UNK], [CLS], [SEP], [PAD]
    first: int
    last: int
    padding: int
    prefix: str  # of a piece that continues a word: "##"
    max_word: int  # a longer word, in characters, is unknown
    max_tokens: Annotated[int, msgspec.Meta(ge=3)]  # with [CLS] and [SEP]
    special: tuple[str, ...]  # recognised where a text contains them
    characters: Characters

    def __post_init__(self) -> None:
        ids = (self.unknown, self.first, self.last, self.padding)
        if not all(0 <= i < len(self.vocabulary) for i in ids):
            raise ValueError(f"expected ids in a vocabulary of {len(self.vocabulary)}, got {ids}")
        if len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError("a token appears twice in the vocabulary")
        unknown = set(self.special) - set(self.vocabulary)
        if unknown:
            raise ValueError(f"special tokens {sorted(unknown)} are not in the vocabulary")


def parse(data: bytes) -> TokenizerData:
    """Return the content of a tokenizer.json, or raise ReleaseError."""
    try:
        return msgspec.json.decode(data, type=TokenizerData)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReleaseError(f"tokenizer.json: {error}; make the release again") from None


class WordPiece:
    """Text -> token ids, equal to the ids the model saw in training."""

    def __init__(self, data: TokenizerData) -> None:
        self.data = data
        self._ids = {token: i for i, token in enumerate(data.vocabulary)}
        self._longest = max(len(token) for token in data.vocabulary)
        pieces = sorted(data.special, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, pieces)) + ")") if pieces else None
        c = data.characters
        # Two tables, because decomposition comes between them.
        self._before = _Table((c.drop, _nothing), (c.blank, _space), (c.apart, _spaced))
        self._after = _Table((c.marks, _nothing), (c.split, _space), (c.punctuation, _spaced))
        self._after.update({ord(char): text for char, text in c.lower.items()})

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`: [CLS], at most max_tokens − 2 pieces, [SEP]."""
        room = self.data.max_tokens - 2
        ids = [self.data.first]
        for piece in self._pieces(text):
            if len(ids) > room:
                break
            ids.append(piece)
        return [*ids, self.data.last]

    def batch(self, encoded: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
        """Return ids (B, T) padded on the right, and the mask (B, T) that is 1 on real tokens."""
        length = max(map(len, encoded))
        ids = np.full((len(encoded), length), self.data.padding, np.int64)
        mask = np.zeros((len(encoded), length), np.int64)
        for row, one in enumerate(encoded):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        return ids, mask

    def words(self, text: str) -> list[str]:
        """Return the normalised words of a text that holds no special token."""
        text = text.translate(self._before)
        if self.data.characters.decompose:
            text = unicodedata.normalize("NFD", text)
        return [word for word in text.translate(self._after).split(" ") if word]

    def _pieces(self, text: str) -> Iterator[int]:
        for part in self._special.split(text) if self._special else [text]:
            if part in self.data.special:
                yield self._ids[part]
                continue
            for word in self.words(part):
                yield from self._cut(word)

    def _cut(self, word: str) -> list[int]:
        """Return the ids of the longest pieces, from left to right; [UNK] if one is missing."""
        if len(word) > self.data.max_word:
            return [self.data.unknown]
        ids: list[int] = []
        start = 0
        while start < len(word):
            prefix = self.data.prefix if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                found = self._ids.get(prefix + word[start:end])
                if found is not None:
                    ids.append(found)
                    start = end
                    break
            else:
                return [self.data.unknown]
        return ids


def _nothing(char: str) -> str:
    return ""


def _space(char: str) -> str:
    return " "


def _spaced(char: str) -> str:
    return f" {char} "


class _Table(dict[int, str]):
    """A table for str.translate that holds only the characters seen so far."""

    def __init__(self, *rules: tuple[Ranges, Callable[[str], str]]) -> None:
        super().__init__()
        self._rules = [([first for first, _ in ranges], ranges, rule) for ranges, rule in rules]

    def __missing__(self, code: int) -> str:
        char = chr(code)
        for firsts, ranges, rule in self._rules:
            at = bisect_right(firsts, code) - 1
            if at >= 0 and code <= ranges[at][1]:
                char = rule(char)
                break
        self[code] = char
        return char
