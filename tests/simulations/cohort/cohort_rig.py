"""Small classifiers and clients of unlike settings, for the tests of the cohort engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anabranch.client.local import Learned, Local, train_alone
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, Examples, Ragged
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.client.tuning.tables import TableClassifier
from anabranch.client.tuning.training import Schedule
from anabranch.client.tuning.vision import ImageClassifier
from anabranch.protocols.adapter import WHOLE, Adapter
from anabranch.protocols.errors import AnabranchError
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Lora, Training

LABELS = 3  # of every classifier here
TOTAL_STEPS = 40  # of the run that a round is part of
VIT = {"image_size": 8, "channels": 1, "patch": 4, "width": 8, "depth": 2, "heads": 2}
TABLES = {
    "logistic": ("logistic", {}, Lora(rank=0)),
    "mlp": ("mlp", {"hidden": (5, 7)}, Lora(rank=0, modules_to_save=("hidden.*",))),
    "mlp-lora": ("mlp", {"hidden": (5, 7)}, Lora(rank=3, alpha=6.0, targets=("hidden.*",))),
}
IMAGES = {
    "vit": ("vit", VIT, Lora(rank=3, layers="last:1", targets=("query", "value"))),
    "vit-all": (
        "vit",
        VIT,
        Lora(rank=2, targets=("query", "up", "down"), modules_to_save=("norm*", "output")),
    ),
    "cnn": ("cnn", {"image_size": 8, "channels": 1}, Lora(rank=0, modules_to_save=("*",))),
}
TEXTS = {
    "bert": ("bert", Lora(rank=2, layers="last:2", targets=("query", "value"))),
    "bert-full": (
        "bert",
        Lora(
            rank=2, layers="last:1", targets=("query",), modules_to_save=("encoder.layer.2.output",)
        ),
    ),
    "mpnet": ("mpnet", Lora(rank=2, layers="last:1", targets=("q", "k"))),
    "distilbert": ("distilbert", Lora(rank=2, layers="last:1", targets=("q_lin", "lin1"))),
}


def tables_and_images(make_config: Any) -> dict[str, Classifier]:
    """Return name -> classifier."""
    made = {}
    kinds: dict[str, dict[str, Any]] = {"tabular": TABLES, "image": IMAGES}
    for kind, cases in kinds.items():
        for name, (base, model, lora) in cases.items():
            config = make_config(base, f"{kind}-classification", lora=lora, **model)
            made[name] = scattered(load_classifier(config))
    return made


def texts(make_config: Any, encoders: dict[str, Path]) -> dict[str, Classifier]:
    """Return name -> classifier."""
    made = {}
    for name, (family, lora) in TEXTS.items():
        config = make_config(str(encoders[family]), lora=lora, max_tokens=16)
        made[name] = scattered(load_classifier(config))
    return made


def scattered(classifier: Classifier) -> Classifier:
    """Return the classifier with random values in the adapter: B and the head are zero at first."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return classifier


SGD = Training(batch_size=3, optimizer="sgd", learning_rate=0.05)


@dataclass(frozen=True)
class Client:
    """One client of a test: its data, settings and part."""

    seed: int
    records: int = 6
    steps: int = 4
    training: Training = SGD
    mu: float = 0.0
    part: Part = WHOLE
    kept: Part | None = None
    first_step: int = 0


def features(classifier: Classifier, records: int, rng: torch.Generator) -> list[Tensor]:
    """Return random inputs of the first stage above the cut, texts of 1 to 9 tokens."""
    if isinstance(classifier, ImageClassifier):
        shape: tuple[int, ...] = (
            classifier.image_shape if classifier.cut == 0 else (4, VIT["width"])
        )
        return list(torch.randn((records, *shape), generator=rng))
    if isinstance(classifier, TableClassifier):
        return list(torch.randn((records, classifier.num_features), generator=rng))
    lengths = torch.randint(1, 10, (records,), generator=rng).tolist()
    if classifier.cut == 0:
        return [torch.randint(3, 38, (n,), generator=rng) for n in lengths]
    return [torch.randn(n, 24, generator=rng) for n in lengths]


