from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anabranch.edge.export.tokenizer import (
    PROBES,
    tokenizer_data,
    write_tokenizer,
)
from anabranch.edge.runtime.tokenizer import WordPiece, parse
from anabranch.protocols.errors import ModelError

Make = Callable[..., Path]


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_written_tokenizer_reads_back_and_gives_the_ids_of_its_source(
    wordpiece_folder: Make, tmp_path: Path, lowercase: bool
) -> None:
    folder = wordpiece_folder(tmp_path / "model", lowercase=lowercase)
    data = tokenizer_data(reference(folder), max_tokens=16)
    ours = WordPiece(parse(write_tokenizer(data)))
    theirs = reference(folder)

    assert data.characters.decompose is lowercase
    assert bool(data.characters.lower) is lowercase
    for text in (*PROBES, "Fracture of the LEFT femur, café 東京"):
        assert ours.encode(text) == theirs(text, truncation=True, max_length=16)["input_ids"]


def test_measuring_leaves_the_tokenizer_as_it_was(wordpiece_folder: Make, tmp_path: Path) -> None:
    tokenizer = reference(wordpiece_folder(tmp_path / "model"))
    before = tokenizer(["acute", "heart failure"], padding=True)["input_ids"]
    tokenizer_data(tokenizer, max_tokens=16)

    assert tokenizer(["acute", "heart failure"], padding=True)["input_ids"] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": None}, "its normalizer is absent, .* WordPiece tokenizers only"),
        ({"normalizer": {"type": "NFC"}}, "its normalizer is NFC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is Whitespace"),
        ({"post_processor": None}, "expected one token before and one after a text, got 0"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0, "[PAD]": 1}, "merges": []}},
            "its model is BPE, the device runtime reads WordPiece",
        ),
        (
            {
                "added_tokens": [
                    {
                        "id": 4,
                        "content": "[MASK]",
                        "single_word": False,
                        "lstrip": True,
                        "rstrip": False,
                        "normalized": False,
                        "special": True,
                    }
                ]
            },
            r"added token '\[MASK\]' has options",
        ),
    ],
)
def test_a_tokenizer_that_devices_cannot_read_is_refused(
    wordpiece_folder: Make, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = wordpiece_folder(tmp_path / "model", **change)

    with pytest.raises(ModelError, match=message):
        tokenizer_data(reference(folder), max_tokens=16)


def test_a_token_outside_the_vocabulary_is_refused(wordpiece_folder: Make, tmp_path: Path) -> None:
    tokenizer = reference(wordpiece_folder(tmp_path / "model"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["[NOTE]"]})

    with pytest.raises(ModelError, match=r"'\[NOTE\]' is not in the vocabulary"):
        tokenizer_data(tokenizer, max_tokens=16)


def test_a_tokenizer_without_a_fast_form_is_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer object: no fast tokenizer"):
        tokenizer_data(object(), max_tokens=16)
