import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import merge, read_adapter, unmerge
from anabranch.client.tuning.tables import TableClassifier, build
from anabranch.client.tuning.text import TextClassifier
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.edge.export import onnx as export
from anabranch.edge.runtime.classify import load_session
from anabranch.protocols.errors import ModelError, ReleaseError
from anabranch.protocols.tables import Lora, Model

Make = Callable[..., Classifier]
KINDS = ["text", "image", "tabular", "logistic"]


def run(path: Path, *inputs: NDArray[Any]) -> NDArray[np.float32]:
    session = load_session(path.read_bytes(), threads=1)
    feeds = dict(zip([i.name for i in session.get_inputs()], inputs, strict=True))
    logits: NDArray[np.float32] = session.run(["logits"], feeds)[0]
    return logits


def batch(classifier: Classifier, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    rng = torch.Generator().manual_seed(rows)
    if isinstance(classifier, TextClassifier):
        lengths = torch.randint(1, 60, (rows,), generator=rng).tolist()
        return collate(classifier.encode(["acute fracture of femur " * n for n in lengths]))
    if isinstance(classifier, ImageClassifier):
        return torch.rand(rows, *classifier.image_shape, generator=rng), None
    return torch.randn(rows, 5, generator=rng), None


def feeds(x: torch.Tensor, mask: torch.Tensor | None) -> list[NDArray[Any]]:
    return [x.numpy()] + ([] if mask is None else [mask.long().numpy()])


# The real encoder


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory, make_config: Any) -> tuple[Classifier, Path]:
    """MiniLM with a random adapter of the size that training gives, and its two graphs."""
    config = msgspec.structs.replace(
        make_config("text"), model=Model(base="minilm", max_tokens=48), lora=Lora(rank=4)
    )
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                std = 0.02 if "lora_B" in name else 0.1
                parameter.normal_(std=std, generator=rng)
    folder = tmp_path_factory.mktemp("minilm")
    export.export_classifier(classifier, folder / "model.onnx")
    export.quantize_int8(folder / "model.onnx", folder / "int8.onnx")
    return classifier, folder


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_minilm_in_onnx_computes_what_torch_computes(
    minilm: tuple[Classifier, Path], rows: int
) -> None:
    classifier, folder = minilm
    x, mask = batch(classifier, rows)
    with torch.no_grad():
        expected = classifier.logits(x, mask).numpy()

    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(run(folder / "model.onnx", *feeds(x, mask)), expected, atol=1e-4)


def test_padding_does_not_change_the_logits_of_a_text(minilm: tuple[Classifier, Path]) -> None:
    classifier, folder = minilm
    x, mask = batch(classifier, 4)
    assert mask is not None
    together = run(folder / "model.onnx", *feeds(x, mask))

    for row, length in enumerate(mask.sum(dim=1).tolist()):
        alone = run(
            folder / "model.onnx", *feeds(x[row : row + 1, :length], mask[row : row + 1, :length])
        )
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-4)


def test_minilm_in_int8_is_a_third_as_large_and_close(minilm: tuple[Classifier, Path]) -> None:
    classifier, folder = minilm
    x, mask = batch(classifier, 9)
    with torch.no_grad():
        expected = classifier.logits(x, mask).numpy()
    sizes = [(folder / name).stat().st_size for name in ("int8.onnx", "model.onnx")]
    got = run(folder / "int8.onnx", *feeds(x, mask))

    assert sizes[0] <= 0.3 * sizes[1]
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.98
    assert not np.array_equal(got, expected)


def test_graphs_load_in_onnxruntime_1_19(minilm: tuple[Classifier, Path]) -> None:
    _, folder = minilm
    for name in ("model.onnx", "int8.onnx"):
        graph = onnx.load(folder / name)

        assert graph.ir_version <= 10
        assert {(i.domain, i.version) for i in graph.opset_import} <= {
            ("", 17),
            ("com.microsoft", 1),
        }
        assert [i.name for i in graph.graph.input] == ["input_ids", "attention_mask"]
        dims = [d.dim_param for i in graph.graph.input for d in i.type.tensor_type.shape.dim]
        assert dims == ["batch", "tokens"] * 2


def test_pairs_of_int8_products_fit_into_16_bits(minilm: tuple[Classifier, Path]) -> None:
    """What x86 without VNNI adds in 16 bits: inputs 2i and 2i + 1, bytes 0 … 255 of x."""
    graph = onnx.load(minilm[1] / "int8.onnx").graph
    products = {n.input[1] for n in graph.node if n.op_type == "MatMulInteger"}
    weights = [onnx.numpy_helper.to_array(w) for w in graph.initializer if w.name in products]

    assert len(weights) == len(products) > 30
    for w in weights:
        assert w.dtype == np.int8
        pairs = w.astype(int).reshape(-1, 2, w.shape[1])
        assert 255 * np.maximum(pairs, 0).sum(axis=1).max() < 2**15
        assert 255 * np.minimum(pairs, 0).sum(axis=1).min() >= -(2**15)


