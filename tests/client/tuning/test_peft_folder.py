import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel

from anabranch.client.tuning.bases import load_classifier, minilm_folder
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.peft_folder import About, read_about, read_peft, write_peft
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import AnabranchError, IncompatibleAdapter, ModelError
from anabranch.protocols.tables import Lora

MakeConfig = Callable[..., RunConfig]
Randomise = Callable[..., None]
# The last two are not square.
TARGETS = ("query", "*.intermediate.dense", "*.layer.[0-9].output.dense")
LORA = Lora(rank=3, alpha=12, targets=TARGETS, layers="last:2")
LABELS = ("a", "b", "c")

# peft 0.21 asks transformers 5.23 for an attribute under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def classifier(
    make_config: MakeConfig, encoders: dict[str, Path], randomise: Randomise
) -> Classifier:
    config = make_config(str(encoders["bert"]), lora=LORA, max_tokens=16)
    classifier = load_classifier(config)
    randomise(classifier)
    return classifier


@pytest.fixture
def folder(classifier: Classifier, tmp_path: Path) -> Path:
    """Return a folder with the classifier's adapter, whose B and head are not zero."""
    write_peft(tmp_path, read_adapter(classifier), base_name="tiny", labels=LABELS)
    return tmp_path


def logits_over(encoder: Any, classifier: Classifier, x: Tensor, mask: Tensor) -> Tensor:
    """Return logits from any encoder's hidden states, with the classifier's pooling and head."""
    with torch.no_grad():
        h = encoder(input_ids=x, attention_mask=mask.long()).last_hidden_state
        last = classifier.num_stages - 1
        logits: Tensor = classifier.head(classifier.run(h, mask, last, last + 1))
    return logits


def assert_same_logits(encoder: Any, classifier: Classifier, texts: list[str]) -> None:
    x, mask = collate(classifier.encode(texts))
    assert mask is not None
    expected = logits_over(encoder, classifier, x, mask)
    assert expected.std() > 0.1
    torch.testing.assert_close(classifier.logits(x, mask), expected, atol=1e-5, rtol=0)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_written_is_read(classifier: Classifier, folder: Path) -> None:
    written = read_adapter(classifier)

    read = read_peft(folder, classifier.spec)

    assert read.spec == written.spec
    assert all(np.array_equal(read.arrays[n], a) for n, a in written.arrays.items())
    assert read_about(folder) == About(spec=written.spec, labels=LABELS, pooling="mean")
    assert not list(folder.glob(".*"))  # no temporary file is left


def test_peft_loads_ours_and_computes_the_same(
    classifier: Classifier, folder: Path, encoders: dict[str, Path], texts: list[str]
) -> None:
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(encoders["bert"]), folder).eval()

    assert_same_logits(theirs, classifier, texts)


