"""The figures of a quantized MiniLM with a trained-like adapter: size, agreement, bits."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.joint import infer_graph, step_graph
from anabranch.edge.export.quantize import quantize_infer, quantize_step
from anabranch.edge.export.weights import externalize
from anabranch.protocols.tables import Lora, Model

pytestmark = pytest.mark.slow
Arrays = dict[str, NDArray[Any]]
LOW = ["int8", "int4"]


@pytest.fixture(scope="module")
def bundle(
    tmp_path_factory: pytest.TempPathFactory, make_config: Any
) -> tuple[Path, Arrays, Arrays]:
    """A folder of graphs in every precision, an adapter and a batch of token ids."""
    config = msgspec.structs.replace(
        make_config("text"), model=Model(base="minilm", max_tokens=48), lora=Lora(rank=8)
    )
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                std = 0.02 if "lora_B" in name else 0.1
                parameter.normal_(std=std, generator=rng)
    adapter = read_adapter(classifier)
    step = step_graph(classifier)
    infer = infer_graph(step, adapter)
    folder = tmp_path_factory.mktemp("bundle")
    externalize({"train_step.fp32": step, "infer.fp32": infer}, "base-fp32.bin", folder)
    for precision in LOW:
        graphs = {
            f"train_step.{precision}": quantize_step(step, precision),
            f"infer.{precision}": quantize_infer(infer, precision),
        }
        externalize(graphs, f"base-{precision}.bin", folder)
    texts = [f"acute fracture number {i} of the left femur" * (1 + i % 4) for i in range(64)]
    ids, mask = collate(classifier.encode(texts))
    assert mask is not None
    return (
        folder,
        dict(adapter.arrays),
        {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy()},
    )


def size(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)


def run(folder: Path, key: str, feeds: Arrays) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / f"{key}.onnx", options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize(("precision", "ratio"), [("int8", 0.27), ("int4", 0.15)])
def test_inference_takes_a_fraction_of_the_bytes(
    bundle: tuple[Path, Arrays, Arrays], precision: str, ratio: float
) -> None:
    folder, _, _ = bundle
    low = size(folder, f"infer.{precision}.onnx", f"base-{precision}.bin")
    assert low <= ratio * size(folder, "infer.fp32.onnx", "base-fp32.bin")


@pytest.mark.parametrize("precision", LOW)
def test_training_and_inference_store_the_base_once(
    bundle: tuple[Path, Arrays, Arrays], precision: str, tmp_path: Path
) -> None:
    import onnx

    folder, _, _ = bundle
    alone = onnx.load(folder / f"infer.{precision}.onnx")
    externalize({"infer": alone}, "base.bin", tmp_path)
    assert size(folder, f"base-{precision}.bin") < 1.01 * size(tmp_path, "base.bin")


def test_a_second_adapter_costs_two_percent_of_the_int8_bundle_at_most(
    bundle: tuple[Path, Arrays, Arrays],
) -> None:
    folder, adapter, _ = bundle
    whole = size(folder, "base-int8.bin", "infer.int8.onnx", "train_step.int8.onnx")
    assert sum(array.nbytes for array in adapter.values()) <= 0.02 * whole


@pytest.mark.parametrize(("precision", "agreement"), [("int8", 0.95), ("int4", 0.85)])
def test_quantized_inference_chooses_the_labels_of_the_float_graph(
    bundle: tuple[Path, Arrays, Arrays], precision: str, agreement: float
) -> None:
    folder, _, texts = bundle
    expected = run(folder, "infer.fp32", texts)["logits"]
    got = run(folder, f"infer.{precision}", texts)["logits"]
    assert (got.argmax(1) == expected.argmax(1)).mean() >= agreement


@pytest.mark.parametrize("precision", LOW)
def test_switching_adapters_changes_no_other_bit(
    bundle: tuple[Path, Arrays, Arrays], precision: str
) -> None:
    folder, first, texts = bundle
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / f"infer.{precision}.onnx", options, providers=["CPUExecutionProvider"]
    )
    few = {name: array[:5] for name, array in texts.items()}
    second = {name: array * np.float32(1.5) for name, array in first.items()}
    default, a, b, again = (
        session.run(["logits"], {**few, **fed})[0] for fed in ({}, first, second, first)
    )
    assert np.array_equal(default, a)
    assert np.array_equal(a, again)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize(("precision", "off"), [("int8", 0.1), ("int4", 0.7)])
def test_gradients_over_a_quantized_base_point_the_same_way(
    bundle: tuple[Path, Arrays, Arrays], precision: str, off: float
) -> None:
    folder, adapter, texts = bundle
    few = {name: array[:4] for name, array in texts.items()}
    weights = np.full(4, 0.25, np.float32)
    rest: Arrays = {"labels": np.arange(4) % 3, "weights": weights, **adapter}
    expected, got = (run(folder, f"train_step.{p}", {**few, **rest}) for p in ("fp32", precision))
    one, other = (
        np.concatenate([r[f"{name}.grad"].ravel() for name in sorted(adapter)])
        for r in (expected, got)
    )
    assert np.linalg.norm(other - one) < off * np.linalg.norm(one)
