import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.nn import functional

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import load_adapter, read_adapter, trainable_parameters
from anabranch.client.tuning.text import TextClassifier
from anabranch.edge.export.artifacts import write_artifacts
from anabranch.edge.export.onnx import input_names
from anabranch.edge.runtime import ort_training
from anabranch.edge.runtime.bundle_manifest import Graph, Limits, Memory, key
from anabranch.edge.runtime.engine import Batch, Engine, Gradients
from anabranch.edge.runtime.ort_training import OrtTrainingEngine
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import BundleError, DataError, DeviceError, IncompatibleAdapter
from anabranch.protocols.tables import Lora, Model, Training

KINDS = ("text", "image", "tabular", "logistic")
Make = Callable[..., Any]
Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Case:
    """A classifier in torch, and the folder of its artifacts."""

    kind: str
    classifier: Classifier
    adapter: Adapter
    folder: Path

    def engine(self, **options: Any) -> OrtTrainingEngine:
        return OrtTrainingEngine(self.folder, self.adapter.spec, self.adapter.arrays, **options)


@pytest.fixture(scope="module")
def case_of(make_classifier: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    cases: dict[str, Case] = {}

    def make(kind: str) -> Case:
        if kind not in cases:
            classifier = make_classifier(kind)
            adapter = read_adapter(classifier)
            folder = tmp_path_factory.mktemp("artifacts") / kind
            write_artifacts(classifier, adapter, folder)
            cases[kind] = Case(kind, classifier, adapter, folder)
        load_adapter(cases[kind].classifier, cases[kind].adapter)
        return cases[kind]

    return make


@pytest.fixture(scope="module", params=KINDS)
def case(request: Any, case_of: Make) -> Case:
    made: Case = case_of(request.param)
    return made


def batch_of(
    case: Case, rows: int, *, tokens: int = 11, seed: int = 0, mean: bool = False
) -> Batch:
    """Records with padding and unequal weights (1 / rows, if mean)."""
    rng = np.random.default_rng(seed)
    classifier, names = case.classifier, input_names(case.classifier)
    if isinstance(classifier, TextClassifier):
        lengths = rng.integers(1, tokens + 1, rows)
        lengths[0] = tokens
        mask = (np.arange(tokens) < lengths[:, None]).astype(np.int64)
        vocabulary = classifier.config.vocab_size
        feeds: Any = dict(
            zip(names, (rng.integers(5, vocabulary, mask.shape) * mask, mask), strict=True)
        )
    else:
        shape: Any = getattr(classifier, "image_shape", None) or (classifier.num_features,)
        feeds = {names[0]: rng.normal(size=(rows, *shape)).astype(np.float32)}
    weights = np.full(rows, 1 / rows) if mean else rng.uniform(0.1, 2, rows)
    labels = rng.integers(0, classifier.num_labels, rows)
    return Batch(feeds, labels, weights.astype(np.float32))


def logits_of(classifier: Classifier, batch: Batch) -> torch.Tensor:
    tensors = [torch.from_numpy(array) for array in batch.feeds.values()]
    return classifier.logits(tensors[0], tensors[1].bool() if len(tensors) > 1 else None)


def by_torch(case: Case, batch: Batch, clipping_norm: float | None = None) -> Gradients:
    """The sums record by record, as engine.py defines them."""
    named = trainable_parameters(case.classifier)
    losses = functional.cross_entropy(
        logits_of(case.classifier, batch), torch.from_numpy(batch.labels), reduction="none"
    )
    arrays = {n: np.zeros(tuple(p.shape), np.float32) for n, p in named.items()}
    norms = np.zeros(len(batch), np.float32)
    for i, weight in enumerate(batch.weights):
        gradients = torch.autograd.grad(losses[i], list(named.values()), retain_graph=True)
        norms[i] = torch.cat([g.flatten() for g in gradients]).norm()
        factor = 1.0 if clipping_norm is None else min(1.0, clipping_norm / float(norms[i]))
        for name, g in zip(named, gradients, strict=True):
            arrays[name] += float(weight) * factor * g.numpy()
    loss = float(batch.weights @ losses.detach().numpy())
    return Gradients(loss, arrays, None if clipping_norm is None else norms)


def vector(arrays: Any) -> NDArray[np.float64]:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float64)


