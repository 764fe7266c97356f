from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import base_weights, merge, read_adapter
from anabranch.edge.export import artifacts_surgery as surgery
from anabranch.edge.export.artifacts import Artifacts, artifacts, write_artifacts
from anabranch.edge.export.joint_graph import content_name
from anabranch.edge.export.onnx import input_names
from anabranch.edge.export.weights import externalize
from anabranch.edge.runtime import operators
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import IncompatibleAdapter, ReleaseError
from anabranch.protocols.tables import Lora, Model, Training

KINDS = ("text", "image", "tabular", "logistic")
Make = Callable[..., Any]


@pytest.fixture(scope="module", params=KINDS)
def made(request: Any, make_classifier: Make) -> tuple[Classifier, Artifacts]:
    classifier = make_classifier(request.param)
    return classifier, artifacts(classifier, read_adapter(classifier))


def arrays_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def graphs_of(one: Artifacts) -> Iterator[onnx.ModelProto]:
    yield from (one.training, one.eval, one.optimizer)


def names_of(values: Any) -> list[str]:
    return [value.name for value in values]


# What the graphs take and give


def test_inputs_are_the_models_then_labels_then_the_adapter_under_its_own_names(
    made: tuple[Classifier, Artifacts],
) -> None:
    classifier, one = made
    first = [*input_names(classifier), "labels"]
    evaluation = names_of(one.eval.graph.input)
    training = names_of(one.training.graph.input)

    assert evaluation[: len(first)] == training[: len(first)] == first
    assert sorted(evaluation[len(first) :]) == sorted(classifier.spec.shapes)
    assert training[: len(evaluation)] == evaluation
    assert training[-1] == "lazy_reset_grad"
    assert names_of(one.eval.graph.output) == ["loss", "logits"]
    assert names_of(one.training.graph.output)[:2] == ["loss", "logits"]


def test_batch_and_tokens_are_free(make_classifier: Make) -> None:
    classifier = make_classifier("text")
    one = artifacts(classifier, read_adapter(classifier))
    for model in (one.training, one.eval):
        dims = {v.name: v.type.tensor_type.shape.dim for v in model.graph.input}
        assert [d.dim_param for d in dims["input_ids"]] == ["batch", "tokens"]
        assert [d.dim_param for d in dims["labels"]] == ["batch"]


def test_graphs_are_of_an_ir_and_opset_that_onnxruntime_1_19_reads(
    made: tuple[Classifier, Artifacts],
) -> None:
    for model in graphs_of(made[1]):
        assert model.ir_version == 8
        opsets = {opset.domain: opset.version for opset in model.opset_import}
        assert opsets.pop("") == 17
        assert opsets.pop("com.microsoft", 1) == 1
        assert not opsets


def test_graphs_have_only_operators_that_a_device_accepts(
    made: tuple[Classifier, Artifacts],
) -> None:
    for model in graphs_of(made[1]):
        assert {(n.domain, n.op_type) for n in model.graph.node} <= operators.TRAINING


def test_the_same_classifier_gives_the_same_bytes(make_classifier: Make) -> None:
    first, second = (
        artifacts(classifier, read_adapter(classifier))
        for classifier in (make_classifier("text"), make_classifier("text"))
    )
    assert first.checkpoint == second.checkpoint
    for a, b in zip(graphs_of(first), graphs_of(second), strict=True):
        assert a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True)


# Frozen weights


def test_frozen_weights_are_the_bases_own_named_by_content_and_stored_once(
    made: tuple[Classifier, Artifacts],
) -> None:
    classifier, one = made
    training, evaluation = arrays_of(one.training), arrays_of(one.eval)
    assert all(name == content_name(a) for name, a in (training | evaluation).items())
    frozen = {
        content_name(tensor.numpy())
        for name, tensor in base_weights(classifier.base).items()
        if tensor.is_floating_point() and name not in classifier.spec.shapes
    }
    large = {name for name, array in training.items() if array.nbytes >= 1024}

    assert frozen <= set(training)
    assert frozen <= set(evaluation)
    assert large <= frozen  # no second copy, transposed or computed


def test_external_data_takes_no_more_than_the_base(make_classifier: Make, tmp_path: Path) -> None:
    classifier = make_classifier("text")
    one = artifacts(classifier, read_adapter(classifier))
    externalize({"training_model": one.training, "eval_model": one.eval}, "base.bin", tmp_path, 0)
    weights = base_weights(classifier.base).values()
    base = sum(t.numel() * t.element_size() for t in weights if t.is_floating_point())

    assert (tmp_path / "base.bin").stat().st_size < base + 8192


def linear_graph(operator: str, first: str = "x", **attributes: Any) -> onnx.ModelProto:
    """y = operator(x, WT) with a folded transpose, as the gradient builder leaves it."""
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)  # W (out 2, in 3)
    domain = "com.microsoft" if operator == "FusedMatMul" else ""
    node = helper.make_node(operator, [first, "WT"], ["y"], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "WT")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


