import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.peft_folder import read_peft
from anabranch.edge.runtime.classify import Model as Device
from anabranch.edge.runtime.manifest import FP32, INT8, MANIFEST, entry, read_manifest, verify
from anabranch.protocols import wire
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import IncompatibleAdapter, PrivacyError, ReleaseError
from anabranch.protocols.tables import (
    Column,
    Contract,
    Federation,
    Lora,
    Model,
    Privacy,
    Release,
    Task,
    Training,
)
from anabranch.server import release
from anabranch.server.card import RunFacts, SitePrivacy
from anabranch.server.release import make_release

FACTS = RunFacts(run="run-1", base_name="minilm", rounds=3, best_round=2, sites=("north", "south"))
BONE = [
    f"{kind} fracture of {side} {bone}{case}"
    for kind in ("open", "closed", "displaced")
    for side in ("left", "right", "unspecified")
    for bone in ("femur", "tibia", "radius", "patella")
    for case in ("", ", initial encounter")
]
HEART = [
    f"{time} {thing} of the {place}{case}"
    for time in ("acute", "chronic", "recurrent")
    for thing in ("infarction", "rupture", "inflammation")
    for place in ("heart", "mitral valve", "aorta", "left ventricle")
    for case in ("", " in diseases classified elsewhere")
]
TEXTS = [*BONE, *HEART]
LABELS = np.repeat(np.array([0, 1], np.int64), [len(BONE), len(HEART)])


def config_for(kind: str, columns: dict[str, Column], model: Model, **changes: Any) -> RunConfig:
    full_kind: Any = f"{kind}-classification"
    fields: dict[str, Any] = {
        "name": "small",
        "task": Task(kind=full_kind, labels=("bone", "heart")),
        "data": Contract(columns=columns | {"y": Column(type="label")}),
        "model": model,
        "federation": Federation(rounds=3),
        "lora": Lora(rank=3),
    }
    return RunConfig(**(fields | changes))


TEXT = config_for("text", {"text": Column(type="text")}, Model(base="minilm", max_tokens=24))
TABLE = config_for(
    "tabular",
    {"a": Column(type="number"), "b": Column(type="number"), "c": Column(type="number")},
    Model(base="mlp", hidden=(40, 30)),
    lora=Lora(rank=2, targets=("hidden.*",)),
)
IMAGE = config_for(
    "image",
    {"image": Column(type="image")},
    Model(base="vit", width=24, depth=2, heads=3, image_size=12, patch=4, channels=3),
)


def table_records(n: int = 90) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rows = np.random.default_rng(4).standard_normal((n, 3)).astype(np.float32)
    return rows, (rows[:, 0] > 0).astype(np.int64)


def trained(config: RunConfig, inputs: Any, labels: NDArray[np.int64]) -> Classifier:
    """Return a classifier with a small random adapter and the least-squares head over it."""
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in classifier.base.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=rng)
        stages = (0, classifier.num_stages)
        encoded = classifier.encode(inputs)
        h = torch.cat([classifier.run(x[None], None, *stages) for x in encoded])
        targets = torch.nn.functional.one_hot(torch.tensor(labels)).float() * 8 - 4
        h1 = torch.cat([h, torch.ones(len(h), 1)], dim=1)
        ridge = h1.T @ h1 + torch.eye(h1.shape[1])
        weights = torch.linalg.solve(ridge, h1.T @ targets)
        classifier.head.weight.copy_(weights[:-1].T)
        classifier.head.bias.copy_(weights[-1])
    return classifier


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[release.Release, Classifier]:
    """The release of a MiniLM whose head was fitted on half of the texts."""
    classifier = trained(TEXT, TEXTS[::2], LABELS[::2])
    adapter = read_adapter(classifier)
    folder = tmp_path_factory.mktemp("runs") / "x" / "release"
    made = make_release(
        classifier, adapter, TEXT, folder, inputs=TEXTS[1::2], labels=LABELS[1::2], facts=FACTS
    )
    return made, classifier


# The real encoder


def test_a_release_holds_every_part_and_its_manifest_lists_them(
    real: tuple[release.Release, Classifier],
) -> None:
    made, classifier = real
    manifest = read_manifest(made.folder)
    verify(made.folder, manifest)
    found = {p.relative_to(made.folder).as_posix() for p in made.folder.rglob("*") if p.is_file()}

    assert found == set(manifest.files) | {MANIFEST}
    assert {
        "README.md",
        "labels.json",
        "tokenizer.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "merged/config.json",
        "merged/model.safetensors",
        "merged/head.safetensors",
        "merged/tokenizer.json",
        FP32,
        INT8,
    } <= found
    assert manifest.base == classifier.base_digest
    assert manifest.adapter == wire.digest(wire.encode(read_adapter(classifier)))
    assert manifest.config == TEXT.digest()
    assert json.loads((made.folder / "labels.json").read_bytes()) == ["bone", "heart"]
    assert made.manifest_sha256 == entry(made.folder / MANIFEST).sha256
    assert [p.name for p in made.folder.parent.iterdir()] == ["release"]  # nothing hidden is left


