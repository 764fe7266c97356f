import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.text import TextClassifier
from anabranch.edge.export.onnx import export_classifier, input_names, quantize_int8
from anabranch.edge.export.tokenizer import tokenizer_data, write_tokenizer
from anabranch.edge.runtime import classify
from anabranch.edge.runtime.classify import Model
from anabranch.edge.runtime.manifest import (
    FP32,
    INT8,
    MANIFEST,
    TOKENIZER,
    Manifest,
    entry,
    read_manifest,
)
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, ReleaseError

TEXTS = [
    "acute failure of heart",
    "Fracture of the left femur",
    "",
    "heart",
    "chronic infarction type " * 12,
    "fracture",
]


def write_release(folder: Path, classifier: Classifier, config: RunConfig) -> Path:
    """Write what a device needs of a release."""
    folder.mkdir()
    export_classifier(classifier, folder / FP32)
    quantize_int8(folder / FP32, folder / INT8)
    if config.task.kind == "text-classification":
        assert isinstance(classifier, TextClassifier)
        data = tokenizer_data(classifier.tokenizer, max_tokens=config.model.max_tokens)
        (folder / TOKENIZER).write_bytes(write_tokenizer(data))
    seal(folder, classifier, config)
    return folder


def seal(folder: Path, classifier: Classifier, config: RunConfig) -> None:
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    manifest = Manifest(
        name=config.name,
        task=config.task.kind,
        labels=config.task.labels,
        inputs=input_names(classifier),
        base=classifier.base_digest,
        adapter="a" * 64,
        config=config.digest(),
        metrics={"accuracy": 0.5},
        files={p.relative_to(folder).as_posix(): entry(p) for p in paths},
    )
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


@pytest.fixture(scope="module")
def releases(
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Classifier]]:
    folder, made = tmp_path_factory.mktemp("releases"), {}
    for kind in ("text", "image", "tabular", "logistic"):
        classifier = make_classifier(kind)
        made[kind] = write_release(folder / kind, classifier, make_config(kind)), classifier
    return made


@pytest.fixture
def make_release(
    releases: dict[str, tuple[Path, Classifier]], tmp_path: Path
) -> Callable[[str], tuple[Path, Classifier]]:
    """Return a function that gives a copy of a release, to be damaged, and its classifier."""

    def make(kind: str) -> tuple[Path, Classifier]:
        folder, classifier = releases[kind]
        return shutil.copytree(folder, tmp_path / kind, dirs_exist_ok=True), classifier

    return make


Make = Callable[[str], tuple[Path, Classifier]]


