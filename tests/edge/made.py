"""Bundles that make_bundle made of the tiny classifiers: measured, limited, signed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import collate
from anabranch.client.tuning.lora import read_adapter
from anabranch.edge.export.accuracy import Inputs
from anabranch.edge.export.bundle import Request, make_bundle
from anabranch.edge.runtime.bundle import Bundle, open_bundle
from anabranch.edge.runtime.bundle_manifest import Manifest
from anabranch.edge.runtime.trust import public_bytes
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.tables import Training

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TRUSTED = (public_bytes(KEY),)
TRAINING = Training(learning_rate=0.01, batch_size=8, local_epochs=2)
WORDS = "acute chronic fracture of the left right femur heart failure infarction type with and"
RECORDS = 60
NOISE = 0.2  # share of records whose label is drawn, not what the classifier says


@dataclass(frozen=True, eq=False)
class Made:
    """A bundle, and what it was made of."""

    folder: Path
    manifest: Manifest
    stages: tuple[str, ...]
    classifier: Classifier
    adapter: Adapter
    config: RunConfig
    inputs: Inputs
    labels: NDArray[np.int64]

    def open(self) -> Bundle:
        return open_bundle(self.folder, trusted=TRUSTED)


def request(**changes: Any) -> Request:
    """Every precision, whatever it loses."""
    fields: dict[str, Any] = {
        "name": "tiny", "version": 3, "tolerance": {"int8": 1.0, "int4": 1.0}
    }  # fmt: skip
    return Request(**(fields | changes))


def inputs_of(kind: str, n: int = RECORDS, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    if kind == "text":
        return [" ".join(rng.choice(WORDS.split(), rng.integers(1, 12))) for _ in range(n)]
    shape = (n, 1, 12, 12) if kind == "image" else (n, 5)
    return rng.standard_normal(shape).astype(np.float32)


def said_by(classifier: Classifier, inputs: Any) -> NDArray[np.float32]:
    """Return the classifier's logits in torch, record by record: no padding."""
    with torch.no_grad():
        rows = [classifier.logits(*collate([one])) for one in classifier.encode(inputs)]
    return torch.cat(rows).numpy()


def labels_of(classifier: Classifier, inputs: Any) -> NDArray[np.int64]:
    """Return what the classifier says, but for a share of records."""
    rng = np.random.default_rng(1)
    labels: NDArray[np.int64] = said_by(classifier, inputs).argmax(1).astype(np.int64)
    drawn = rng.random(len(labels)) < NOISE
    labels[drawn] = rng.integers(0, classifier.num_labels, int(drawn.sum()))
    return labels


def make(
    kind: str,
    folder: Path,
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
    *,
    what: Request | None = None,
    adapter: Adapter | None = None,
) -> Made:
    """Make a bundle of a tiny classifier; `adapter` None is its own."""
    classifier, config = make_classifier(kind), make_config(kind, training=TRAINING)
    own, inputs = read_adapter(classifier), inputs_of(kind)
    labels = labels_of(classifier, inputs)
    stages: list[str] = []
    manifest = make_bundle(
        classifier,
        adapter or own,
        config,
        folder,
        request=what or request(),
        inputs=inputs,
        labels=labels,
        signing_key=KEY,
        on_stage=stages.append,
    )
    chosen = adapter or own
    return Made(folder, manifest, tuple(stages), classifier, chosen, config, inputs, labels)


def small(
    make_classifier: Callable[..., Classifier],
    make_config: Callable[..., RunConfig],
    folder: Path,
    **changes: Any,
) -> Manifest:
    """A logistic bundle of fp32 alone."""
    classifier = make_classifier("logistic")
    inputs = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    labels = said_by(classifier, inputs).argmax(1)
    arguments: dict[str, Any] = {
        "request": Request(name="small", version=1, precisions=("fp32",), artifacts=False),
        "inputs": inputs,
        "labels": labels,
        "signing_key": KEY,
        "adapter": read_adapter(classifier),
        "config": make_config("logistic"),
        "classifier": classifier,
    } | changes
    return make_bundle(
        arguments.pop("classifier"),
        arguments.pop("adapter"),
        arguments.pop("config"),
        folder,
        **arguments,
    )
