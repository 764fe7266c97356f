"""The training step as an ONNX graph: what goes in and out, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import load_adapter, merge, read_adapter
from anabranch.edge.export.joint import check_against_torch, infer_graph, step_graph
from anabranch.edge.export.joint_graph import LARGEST, Graph, content_name
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import ModelError, ReleaseError
from anabranch.protocols.tables import Lora

KINDS = ("text", "image", "tabular", "logistic")
Made = Callable[..., Classifier]
Arrays = dict[str, NDArray[Any]]


def close(a: NDArray[Any], b: NDArray[Any], relative: float = 1e-5) -> bool:
    return float(np.abs(a - b).max()) <= relative * max(float(np.abs(b).max()), 1e-6)


# -- the graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_by_name_and_order(
    kind: str, make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    names = [n for n, _ in make_classifier(kind).spec.tensors]
    data = {"text": ["input_ids", "attention_mask"], "image": ["pixels"]}.get(kind, ["features"])
    plain, clipped = steps(kind), steps(kind, True)
    assert ports(plain.graph.input) == [*data, "labels", "weights", *names]
    assert ports(clipped.graph.input) == [*data, "labels", "weights", "clipping_norm", *names]
    grads = [f"{n}.grad" for n in names]
    assert ports(plain.graph.output) == ["loss", "losses", "logits", *grads]
    assert ports(clipped.graph.output) == ["losses", "logits", "norms", *grads]


def ports(values: Any) -> list[str]:
    return [v.name for v in values]


def shape_of(value: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_model_is_plain_onnx(
    kind: str, clipped: bool, steps: Callable[..., onnx.ModelProto]
) -> None:
    step = steps(kind, clipped)
    onnx.checker.check_model(step, full_check=True)
    assert [(o.domain, o.version) for o in step.opset_import] == [("", 18)]
    assert step.ir_version == 10
    assert not step.functions
    assert {n.domain for n in step.graph.node} == {""}


def test_batch_and_tokens_are_free(steps: Callable[..., onnx.ModelProto]) -> None:
    values = {
        v.name: shape_of(v) for v in (*steps("text").graph.input, *steps("text").graph.output)
    }
    assert values["input_ids"] == values["attention_mask"] == ["batch", "tokens"]
    assert values["labels"] == values["weights"] == values["losses"] == ["batch"]
    assert values["logits"] == ["batch", 3]
    assert values["loss"] == []
    assert values["head.weight"] == values["head.weight.grad"] == [3, 24]


def test_frozen_weights_are_named_by_content_and_shared(
    make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    classifier = make_classifier("text")
    plain, clipped = ({i.name: i for i in steps("text", c).graph.initializer} for c in (0, 1))
    for name, tensor in plain.items():
        assert name == content_name(numpy_helper.to_array(tensor))
        assert re.fullmatch(r"w_[0-9a-f]{24}", name)
    large = {n for n, i in plain.items() if np.prod(i.dims) > 20}
    assert large == {n for n, i in clipped.items() if np.prod(i.dims) > 20}
    words = classifier.base.get_parameter("embeddings.word_embeddings.weight")
    assert content_name(words.detach().numpy()) in large
    weight = classifier.base.get_parameter("encoder.layer.1.output.dense.weight").detach().numpy()
    assert content_name(weight) in large  # one copy, as the base has it
    assert content_name(weight.T.copy()) not in large


def test_content_names_tell_dtype_and_shape_apart() -> None:
    zeros = [np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32)]
    assert len({content_name(z) for z in zeros}) == 3
    assert content_name(np.arange(6).reshape(2, 3).T) == content_name(
        np.array([[0, 3], [1, 4], [2, 5]])
    )


@pytest.mark.parametrize("clipped", [False, True])
def test_classifier_is_left_as_it_was(clipped: bool, make_classifier: Made) -> None:
    classifier = make_classifier("tabular").train(clipped)

    def state() -> list[Any]:
        parameters = [(n, id(p), p.requires_grad, p.grad) for n, p in classifier.named_parameters()]
        modules = [
            (n, id(m), m.training, vars(m).get("forward")) for n, m in classifier.named_modules()
        ]
        return [parameters, modules, classifier.compute_base_digest(), torch.is_grad_enabled()]

    before, adapter = state(), read_adapter(classifier)
    step_graph(classifier, clipped=clipped)
    assert state() == before
    after = read_adapter(classifier)
    assert all(np.array_equal(after.arrays[n], a) for n, a in adapter.arrays.items())


def test_export_is_deterministic(
    make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    again = step_graph(make_classifier("tabular"), clipped=True)
    assert again.SerializeToString() == steps("tabular", True).SerializeToString()


def test_base_below_the_first_trained_tensor_has_no_backward(
    make_config: Callable[..., Any], steps: Callable[..., onnx.ModelProto]
) -> None:
    from anabranch.client.tuning.bases import load_classifier

    last = load_classifier(make_config("text", lora=Lora(rank=3, layers="last:1")))
    step = step_graph(last)
    assert len(step.graph.node) < 0.75 * len(steps("text").graph.node)


# -- inference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_infer_gives_the_logits_of_the_default_and_of_a_fed_adapter(
    kind: str,
    make_classifier: Made,
    steps: Callable[..., onnx.ModelProto],
    make_batch: Callable[..., Arrays],
) -> None:
    classifier = make_classifier(kind)
    adapter = read_adapter(classifier)
    model = infer_graph(steps(kind), adapter)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feeds = make_batch(kind)
    data = {n: a for n, a in feeds.items() if n not in ("labels", "weights")}
    assert [i.name for i in session.get_inputs()] == list(data)
    assert ports(model.graph.input) == [*data, *adapter.arrays]
    for scale in (1.0, 0.5):
        other = Adapter(adapter.spec, {n: a * np.float32(scale) for n, a in adapter.arrays.items()})
        (got,) = session.run(None, data if scale == 1.0 else {**data, **other.arrays})
        load_adapter(classifier, other)
        x, *mask = (torch.tensor(a) for a in data.values())
        with torch.no_grad():
            expected = classifier.logits(x, mask[0].bool() if mask else None).numpy()
        assert close(got, expected)


def test_infer_leaves_the_step_alone(
    make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    before = steps("text").SerializeToString()
    infer_graph(steps("text"), read_adapter(make_classifier("text")))
    assert steps("text").SerializeToString() == before


def test_infer_refuses_a_clipped_step_and_another_adapter(
    make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    adapter = read_adapter(make_classifier("image"))
    with pytest.raises(ValueError, match="expected a plain step"):
        infer_graph(steps("image", True), adapter)
    with pytest.raises(ValueError, match=r"blocks\.0.*the step takes None, the adapter has"):
        infer_graph(steps("text"), adapter)


# -- refusals -------------------------------------------------------------------------------------


def test_check_names_the_tensor_that_is_wrong(
    make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(steps("tabular"))
    for node in broken.graph.node:
        node.output[:] = ["right" if o == "head.weight.grad" else o for o in node.output]
    two = numpy_helper.from_array(np.array(1.001, np.float32), "factor")
    broken.graph.initializer.append(two)
    broken.graph.node.append(
        onnx.helper.make_node("Mul", ["right", "factor"], ["head.weight.grad"])
    )
    with pytest.raises(ReleaseError, match=r"head\.weight\.grad: .* differ by 0\.001"):
        check_against_torch(broken, make_classifier("tabular"), clipped=False)
    assert check_against_torch(
        broken, make_classifier("tabular"), clipped=False, tolerance=0.01
    ) == pytest.approx(1e-3, rel=0.01)


def test_check_takes_not_a_number_for_a_difference(
    make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    broken = onnx.ModelProto()
    broken.CopyFrom(steps("logistic"))
    for node in broken.graph.node:
        node.output[:] = ["right" if o == "loss" else o for o in node.output]
    broken.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
    broken.graph.node.append(onnx.helper.make_node("Add", ["right", "nan"], ["loss"]))
    with pytest.raises(ReleaseError, match=r"^loss: .* differ by inf"):
        check_against_torch(broken, make_classifier("logistic"), clipped=False)


def test_merged_classifier_is_refused(make_classifier: Made) -> None:
    classifier = make_classifier("tabular")
    merge(classifier)
    with pytest.raises(ModelError, match="unmerge it first"):
        step_graph(classifier)


def test_classifier_elsewhere_than_on_the_cpu_is_refused(make_classifier: Made) -> None:
    with pytest.raises(ModelError, match="on meta: move it to the CPU"):
        step_graph(make_classifier("tabular").to("meta"))


def test_operator_without_a_form_is_refused(
    make_classifier: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier("tabular")
    run = classifier.run
    monkeypatch.setattr(
        classifier, "run", lambda *args: torch.special.bessel_j0(run(*args)).detach()
    )
    with pytest.raises(ModelError, match=r"special_bessel_j0.* no form in ONNX"):
        step_graph(classifier)


def test_base_that_fixes_the_batch_is_refused(
    make_classifier: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = make_classifier("tabular")
    run = classifier.run

    def fixed(h: Any, *args: Any) -> Any:
        return run(h[: int(h.shape[0])], *args)

    monkeypatch.setattr(classifier, "run", fixed)
    with pytest.raises(ModelError, match="fixes the batch size at 13"):
        step_graph(classifier)


def test_weights_beyond_one_protobuf_message_are_refused() -> None:
    graph = Graph()
    graph.constants["w"] = np.broadcast_to(np.float32(0), (LARGEST // 4 + 1,))
    with pytest.raises(ModelError, match="choose a smaller base"):
        graph.model({}, {})