def test_ours_loads_what_peft_made_and_computes_the_same(
    make_config: MakeConfig,
    encoders: dict[str, Path],
    texts: list[str],
    randomise: Randomise,
    tmp_path: Path,
) -> None:
    config = LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=r".*layer\.[12]\.(attention\.self\.query|intermediate\.dense|output\.dense)",
    )
    theirs = get_peft_model(AutoModel.from_pretrained(encoders["bert"]), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(str(tmp_path))
    classifier = load_classifier(make_config(str(encoders["bert"]), lora=LORA, max_tokens=16))

    adapter = read_peft(tmp_path, classifier.spec, foreign=True)

    assert not adapter.arrays["head.weight"].any()
    load_adapter(classifier, adapter)
    with torch.no_grad():
        classifier.head.weight.normal_()
    assert_same_logits(theirs, classifier, texts)


def test_minilm_adapters_pass_through_peft(
    make_config: MakeConfig, randomise: Randomise, tmp_path: Path
) -> None:
    lora = Lora(rank=4, targets=("value", "*.intermediate.dense"), layers="last:2")
    classifier = load_classifier(make_config("minilm", lora=lora))
    randomise(classifier)
    with torch.no_grad():
        classifier.head.weight /= 10
    write_peft(tmp_path, read_adapter(classifier), base_name="minilm", labels=LABELS)
    base = AutoModel.from_pretrained(minilm_folder(), attn_implementation="eager")

    theirs = PeftModel.from_pretrained(base, tmp_path).eval()

    assert_same_logits(theirs, classifier, ["femur fracture", "asthma, unspecified", "sepsis"])


def test_tensors_other_than_factors_lie_beside(
    make_config: MakeConfig, encoders: dict[str, Path], randomise: Randomise, tmp_path: Path
) -> None:
    lora = Lora(rank=3, targets=("query",), modules_to_save=("encoder.layer.2.output",))
    classifier = load_classifier(make_config(str(encoders["bert"]), lora=lora, max_tokens=16))
    randomise(classifier)
    write_peft(tmp_path, read_adapter(classifier), base_name="tiny", labels=LABELS)

    beside = safetensors.numpy.load_file(tmp_path / "head.safetensors")

    assert beside["encoder.layer.2.output.dense.weight"].shape == (24, 40)
    assert beside.keys() >= {"head.weight", "head.bias"}
    read = read_peft(tmp_path, classifier.spec)
    assert all((read.arrays[n] == a).all() for n, a in read_adapter(classifier).arrays.items())


def test_an_adapter_without_factors_is_a_head(
    make_config: MakeConfig, encoders: dict[str, Path], randomise: Randomise, tmp_path: Path
) -> None:
    config = make_config(str(encoders["bert"]), lora=Lora(rank=0), max_tokens=16)
    classifier = load_classifier(config)
    randomise(classifier)
    write_peft(tmp_path, read_adapter(classifier), base_name="tiny", labels=LABELS, pooling="cls")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["anabranch.json", "head.safetensors"]
    assert read_about(tmp_path).pooling == "cls"
    read = read_peft(tmp_path, classifier.spec)
    assert np.array_equal(read.arrays["head.weight"], classifier.head.weight.detach().numpy())


def test_half_precision_adapters_are_widened(classifier: Classifier, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    halves = {name: a.astype(np.float16) for name, a in arrays.items()}
    safetensors.numpy.save_file(halves, file)

    read = read_peft(folder, classifier.spec)

    for name, half in halves.items():
        array = read.arrays[name.removeprefix("base_model.model.")]
        assert array.dtype == np.float32
        assert np.array_equal(array, half.astype(np.float32))


def test_an_adapter_of_another_base_is_refused(classifier: Classifier, folder: Path) -> None:
    other = msgspec.structs.replace(classifier.spec, base="f" * 64)

    with pytest.raises(IncompatibleAdapter, match="adapter is for base model"):
        read_peft(folder, other)


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "adapter_model.safetensors", "head.safetensors", "anabranch.json"],
)
def test_a_missing_file_is_named(classifier: Classifier, folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(ModelError, match=f"has no {name}"):
        read_peft(folder, classifier.spec)


def test_pickles_are_not_opened(classifier: Classifier, folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    with pytest.raises(ModelError, match=r"adapter_model.bin is a pickle, which can run code"):
        read_peft(folder, classifier.spec)


def test_a_folder_that_peft_wrote_does_not_say_its_base(
    classifier: Classifier, folder: Path
) -> None:
    (folder / "anabranch.json").unlink()

    with pytest.raises(ModelError, match=r"has no anabranch.json"):
        read_peft(folder, classifier.spec)
    read_peft(folder, classifier.spec, foreign=True)


FIRST = "base_model.model.encoder.layer.1.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST: np.full((3, 24), np.nan, np.float32)}, "72 of 72 values are NaN or infinite"),
        ({FIRST: np.full((3, 23), 1, np.float32)}, r"expected shape \(3, 24\), got \(3, 23\)"),
        ({FIRST: np.full((3, 24), 1, np.float64)}, "expected float32, got torch.float64"),
        ({"base_model.model.x": np.ones(2, np.float32)}, "x: expected"),
        ({"encoder.x": np.ones(2, np.float32)}, "encoder.x does not begin with base_model.model."),
    ],
)
def test_bad_tensors_are_refused(
    classifier: Classifier, folder: Path, change: dict[str, np.ndarray], message: str
) -> None:
    file = folder / "adapter_model.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(file) | change, file)

    with pytest.raises(IncompatibleAdapter, match=message):
        read_peft(folder, classifier.spec)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "IA3"}, ModelError, 'expected an object with peft_type "LORA"'),
        ({"use_dora": True}, ModelError, "use_dora = True is not supported"),
        ({"use_rslora": True}, ModelError, "use_rslora = True is not supported"),
        ({"bias": "all"}, ModelError, "bias = 'all' is not supported"),
        ({"alpha_pattern": {"query": 3}}, ModelError, "alpha_pattern = .* is not supported"),
        ({"r": 5}, IncompatibleAdapter, "r is 5, expected 3"),
        ({"lora_alpha": 7}, IncompatibleAdapter, "lora_alpha is 7, expected 12"),
    ],
)
def test_other_kinds_of_adapter_are_refused(
    classifier: Classifier,
    folder: Path,
    change: dict[str, object],
    error: type[AnabranchError],
    message: str,
) -> None:
    edit_json(folder / "adapter_config.json", **change)

    with pytest.raises(error, match=message):
        read_peft(folder, classifier.spec)


@pytest.mark.parametrize("name", ["adapter_config.json", "anabranch.json"])
def test_broken_json_is_refused(classifier: Classifier, folder: Path, name: str) -> None:
    (folder / name).write_text("{")

    with pytest.raises(ModelError, match=name):
        read_peft(folder, classifier.spec)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors"])
@pytest.mark.parametrize("keep", [0, 7, -1])
def test_broken_tensors_are_refused(
    classifier: Classifier, folder: Path, name: str, keep: int
) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    with pytest.raises(ModelError, match=f"{name} is not a safetensors file"):
        read_peft(folder, classifier.spec)