def torch_probabilities(classifier: Classifier, inputs: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        x, mask = collate(classifier.encode(inputs))
        return classifier.logits(x, mask).softmax(dim=1).numpy()


# What a model says


def test_texts_get_the_labels_and_probabilities_of_the_torch_model(make_release: Make) -> None:
    folder, classifier = make_release("text")
    said = Model.open(folder, precision="fp32").classify(TEXTS)
    expected = torch_probabilities(classifier, TEXTS)

    assert [label for label, _ in said] == [
        ("bone", "heart", "other")[k] for k in expected.argmax(axis=1)
    ]
    np.testing.assert_allclose([p for _, p in said], expected.max(axis=1), atol=1e-4)
    assert len({label for label, _ in said}) > 1


@pytest.mark.parametrize(
    ("kind", "shape"), [("image", (9, 1, 12, 12)), ("tabular", (9, 5)), ("logistic", (9, 5))]
)
def test_arrays_get_the_labels_and_probabilities_of_the_torch_model(
    make_release: Make, kind: str, shape: tuple[int, ...]
) -> None:
    folder, classifier = make_release(kind)
    inputs = np.random.default_rng(0).random(shape, np.float32)
    said = Model.open(folder, precision="fp32").classify(inputs)

    expected = torch_probabilities(classifier, inputs).max(axis=1)
    np.testing.assert_allclose([p for _, p in said], expected, atol=1e-4)


def test_int8_is_the_default_and_differs_a_little(make_release: Make) -> None:
    folder, _ = make_release("tabular")
    inputs = np.random.default_rng(0).random((9, 5), np.float32)
    int8, fp32 = (
        m.logits(inputs) for m in (Model.open(folder), Model.open(folder, precision="fp32"))
    )

    assert not np.array_equal(int8, fp32)
    assert np.abs(int8 - fp32).max() < 0.2 * np.abs(fp32).max()


def test_ranked_labels_are_complete_ordered_and_begin_with_the_answer(make_release: Make) -> None:
    model = Model.open(make_release("text")[0])
    ranked = model.ranked(TEXTS)

    assert [one[0] for one in ranked] == model.classify(TEXTS)
    assert [one[:2] for one in ranked] == model.ranked(TEXTS, top=2)
    for one in ranked:
        assert {label for label, _ in one} == {"bone", "heart", "other"}
        assert sum(p for _, p in one) == pytest.approx(1)
        assert [p for _, p in one] == sorted((p for _, p in one), reverse=True)


def test_no_inputs_give_no_answers(make_release: Make) -> None:
    assert Model.open(make_release("text")[0]).classify([]) == []
    empty = np.zeros((0, 5), np.float32)
    assert Model.open(make_release("tabular")[0]).classify(empty) == []


# Batches


@pytest.mark.parametrize("tokens", [1, 30, 100, 10_000])
def test_answers_do_not_depend_on_how_inputs_are_cut_into_batches(
    make_release: Make, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    model = Model.open(make_release("text")[0], precision="fp32")
    texts = [f"{text} {i}" for i in range(4) for text in TEXTS]
    expected = np.concatenate([model.logits([text]) for text in texts])
    monkeypatch.setattr(classify, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(classify, "WINDOW", 7)

    np.testing.assert_allclose(model.logits(texts), expected, atol=1e-4)


def test_no_batch_holds_more_tokens_or_values_than_allowed(
    make_release: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "BATCH_TOKENS", 60)
    monkeypatch.setattr(classify, "BATCH_VALUES", 12)
    text = Model.open(make_release("text")[0])
    names = text.manifest.inputs
    cut = classify.batches(TEXTS * 20, names, (), text.tokenizer)
    texts = [feeds["input_ids"] for _, feeds in cut]
    table = classify.batches(np.zeros((7, 5), np.float32), ["features"], (5,), None)
    rows = [feeds["features"] for _, feeds in table]

    assert max(b.size for b in texts) <= 60
    assert np.mean([b.size for b in texts]) > 40  # and they are used
    assert [b.shape for b in rows] == [(2, 5), (2, 5), (2, 5), (1, 5)]


# Fail closed


@pytest.mark.parametrize("name", [FP32, INT8, TOKENIZER])
@pytest.mark.parametrize("damage", ["changed", "longer", "missing"])
def test_a_release_with_a_damaged_file_does_not_open(
    make_release: Make, name: str, damage: str
) -> None:
    folder, _ = make_release("text")
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(bytes(data) if damage == "changed" else path.read_bytes() + b" ")

    message = "cannot be read" if damage == "missing" else "is not the file that was released"
    with pytest.raises(ReleaseError, match=f"{name}: {message}"):
        Model.open(folder, precision="fp32")


def edit(folder: Path, **changes: Any) -> None:
    fields = msgspec.json.decode((folder / MANIFEST).read_bytes()) | changes
    (folder / MANIFEST).write_bytes(msgspec.json.encode(fields))


def test_a_release_without_int8_says_so(make_release: Make) -> None:
    folder, _ = make_release("tabular")
    files = msgspec.to_builtins(read_manifest(folder).files)
    (folder / INT8).unlink()
    edit(folder, files={name: file for name, file in files.items() if name != INT8})

    with pytest.raises(ReleaseError, match=r"no int8 model: .* take the other precision"):
        Model.open(folder)
    assert Model.open(folder, precision="fp32").manifest.name == "tiny-tabular"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "Invalid enum value 2"),
        ({"base": "abc"}, "matching regex"),
        ({"extra": 1}, "unknown field `extra`"),
        ({"labels": "bone"}, "Expected `array`"),
        ({"files": {"../x": {"bytes": 1, "sha256": "a" * 64}}}, "'../x' does not lie inside"),
        ({"files": {"/etc/x": {"bytes": 1, "sha256": "a" * 64}}}, "does not lie inside"),
        ({"files": {"a/../../x": {"bytes": 1, "sha256": "a" * 64}}}, "does not lie inside"),
        ({"files": {"c:x": {"bytes": 1, "sha256": "a" * 64}}}, "does not lie inside"),
        ({"files": {"x": {"bytes": -1, "sha256": "a" * 64}}}, "Expected `int` >= 0"),
    ],
)
def test_a_hostile_manifest_is_refused(
    make_release: Make, change: dict[str, Any], message: str
) -> None:
    folder, _ = make_release("logistic")
    edit(folder, **change)

    with pytest.raises(ReleaseError, match=f"manifest.json: .*{message}"):
        Model.open(folder)


def test_a_folder_that_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match=r"manifest\.json: cannot be read .* a release's folder"):
        Model.open(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff{")
    with pytest.raises(ReleaseError, match=r"manifest\.json: "):
        Model.open(tmp_path)


def test_a_model_that_onnxruntime_cannot_load_is_refused(make_release: Make) -> None:
    folder, _ = make_release("logistic")
    (folder / INT8).write_bytes(b"no graph")
    digest = hashlib.sha256(b"no graph").hexdigest()
    files = msgspec.to_builtins(read_manifest(folder).files)
    edit(folder, files=files | {INT8: {"bytes": 8, "sha256": digest}})

    with pytest.raises(ReleaseError, match=r"onnxruntime [0-9.]+ cannot load the model"):
        Model.open(folder)


def test_inputs_of_another_kind_are_refused(make_release: Make) -> None:
    text, table = Model.open(make_release("text")[0]), Model.open(make_release("tabular")[0])

    for wrong in ("one text", [b"bytes"], [1.0], np.zeros((2, 5), np.float32)):
        with pytest.raises(DataError, match="expected a list of str"):
            text.classify(wrong)  # type: ignore[arg-type]
    for array in (np.zeros((2, 4), np.float32), np.zeros(5, np.float32), np.zeros((2, 5), int)):
        with pytest.raises(DataError, match=r"float32 inputs of shape \(n, 5\), got"):
            table.classify(array)
    with pytest.raises(DataError, match="NaN or infinite"):
        table.classify(np.full((2, 5), np.nan, np.float32))


def test_fewer_than_one_thread_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
        Model.open(tmp_path, threads=0)


def test_a_precision_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="precision 'int4': expected int8 or fp32"):
        Model.open(tmp_path, precision="int4")  # type: ignore[arg-type]