def distance(got: Any, expected: Any) -> float:
    """‖got − expected‖ / ‖expected‖ over the whole adapter."""
    a, b = vector(got), vector(expected)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def joined(first: Batch, second: Batch) -> Batch:
    return Batch(
        {n: np.concatenate([a, second.feeds[n]]) for n, a in first.feeds.items()},
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.weights, second.weights]),
    )


def part_of(batch: Batch, rows: Any) -> Batch:
    feeds = {n: a[rows] for n, a in batch.feeds.items()}
    return Batch(feeds, batch.labels[rows], batch.weights[rows])


# Equal to torch


def test_engine_is_an_engine(case: Case) -> None:
    engine: Engine = case.engine()
    assert engine.spec == case.classifier.spec


@pytest.mark.parametrize(("rows", "tokens"), [(1, 7), (2, 11), (5, 3), (9, 24)])
@pytest.mark.parametrize("mean", [True, False])
def test_loss_and_gradients_are_torchs_for_any_batch_and_length(
    case: Case, rows: int, tokens: int, mean: bool
) -> None:
    batch = batch_of(case, rows, tokens=tokens, seed=rows, mean=mean)
    got, expected = case.engine().grads(batch), by_torch(case, batch)

    assert got.norms is None
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert {n: a.dtype for n, a in got.arrays.items()} == dict.fromkeys(
        case.adapter.spec.shapes, np.float32
    )
    assert {n: a.shape for n, a in got.arrays.items()} == case.adapter.spec.shapes
    assert distance(got.arrays, expected.arrays) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_clipped_sums_and_norms_are_those_of_a_loop_over_records(case: Case, share: float) -> None:
    batch = batch_of(case, 6, seed=3)
    norms = by_torch(case, batch, 1.0).norms
    assert norms is not None
    bound = float(np.quantile(norms, share)) * (1.01 if share else 0.5)
    got, expected = case.engine().grads(batch, clipping_norm=bound), by_torch(case, batch, bound)

    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert got.norms is not None
    np.testing.assert_allclose(got.norms, norms, rtol=1e-5)
    assert distance(got.arrays, expected.arrays) < 1e-5


