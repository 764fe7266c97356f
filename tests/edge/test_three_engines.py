"""torch, the plain graph and onnxruntime-training, from one bundle: the same training.

Each of the three goes its own way, from the released adapter, with its own optimiser: torch's
AdamW, and the runtime's in numpy for the two engines. Batches change in size, length and padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import load_adapter, read_adapter, trainable_parameters
from anabranch.edge.export.bundle import Request, make_bundle
from anabranch.edge.runtime import optimizer
from anabranch.edge.runtime.bundle import Bundle, open_bundle
from anabranch.edge.runtime.engine import Batch, Engine
from anabranch.edge.runtime.joint import open_engine
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Lora, Model, Training
from tests.edge.made import KEY, TRUSTED, Made

STEPS = 20
TOLERANCE = 1e-5  # ‖difference‖ / ‖torch's‖, over the whole adapter
LOOSE = 5e-5  # torch's own float32 is 0.9e-5 from its float64 on MiniLM, by a few such entries
TRAINING = Training(learning_rate=1e-3, weight_decay=0.1, head_learning_rate=1e-3)
Step = tuple[float, NDArray[np.float64], NDArray[np.float64]]  # loss, gradient, adapter after it


def vector(arrays: Any) -> NDArray[np.float64]:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float64)


def apart(got: Any, expected: Any) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def batch_of(made: Made, rows: int, tokens: int, seed: int) -> Batch:
    """Records of up to `tokens` tokens, padded, the whole batch a little more."""
    manifest, rng = made.manifest, np.random.default_rng(seed)
    if manifest.shape:
        values = rng.standard_normal((rows, *manifest.shape)).astype(np.float32)
        feeds: Any = {manifest.inputs[0]: values}
    else:
        lengths = rng.integers(1, tokens + 1, rows)
        mask = (np.arange(tokens + seed % 3) < lengths[:, None]).astype(np.int64)
        ids = rng.integers(5, 60, mask.shape) * mask
        feeds = dict(zip(manifest.inputs, (ids, mask), strict=True))
    labels = rng.integers(0, len(manifest.labels), rows)
    return Batch(feeds, labels, np.full(rows, 1 / rows, np.float32))


def by_torch(classifier: Classifier, batches: list[Batch]) -> list[Step]:
    """Train in torch; the classifier is put back."""
    start, named = read_adapter(classifier), trainable_parameters(classifier)
    steps = []
    adamw = torch.optim.AdamW(
        named.values(), lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay
    )
    for batch in batches:
        inputs = [torch.from_numpy(array) for array in batch.feeds.values()]
        logits = classifier.logits(inputs[0], inputs[1].bool() if len(inputs) > 1 else None)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
        adamw.zero_grad()
        loss.backward()
        gradient = vector({n: np.asarray(p.grad) for n, p in named.items()})
        adamw.step()
        after = vector({n: p.detach().numpy() for n, p in named.items()})
        steps.append((float(loss.detach()), gradient, after))
    for parameter in named.values():
        parameter.grad = None
    load_adapter(classifier, start)
    return steps


def by_engine(engine: Engine, batches: list[Batch]) -> list[Step]:
    params, steps = engine.params(), []
    state = optimizer.fresh(TRAINING, params, params)
    for i, batch in enumerate(batches):
        engine.set_params(params)
        found = engine.grads(batch)
        params, state = optimizer.update(TRAINING, params, found.arrays, state, step=i, rate=1.0)
        steps.append((found.loss, vector(found.arrays), vector(params)))
    return steps


def require_same(got: list[Step], expected: list[Step], tiny: float = 0.0) -> None:
    """Compare every step; entries whose first gradient is below `tiny` get LOOSE.

    AdamW's first step is η g / (|g| + 1e-8): where |g| is about 1e-8, a last bit of g shows.
    """
    assert len(got) == len(expected)
    settled = np.abs(expected[0][1]) >= tiny
    assert settled.mean() > 0.999
    for at, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one[0] == pytest.approx(other[0], rel=TOLERANCE), f"loss of step {at}"
        assert apart(one[1], other[1]) < TOLERANCE, f"gradient of step {at}"
        assert apart(one[2] * settled, other[2] * settled) < TOLERANCE, f"adapter after step {at}"
        assert apart(one[2], other[2]) < (LOOSE if tiny else TOLERANCE), f"adapter, step {at}"


def require_three(
    classifier: Classifier, bundle: Bundle, batches: list[Batch], tiny: float = 0.0
) -> None:
    expected = by_torch(classifier, batches)
    start = vector(bundle.adapter.arrays)
    assert apart(expected[-1][2], start) > 1e-2  # it went somewhere
    joint = by_engine(open_engine(bundle, engine="joint"), batches)
    training = by_engine(open_engine(bundle, engine="ort-training"), batches)
    require_same(joint, expected, tiny)
    require_same(training, expected, tiny)
    require_same(joint, training, tiny)


@pytest.mark.parametrize("max_records", [None, 3])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_three_engines_end_in_the_same_adapter(
    kind: str, max_records: int | None, made: Callable[[str], Made]
) -> None:
    one = made(kind)
    batches = [batch_of(one, 1 + (3 * i) % 7, 3 + (5 * i) % 20, seed=i) for i in range(STEPS)]
    bundle = one.open()
    if max_records is not None:  # batches are cut into micro-batches
        limits = msgspec.structs.replace(bundle.manifest.limits, max_records=max_records)
        manifest = msgspec.structs.replace(bundle.manifest, limits=limits)
        bundle = replace(bundle, manifest=manifest)
        engine: Any = open_engine(bundle)
        assert max(len(engine.pieces(batch)) for batch in batches) == 3
    require_three(one.classifier, bundle, batches)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_clipped_sums_and_logits_are_the_same(kind: str, made: Callable[[str], Made]) -> None:
    one = made(kind)
    bundle, batch = one.open(), batch_of(one, 6, 17, seed=4)
    joint, training = (open_engine(bundle, engine=name) for name in ("joint", "ort-training"))
    free = joint.grads(batch, clipping_norm=1e9)
    assert free.norms is not None
    bound = float(np.median(free.norms))
    found = [engine.grads(batch, clipping_norm=bound) for engine in (joint, training)]
    norms = [each.norms for each in found]
    assert norms[0] is not None
    assert norms[1] is not None
    assert apart(norms[0], norms[1]) < TOLERANCE
    assert apart(*(vector(each.arrays) for each in found)) < TOLERANCE
    assert apart(vector(found[0].arrays), vector(free.arrays)) > 0.01
    assert apart(*(engine.predict(batch.feeds) for engine in (joint, training))) < TOLERANCE


# -- the real encoder ---------------------------------------------------------------------------


def sentences(folder: Path, count: int) -> tuple[list[str], NDArray[np.int64]]:
    lines = (folder / "sst2" / "stsa.binary.dev").read_text().splitlines()
    chosen = np.random.default_rng(0).permutation(len(lines))[:count]
    labels = np.array([int(lines[i][0]) for i in chosen], np.int64)
    return [lines[i][2:] for i in chosen], labels


@pytest.mark.slow
def test_three_engines_end_in_the_same_adapter_on_minilm_and_real_sentences(
    make_config: Callable[..., RunConfig], shared_data: Path, tmp_path: Path
) -> None:
    config = make_config(
        "text",
        model=Model(base="minilm", max_tokens=64),
        lora=Lora(rank=8, targets=("query", "value")),
        training=TRAINING,
    )
    classifier = load_classifier(config)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in trainable_parameters(classifier).items():
            if "lora_B" in name or name.startswith("head."):
                parameter.normal_(std=0.02, generator=rng)
    texts, labels = sentences(shared_data, 120)
    make_bundle(
        classifier,
        read_adapter(classifier),
        config,
        tmp_path / "bundle",
        request=Request(name="minilm", version=1, precisions=("fp32",)),
        inputs=texts,
        labels=labels,
        signing_key=KEY,
    )
    bundle = open_bundle(tmp_path / "bundle", trusted=TRUSTED)
    batches, at = [], 0
    for i in range(STEPS):
        rows = slice(at, at := at + 2 + i % 7)
        ids, mask = collate(classifier.encode(texts[rows]))
        assert mask is not None
        count = len(ids)
        feeds = dict(zip(bundle.manifest.inputs, (ids.numpy(), mask.long().numpy()), strict=True))
        batches.append(Batch(feeds, labels[rows], np.full(count, 1 / count, np.float32)))
    assert len({array.shape for b in batches for array in b.feeds.values()}) > 10
    require_three(classifier, bundle, batches, tiny=1e-7)
