"""From a Hugging Face tokenizer to plain data that a device can read.

Only WordPiece as BERT uses it. What it does to characters is not copied from a description
but measured, code point by code point, on the tokenizer itself (the Unicode tables compiled
into it are older than Python's); then both tokenizers must agree on a list of probes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from anabranch.edge.runtime.tokenizer import Characters, Ranges, TokenizerData, WordPiece
from anabranch.protocols.errors import ModelError

PROBES = (
    "",
    "Acute myocardial infarction, unspecified",
    "Ménière's disease; Sjögren\u2013Larsson syndrome (ĐŽ, İstanbul, ΣΑΣ, ﬁ, Å)",
    "東京 は 2020年, 한국어 ไทย हिन्दी עברית العربية",
    "tabs\tand\nlines\r\nand\u00a0blanks\u200b\u2028, nul\x00, bell\x07, \ufffd, \U000e0001",
    "[CLS] a [SEP] b [MASK] [UNK] [PAD] [sep]",
    "x" * 150 + " $9.99 5mg/ml a_b ^ ~ ` + = < > | \u037e \u00b7 \u2014 \u30fb",
    "e\u0301 \u0915\u093c \u302e\u0323 🙂 👩‍⚕️",
)


def tokenizer_data(tokenizer: Any, *, max_tokens: int) -> TokenizerData:
    """Return the data of a loaded Hugging Face tokenizer, cutting texts at `max_tokens`.

    Raises ModelError unless it is WordPiece with BERT's normalisation, or if our reading of
    it does not give the same ids on PROBES.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"tokenizer {type(tokenizer).__name__}: no fast tokenizer; the device runtime reads "
            "WordPiece only"
        )
    state = backend.to_str()
    parts, backend = json.loads(state), type(backend).from_str(state)  # a copy to measure
    _require_wordpiece(parts)
    vocabulary = _vocabulary(parts)
    ids = {token: i for i, token in enumerate(vocabulary)}
    first, last = _ends(backend)
    data = TokenizerData(
        vocabulary=vocabulary,
        unknown=ids[parts["model"]["unk_token"]],
        first=first,
        last=last,
        padding=int(tokenizer.pad_token_id),
        prefix=parts["model"]["continuing_subword_prefix"],
        max_word=parts["model"]["max_input_chars_per_word"],
        max_tokens=max_tokens,
        special=tuple(sorted(token["content"] for token in parts["added_tokens"])),
        characters=_characters(backend, parts["normalizer"]),
    )
    _require_same_ids(data, tokenizer)
    return data


def write_tokenizer(data: TokenizerData) -> bytes:
    """Return the content of a tokenizer.json; `runtime.tokenizer.parse` reads it."""
    return msgspec.json.encode(data)


def _require_wordpiece(parts: dict[str, Any]) -> None:
    for part, expected in (
        ("model", "WordPiece"),
        ("normalizer", "BertNormalizer"),
        ("pre_tokenizer", "BertPreTokenizer"),
    ):
        got = (parts[part] or {}).get("type")
        if got != expected:
            raise ModelError(
                f"tokenizer: its {part} is {got or 'absent'}, the device runtime reads WordPiece "
                f"tokenizers only, with {expected}; take a BERT-like base"
            )
    for token in parts["added_tokens"]:
        if token["normalized"] or token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ModelError(
                f"tokenizer: added token {token['content']!r} has options that the device runtime "
                "does not read (normalized, lstrip, rstrip, single_word)"
            )


def _vocabulary(parts: dict[str, Any]) -> tuple[str, ...]:
    ids: dict[str, int] = parts["model"]["vocab"]
    for token in parts["added_tokens"]:
        if ids.get(token["content"]) != token["id"]:
            raise ModelError(f"tokenizer: token {token['content']!r} is not in the vocabulary file")
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ModelError(
            f"tokenizer: the ids of {len(tokens)} tokens are not 0 to {len(tokens) - 1}"
        )
    return tuple(tokens)


def _ends(backend: Any) -> tuple[int, int]:
    """Return the ids that the tokenizer puts before and after a text."""
    backend.no_padding()
    ids = backend.encode("").ids
    if len(ids) != 2:
        raise ModelError(
            f"tokenizer: expected one token before and one after a text, got {len(ids)} for an "
            "empty one"
        )
    return ids[0], ids[1]


def _characters(backend: Any, options: dict[str, Any]) -> Characters:
    """Measure what the normalizer and the pre-tokenizer do to each code point."""
    from tokenizers.normalizers import BertNormalizer

    lowercase = options["lowercase"]
    strip = lowercase if options["strip_accents"] is None else options["strip_accents"]
    off = {
        "clean_text": False,
        "handle_chinese_chars": False,
        "strip_accents": False,
        "lowercase": False,
    }

    def measure(**on: bool) -> Callable[[str], str]:
        return BertNormalizer(**(off | on)).normalize_str

    clean = list(_each(measure(clean_text=options["clean_text"])))
    apart = _each(measure(handle_chinese_chars=options["handle_chinese_chars"]))
    lower = _each(measure(lowercase=lowercase))
    marks = _each(measure(strip_accents=strip))
    split, punctuation = _borders(backend)
    return Characters(
        drop=_ranges(c for c, to in clean if not to),
        blank=_ranges(c for c, to in clean if to == " " and c != 32),
        apart=_ranges(c for c, to in apart if to != chr(c)),
        decompose=strip,
        marks=_ranges(c for c, to in marks if not to),
        lower={chr(c): to for c, to in lower if to != chr(c)},
        split=split,
        punctuation=punctuation,
    )


def _each(normalize: Callable[[str], str]) -> Iterator[tuple[int, str]]:
    """Yield (code point, what the normalizer makes of it) for all of Unicode.

    One call per 4,096 characters with "|" between them: it changes nothing and is changed
    by nothing.
    """
    for start in range(0, 0x110000, 4096):
        codes = [c for c in range(start, start + 4096) if not 0xD800 <= c < 0xE000 and c != 0x7C]
        if codes:
            results = normalize("|".join(map(chr, codes))).split("|")
            yield from zip(codes, results, strict=True)


def _borders(backend: Any) -> tuple[Ranges, Ranges]:
    """Return the characters that end a word, and those that are a word."""
    split, punctuation = [], []
    for start in range(0, 0x110000, 4096):
        codes = [c for c in range(start, start + 4096) if not 0xD800 <= c < 0xE000 and c != 0x61]
        text = "".join(f"a{chr(c)}" for c in codes) + "a"
        words = {at: word for word, (at, _) in backend.pre_tokenizer.pre_tokenize_str(text)}
        for i, code in enumerate(codes):
            at = 2 * i + 1  # position of the character; offsets count characters
            if words.get(at) == chr(code):
                punctuation.append(code)
            elif at + 1 in words:
                split.append(code)
    return _ranges(split), _ranges(punctuation)


def _ranges(codes: Iterable[int]) -> Ranges:
    """Return ascending code points as ranges (first, last)."""
    ranges: list[tuple[int, int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1] = (ranges[-1][0], code)
        else:
            ranges.append((code, code))
    return tuple(ranges)


def _require_same_ids(data: TokenizerData, tokenizer: Any) -> None:
    ours = WordPiece(data)
    for probe in PROBES:
        theirs = tokenizer(probe, truncation=True, max_length=data.max_tokens)["input_ids"]
        if ours.encode(probe) != list(theirs):
            raise ModelError(
                f"tokenizer: our WordPiece reads {probe!r} differently; the device runtime cannot "
                "use this tokenizer"
            )
