import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Ragged, collate
from anabranch.client.tuning.lora import merge, trainable_parameters
from anabranch.protocols.tables import Lora
from anabranch.simulations.cohort.grouped import Unbatchable
from anabranch.simulations.cohort.packed import PackedBatch, Plan, forward, pack, why_not
from anabranch.simulations.cohort.ragged import RaggedLayers

PACKED = ["bert", "roberta", "electra"]
QUERY_VALUE = Lora(rank=3, layers="last:2")
ALL_LINEAR = Lora(rank=2, layers="last:1", targets=("query", "key", "value", "dense"))
WITH_FULL = Lora(
    rank=2,
    layers="last:2",
    targets=("query", "value"),
    modules_to_save=("encoder.layer.2.output", "encoder.layer.1.attention.self.key"),
)
WIDTH = 24
Batch = list[list[int]]  # lengths of the records of every client
BATCHES = st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=5), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def classifiers(make_config: Any, encoders: dict[str, Path]) -> dict[str, Classifier]:
    """Return name -> classifier: every family, pooling, and kind of adapter."""
    made = {}
    for kind in PACKED:
        config = make_config(str(encoders[kind]), lora=QUERY_VALUE, max_tokens=16)
        made[kind] = load_classifier(config)
    for name, lora in {"all": ALL_LINEAR, "full": WITH_FULL}.items():
        config = make_config(str(encoders["bert"]), lora=lora, max_tokens=16, pooling="cls")
        made[name] = load_classifier(config)
    return {name: classifier.double() for name, classifier in made.items()}


def values_of(classifier: Classifier, clients: int) -> dict[str, Tensor]:
    """Return name -> (K, *shape): different values for every client."""
    rng = torch.Generator().manual_seed(1)
    return {
        name: 0.3 * torch.randn((clients, *p.shape), generator=rng, dtype=p.dtype)
        for name, p in trainable_parameters(classifier).items()
    }


def rows_of(lengths: Batch) -> list[list[Tensor]]:
    rng = torch.Generator().manual_seed(2)
    kind = torch.float64
    return [
        [torch.randn((n, WIDTH), generator=rng, dtype=kind) for n in client] for client in lengths
    ]