@pytest.mark.parametrize(
    ("operator", "width", "attributes", "becomes"),
    [
        ("MatMul", 3, {}, ["FusedMatMul"]),
        ("FusedMatMul", 2, {"transB": 1, "alpha": 1.0}, ["MatMul"]),
        ("FusedMatMul", 2, {"transB": 1, "alpha": 0.5}, ["Transpose", "FusedMatMul"]),
        ("Gemm", 2, {"transB": 1}, ["Transpose", "Gemm"]),
    ],
)
def test_a_folded_transpose_is_replaced_by_the_weight_itself(
    operator: str, width: int, attributes: dict[str, Any], becomes: list[str]
) -> None:
    import onnxruntime

    before, after = (linear_graph(operator, **attributes) for _ in range(2))
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    evaluation = onnx.ModelProto()
    evaluation.graph.initializer.append(numpy_helper.from_array(weight, "W"))
    surgery.share_transposed(after, evaluation)
    x = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
    results = [
        onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, {"x": x})[0]
        for model in (before, after)
    ]

    assert [node.op_type for node in after.graph.node] == becomes
    assert names_of(after.graph.initializer) == ["W"]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


# The adapter


def test_tensors_of_equal_value_stay_apart(make_config: Make) -> None:
    classifier = load_classifier(make_config("text"))
    adapter = read_adapter(classifier)
    zero = [a.shape for n, a in adapter.arrays.items() if n.endswith("lora_B.weight")]
    one = artifacts(classifier, adapter)

    assert len(zero) == 4
    assert len(set(zero)) == 1
    assert set(classifier.spec.shapes) <= set(names_of(one.training.graph.input))


def test_modules_trained_in_full_are_trainable(make_config: Make) -> None:
    lora = Lora(rank=2, modules_to_save=("encoder.layer.1.output.LayerNorm",))
    classifier = load_classifier(make_config("text", lora=lora))
    one = artifacts(classifier, read_adapter(classifier))
    names = names_of(one.training.graph.input)

    assert "encoder.layer.1.output.LayerNorm.weight" in classifier.spec.shapes
    assert set(classifier.spec.shapes) <= set(names)


def test_the_adapter_given_counts_and_not_the_classifiers_own(make_classifier: Make) -> None:
    classifier = make_classifier("tabular")
    adapter = read_adapter(classifier)
    other = Adapter(classifier.spec, {n: a + 1 for n, a in adapter.arrays.items()})
    one, two = artifacts(classifier, adapter), artifacts(classifier, other)

    assert one.training == two.training
    assert one.eval == two.eval
    assert other.arrays["head.weight"].tobytes() in two.checkpoint
    assert other.arrays["head.weight"].tobytes() not in one.checkpoint


def test_checkpoint_is_about_as_large_as_the_adapter(made: tuple[Classifier, Artifacts]) -> None:
    classifier, one = made
    assert len(one.checkpoint) <= 4 * (4 * classifier.spec.num_values) + 512


def test_classifier_is_left_as_it_was_and_may_be_merged(make_classifier: Make) -> None:
    classifier = make_classifier("text")
    adapter = read_adapter(classifier)
    classifier.train()
    modes = {name: m.training for name, m in classifier.named_modules()}
    plain = artifacts(classifier, adapter)
    assert {name: m.training for name, m in classifier.named_modules()} == modes
    merge(classifier)
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    merged = artifacts(classifier, adapter)

    assert classifier.merged
    assert all(torch.equal(state[n], t) for n, t in classifier.state_dict().items())
    assert merged.training == plain.training


def test_an_adapter_of_another_spec_is_refused(make_classifier: Make) -> None:
    classifier = make_classifier("tabular")
    spec = msgspec.structs.replace(classifier.spec, alpha=3.0)
    adapter = Adapter(spec, read_adapter(classifier).arrays)
    with pytest.raises(IncompatibleAdapter, match="alpha"):
        artifacts(classifier, adapter)


# The optimizer


@pytest.mark.parametrize("training", [None, Training(weight_decay=0.25, max_grad_norm=None)])
def test_optimizer_is_torchs_adamw(make_classifier: Make, training: Training | None) -> None:
    classifier = make_classifier("logistic")
    one = artifacts(classifier, read_adapter(classifier), training=training)
    (node,) = one.optimizer.graph.node
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    assert node.op_type == "AdamWOptimizer"
    assert values["adam_mode"] == 0
    assert values["correct_bias"] == 1
    expected = {"alpha": 0.9, "beta": 0.999, "epsilon": 1e-8}
    expected["weight_decay"] = 0.25 if training else 0.0
    for name, value in expected.items():
        assert values[name] == pytest.approx(value)