def test_both_graphs_are_as_accurate_as_torch_and_int8_is_small(
    real: tuple[release.Release, Classifier],
) -> None:
    made, _ = real
    checks = made.checks

    assert checks.num_records == len(TEXTS) // 2
    assert checks.torch_accuracy > 0.9
    assert checks.fp32_accuracy == checks.torch_accuracy
    assert checks.int8_accuracy >= checks.fp32_accuracy - 0.01
    assert made.int8_bytes <= 0.3 * made.fp32_bytes
    assert made.int8_bytes == (made.folder / INT8).stat().st_size
    assert 0 < checks.int8_latency_ms < 1000
    assert set(checks.metrics) == {"accuracy", "macro_f1", "auroc", "ece", "loss"}


def test_a_device_classifies_sentences_with_the_release(
    real: tuple[release.Release, Classifier],
) -> None:
    said = Device.open(real[0].folder).classify(
        ["Broken shin bone, closed", "Myocardial infarction", "fracture of rib"]
    )

    assert [label for label, _ in said] == ["bone", "heart", "bone"]
    assert all(0.5 < probability <= 1 for _, probability in said)


def test_the_merged_folder_gives_the_same_logits_by_the_recipe_of_the_card(
    real: tuple[release.Release, Classifier],
) -> None:
    from transformers import AutoTokenizer, BertModel

    made, classifier = real
    merged = made.folder / "merged"
    model = BertModel.from_pretrained(merged, add_pooling_layer=False)
    tokens = AutoTokenizer.from_pretrained(merged)(TEXTS[:5], padding=True, return_tensors="pt")
    head = safetensors.torch.load_file(merged / "head.safetensors")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None]
        vector = (hidden * mask).sum(1) / mask.sum(1)
        vector = vector / vector.norm(dim=1, keepdim=True) * vector.shape[1] ** 0.5
        logits = vector @ head["head.weight"].T + head["head.bias"]

    expected = Device.open(made.folder, precision="fp32").logits(TEXTS[:5])
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)
    assert classifier.compute_base_digest() == classifier.base_digest


def test_the_adapter_of_a_release_reads_back(real: tuple[release.Release, Classifier]) -> None:
    made, classifier = real
    again = read_peft(made.folder / "adapter", classifier.spec)

    assert wire.encode(again) == wire.encode(read_adapter(classifier))


def test_the_card_lists_the_checksums_of_the_files(
    real: tuple[release.Release, Classifier],
) -> None:
    made, _ = real
    card = (made.folder / "README.md").read_text()
    for name, file in read_manifest(made.folder).files.items():
        assert (file.sha256 in card) is (name != "README.md")
    assert "There is no differential privacy" in card


# Images and tables


def image_records() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    images = np.random.default_rng(5).random((40, 3, 12, 12), np.float32)
    labels = np.arange(40) % 2
    images[labels == 1, :, :6] *= 0.3
    return images, labels


@pytest.mark.parametrize(
    ("config", "records"), [(TABLE, table_records()), (IMAGE, image_records())]
)
def test_images_and_tables_are_released_too(
    tmp_path: Path, config: RunConfig, records: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> None:
    config = msgspec.structs.replace(config, release=Release(int8_tolerance=0.2))
    inputs, labels = records
    classifier = trained(config, inputs, labels)
    made = make_release(
        classifier,
        read_adapter(classifier),
        config,
        tmp_path / "release",
        inputs=inputs,
        labels=labels,
        facts=FACTS,
        threads=2,
    )

    assert made.checks.fp32_accuracy > 0.8
    assert made.checks.threads == 2
    said = [label for label, _ in Device.open(made.folder, precision="fp32").classify(inputs)]
    truth = [config.task.labels[k] for k in labels]
    assert np.mean([a == b for a, b in zip(said, truth, strict=True)]) == made.checks.fp32_accuracy


# Refusals: nothing half-written


@pytest.fixture
def table_release(tmp_path: Path) -> Callable[..., release.Release]:
    """Return a function that releases the small table model."""
    inputs, labels = table_records()
    classifier = trained(TABLE, inputs, labels)
    arguments: dict[str, Any] = {
        "classifier": classifier,
        "adapter": read_adapter(classifier),
        "config": msgspec.structs.replace(TABLE, release=Release(int8_tolerance=0.2)),
        "folder": tmp_path / "release",
        "inputs": inputs,
        "labels": labels,
        "facts": FACTS,
    }

    def make(**changes: Any) -> release.Release:
        return make_release(**(arguments | changes))

    return make


def test_an_int8_model_that_loses_too_much_is_refused_and_left_out(tmp_path: Path) -> None:
    """Large features take a row's whole int8 range, the small one that decides is rounded away."""
    config = config_for(
        "tabular",
        {name: Column(type="number") for name in "abc"},
        Model(base="logistic"),
        lora=Lora(rank=0),
    )
    rows = np.random.default_rng(6).standard_normal((200, 3)).astype(np.float32)
    rows[:, 1:] = np.abs(rows[:, 1:]) * np.array([1000, -1000], np.float32)
    labels = (rows[:, 0] > 0).astype(np.int64)
    classifier = load_classifier(config)
    with torch.no_grad():
        classifier.head.weight.copy_(torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]))

    message = (
        r"int8 model refused: its accuracy is 0\.[0-9]+, fp32 has 1\.0000, and "
        r"release\.int8_tolerance is 0\.01\..*holds the release without it"
    )
    with pytest.raises(ReleaseError, match=message):
        make_release(
            classifier,
            read_adapter(classifier),
            config,
            tmp_path / "release",
            inputs=rows,
            labels=labels,
            facts=FACTS,
        )

    folder = tmp_path / "release"
    assert not (folder / INT8).exists()
    assert INT8 not in read_manifest(folder).files
    verify(folder, read_manifest(folder))
    assert "int8 model was refused" in (folder / "README.md").read_text()
    assert len(Device.open(folder, precision="fp32").classify(rows[:3])) == 3
    with pytest.raises(ReleaseError, match="has no int8 model"):
        Device.open(folder)