def cohort(classifier: Classifier, clients: Sequence[Client], form: str = "list") -> list[Local]:
    """Return the clients' Locals; `form` says what their features are: list, dense or ragged."""
    rng = torch.Generator().manual_seed(7)
    records = [features(classifier, client.records, rng) for client in clients]
    parts: list[Sequence[Tensor]] = list(records)
    flat = [feature for own in records for feature in own]
    ends = np.cumsum([0, *(len(own) for own in records)])
    if form == "dense":
        data = torch.stack(flat)
        parts = [Dense(data, torch.arange(a, b)) for a, b in pairwise(ends)]
    elif form == "ragged":
        length = torch.tensor([len(feature) for feature in flat])
        whole = Ragged(torch.cat(flat), length.cumsum(0) - length, length)
        parts = [whole.subset(range(a, b)) for a, b in pairwise(ends)]
    return [
        Local(
            name=f"client-{i}",
            classifier=classifier,
            start=start(classifier, client.seed % 2),
            examples=Examples(part, torch.randint(0, LABELS, (client.records,), generator=rng)),
            training=client.training,
            steps=client.steps,
            schedule=Schedule(first_step=client.first_step, total_steps=TOTAL_STEPS),
            seed=client.seed,
            proximal_mu=client.mu,
            part=client.part,
            kept=client.kept,
        )
        for i, (client, part) in enumerate(zip(clients, parts, strict=True))
    ]


_STARTS: dict[tuple[int, int], Adapter] = {}


def start(classifier: Classifier, seed: int) -> Adapter:
    """Return one of the adapters that clients begin from: the same object for the same seed."""
    key = id(classifier), seed
    if key not in _STARTS:
        rng = np.random.default_rng(seed)
        spec = classifier.spec
        arrays = {n: rng.normal(0, 0.4, s).astype(np.float32) for n, s in spec.tensors}
        _STARTS[key] = Adapter(spec, arrays)
    return _STARTS[key]


def one_by_one(locals: Sequence[Local]) -> list[Learned | AnabranchError]:
    """Return what came of every Local, trained alone."""
    results: list[Learned | AnabranchError] = []
    for local in locals:
        try:
            results.append(train_alone(local))
        except AnabranchError as error:
            results.append(error)
    return results


def conditioned(locals: Sequence[Local], expected: Sequence[Learned | AnabranchError]) -> float:
    """Return the tolerance that training itself allows, at least 1e-5.

    Some rounds amplify rounding (large factors, momentum, no clipping): a start that is one unit
    in the last place away ends further than 1e-5 away, on one engine alone. Ten units are allowed.
    """
    ulp = np.float32(1 + 2.0**-23)
    nudged = [
        dataclasses.replace(
            local,
            start=Adapter(
                local.start.spec, {name: a * ulp for name, a in local.start.arrays.items()}
            ),
        )
        for local in locals
    ]
    moved = 0.0
    for one, other in zip(expected, one_by_one(nudged), strict=True):
        if isinstance(one, Learned) and isinstance(other, Learned):
            pairs = ((a, other.after.arrays[name]) for name, a in one.after.arrays.items())
            moved = max(moved, *(float(np.abs(a - b).max()) for a, b in pairs))
    return max(1e-5, 10 * moved)


def require_equal(
    got: Sequence[Learned | AnabranchError],
    expected: Sequence[Learned | AnabranchError],
    tolerance: float = 1e-5,
) -> None:
    """Fail unless all values, losses and errors are equal to `tolerance`."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        if isinstance(theirs, AnabranchError):
            assert type(ours) is type(theirs)
            assert str(ours) == str(theirs)
            continue
        assert isinstance(ours, Learned), ours
        assert ours.steps == theirs.steps
        assert (ours.loss is None) == (theirs.loss is None)
        if ours.loss is not None and theirs.loss is not None:
            assert abs(ours.loss - theirs.loss) <= tolerance * max(1.0, abs(theirs.loss))
        assert ours.after.spec == theirs.after.spec
        for name, array in theirs.after.arrays.items():
            np.testing.assert_allclose(
                ours.after.arrays[name], array, rtol=tolerance, atol=tolerance, err_msg=name
            )
