"""The training step in ONNX is torch's training step, for every way to cut a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import trainable_parameters
from anabranch.edge.export.joint import check_against_torch, step_graph
from anabranch.protocols.tables import Lora, Model

KINDS = ("text", "image", "tabular", "logistic")
Made = Callable[..., Classifier]
Arrays = dict[str, NDArray[Any]]
Sessions = Callable[..., Any]
Batches = Callable[..., Arrays]


def take(feeds: Arrays, rows: Any) -> Arrays:
    return {name: array[rows] for name, array in feeds.items()}


def flat(found: Arrays) -> NDArray[np.float64]:
    return np.concatenate(
        [a.reshape(-1).astype(np.float64) for n, a in found.items() if n.endswith(".grad")]
    )


def close(a: NDArray[Any], b: NDArray[Any], relative: float = 1e-5) -> bool:
    return float(np.abs(a - b).max()) <= relative * max(float(np.abs(b).max()), 1e-6)


# -- it is torch's step -----------------------------------------------------------------------


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_step_computes_what_torch_computes(
    kind: str, clipped: bool, make_classifier: Made, steps: Callable[..., onnx.ModelProto]
) -> None:
    worst = check_against_torch(steps(kind, clipped), make_classifier(kind), clipped=clipped)
    assert 0 < worst < 1e-5


def test_batch_and_tokens_stay_apart_where_no_other_length_is_left(
    make_config: Callable[..., Any], tiny_bert: Path
) -> None:
    config = make_config("text", model=Model(base=str(tiny_bert), max_tokens=13))
    classifier = load_classifier(config)
    step = step_graph(classifier, clipped=False)
    assert check_against_torch(step, classifier, clipped=False) < 1e-5


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        ("image", ("patch", "position", "*.mlp", "norm", "*.norm1")),
        pytest.param(
            "text",
            ("embeddings", "*.output.LayerNorm", "*.intermediate.dense"),
            marks=pytest.mark.slow,
        ),
        ("tabular", ("hidden.1",)),
    ],
)
def test_step_trains_whole_modules(
    kind: str,
    trained: tuple[str, ...],
    clipped: bool,
    make_config: Callable[..., Any],
) -> None:
    targets = ("hidden.0",) if kind == "tabular" else ("query", "value")
    lora = Lora(rank=3, targets=targets, modules_to_save=trained)
    classifier = load_classifier(make_config(kind, lora=lora))
    step = step_graph(classifier, clipped=clipped)
    assert check_against_torch(step, classifier, clipped=clipped) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_of_adamw_end_where_torch_ends(
    kind: str, make_classifier: Made, sessions: Sessions, make_batch: Batches
) -> None:
    session = sessions(kind)
    feeds = [make_batch(kind, rows=3 + i % 4, tokens=5 + i % 7, seed=i) for i in range(20)]
    assert adamw_difference(make_classifier(kind), session, feeds) < 1e-5


@pytest.mark.slow
def test_twenty_steps_of_adamw_on_minilm(
    make_config: Callable[..., Any], open_step: Any, make_batch: Batches
) -> None:
    lora, model = Lora(rank=8, targets=("query", "value")), Model(base="minilm", max_tokens=64)
    classifier = load_classifier(make_config("text", model=model, lora=lora))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.02)
    for clipped in (True, False):
        step = step_graph(classifier, clipped=clipped)
        assert check_against_torch(step, classifier, clipped=clipped) < 2e-5
    feeds = [make_batch("text", rows=3 + i % 4, tokens=5 + i % 7, seed=i) for i in range(20)]
    assert adamw_difference(classifier, open_step(step, classifier), feeds) < 1e-5


def adamw_difference(
    classifier: Classifier, session: Any, batches: list[Arrays], lr: float = 1e-3
) -> float:
    """Return the largest relative difference of loss, gradients and adapter over the steps."""
    start = dict(session.adapter)
    ours = {n: torch.nn.Parameter(torch.tensor(a)) for n, a in start.items()}
    theirs = trainable_parameters(classifier)
    optimizers = [torch.optim.AdamW(list(p.values()), lr=lr) for p in (ours, theirs)]
    worst = 0.0
    for feeds in batches:
        session.adapter = {n: p.detach().numpy() for n, p in ours.items()}
        found = session(feeds)
        names = [n for n in feeds if n not in ("labels", "weights")]
        x = torch.tensor(feeds[names[0]])
        mask = torch.tensor(feeds[names[1]]).bool() if len(names) > 1 else None
        logits = classifier.logits(x, mask)
        labels, weights = torch.tensor(feeds["labels"]), torch.tensor(feeds["weights"])
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights).sum()
        optimizers[1].zero_grad()
        loss.backward()
        expected = {f"{n}.grad": np.asarray(p.grad) for n, p in theirs.items()}
        for name, parameter in ours.items():
            parameter.grad = torch.tensor(found[f"{name}.grad"])
        for optimizer in optimizers:
            optimizer.step()
        worst = max(
            worst,
            abs(float(found["loss"]) - loss.item()) / loss.item(),
            difference(found["logits"], logits.detach().numpy()),
            difference(flat(found), flat(expected)),
            difference(*(vector(p) for p in (ours, theirs))),
        )
    session.adapter = start
    return worst


def vector(parameters: dict[str, Any]) -> NDArray[Any]:
    return np.concatenate([p.detach().numpy().reshape(-1) for p in parameters.values()])


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# -- laws ---------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(cut=st.integers(1, 5), clipped=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", ["text", "image"])
def test_micro_batches_add_up_to_the_batch(
    kind: str,
    cut: int,
    clipped: bool,
    seed: int,
    sessions: Sessions,
    make_batch: Batches,
) -> None:
    session, bound = sessions(kind, clipped), 0.5 if clipped else None
    feeds = make_batch(kind, seed=seed)
    whole = session(feeds, bound)
    parts = [session(take(feeds, rows), bound) for rows in (slice(cut), slice(cut, None))]
    assert close(flat(parts[0]) + flat(parts[1]), flat(whole), 1e-4)
    losses = np.concatenate([p["losses"] for p in parts])
    assert close(losses, whole["losses"])


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_change_no_gradient(
    kind: str, clipped: bool, sessions: Sessions, make_batch: Batches
) -> None:
    session, bound = sessions(kind, clipped), 0.5 if clipped else None
    feeds = make_batch(kind)
    feeds["weights"][4:] = 0.0
    assert close(flat(session(feeds, bound)), flat(session(take(feeds, slice(4)), bound)))


@pytest.mark.parametrize("clipped", [False, True])
def test_padding_tokens_change_nothing(
    clipped: bool, sessions: Sessions, make_batch: Batches
) -> None:
    session, bound = sessions("text", clipped), 0.5 if clipped else None
    feeds = make_batch("text")
    longer = dict(feeds)
    for name in ("input_ids", "attention_mask"):
        longer[name] = np.pad(feeds[name], ((0, 0), (0, 5)))
    short, long = session(feeds, bound), session(longer, bound)
    assert close(flat(long), flat(short))
    assert close(long["logits"], short["logits"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_that_nobody_reaches_gives_the_plain_sums(
    kind: str, sessions: Sessions, make_batch: Batches
) -> None:
    clipped = sessions(kind, True)
    plain = sessions(kind, False)
    assert close(flat(clipped(make_batch(kind), 1e6)), flat(plain(make_batch(kind))))


@settings(max_examples=15, deadline=None)
@given(bound=st.floats(2**-10, 8.0, width=32), seed=st.integers(0, 99))
def test_no_record_weighs_more_than_the_bound(
    bound: float, seed: int, sessions: Sessions, make_batch: Batches
) -> None:
    session = sessions("text", True)
    feeds = take(make_batch("text", seed=seed), slice(1)) | {"weights": np.ones(1, np.float32)}
    found = session(feeds, bound)
    length = np.linalg.norm(flat(found))
    assert length <= bound * (1 + 1e-5)
    assert np.isclose(length, min(bound, float(found["norms"][0])), rtol=1e-4)
