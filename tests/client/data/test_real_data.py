"""The contract and the readers on public data as it is found, not as we would write it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from anabranch.client.data.contract import check
from anabranch.client.data.read import read_table
from anabranch.client.data.records import fingerprint, load_records, num_features, split
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError

MakeConfig = Callable[..., RunConfig]

# The 14 attributes of UCI's processed files, which have no header.
HEART = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,num"
LEVELS = {"age": (54, 9), "trestbps": (132, 19), "thalach": (138, 26), "oldpeak": (0.9, 1.1)}
HOSPITALS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}


def heart_file(shared_data: Path, hospital: str, folder: Path) -> Path:
    """Write a hospital's records with a header; 63.0 and 63 are one value, as categories need."""
    source = shared_data / "heart-disease" / f"processed.{hospital}.data"
    lines = source.read_text().replace(".0,", ",").split()
    file = folder / f"{hospital}.csv"
    file.write_text("\n".join([HEART, *lines]) + "\n")
    return file


def heart_columns(**changes: Any) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: {"type": "number", "mean": mean, "std": std, "optional": True}
        for name, (mean, std) in LEVELS.items()
    }
    columns["age"] |= {"min": 18, "max": 100, "optional": False}
    columns["cp"] = {"type": "category", "values": ["1", "2", "3", "4"]}
    columns["thal"] = {"type": "category", "values": ["3", "6", "7"], "optional": True}
    columns["num"] = {"type": "label"}
    return columns | changes


@pytest.mark.parametrize(("hospital", "rows"), HOSPITALS.items())
def test_four_hospitals_keep_one_contract(
    hospital: str, rows: int, shared_data: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("tabular", heart_columns(), ("0", "1", "2", "3", "4"), min_rows=100)

    records = load_records(heart_file(shared_data, hospital, tmp_path), config)
    _, held = split(records, 0.2, seed=1)

    assert isinstance(records.inputs, np.ndarray)
    assert records.inputs.shape == (rows, num_features(config)) == (rows, 1 + 3 * 2 + 4 + 4)
    assert np.abs(records.inputs).max() < 10
    assert len(held) == round(0.2 * rows)
    shares = held.label_counts(5) / len(held) - records.label_counts(5) / rows
    assert np.abs(shares).max() < 0.03


def test_missing_cholesterol_is_found_in_every_row_that_lacks_it(
    shared_data: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    file = heart_file(shared_data, "hungarian", tmp_path)
    strict = heart_columns(chol={"type": "number", "max": 600})
    config = make_config("tabular", strict, ("0", "1", "2", "3", "4"))
    cells = [line.split(",")[4] for line in file.read_text().splitlines()[1:]]

    empty, above = check(read_table(file), config)

    assert empty.rows == tuple(row for row, cell in enumerate(cells, 1) if cell == "?")
    assert len(empty.rows) == 23
    assert above.rows == tuple(r for r, c in enumerate(cells, 1) if c != "?" and float(c) > 600)


def test_a_headerless_file_is_refused_without_showing_a_patient(
    shared_data: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "va.csv"
    file.write_text((shared_data / "heart-disease" / "processed.va.data").read_text())
    config = make_config("tabular", heart_columns(), ("0", "1", "2", "3", "4"))

    with pytest.raises(DataError, match=r"line 1: columns 2 and 7 have the same name.*header\?"):
        load_records(file, config)


def test_text_messages_are_read_to_the_last_one(
    shared_data: Path, make_config: MakeConfig, tmp_path: Path
) -> None:
    file = tmp_path / "sms.tsv"
    lines = (shared_data / "sms-spam" / "sms.tsv").read_text(encoding="utf-8")
    file.write_text(f"label\ttext\n{lines}", encoding="utf-8")
    columns = {"text": {"type": "text"}, "label": {"type": "label"}}
    config = make_config("text", columns, ("ham", "spam"), max_characters=1000)

    messages = load_records(file, config)
    train, held = split(messages, 0.1, seed=0)

    assert messages.label_counts(2).tolist() == [4827, 747]
    assert set(train.inputs).isdisjoint(held.inputs)  # the corpus has hundreds of copies
    assert len(held) == pytest.approx(557, abs=10)
    assert fingerprint(messages) != fingerprint(train)


def test_digits_written_as_images_come_back_as_they_were(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    digits = load_digits()
    count = 300
    for at in range(count):
        file = tmp_path / str(digits.target[at]) / f"{at:04}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((digits.images[at] * 15).astype(np.uint8)).save(file)
    columns = {"image": {"type": "image"}, "label": {"type": "label"}}
    config = make_config("image", columns, tuple("9876543210"), model={"base": "vit"})

    records = load_records(tmp_path, config)

    order = np.lexsort((np.arange(count), digits.target[:count]))
    assert isinstance(records.inputs, np.ndarray)
    np.testing.assert_allclose(records.inputs[:, 0] * 255, digits.images[order] * 15, atol=1e-4)
    assert (records.labels == 9 - digits.target[order]).all()