def test_every_embedding_and_linear_layer_is_quantized(minilm: tuple[Classifier, Path]) -> None:
    graph = onnx.load(minilm[1] / "int8.onnx").graph
    floats = {w.name: w.dims for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
    matrices = {name for name, dims in floats.items() if len(dims) > 1 and min(dims) > 1}

    assert matrices == set()
    assert sum(int(np.prod(dims)) for dims in floats.values()) < 200_000  # scales, biases, norms
    for node in (n for n in graph.node if n.op_type in ("MatMul", "Gemm")):
        assert not set(node.input) & floats.keys()  # attention multiplies what it computed


# Every kind of classifier


@pytest.mark.parametrize("kind", KINDS)
def test_any_classifier_in_onnx_computes_what_torch_computes(
    make_classifier: Make, tmp_path: Path, kind: str
) -> None:
    classifier = make_classifier(kind)
    difference = export.export_classifier(classifier, tmp_path / "model.onnx")

    assert difference <= export.TOLERANCE
    for rows in (1, 7):
        x, mask = batch(classifier, rows)
        with torch.no_grad():
            expected = classifier.logits(x, mask).numpy()
        got = run(tmp_path / "model.onnx", *feeds(x, mask))
        assert got.shape == (rows, 3)
        np.testing.assert_allclose(got, expected, atol=1e-4)
    assert tuple(
        i.name for i in load_session((tmp_path / "model.onnx").read_bytes(), threads=1).get_inputs()
    ) == export.input_names(classifier)


@pytest.mark.parametrize("kind", KINDS)
def test_exporting_changes_neither_base_nor_adapter(
    make_classifier: Make, tmp_path: Path, kind: str
) -> None:
    classifier = make_classifier(kind)
    before = read_adapter(classifier)
    export.export_classifier(classifier, tmp_path / "model.onnx")
    after = read_adapter(classifier)

    assert classifier.compute_base_digest() == classifier.base_digest
    assert not classifier.merged
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(after.arrays[name], array)


@pytest.mark.parametrize("kind", KINDS)
def test_any_classifier_can_be_quantized(make_classifier: Make, tmp_path: Path, kind: str) -> None:
    classifier = make_classifier(kind, std=0.05)
    export.export_classifier(classifier, tmp_path / "model.onnx")
    export.quantize_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    x, mask = batch(classifier, 6)
    expected = run(tmp_path / "model.onnx", *feeds(x, mask))
    got = run(tmp_path / "int8.onnx", *feeds(x, mask))

    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    assert "Integer" in " ".join(n.op_type for n in onnx.load(tmp_path / "int8.onnx").graph.node)


def test_a_merged_classifier_gives_the_same_graph_and_stays_merged(
    make_classifier: Make, tmp_path: Path
) -> None:
    classifier = make_classifier("tabular")
    export.export_classifier(classifier, tmp_path / "a.onnx")
    merge(classifier)
    export.export_classifier(classifier, tmp_path / "b.onnx")

    assert classifier.merged
    unmerge(classifier)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_exporters_say_nothing_and_leave_logging_alone(
    make_classifier: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export.export_classifier(make_classifier("text"), tmp_path / "model.onnx")
        export.quantize_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx")

    assert [str(w.message) for w in caught] == []
    assert (list(root.handlers), root.level) == before
    assert capfd.readouterr() == ("", "")


# Refusals


class Moody(TableClassifier):
    """Computes something else for batches of the size that is traced."""

    def logits(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits = super().logits(x, mask)
        return logits if len(x) == 3 else -logits


def test_a_graph_that_computes_something_else_is_refused_and_removed(
    make_classifier: Make, tmp_path: Path
) -> None:
    honest = make_classifier("logistic")
    moody = Moody(build(5, (), seed=0), num_features=5, num_labels=3, base_digest="0" * 64)
    moody.spec = honest.spec
    with torch.no_grad():
        moody.head.weight.copy_(honest.head.weight)

    with pytest.raises(ReleaseError, match=r"model\.onnx: onnxruntime and torch differ by [0-9]"):
        export.export_classifier(moody, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    class Other(Classifier):
        num_stages = 0
        run = encode = stage_of = None  # type: ignore[assignment]

    other = Other(torch.nn.Linear(2, 2), width=2, num_labels=2, base_digest="0" * 64)
    with pytest.raises(ModelError, match="Other cannot be exported to ONNX"):
        export.export_classifier(other, tmp_path / "model.onnx")