def test_logits_are_torchs(case: Case) -> None:
    batch = batch_of(case, 5)
    with torch.no_grad():
        expected = logits_of(case.classifier, batch).numpy()
    got = case.engine().predict(batch.feeds)

    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def adamw_steps(case: Case, batches: list[Batch], training: Training) -> tuple[Arrays, list[float]]:
    """Train in torch; return the adapter and the losses. The classifier is put back."""
    named = trainable_parameters(case.classifier)
    optimizer = torch.optim.AdamW(
        named.values(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    losses = []
    for batch in batches:
        loss = functional.cross_entropy(
            logits_of(case.classifier, batch), torch.from_numpy(batch.labels)
        )
        optimizer.zero_grad()
        loss.backward()
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), training.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    trained = {n: p.detach().numpy().copy() for n, p in named.items()}
    for parameter in named.values():
        parameter.grad = None
    load_adapter(case.classifier, case.adapter)
    return trained, losses


def engine_steps(
    engine: Engine, batches: list[Batch], training: Training
) -> tuple[Arrays, list[float]]:
    """Train with an engine and the numpy optimizer."""
    from anabranch.edge.runtime import optimizer

    params, losses = engine.params(), []
    state = optimizer.fresh(training, params, params)
    for step, batch in enumerate(batches):
        engine.set_params(params)
        found = engine.grads(batch)
        clipped: Any = found.arrays
        if training.max_grad_norm is not None:
            clipped = optimizer.clip(clipped, training.max_grad_norm)
        params, state = optimizer.update(training, params, clipped, state, step=step, rate=1.0)
        losses.append(found.loss)
    return params, losses


def batches_of(case: Case, count: int, rows: int = 6) -> list[Batch]:
    """Batches of changing size and length."""
    return [
        batch_of(case, rows + i % 3, tokens=5 + i % 13, seed=100 + i, mean=True)
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_adapter_after_20_steps_is_torchs(case_of: Make, kind: str) -> None:
    case = case_of(kind)
    training = Training(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    batches = batches_of(case, 20)
    expected, expected_losses = adamw_steps(case, batches, training)
    got, losses = engine_steps(case.engine(), batches, training)

    assert distance(expected, case.adapter.arrays) > 1e-2
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert distance(got, expected) < 1e-5


@dataclass
class Native:
    """The artifacts as an app uses them: onnxruntime-training's own classes."""

    state: Any
    module: Any
    optimizer: Any

    @classmethod
    def open(cls, folder: Path) -> "Native":
        from onnxruntime.training.api import CheckpointState, Module, Optimizer

        state = CheckpointState.load_checkpoint(folder / "checkpoint")
        module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
        return cls(state, module, Optimizer(folder / "optimizer_model.onnx", module))

    def step(self, batch: Batch) -> float:
        self.module.train()
        loss, _ = self.module(*batch.feeds.values(), batch.labels)
        self.optimizer.step()
        self.module.lazy_reset_grad()
        return float(loss)

    def params(self) -> Arrays:
        return {name: value.data.copy() for name, value in self.state.parameters}


@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize("kind", ["text", "image", "tabular"])
def test_the_artifacts_own_optimizer_is_torchs_adamw(
    case_of: Make, kind: str, bound: float | None, tmp_path: Path
) -> None:
    case = case_of(kind)
    training = Training(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=bound)
    write_artifacts(case.classifier, case.adapter, tmp_path, training=training)
    native = Native.open(tmp_path)
    native.optimizer.set_learning_rate(training.learning_rate)
    batches = batches_of(case, 20)
    expected, expected_losses = adamw_steps(case, batches, training)
    losses = [native.step(batch) for batch in batches]

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert distance(native.params(), expected) < 1e-5


def test_the_evaluation_model_exports_to_a_plain_graph(case: Case, tmp_path: Path) -> None:
    import onnxruntime

    write_artifacts(case.classifier, case.adapter, tmp_path)
    native = Native.open(tmp_path)
    batch = batch_of(case, 4)
    for _ in range(3):
        native.step(batch)
    native.module.eval()
    native.module.export_model_for_inferencing(tmp_path / "plain.onnx", ["logits"])
    session = onnxruntime.InferenceSession(
        tmp_path / "plain.onnx", providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(["logits"], batch.feeds)
    load_adapter(case.classifier, Adapter(case.adapter.spec, native.params()))
    with torch.no_grad():
        expected = logits_of(case.classifier, batch).numpy()
    load_adapter(case.classifier, case.adapter)

    assert [one.name for one in session.get_inputs()] == list(input_names(case.classifier))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# Sums


@pytest.mark.parametrize("bound", [None, 0.3])
@given(cut=st.integers(0, 6), factor=st.sampled_from([0.5, 2.0, 8.0]))
@settings(max_examples=8, deadline=None)
def test_sums_of_micro_batches_add_up_and_are_linear_in_the_weights(
    case_of: Make, bound: float | None, cut: int, factor: float
) -> None:
    case = case_of("text")
    engine, batch = case.engine(), batch_of(case, 6)
    whole = engine.grads(batch, clipping_norm=bound)
    first, second = (
        engine.grads(part_of(batch, rows), clipping_norm=bound)
        for rows in (slice(0, cut), slice(cut, None))
    )
    scaled = engine.grads(
        Batch(batch.feeds, batch.labels, np.float32(factor) * batch.weights), clipping_norm=bound
    )

    assert first.loss + second.loss == pytest.approx(whole.loss, rel=1e-5)
    added = {n: a + second.arrays[n] for n, a in first.arrays.items()}
    assert distance(added, whole.arrays) < 1e-5
    assert scaled.loss == pytest.approx(factor * whole.loss, rel=1e-6)
    assert distance(scaled.arrays, {n: factor * a for n, a in whole.arrays.items()}) < 1e-6


def test_padding_of_tokens_changes_nothing(case_of: Make) -> None:
    case = case_of("text")
    batch = batch_of(case, 4, tokens=9)
    feeds = {n: np.pad(a, ((0, 0), (0, 6))) for n, a in batch.feeds.items()}
    engine = case.engine()
    narrow, wide = engine.grads(batch), engine.grads(Batch(feeds, batch.labels, batch.weights))

    assert wide.loss == pytest.approx(narrow.loss, rel=1e-5)
    assert distance(wide.arrays, narrow.arrays) < 1e-5


@pytest.mark.parametrize("bound", [None, 0.3])
def test_rows_of_weight_0_are_not_computed(case_of: Make, bound: float | None) -> None:
    case = case_of("tabular")
    batch, padding = batch_of(case, 3), batch_of(case, 2, seed=8)
    feeds = {n: np.full_like(a, np.nan) for n, a in padding.feeds.items()}
    rows = Batch(feeds, padding.labels, np.zeros(2, np.float32))
    engine = case.engine()
    plain = engine.grads(batch, clipping_norm=bound)
    padded = engine.grads(joined(batch, rows), clipping_norm=bound)

    assert padded.loss == plain.loss
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(padded.arrays[name], array)
    if bound is not None:
        assert padded.norms is not None
        assert plain.norms is not None
        np.testing.assert_array_equal(padded.norms, [*plain.norms, 0, 0])


@pytest.mark.parametrize("bound", [None, 1.0])
def test_a_batch_without_records_gives_zeros(case: Case, bound: float | None) -> None:
    batch = part_of(batch_of(case, 3), slice(0, 0))
    got = case.engine().grads(batch, clipping_norm=bound)

    assert got.loss == 0
    assert not vector(got.arrays).any()
    if bound is None:
        assert got.norms is None
    else:
        assert got.norms is not None
        assert got.norms.shape == (0,)
    assert case.engine().predict(batch.feeds).shape == (0, 3)


# The adapter in the engine


def test_adapter_can_be_set_and_read_back_bit_for_bit(case: Case) -> None:
    rng = np.random.default_rng(4)
    engine, batch = case.engine(), batch_of(case, 3)
    other = {n: rng.normal(size=s).astype(np.float32) for n, s in case.adapter.spec.tensors}
    before = engine.grads(batch)
    engine.set_params(dict(reversed(list(other.items()))))  # by name, in any order
    changed = engine.grads(batch)
    read = engine.params()
    engine.set_params(case.adapter.arrays)
    after = engine.grads(batch)

    assert sorted(read) == sorted(other)
    for name, array in other.items():
        np.testing.assert_array_equal(read[name], array)
        np.testing.assert_array_equal(after.arrays[name], before.arrays[name])
    assert distance(changed.arrays, before.arrays) > 0.1


def test_a_transposed_view_is_set_as_it_reads(case_of: Make) -> None:
    case = case_of("tabular")
    engine = case.engine()
    name = "hidden.0.lora_A.weight"
    fortran = {n: np.asfortranarray(a) for n, a in case.adapter.arrays.items()}
    assert not fortran[name].flags.c_contiguous
    engine.set_params(fortran)
    np.testing.assert_array_equal(engine.params()[name], case.adapter.arrays[name])


def test_what_is_returned_and_what_is_given_are_copies(case_of: Make) -> None:
    case = case_of("tabular")
    engine, batch = case.engine(), batch_of(case, 3)
    first, params = engine.grads(batch), engine.params()
    kept = {n: a.copy() for n, a in first.arrays.items()}
    given = {n: a + 1 for n, a in case.adapter.arrays.items()}
    engine.set_params(given)
    for array in given.values():
        array[...] = 7
    engine.grads(batch_of(case, 5, seed=9), clipping_norm=0.1)

    for name, array in case.adapter.arrays.items():
        np.testing.assert_array_equal(first.arrays[name], kept[name])
        np.testing.assert_array_equal(params[name], array)
        np.testing.assert_array_equal(engine.params()[name], array + 1)
        engine.params()[name][...] = 9
        np.testing.assert_array_equal(engine.params()[name], array + 1)


def test_gradients_change_nothing_and_do_not_pile_up(case_of: Make) -> None:
    case = case_of("text")
    engine, batch = case.engine(), batch_of(case, 4)
    first = engine.grads(batch)
    engine.grads(batch_of(case, 2, seed=5), clipping_norm=0.2)
    again = engine.grads(batch)

    for name, array in case.adapter.arrays.items():
        np.testing.assert_array_equal(engine.params()[name], array)
        np.testing.assert_array_equal(again.arrays[name], first.arrays[name])


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape", "nan", "dtype"])
def test_other_adapters_are_refused_and_change_nothing(case_of: Make, wrong: str) -> None:
    case = case_of("tabular")
    engine = case.engine()
    arrays: dict[str, Any] = {n: a + 1 for n, a in case.adapter.arrays.items()}
    if wrong == "missing":
        del arrays["head.bias"]
    elif wrong == "extra":
        arrays["tail"] = np.zeros(1, np.float32)
    elif wrong == "shape":
        arrays["head.bias"] = np.zeros(4, np.float32)
    elif wrong == "nan":
        arrays["head.weight"][0, 0] = np.nan
    else:
        arrays["head.bias"] = np.zeros(3)
    with pytest.raises(IncompatibleAdapter, match=r"head|tail"):
        engine.set_params(arrays)
    for name, array in case.adapter.arrays.items():
        np.testing.assert_array_equal(engine.params()[name], array)


# Refusals


def test_labels_beside_the_head_are_refused(case_of: Make) -> None:
    case = case_of("logistic")
    batch = batch_of(case, 3)
    for label in (-1, 3):
        labels = np.array([0, label, 1])
        with pytest.raises(DataError, match=rf"label {label}: expected 0 to 2"):
            case.engine().grads(Batch(batch.feeds, labels, batch.weights))


def test_inputs_that_the_graph_does_not_take_are_refused_without_showing_them(
    case_of: Make,
) -> None:
    case = case_of("tabular")
    batch = batch_of(case, 3)
    engine = case.engine()
    with pytest.raises(ValueError, match="expected the model's inputs features, got pixels"):
        engine.grads(Batch({"pixels": batch.feeds["features"]}, batch.labels, batch.weights))
    with pytest.raises(DeviceError, match="onnxruntime-training stopped") as caught:
        engine.predict({"features": np.full((2, 4), 123.5, np.float32)})
    assert "123.5" not in str(caught.value)


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clipping_norm_that_is_no_bound_is_refused(case_of: Make, bound: float) -> None:
    case = case_of("logistic")
    with pytest.raises(ValueError, match="expected a clipping norm above 0"):
        case.engine().grads(batch_of(case, 2), clipping_norm=bound)


def test_less_than_one_thread_is_refused(case_of: Make) -> None:
    with pytest.raises(ValueError, match="expected threads >= 1, got 0"):
        case_of("logistic").engine(threads=0)


def test_a_closed_engine_says_so(case_of: Make) -> None:
    case = case_of("logistic")
    engine = case.engine()
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.params()


@pytest.mark.parametrize("name", ["training_model.onnx", "eval_model.onnx", "checkpoint"])
def test_artifacts_that_cannot_be_loaded_are_refused(
    case_of: Make, tmp_path: Path, name: str
) -> None:
    case = case_of("logistic")
    for path in case.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="onnxruntime cannot load the artifacts"):
        OrtTrainingEngine(tmp_path, case.adapter.spec, case.adapter.arrays)


def test_artifacts_of_another_adapter_are_refused(case_of: Make) -> None:
    small, large = case_of("logistic"), case_of("tabular")
    with pytest.raises(BundleError, match=r"checkpoint: .* export the bundle again"):
        OrtTrainingEngine(small.folder, large.adapter.spec, large.adapter.arrays)


def test_an_onnxruntime_that_cannot_train_is_named_with_what_to_install(
    case_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi import _pybind_state

    monkeypatch.delattr(_pybind_state, "Module")
    with pytest.raises(DeviceError, match=r"cannot train by itself: pip install onnxruntime-train"):
        case_of("logistic").engine()


# Opened from a bundle


@dataclass(frozen=True)
class Opened:
    """What `open` reads of a bundle."""

    folder: Path
    manifest: Any
    adapter: Adapter


def bundle_of(case: Case, make_tiny: Make, **changes: Any) -> Any:
    memory = Memory(fixed=1 << 20, per_record=1 << 20)
    graph = Graph(file="train_step.fp32.onnx", onnxruntime="1.19", memory=memory)
    manifest = make_tiny("table").manifest
    fields: dict[str, Any] = {
        "spec": case.adapter.spec,
        "inputs": input_names(case.classifier),
        "artifacts": True,
        "graphs": {key("train_step", "fp32"): graph},
        "limits": Limits(memory_bytes=4 << 20, max_records=8, max_tokens=24),
        "shape": (5,),
    }
    manifest = msgspec.structs.replace(manifest, **(fields | changes))
    return Opened(case.folder, manifest, case.adapter)


def test_a_bundles_limits_cut_the_batch(case_of: Make, make_tiny: Make) -> None:
    case = case_of("tabular")
    batch = batch_of(case, 8)
    engine = OrtTrainingEngine.open(bundle_of(case, make_tiny))
    assert [len(piece) for piece in engine.pieces(batch)] == [3, 3, 2]
    engine = OrtTrainingEngine.open(bundle_of(case, make_tiny), memory_bytes=2 << 20)
    assert [len(piece) for piece in engine.pieces(batch)] == [1] * 8
    for bound in (None, 0.3):
        got, whole = (one.grads(batch, clipping_norm=bound) for one in (engine, case.engine()))
        assert got.loss == pytest.approx(whole.loss, rel=1e-5)
        assert distance(got.arrays, whole.arrays) < 1e-5
    np.testing.assert_allclose(
        engine.predict(batch.feeds), case.engine().predict(batch.feeds), rtol=1e-5, atol=1e-6
    )


def test_bundles_without_artifacts_and_limits_too_small_are_refused(
    case_of: Make, make_tiny: Make
) -> None:
    case = case_of("tabular")
    with pytest.raises(BundleError, match="made without artifacts for onnxruntime-training"):
        OrtTrainingEngine.open(bundle_of(case, make_tiny, artifacts=False))
    with pytest.raises(DeviceError, match="one record of 1 tokens needs"):
        OrtTrainingEngine.open(bundle_of(case, make_tiny), memory_bytes=1 << 20)


# On a device

ALONE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "transformers", "flwr", "scipy"}:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Hidden())
import msgspec, numpy as np
from pathlib import Path
from anabranch.edge.runtime.engine import Batch
from anabranch.edge.runtime.ort_training import OrtTrainingEngine
from anabranch.protocols.spec import AdapterSpec

folder = Path(sys.argv[1])
data = dict(np.load(folder / "data.npz"))
spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=AdapterSpec)
adapter = {name: data["p/" + name] for name, _ in spec.tensors}
engine = OrtTrainingEngine(folder, spec, adapter)
feeds = {name[2:]: value for name, value in data.items() if name.startswith("f/")}
found = engine.grads(Batch(feeds, data["labels"], data["weights"]))
np.savez(folder / "found.npz", **found.arrays)
loaded = {name.partition(".")[0] for name in sys.modules}
print(json.dumps({
    "loss": found.loss,
    "loaded": sorted(loaded & {"torch", "onnx", "transformers", "flwr", "scipy"}),
    "training": "onnxruntime.training" in sys.modules,
}))
"""


def test_it_trains_in_a_process_without_torch_and_onnx(case_of: Make, tmp_path: Path) -> None:
    case = case_of("text")
    batch = batch_of(case, 4)
    for path in case.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(case.adapter.spec))
    arrays = {f"p/{n}": a for n, a in case.adapter.arrays.items()}
    arrays |= {f"f/{n}": a for n, a in batch.feeds.items()}
    np.savez(tmp_path / "data.npz", labels=batch.labels, weights=batch.weights, **arrays)
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    said, expected = json.loads(run.stdout), by_torch(case, batch)

    assert said["loaded"] == []
    assert not said["training"]  # its package is not needed, and left to those who want it
    assert said["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert distance(dict(np.load(tmp_path / "found.npz")), expected.arrays) < 1e-5


def test_the_engine_leaves_onnxruntimes_own_packages_as_they_are(case_of: Make) -> None:
    before = {n: m for n, m in sys.modules.items() if n.startswith("onnxruntime.training")}
    case_of("logistic").engine()
    after = {n: m for n, m in sys.modules.items() if n.startswith("onnxruntime.training")}
    assert after == before
    assert callable(ort_training.bindings().Module)


# The real encoder


@pytest.fixture(scope="module")
def minilm(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Case:
    config = make_config("text", model=Model(base="minilm", max_tokens=64), lora=Lora(rank=8))
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable_parameters(classifier).items():
            if "lora_B" in name or name.startswith("head."):
                parameter.normal_(std=0.02, generator=rng)
    adapter, folder = read_adapter(classifier), tmp_path_factory.mktemp("minilm")
    write_artifacts(classifier, adapter, folder)
    return Case("text", classifier, adapter, folder)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tokens"), [(1, 5), (3, 64), (5, 33)])
def test_minilms_gradients_are_torchs(minilm: Case, rows: int, tokens: int) -> None:
    batch = batch_of(minilm, rows, tokens=tokens, seed=rows)
    engine = minilm.engine()
    for bound in (None, 0.5):
        got = engine.grads(batch, clipping_norm=bound)
        expected = by_torch(minilm, batch, bound)
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert distance(got.arrays, expected.arrays) < 1e-5


@pytest.mark.slow
def test_minilms_adapter_after_20_steps_is_torchs(minilm: Case) -> None:
    training = Training(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=1.0)
    batches = batches_of(minilm, 20)
    expected, expected_losses = adamw_steps(minilm, batches, training)
    got, losses = engine_steps(minilm.engine(), batches, training)

    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert distance(got, expected) < 1e-5
