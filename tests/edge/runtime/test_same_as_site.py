"""A device trains what a site trains: same table, same seed, same adapter."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.training import Schedule as SiteSchedule
from anabranch.client.tuning.training import fit, predict
from anabranch.edge.export.joint import infer_graph, step_graph
from anabranch.edge.export.onnx import input_names
from anabranch.edge.runtime.bundle_manifest import Graph, Limits, Manifest, Memory, key
from anabranch.edge.runtime.data import Records
from anabranch.edge.runtime.joint import JointEngine
from anabranch.edge.runtime.predict import Predictor
from anabranch.edge.runtime.steps import Schedule
from anabranch.edge.runtime.training import train
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Training

KINDS = ("text", "image", "tabular", "logistic")
SHAPES: dict[str, tuple[int, ...]] = {
    "text": (), "image": (1, 12, 12), "tabular": (5,), "logistic": (5,)
}  # fmt: skip
WORDS = ("acute", "chronic", "fracture", "of", "femur", "heart", "failure", "infarction")
TRAININGS = (
    Training(learning_rate=0.01, head_learning_rate=0.03, weight_decay=0.02, batch_size=8),
    Training(
        optimizer="sgd",
        learning_rate=0.05,
        batch_size=6,
        schedule="cosine",
        warmup=0.2,
        class_weights="balanced",
        max_grad_norm=0.5,
    ),
)


def inputs_of(kind: str, n: int) -> Any:
    rng = np.random.default_rng(7)
    if kind == "text":
        return [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(n)]
    return rng.random((n, *SHAPES[kind])).astype(np.float32)


@pytest.fixture(scope="module")
def make_joint(
    make_classifier: Callable[..., Classifier], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """Return a function from a kind to a look-alike of an opened bundle, with its classifier."""
    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp(kind)
        classifier = make_classifier(kind)
        adapter = read_adapter(classifier)
        step = step_graph(classifier)
        models = {"train_step": step, "infer": infer_graph(step, adapter)}
        graphs = {}
        for role, model in models.items():
            name = key(role, "fp32")  # type: ignore[arg-type]
            onnx.save(
                model,
                folder / f"{name}.onnx",
                save_as_external_data=True,
                location=f"{name}.bin",
                size_threshold=1024,
            )
            memory = Memory(fixed=1 << 20, per_record=1 << 10)
            graphs[name] = Graph(file=f"{name}.onnx", onnxruntime="1.19", memory=memory)
        task: Any = f"{'tabular' if kind == 'logistic' else kind}-classification"
        manifest = Manifest(
            name=kind,
            version=1,
            created="2026-01-01T00:00:00Z",
            task=task,
            labels=("bone", "heart", "other"),
            inputs=tuple(input_names(classifier)),
            shape=SHAPES[kind],
            spec=classifier.spec,
            adapter="a" * 64,
            config="c" * 64,
            training=TRAININGS[0],
            graphs=graphs,
            artifacts=False,
            measured={},
            limits=Limits(memory_bytes=10**9, max_records=5, max_tokens=24),
            versions={},
            files={},
        )
        made[kind] = SimpleNamespace(
            folder=folder, manifest=manifest, adapter=adapter, tokenizer=None, digest="d" * 64
        )
        return made[kind]

    return make


def records_of(classifier: Classifier, bundle: Any, kind: str, n: int) -> tuple[Records, Examples]:
    encoded = classifier.encode(inputs_of(kind, n))
    labels = np.random.default_rng(1).integers(0, 3, n)
    features: Any = [one.numpy() for one in encoded]
    if kind != "text":
        features = np.stack(features)
    identities = tuple(bytes([i]) * 32 for i in range(n))
    records = Records(bundle.manifest.inputs, features, labels, identities)
    prefixed = [
        classifier.prefix(x[None], torch.ones(1, len(x)).bool() if kind == "text" else None)[0]
        for x in encoded
    ]
    return records, Examples(prefixed, torch.from_numpy(labels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", TRAININGS)
def test_twenty_steps_end_with_the_adapter_of_a_site(
    make_joint: Callable[[str], Any],
    make_classifier: Callable[..., Classifier],
    kind: str,
    training: Training,
) -> None:
    bundle, classifier = make_joint(kind), make_classifier(kind)
    records, examples = records_of(classifier, bundle, kind, 30)
    engine = JointEngine(bundle.folder, bundle.manifest, bundle.adapter)
    before = predict(classifier, examples.features)
    np.testing.assert_allclose(
        engine.predict(records.feeds(range(30))), before, rtol=1e-4, atol=1e-4
    )
    part = Part(factors="B") if training.optimizer == "sgd" and kind != "logistic" else Part()

    done = train(
        engine,
        records,
        training,
        steps=20,
        seed=5,
        schedule=Schedule(first_step=3, total_steps=30),
        proximal_mu=0.1,
        part=part,
    )
    fit(
        classifier,
        examples,
        training,
        steps=20,
        seed=5,
        schedule=SiteSchedule(first_step=3, total_steps=30),
        proximal_mu=0.1,
        part=part,
    )

    for name, array in read_adapter(classifier).arrays.items():
        np.testing.assert_allclose(
            done.adapter.arrays[name], array, rtol=1e-3, atol=2e-5, err_msg=name
        )
    assert done.delta.norm() > 0.1
    logits = predict(classifier, examples.features)
    np.testing.assert_allclose(
        engine.predict(records.feeds(range(30))), logits, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_predictor_answers_as_the_site_does(
    make_joint: Callable[[str], Any], make_classifier: Callable[..., Classifier], kind: str
) -> None:
    bundle, classifier = make_joint(kind), make_classifier(kind)
    records, examples = records_of(classifier, bundle, kind, 12)
    predictor = Predictor.open(bundle, precision="fp32")
    got = predictor.run(records.feeds(range(12)))
    np.testing.assert_allclose(got, predict(classifier, examples.features), rtol=1e-4, atol=1e-4)


def test_the_files_lie_beside_the_graph(make_joint: Callable[[str], Any]) -> None:
    folder: Path = make_joint("text").folder
    assert (folder / "train_step.fp32.bin").stat().st_size > 1024
