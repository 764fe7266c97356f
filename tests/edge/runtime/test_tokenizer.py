import csv
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.client.tuning.bases import minilm_folder
from anabranch.edge.export.tokenizer import tokenizer_data
from anabranch.edge.runtime.tokenizer import TokenizerData, WordPiece, parse
from anabranch.protocols.errors import ReleaseError

MAX_TOKENS = 48


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


@pytest.fixture(scope="module")
def data(theirs: Any) -> TokenizerData:
    return tokenizer_data(theirs, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module")
def ours(data: TokenizerData) -> WordPiece:
    return WordPiece(data)


def wide(data: TokenizerData) -> WordPiece:
    """Return the same tokenizer without a limit that matters."""
    return WordPiece(msgspec.structs.replace(data, max_tokens=100_000))


def first_difference(ours: WordPiece, theirs: Any, texts: list[str]) -> str | None:
    expected = theirs(texts, truncation=True, max_length=ours.data.max_tokens)["input_ids"]
    pairs = zip(texts, expected, strict=True)
    return next((ascii(text) for text, ids in pairs if ours.encode(text) != ids), None)


def real_texts(folder: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of how the package reads its data
        import simple_icd_10_cm as icd
    yield from (icd.get_description(code) for code in icd.get_all_codes()[::20])
    for name in ("sms-spam/sms.tsv", "sst2/stsa.binary.dev"):
        yield from (folder / name).read_text(errors="replace").splitlines()[::2]
    yield from (folder / "medquad" / "answers.tsv").read_text().splitlines()[::8]
    with (folder / "medical-abstracts" / "medical_tc_test.csv").open(newline="") as file:
        yield from [row[1] for row in csv.reader(file)][::8]


# Equal to the reference


def test_ids_of_real_texts_equal_the_reference(
    ours: WordPiece, theirs: Any, shared_data: Path
) -> None:
    texts = list(real_texts(shared_data))

    assert len(texts) > 8_000
    assert sum(len(ours.encode(text)) == MAX_TOKENS for text in texts) > 900  # truncated
    assert first_difference(ours, theirs, texts) is None


def test_ids_of_every_character_equal_the_reference(data: TokenizerData, theirs: Any) -> None:
    blocks = [*range(0, 0x20000, 32), *range(0xE0000, 0xE0200, 32), 0x10FF00]
    codes = [[c for c in range(b, b + 32) if not 0xD800 <= c < 0xE000] for b in blocks]
    texts = ["".join(f"a{chr(c)}b {chr(c)} " for c in block) for block in codes if block]

    assert first_difference(wide(data), _wide_reference(theirs), texts) is None


@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("aé\u0301İΣß ﬁ.-[SEP]"))
def test_ids_of_any_text_equal_the_reference(ours: WordPiece, theirs: Any, text: str) -> None:
    assert first_difference(ours, theirs, [text]) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\r\n",
        "\x00\x01\x7f\u200b\ufeff",
        "naïve café CAFÉ cafe\u0301",
        "東京都は日本の首都です。漢字kanji",
        "[CLS] [SEP][SEP] [MASK] [PAD] [cls] [ SEP ] [UNK]x",
        "x" * 100 + " " + "y" * 101,
        "don't stop—ever… “quoted” 5°C ±2 µg/m² ½",
        "👩‍⚕️🏥 ✚",
        "ΑΣ ΌΣΟΣ İI\u0131i ǅ ẞ",
        "पुरानी बीमारी ความดัน غدد",
    ],
)
def test_ids_of_odd_texts_equal_the_reference(ours: WordPiece, theirs: Any, text: str) -> None:
    assert first_difference(ours, theirs, [text]) is None


def test_ids_of_a_known_sentence(ours: WordPiece) -> None:
    assert ours.encode("Acute pain.") == [101, 11325, 3255, 1012, 102]


# Laws


@given(text=st.text("ab c.é"), limit=st.integers(3, 12))
def test_truncation_keeps_the_first_tokens_and_the_last_mark(
    data: TokenizerData, text: str, limit: int
) -> None:
    short = WordPiece(msgspec.structs.replace(data, max_tokens=limit)).encode(text)
    full = wide(data).encode(text)

    assert len(short) <= limit
    assert short[:-1] == full[:-1][: limit - 1]
    assert short[-1] == data.last


@given(texts=st.lists(st.text("ab c"), min_size=1, max_size=4))
def test_a_batch_holds_every_text_padded_on_the_right(ours: WordPiece, texts: list[str]) -> None:
    encoded = [ours.encode(text) for text in texts]
    ids, mask = ours.batch(encoded)

    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape == (len(texts), max(map(len, encoded)))
    for row, one in enumerate(encoded):
        assert ids[row][mask[row] == 1].tolist() == one
        assert (ids[row][mask[row] == 0] == ours.data.padding).all()
        assert (np.diff(mask[row]) <= 0).all()


def test_data_survive_json(data: TokenizerData) -> None:
    assert parse(msgspec.json.encode(data)) == data


def test_a_lone_surrogate_is_unknown_and_no_error(ours: WordPiece, data: TokenizerData) -> None:
    assert ours.encode("\ud800") == [data.first, data.unknown, data.last]


def test_the_character_tables_stay_small(data: TokenizerData) -> None:
    piece = wide(data)
    piece.encode("".join(map(chr, range(0x4E00, 0x9FFF))) * 3)

    assert len(piece._before) < 21_500


def test_importing_the_tokenizer_loads_no_torch_and_no_transformers() -> None:
    code = (
        "import sys, anabranch.edge.runtime.tokenizer, anabranch.edge.runtime.classify\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'onnx', 'flwr'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 30_522}, "expected ids in a vocabulary of 30522"),
        ({"first": -1}, "expected ids in a vocabulary"),
        ({"special": ("[NEW]",)}, r"special tokens \['\[NEW\]'\] are not in the vocabulary"),
        ({"vocabulary": ("a", "a")}, "appears twice|expected ids"),
        ({"max_tokens": 2}, "Expected `int` >= 3"),
        ({"kind": "bpe"}, "Invalid enum value 'bpe'"),
        ({"merges": []}, "unknown field `merges`"),
    ],
)
def test_tokenizer_data_that_make_no_sense_are_refused(
    data: TokenizerData, change: dict[str, Any], message: str
) -> None:
    fields = msgspec.to_builtins(data) | change

    with pytest.raises(ReleaseError, match=f"^tokenizer.json: .*({message})"):
        parse(msgspec.json.encode(fields))


@pytest.mark.parametrize("bytes_", [b"", b"{", b"[]", b'{"kind":"\xff"}', b"[" * 5000])
def test_bytes_that_are_no_tokenizer_are_refused(bytes_: bytes) -> None:
    with pytest.raises(ReleaseError, match=r"tokenizer\.json: "):
        parse(bytes_)


def _wide_reference(theirs: Any) -> Any:
    def encode(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": theirs(texts, truncation=False)["input_ids"]}

    return encode