def alone(
    classifier: Classifier, values: dict[str, Tensor], rows: list[list[Tensor]], weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and gradients of one client after the other, on padded batches."""
    parameters = trainable_parameters(classifier)
    logits, gradients = [], []
    for k, client in enumerate(rows):
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(values[name][k])
        out = classifier(*collate(client))
        loss = (out * weight[: len(out)]).sum()
        gradients.append(torch.autograd.grad(loss, list(parameters.values())))
        logits.append(out.detach())
    stacked = [torch.stack(each) for each in zip(*gradients, strict=True)]
    return torch.cat(logits), dict(zip(parameters, stacked, strict=True))


def together(
    classifier: Classifier, values: dict[str, Tensor], rows: list[list[Tensor]], weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    gradients = {name: torch.full_like(v, torch.nan) for name, v in values.items()}
    layers = RaggedLayers(classifier)
    layers.bind(values, gradients)
    logits = forward(classifier, batch_of(rows), layers)
    loss = sum((part * weight[: len(part)]).sum() for part in logits.split([len(c) for c in rows]))
    assert isinstance(loss, Tensor)
    loss.backward()
    layers.require_complete()
    return logits.detach(), gradients


def batch_of(rows: list[list[Tensor]]) -> PackedBatch:
    flat = [row for client in rows for row in client]
    lengths = torch.tensor([len(row) for row in flat])
    return PackedBatch(torch.cat(flat), lengths, tuple(len(client) for client in rows))


@pytest.mark.parametrize("name", [*PACKED, "all", "full"])
@settings(max_examples=12)
@given(lengths=BATCHES)
def test_packed_rows_give_the_logits_and_gradients_of_padded_batches(
    classifiers: dict[str, Classifier], name: str, lengths: Batch
) -> None:
    classifier = classifiers[name]
    assert why_not(classifier) is None
    values, rows = values_of(classifier, len(lengths)), rows_of(lengths)
    weight = torch.randn((5, 3), generator=torch.Generator().manual_seed(3))

    logits, gradients = together(classifier, values, rows, weight)

    expected_logits, expected = alone(classifier, values, rows, weight)
    torch.testing.assert_close(logits, expected_logits, atol=1e-10, rtol=1e-10)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-9, rtol=1e-9)


def test_single_precision_is_exact_to_five_digits(classifiers: dict[str, Classifier]) -> None:
    lengths = [[3, 7, 1], [16], [5, 5, 12, 2]]
    rows, weight = rows_of(lengths), torch.ones((4, 3), dtype=torch.float64)
    classifier = classifiers["bert"]
    values = values_of(classifier, 3)
    exact, expected = alone(classifier, values, rows, weight)
    try:
        classifier.float()
        single = {name: value.float() for name, value in values.items()}
        short = [[row.float() for row in client] for client in rows]
        logits, gradients = together(classifier, single, short, weight.float())
    finally:
        classifier.double()

    assert_near(logits, exact)
    for name, gradient in gradients.items():
        assert_near(gradient, expected[name])


def assert_near(found: Tensor, exact: Tensor) -> None:
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max().clamp(min=1)


def test_a_client_does_not_depend_on_who_else_is_in_the_batch(
    classifiers: dict[str, Classifier],
) -> None:
    classifier, rows = classifiers["electra"], rows_of([[3, 9], [1, 16, 4], [7]])
    values, weight = values_of(classifier, 3), torch.ones((3, 3), dtype=torch.float64)
    logits, gradients = together(classifier, values, rows, weight)

    second = {name: value[1:2] for name, value in values.items()}
    only, its = together(classifier, second, rows[1:2], weight)

    torch.testing.assert_close(only, logits[2:5], atol=1e-10, rtol=0)
    for name, gradient in its.items():
        torch.testing.assert_close(gradient[0], gradients[name][1], atol=1e-9, rtol=1e-9)


def test_what_is_not_trained_gets_no_gradient_and_the_rest_the_same(
    classifiers: dict[str, Classifier],
) -> None:
    classifier, rows = classifiers["full"], rows_of([[3, 9], [4]])
    values = values_of(classifier, 2)
    everything = {name: torch.zeros_like(value) for name, value in values.items()}
    some = {name: torch.zeros_like(v) for name, v in values.items() if "lora_B" in name}
    for gradients in (everything, some):
        layers = RaggedLayers(classifier)
        layers.bind(values, gradients)
        forward(classifier, batch_of(rows), layers).square().sum().backward()
        layers.require_complete()

    assert some
    for name, gradient in some.items():
        torch.testing.assert_close(gradient, everything[name], atol=1e-10, rtol=1e-10)


def test_every_batch_overwrites_the_gradients_of_the_last(
    classifiers: dict[str, Classifier],
) -> None:
    classifier, rows = classifiers["roberta"], rows_of([[3, 9], [4]])
    values = values_of(classifier, 2)
    gradients = {name: torch.zeros_like(value) for name, value in values.items()}
    layers = RaggedLayers(classifier)
    layers.bind(values, gradients)
    seen = []
    for _ in range(2):
        forward(classifier, batch_of(rows), layers).square().sum().backward()
        seen.append(torch.cat([g.reshape(-1) for g in gradients.values()]))

    assert torch.equal(seen[0], seen[1])
    assert seen[0].norm() > 0


def test_a_trained_tensor_without_a_gradient_is_noticed(
    classifiers: dict[str, Classifier],
) -> None:
    classifier = classifiers["bert"]
    values = values_of(classifier, 1)
    layers = RaggedLayers(classifier)
    layers.bind(values, {name: torch.zeros_like(value) for name, value in values.items()})

    with pytest.raises(Unbatchable, match="took no part in the loss"):
        layers.require_complete()


@given(lengths=BATCHES, shared=st.booleans())
def test_a_packed_batch_holds_the_rows_of_every_client_in_order(
    lengths: Batch, shared: bool
) -> None:
    rows = rows_of(lengths)
    flat = batch_of(rows)
    size = flat.lengths
    store = Ragged(flat.values, size.cumsum(0) - size, size)
    ends = flat.record_spans
    parts: Sequence[Ragged] = [store.subset(range(*span)) for span in ends]
    if not shared:
        parts = [Ragged(part.values.clone(), part.start, part.length) for part in parts]
    chosen = [torch.arange(len(part)).flip(0) for part in parts]

    batch = pack(parts, chosen)

    assert batch.records == flat.records
    expected = [row for client in rows for row in reversed(client)]
    assert batch.lengths.tolist() == [len(row) for row in expected]
    assert torch.equal(batch.values, torch.cat(expected))
    assert [stop - start for start, stop in batch.row_spans] == [sum(c) for c in lengths]


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), heads=st.integers(1, 4))
def test_every_token_has_one_place_in_attention_and_finds_back(
    lengths: list[int], heads: int
) -> None:
    plan = Plan.of(torch.tensor(lengths), heads, torch.zeros(1))
    pieces = torch.arange(sum(lengths) * heads)

    assert torch.equal(plan.into[plan.back], pieces)
    three = torch.arange(sum(lengths) * 3 * heads)
    assert torch.equal(plan.into3[plan.back3], three)
    real = len(plan.into) if plan.real is None else int(plan.real.sum())
    assert real == len(pieces)
    for bucket in plan.buckets:
        assert bucket.at.stop - bucket.at.start == math.prod(bucket.shape)


def test_what_cannot_be_packed_is_said(make_config: Any, encoders: dict[str, Path]) -> None:
    def reason(base: str, lora: Lora = QUERY_VALUE, **more: Any) -> str | None:
        return why_not(load_classifier(make_config(base, lora=lora, max_tokens=16, **more)))

    mpnet = Lora(rank=2, layers="last:1", targets=("q", "v"))
    assert "bias by distance" in str(reason(str(encoders["mpnet"]), mpnet))
    lora = Lora(rank=2, layers="last:1", targets=("q_lin",))
    assert "distilbert cannot be called" in str(reason(str(encoders["distilbert"]), lora))
    embedding = Lora(rank=2, targets=("query",), modules_to_save=("embeddings",))
    assert "embeddings" in str(reason(str(encoders["bert"]), embedding))
    assert "head alone" in str(reason(str(encoders["bert"]), Lora(rank=0)))
    table = load_classifier(make_config("logistic", "tabular-classification"))
    assert "one shape" in str(why_not(table))
    merged = load_classifier(make_config(str(encoders["bert"]), lora=QUERY_VALUE, max_tokens=16))
    merge(merged)
    assert "merged" in str(why_not(merged))
    other = load_classifier(make_config(str(encoders["bert"]), lora=QUERY_VALUE, max_tokens=16))
    other.base.get_submodule("encoder.layer.2.output").dense = torch.nn.Identity()
    assert "plain linear" in str(why_not(other))