def test_a_graph_that_disagrees_with_torch_is_not_released(
    table_release: Callable[..., release.Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = release._torch_logits
    monkeypatch.setattr(release, "_torch_logits", lambda *a: honest(*a)[:, ::-1])

    with pytest.raises(ReleaseError, match=r"fp32 graph has accuracy .* nothing is released"):
        table_release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["write_peft", "quantize_int8", "model_card", "sync_folder"])
def test_a_release_that_fails_on_the_way_leaves_all_or_nothing(
    table_release: Callable[..., release.Release],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(release, step, broken)

    with pytest.raises(OSError, match="disk full"):
        table_release()
    if step == "sync_folder":  # after the rename
        verify(tmp_path / "release", read_manifest(tmp_path / "release"))
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_release_never_replaces_another(
    table_release: Callable[..., release.Release], tmp_path: Path
) -> None:
    (tmp_path / "release").mkdir()

    with pytest.raises(ReleaseError, match="release exists already: move it away"):
        table_release()
    assert list((tmp_path / "release").iterdir()) == []


def test_a_release_without_held_out_records_is_refused(
    table_release: Callable[..., release.Release], tmp_path: Path
) -> None:
    inputs, labels = table_records()
    for x, y in ((inputs[:0], labels[:0]), (inputs, labels[:5])):
        with pytest.raises(ReleaseError, match=r"held-out records: got \d+ inputs and \d+ labels"):
            table_release(inputs=x, labels=y)
    assert list(tmp_path.iterdir()) == []


def test_a_private_run_is_not_released_without_its_privacy_facts(
    table_release: Callable[..., release.Release], tmp_path: Path
) -> None:
    config = msgspec.structs.replace(
        TABLE,
        privacy=Privacy(epsilon=8.0),
        training=Training(local_steps=3),
        release=Release(int8_tolerance=0.2),
    )
    with pytest.raises(PrivacyError, match="no privacy facts of site 'north'"):
        table_release(config=config)
    assert list(tmp_path.iterdir()) == []

    spent = [
        SitePrivacy(site=s, epsilon=7.9, delta=1e-4, noise_multiplier=1.1, sample_rate=0.1, steps=9)
        for s in FACTS.sites
    ]
    facts = RunFacts(
        run="run-1",
        base_name="mlp",
        rounds=3,
        best_round=2,
        sites=FACTS.sites,
        privacy=tuple(spent),
    )
    made = table_release(config=config, facts=facts)
    assert "| north | 7.900 | 1.771 | 0.0001 | 1.1000 |" in (made.folder / "README.md").read_text()


def test_an_adapter_for_another_base_is_not_released(
    table_release: Callable[..., release.Release], tmp_path: Path
) -> None:
    other = read_adapter(load_classifier(msgspec.structs.replace(TABLE, seed=9)))

    with pytest.raises(IncompatibleAdapter, match="base model"):
        table_release(adapter=other)
    assert list(tmp_path.iterdir()) == []


def test_the_same_release_twice_has_the_same_models(
    table_release: Callable[..., release.Release], tmp_path: Path
) -> None:
    first = read_manifest(table_release().folder)
    shutil.move(tmp_path / "release", tmp_path / "first")
    second = read_manifest(table_release().folder)

    for name in (FP32, INT8, "merged/model.safetensors", "adapter/adapter_model.safetensors"):
        assert first.files[name] == second.files[name]