def test_optimizer_clips_where_the_training_does(make_classifier: Make) -> None:
    classifier = make_classifier("logistic")
    one = artifacts(classifier, read_adapter(classifier), training=Training(max_grad_norm=0.5))
    clip, adamw = one.optimizer.graph.node

    assert clip.op_type == "InplaceClipGradNorm"
    assert helper.get_attribute_value(clip.attribute[0]) == 0.5
    assert clip.output[0] in adamw.input
    assert {(n.domain, n.op_type) for n in (clip, adamw)} <= operators.TRAINING


# What the gradient builder cannot take


def test_every_layer_norm_gives_the_statistics_that_its_gradient_reads(
    make_classifier: Make,
) -> None:
    classifier = make_classifier("text")
    one = artifacts(classifier, read_adapter(classifier))
    norms = [n for n in one.training.graph.node if n.op_type == "LayerNormalization"]
    assert len(norms) == 5
    assert all(len(n.output) == 3 and all(n.output) for n in norms)


def test_batch_normalization_is_refused_by_name() -> None:
    node = helper.make_node("BatchNormalization", list("xgbmv"), ["y"], name="stem.norm")
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    with pytest.raises(ReleaseError, match=r"stem\.norm: .* the batch's own statistics; fold it"):
        surgery.refuse_batchnorm(model)


def test_a_trainable_tensor_that_the_exporter_lost_is_refused(make_classifier: Make) -> None:
    spec = make_classifier("tabular").spec
    kept = [n for n in spec.shapes if n != "hidden.0.lora_B.weight"]
    tensors = [
        numpy_helper.from_array(
            np.zeros(spec.shapes[n], np.float32),
            f"classifier.{n}" if n.startswith("head.") else f"classifier.base.{n}",
        )
        for n in kept
    ]
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    with pytest.raises(ReleaseError, match=r"hidden\.0\.lora_B\.weight: expected an initializer"):
        surgery.name_trainable(model, spec)
    assert sorted(names_of(model.graph.initializer)) == sorted(kept)


def test_an_operator_without_a_gradient_is_refused(
    make_classifier: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    classifier = make_classifier("tabular")
    run = type(classifier).run
    monkeypatch.setattr(
        type(classifier), "run", lambda self, h, *rest: torch.round(run(self, h, *rest))
    )
    with pytest.raises(ReleaseError, match=r"cannot differentiate this base: .*Round"):
        artifacts(classifier, read_adapter(classifier))
    assert capfd.readouterr().err == ""


def test_an_operator_that_torch_cannot_export_is_refused(
    make_classifier: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier("tabular")
    run = type(classifier).run
    monkeypatch.setattr(
        type(classifier), "run", lambda self, h, *rest: torch.special.i1(run(self, h, *rest))
    )
    with pytest.raises(ReleaseError, match=r"torch cannot write this base .*i1"):
        artifacts(classifier, read_adapter(classifier))


def test_graphs_within_nodes_and_names_that_are_taken_are_refused() -> None:
    inner = helper.make_graph([], "inner", [], [])
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    with pytest.raises(ReleaseError, match="If with a graph inside"):
        surgery.rename(model, {"y": "z"})
    node = helper.make_node("Add", ["a", "b"], ["c"])
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    with pytest.raises(ReleaseError, match="a cannot be called c"):
        surgery.rename(model, {"a": "c"})
    surgery.rename(model, {"a": "b", "b": "a"})
    assert list(model.graph.node[0].input) == ["b", "a"]


# Files


def test_files_are_written_whole_with_their_weights(make_classifier: Make, tmp_path: Path) -> None:
    classifier = make_classifier("image")
    adapter = read_adapter(classifier)
    one = artifacts(classifier, adapter)
    write_artifacts(classifier, adapter, tmp_path / "new" / "folder")
    written = {p.name: p.read_bytes() for p in (tmp_path / "new" / "folder").iterdir()}

    assert written.pop("checkpoint") == one.checkpoint
    names = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx")
    for name, model in zip(names, graphs_of(one), strict=True):
        assert onnx.load_model_from_string(written.pop(name)) == model
    assert not written


@pytest.mark.slow
def test_minilms_weights_are_stored_once(make_config: Make, tmp_path: Path) -> None:
    config = make_config("text", model=Model(base="minilm", max_tokens=64), lora=Lora(rank=8))
    classifier = load_classifier(config)
    one = artifacts(classifier, read_adapter(classifier))
    externalize({"training_model": one.training, "eval_model": one.eval}, "base.bin", tmp_path)
    weights = base_weights(classifier.base).values()
    base = sum(t.numel() * t.element_size() for t in weights if t.is_floating_point())
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}

    assert sizes["base.bin"] < 1.01 * base
    assert sizes["training_model.onnx"] + sizes["eval_model.onnx"] < 1 << 20
    assert len(one.checkpoint) < 1.1 * 4 * classifier.spec.num_values
