"""make_bundle: complete, true to torch, signed; and nothing at all when something is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export import bundle as exporting
from anabranch.edge.export.bundle import PRECISIONS, ROLES, Request
from anabranch.edge.runtime import bundle_manifest as names
from anabranch.edge.runtime.bundle import open_bundle
from anabranch.edge.runtime.bundle_manifest import key
from anabranch.edge.runtime.manifest import TOKENIZER
from anabranch.edge.runtime.measure import Job, measure
from anabranch.edge.runtime.onnx_adapter import supported
from anabranch.edge.runtime.predict import Predictor
from anabranch.edge.runtime.trust import public_bytes
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import (
    BundleError,
)
from tests.edge.made import KEY, RECORDS, Made, make, request, said_by, small

KINDS = ("text", "image", "tabular")
Bundles = Callable[[str], Made]
Make = Callable[..., Any]
GRAPHS = {key(role, precision) for role in ROLES for precision in PRECISIONS}
UNLIKE = {names.MANIFEST, names.SIGNATURE}  # time of making, and what was measured


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def other_adapter(adapter: Adapter) -> Adapter:
    rng = np.random.default_rng(8)
    arrays = {n: rng.normal(size=s, scale=0.2).astype(np.float32) for n, s in adapter.spec.tensors}
    return Adapter(adapter.spec, arrays)


# -- what is in it ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_opens_with_the_key_that_signed_it_and_no_other(kind: str, made: Bundles) -> None:
    bundle = made(kind).open()
    assert bundle.manifest == made(kind).manifest
    assert wire.encode(bundle.adapter) == wire.encode(made(kind).adapter)
    assert (bundle.tokenizer is not None) is (kind == "text")
    stranger = public_bytes(Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match=r"signature: .*does not trust"):
        open_bundle(made(kind).folder, trusted=[stranger])


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_what_was_asked_for_and_trained(kind: str, made: Bundles) -> None:
    one = made(kind)
    manifest = one.manifest
    assert (manifest.name, manifest.version) == ("tiny", 3)
    assert manifest.task == one.config.task.kind
    assert manifest.labels == one.config.task.labels
    assert manifest.columns == one.config.data.columns
    assert manifest.config == one.config.digest()
    assert manifest.training == one.config.training
    assert (manifest.privacy, manifest.privacy_steps) == (None, 0)
    assert manifest.spec == one.adapter.spec
    assert manifest.adapter == wire.digest(wire.encode(one.adapter))
    assert manifest.shape == {"text": (), "image": (1, 12, 12), "tabular": (5,)}[kind]
    assert manifest.limits.max_tokens == (24 if kind == "text" else 1)
    assert manifest.artifacts
    assert {"anabranch", "torch", "onnx", "numpy"} <= set(manifest.versions)
    assert any(name.startswith("onnxruntime") for name in manifest.versions)


@pytest.mark.parametrize("kind", KINDS)
def test_every_graph_is_there_and_maps_only_files_of_its_precision(
    kind: str, made: Bundles
) -> None:
    manifest = made(kind).manifest
    assert set(manifest.graphs) == GRAPHS
    for name, graph in manifest.graphs.items():
        assert graph.file == f"{name}.onnx"
        precision = name.split(".")[1]
        assert graph.data == (() if kind == "tabular" else (f"base-{precision}.bin",))
        assert graph.onnxruntime >= "1.19"


@pytest.mark.parametrize("kind", KINDS)
def test_the_list_of_files_is_exact(kind: str, made: Bundles) -> None:
    one = made(kind)
    expected = {f"{name}.onnx" for name in GRAPHS} | {names.ADAPTER}
    expected |= {names.TRAINING_MODEL, names.EVAL_MODEL, names.OPTIMIZER_MODEL, names.CHECKPOINT}
    expected |= {f"base-{p}.bin" for p in PRECISIONS} if kind != "tabular" else set()
    expected |= {TOKENIZER} if kind == "text" else set()
    expected |= {names.ONNX_ADAPTER} if supported() else set()
    assert set(one.manifest.files) == expected
    assert {p.name for p in one.folder.iterdir()} == expected | UNLIKE
    for name, digest in digests(one.folder).items():
        if name not in UNLIKE:
            assert one.manifest.files[name].sha256 == digest
            assert one.manifest.files[name].bytes == (one.folder / name).stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_and_latency_are_of_the_records(kind: str, made: Bundles) -> None:
    one = made(kind)
    bundle = one.open()
    assert tuple(one.manifest.measured) == PRECISIONS
    for precision, measured in one.manifest.measured.items():
        logits = Predictor.open(bundle, precision=precision).logits(one.inputs)
        assert measured.records == RECORDS
        assert measured.accuracy == float((logits.argmax(1) == one.labels).mean())
        assert 0 < measured.p50_ms <= measured.p95_ms
        graph = one.manifest.graphs[key("infer", precision)]
        sizes = [(one.folder / name).stat().st_size for name in (graph.file, *graph.data)]
        assert measured.bytes == sum(sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_as_accurate_as_torch_and_gives_its_logits(kind: str, made: Bundles) -> None:
    one = made(kind)
    expected = said_by(one.classifier, one.inputs)
    got = Predictor.open(one.open(), precision="fp32").logits(one.inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    truth = float((expected.argmax(1) == one.labels).mean())
    assert 0.5 < truth < 1  # neither guessed, nor a figure that anything would reach
    assert abs(one.manifest.measured["fp32"].accuracy - truth) <= max(1e-3, 1.5 / RECORDS)


def test_quantized_bases_are_smaller(made: Bundles) -> None:
    for kind in ("text", "image"):
        size = {p: made(kind).manifest.files[f"base-{p}.bin"].bytes for p in PRECISIONS}
        assert size["int4"] < size["int8"] < size["fp32"]


@pytest.mark.parametrize("kind", ["text", "image"])
def test_memory_models_lie_above_measured_peaks_and_within_the_limit(
    kind: str, made: Bundles
) -> None:
    one = made(kind)
    longest = one.manifest.limits.max_tokens
    needs = [g.memory.needed(exporting.MICRO_BATCH, longest) for g in one.manifest.graphs.values()]
    assert one.manifest.limits.memory_bytes == max(needs)
    points = ((1, longest), (2, max(1, longest // 2)), (exporting.MICRO_BATCH, longest))
    for role in ROLES:  # in another process than the one that the model is of
        job = Job(folder=str(one.folder), role=role, precision="int8", points=points, repeats=1)
        memory = one.manifest.graphs[key(role, "int8")].memory
        for point in measure(job):
            assert point.peak <= memory.needed(point.records, point.tokens)
            assert point.peak > 0.8 * memory.fixed  # and not above them by much


def test_stages_are_told_in_order(made: Bundles) -> None:
    assert made("text").stages == (
        "exporting",
        "onnxruntime-training artifacts",
        "comparing engines",
        "measuring accuracy",
        "measuring memory",
    )


# -- what it leaves behind ----------------------------------------------------------------------


def state_of(classifier: Any) -> dict[str, Any]:
    tensors = {**dict(classifier.named_parameters()), **dict(classifier.named_buffers())}
    return {
        "tensors": {n: t.detach().clone() for n, t in tensors.items()},
        "asking": {n for n, p in classifier.named_parameters() if p.requires_grad},
        "gradients": {n for n, p in classifier.named_parameters() if p.grad is not None},
        "training": {n: m.training for n, m in classifier.named_modules()},
        "hooks": {n: len(m._forward_hooks) for n, m in classifier.named_modules()},
        "types": {n: type(m) for n, m in classifier.named_modules()},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_is_left_as_it_was(kind: str, made: Bundles, make_classifier: Make) -> None:
    before, after = state_of(make_classifier(kind)), state_of(made(kind).classifier)
    tensors = before.pop("tensors"), after.pop("tensors")
    assert after == before
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_bundle_is_left(kind: str, made: Bundles) -> None:
    assert list(made(kind).folder.parent.iterdir()) == [made(kind).folder]


# -- again --------------------------------------------------------------------------------------


def untimed(manifest: names.Manifest) -> Any:
    """Return the manifest without time of making, time and memory."""
    fields = msgspec.to_builtins(manifest)
    del fields["created"], fields["limits"]["memory_bytes"]
    for graph in fields["graphs"].values():
        del graph["memory"]
    for measured in fields["measured"].values():
        del measured["p50_ms"], measured["p95_ms"]
    return fields


def test_two_exports_differ_only_in_what_was_measured(
    make_classifier: Make, make_config: Make, tmp_path: Path
) -> None:
    first, second = (
        small(make_classifier, make_config, tmp_path / name) for name in ("one", "two")
    )
    assert untimed(first) == untimed(second)
    files = digests(tmp_path / "one"), digests(tmp_path / "two")
    assert files[0].keys() == files[1].keys()
    assert {n for n in files[0] if files[0][n] != files[1][n]} <= UNLIKE


@pytest.fixture(scope="module")
def update(made: Bundles, make_classifier: Make, make_config: Make, tmp_path_factory: Any) -> Made:
    """The image bundle with another adapter for the same base."""
    adapter = other_adapter(made("image").adapter)
    folder = tmp_path_factory.mktemp("update") / "image"
    what = request(version=4, precisions=("fp32", "int8"))
    return make("image", folder, make_classifier, make_config, what=what, adapter=adapter)


def test_another_adapter_changes_only_small_files(update: Made, made: Bundles) -> None:
    first, second = digests(made("image").folder), digests(update.folder)
    assert second.keys() == {name for name in first if "int4" not in name}
    changed = {n for n in second if first[n] != second[n]}
    defaults = {"infer.fp32.onnx", "infer.int8.onnx"}
    assert changed == {*UNLIKE, *defaults, names.ADAPTER, names.CHECKPOINT}
    frame = update.manifest.files[names.ADAPTER].bytes
    for name in defaults:  # the nodes, and the adapter once
        path = update.folder / name
        graph = onnx.load(path, load_external_data=False).graph
        held = {t.name for t in graph.initializer if t.name in update.adapter.arrays}
        assert held == set(update.adapter.arrays)
        graphs = [
            onnx.load(folder / name, load_external_data=False)
            for folder in (made("image").folder, update.folder)
        ]
        for model in graphs:  # what is not the adapter is the same, byte for byte
            kept = [t for t in model.graph.initializer if t.name not in held]
            del model.graph.initializer[:]
            model.graph.initializer.extend(kept)
        without = [model.SerializeToString(deterministic=True) for model in graphs]
        assert without[0] == without[1]
        assert path.stat().st_size - len(without[1]) < frame + 64 * len(held)
    assert (update.folder / names.CHECKPOINT).stat().st_size < 2 * frame


def test_the_other_adapter_is_what_the_update_answers_with(update: Made, made: Bundles) -> None:
    got = Predictor.open(update.open(), precision="fp32").logits(update.inputs)
    np.testing.assert_allclose(got, said_by(update.classifier, update.inputs), 1e-4, 1e-5)
    assert read_adapter(update.classifier).arrays.keys() == update.adapter.arrays.keys()
    for name, array in read_adapter(update.classifier).arrays.items():
        np.testing.assert_array_equal(array, update.adapter.arrays[name])
    with_released = Predictor.open(made("image").open(), precision="fp32", adapter=update.adapter)
    np.testing.assert_array_equal(with_released.logits(update.inputs), got)


# -- chosen parts, privacy ----------------------------------------------------------------------


def test_only_what_was_asked_for_is_in_it_and_the_order_does_not_matter(
    make_classifier: Make, make_config: Make, tmp_path: Path
) -> None:
    what = Request(
        name="few",
        version=1,
        precisions=("int8", "fp32"),
        artifacts=False,
        memory_bytes=1 << 30,
        tolerance={"int8": 1.0},
    )
    manifest = small(make_classifier, make_config, tmp_path / "few", request=what)
    assert set(manifest.graphs) == {key(r, p) for r in ROLES for p in ("fp32", "int8")}
    assert tuple(manifest.measured) == ("fp32", "int8")
    assert not manifest.artifacts
    assert names.CHECKPOINT not in manifest.files
    assert manifest.limits.memory_bytes == 1 << 30


def test_a_private_runs_promise_goes_with_the_bundle(
    make_classifier: Make, make_config: Make, tmp_path: Path
) -> None:
    from anabranch.protocols.tables import Federation, Privacy, Training

    config = make_config(
        "logistic",
        privacy=Privacy(epsilon=2.0),
        training=Training(optimizer="sgd", learning_rate=0.5, local_steps=5),
        federation=Federation(rounds=7),
    )
    manifest = small(make_classifier, make_config, tmp_path / "private", config=config)
    assert manifest.privacy == config.privacy
    assert manifest.privacy_steps == 35


def test_a_manifest_that_was_changed_after_signing_does_not_open(
    made: Bundles, tmp_path: Path
) -> None:
    for path in made("tabular").folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = json.loads((tmp_path / names.MANIFEST).read_bytes())
    data["limits"]["memory_bytes"] += 1
    (tmp_path / names.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="signature"):
        open_bundle(tmp_path, trusted=[public_bytes(KEY)])
