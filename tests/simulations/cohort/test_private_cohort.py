"""Private training of a cohort: each client's numbers are those of that client alone."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from scipy import stats
from torch import Tensor
from torch.nn import functional

from anabranch.client.local import Learned, Local
from anabranch.client.privacy import DpPlan, sampling_rate
from anabranch.client.private_round import PrivateRound
from anabranch.client.tuning.active import only
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Dense, Examples, collate
from anabranch.client.tuning.lora import load_adapter, read_adapter, trainable_parameters
from anabranch.client.tuning.private import NOISE_ALONE, PrivateFit
from anabranch.client.tuning.randomness import Randomness
from anabranch.client.tuning.training import Schedule
from anabranch.protocols.adapter import WHOLE, Adapter
from anabranch.protocols.errors import AnabranchError, IncompatibleAdapter, PrivacyError
from anabranch.protocols.part import Part
from anabranch.protocols.spec import LORA_B
from anabranch.protocols.tables import Clipping, Engine, Training
from anabranch.simulations.cohort import private, private_member
from anabranch.simulations.cohort.engine import PRIVATE_FLOAT32, CohortEngine
from anabranch.simulations.cohort.grouped_private import grouped_gradients
from anabranch.simulations.cohort.private import can_batch, train_private_cohort
from anabranch.simulations.cohort.private_member import Member
from anabranch.simulations.cohort.private_records import Index, Records, Values, chunk_limit
from anabranch.simulations.population.books import SimulatedBooks
from tests.client.tuning.private_rig import (
    CLIPPINGS,
    Sequences,
    examples,
    gradient_sigma,
    make,
    plan,
    traces,
)
from tests.simulations.cohort import cohort_rig
from tests.simulations.cohort.cohort_rig import one_by_one, require_equal

PARTS = [Part(), Part(factors="B"), Part(factors="A", dense=False), Part(ranks=(1,))]
SGD = Training(optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=4, local_steps=1)
ADAMW = Training(learning_rate=0.02, weight_decay=0.1, batch_size=3, schedule="cosine", warmup=0.3)
MOMENTUM = Training(optimizer="sgd", learning_rate=0.05, batch_size=5, head_learning_rate=0.2)
WEIGHTED = Training(learning_rate=0.01, batch_size=4, class_weights=(0.3, 1.0, 4.0))
TRAININGS = [ADAMW, MOMENTUM, WEIGHTED]


@pytest.fixture
def classifier() -> Sequences:
    return honest()


def honest() -> Sequences:
    """Return the rig's classifier, with the true digest of its base."""
    made = make()
    made.base_digest = made.compute_base_digest()
    made.spec = msgspec.structs.replace(made.spec, base=made.base_digest)
    return made


def key(text: str) -> Randomness:
    return Randomness(hashlib.sha256(text.encode()).digest())


def client(
    classifier: Classifier,
    number: int = 0,
    *,
    records: int = 9,
    training: Training = SGD,
    steps: int = 1,
    data: Examples | None = None,
    start: Adapter | None = None,
    part: Part = WHOLE,
    kept: Part | None = None,
    mu: float = 0.0,
    engine: Engine = "fast",
    first: int = 0,
    norm: float | None = None,
    **planned: Any,
) -> Local:
    """Return a client; its randomness begins anew with every call."""
    data = examples(records, seed=number) if data is None else data
    rate = sampling_rate(training.batch_size, len(data))
    of = plan(**{"noise_multiplier": 0.8, "sample_rate": rate, "steps": 20} | planned)
    return Local(
        name=f"client-{number}",
        classifier=classifier,
        start=read_adapter(classifier) if start is None else start,
        examples=data,
        training=training,
        steps=steps,
        schedule=Schedule(first_step=first, total_steps=of.steps),
        seed=number,
        proximal_mu=mu,
        part=part,
        kept=kept,
        private=PrivateRound(
            plan=of,
            engine=engine,
            clipping_norm=norm,
            randomness=key(str(number)),
            entry=1,
            rows=(),
            run="run",
            ledger=SimulatedBooks().of(f"client-{number}"),
        ),
    )


def both(
    make_all: Callable[[], Sequence[Local]],
) -> tuple[list[Learned | AnabranchError], list[Learned | AnabranchError]]:
    """Return what a cohort makes of clients, and what each makes alone."""
    starts = [local.start for local in make_all()]
    again = [dataclasses.replace(x, start=s) for x, s in zip(make_all(), starts, strict=True)]
    together = train_private_cohort(again)
    again = [dataclasses.replace(x, start=s) for x, s in zip(make_all(), starts, strict=True)]
    return together, one_by_one(again)


def learned(outcome: Learned | AnabranchError) -> Learned:
    assert isinstance(outcome, Learned), outcome
    return outcome


def flat(adapter: Adapter) -> Tensor:
    """Return all values in the order of names."""
    return torch.cat([torch.tensor(adapter.arrays[n]).flatten() for n in sorted(adapter.arrays)])


def change(local: Local, outcome: Learned | AnabranchError) -> Tensor:
    return flat(learned(outcome).after) - flat(local.start)


def require_same(make_all: Callable[[], Sequence[Local]], tolerance: float = 1e-5) -> None:
    together, alone = both(make_all)
    require_equal(together, alone, tolerance)
    for ours, theirs in zip(together, alone, strict=True):
        if isinstance(theirs, Learned) and isinstance(ours, Learned):
            assert isinstance(ours.private, PrivateFit)
            assert isinstance(theirs.private, PrivateFit)
            assert ours.private.spend == theirs.private.spend
            assert ours.private.engine == theirs.private.engine
            assert ours.private.clipping_norm == pytest.approx(theirs.private.clipping_norm)


# Laws

settings_of_a_client = st.fixed_dictionaries(
    {
        "records": st.integers(1, 30),
        "training": st.sampled_from(TRAININGS),
        "steps": st.integers(1, 4),
        "first": st.integers(0, 16),
        "mu": st.sampled_from([0.0, 0.7]),
        "noise_multiplier": st.sampled_from([0.3, 2.0]),
        "clipping_norm": st.sampled_from([0.05, 0.5, 5.0]),
        "norm": st.sampled_from([None, 0.2]),
        "target_quantile": st.sampled_from([0.3, 0.9]),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    clients=st.lists(settings_of_a_client, min_size=1, max_size=5),
    clipping=st.sampled_from(CLIPPINGS),
    part=st.sampled_from(PARTS),
    kept=st.sampled_from([None, Part(ranks=(0,))]),
)
def test_every_client_learns_what_it_learns_alone(
    clients: list[dict[str, Any]], clipping: Clipping, part: Part, kept: Part | None
) -> None:
    classifier = honest()
    require_same(
        lambda: [
            client(classifier, i, part=part, kept=kept, clipping=clipping, **one)
            for i, one in enumerate(clients)
        ]
    )


@settings(max_examples=10, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PARTS), min_size=2, max_size=5),
    clippings=st.lists(st.sampled_from(CLIPPINGS), min_size=5, max_size=5),
)
def test_clients_of_other_parts_and_clippings_may_come_together(
    parts: list[Part], clippings: list[Clipping]
) -> None:
    classifier = honest()
    require_same(
        lambda: [
            client(classifier, i, part=p, clipping=c, steps=2, training=ADAMW)
            for i, (p, c) in enumerate(zip(parts, clippings, strict=False))
        ]
    )


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    limit=st.integers(1, 9),
    dense=st.booleans(),
    data=st.data(),
)
def test_every_sampled_record_is_in_one_chunk_with_its_own_label(
    sizes: list[int], limit: int, dense: bool, data: st.DataObject
) -> None:
    # A record's feature and label both say which record of which client it is.
    classifier, locals = honest(), []
    for k, size in enumerate(sizes):
        marks = torch.arange(max(size, 1)) + 100 * k
        rows: list[Tensor] = [
            torch.full((3 if dense else 1 + i % 4, 5), float(m)) for i, m in enumerate(marks)
        ]
        features: Sequence[Tensor] = Dense(torch.stack(rows)) if dense else rows
        locals.append(client(classifier, k, data=Examples(features, marks)))
    drawn: dict[int, Index] = {
        k: np.array(sorted(data.draw(st.sets(st.integers(0, size - 1)))) if size else [], np.int64)
        for k, size in enumerate(sizes)
    }
    wanted = sorted(int(100 * k + i) for k, chosen in drawn.items() for i in chosen)

    found: list[int] = []
    for chunk in Records(locals, torch.device("cpu")).chunks(drawn, limit):
        assert 0 < len(chunk) <= limit
        assert (chunk.features[:, 0, 0] == chunk.labels).all()
        assert (chunk.owner == chunk.labels // 100).all()
        inside = [c for c, start, stop in chunk.segments for _ in range(start, stop)]
        assert chunk.owner.tolist() == inside == sorted(inside)
        found += chunk.labels.tolist()

    assert sorted(found) == wanted


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 1 << 26), tokens=st.integers(1, 600))
def test_gradients_of_more_than_64_records_are_in_memory_only_if_they_are_small(
    size: int, tokens: int
) -> None:
    limit = chunk_limit(size, tokens)

    assert limit >= 1
    assert limit <= 64 or limit * size <= 1 << 22


# Models


@pytest.mark.parametrize("name", ["logistic", "mlp", "mlp-lora", "vit", "vit-all"])
@pytest.mark.parametrize("form", ["list", "dense"])
@pytest.mark.parametrize("clipping", ["flat", "per-layer"])
def test_tables_and_images_learn_what_they_learn_alone(
    make_config: Any, name: str, form: str, clipping: Clipping
) -> None:
    require_same(lambda: _wild(_made(make_config, name), form, clipping))


@pytest.mark.parametrize("name", ["bert", "bert-full", "mpnet", "distilbert"])
@pytest.mark.parametrize("form", ["list", "ragged"])
def test_texts_of_unequal_length_learn_what_they_learn_alone(
    make_config: Any, encoders: dict[str, Path], name: str, form: str
) -> None:
    family, lora = cohort_rig.TEXTS[name]
    made = load_classifier(make_config(str(encoders[family]), lora=lora, max_tokens=16))
    require_same(lambda: _wild(cohort_rig.scattered(made), form, "flat"))


def _made(make_config: Any, name: str) -> Classifier:
    kind = "image" if name in cohort_rig.IMAGES else "tabular"
    cases: dict[str, Any] = {**cohort_rig.IMAGES, **cohort_rig.TABLES}
    base, model, lora = cases[name]
    return load_classifier(make_config(base, f"{kind}-classification", lora=lora, **model))


def _wild(classifier: Classifier, form: str, clipping: Clipping) -> list[Local]:
    """Return three unlike clients with their own starts."""
    sizes = [cohort_rig.Client(seed=i, records=n) for i, n in enumerate((3, 11, 7))]
    return [
        client(
            classifier, i, data=one.examples, start=one.start, training=ADAMW, steps=2,
            mu=0.3, clipping=clipping, clipping_norm=0.3,
        )
        for i, one in enumerate(cohort_rig.cohort(classifier, sizes, form))
    ]  # fmt: skip


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_chunks_change_no_result(
    classifier: Sequences, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(private, "chunk_limit", lambda *_: limit)

    require_same(lambda: [client(classifier, i, records=20, training=ADAMW) for i in range(3)])


def test_small_cohorts_change_no_result(
    classifier: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private_member, "ROWS", 20)

    require_same(lambda: [client(classifier, i, training=ADAMW, steps=2) for i in range(6)])


def test_the_engine_trains_private_clients_together(classifier: Sequences) -> None:
    engine = CohortEngine()
    start = read_adapter(classifier)

    outcomes = engine.train([client(classifier, i, start=start) for i in range(3)])

    require_equal(outcomes, one_by_one([client(classifier, i, start=start) for i in range(3)]))
    assert not engine.reasons


def test_private_clients_stay_in_float32_and_it_is_said(
    classifier: Sequences, caplog: pytest.LogCaptureFixture
) -> None:
    engine, start = CohortEngine("bf16"), read_adapter(classifier)

    with caplog.at_level(logging.WARNING):
        outcomes = engine.train([client(classifier, i, start=start) for i in range(3)])

    require_equal(outcomes, one_by_one([client(classifier, i, start=start) for i in range(3)]))
    assert engine.reasons == {PRIVATE_FLOAT32: 3}
    assert caplog.text.count(PRIVATE_FLOAT32) == 1


def test_private_and_other_clients_come_back_in_their_order(classifier: Sequences) -> None:
    start = read_adapter(classifier)

    def mixed() -> list[Local]:
        locals = [client(classifier, i, start=start, steps=2) for i in range(5)]
        return [dataclasses.replace(x, private=None) if i % 2 else x for i, x in enumerate(locals)]

    outcomes = CohortEngine().train(mixed())

    require_equal(outcomes, one_by_one(mixed()))
    kinds = [learned(outcome).private is not None for outcome in outcomes]
    assert kinds == [True, False, True, False, True]


def test_gradients_that_somebody_left_are_not_taken_for_the_cohorts_own(
    classifier: Sequences,
) -> None:
    for parameter in trainable_parameters(classifier).values():
        parameter.grad = torch.ones_like(parameter)

    require_same(lambda: [client(classifier, i, steps=2) for i in range(3)])


# Norms, noise


def test_norms_are_those_of_opacus(classifier: Sequences) -> None:
    starts = []
    for seed in range(3):  # every client has values of its own
        torch.manual_seed(seed)
        arrays = {
            n: (p.detach() + 0.2 * torch.randn_like(p)).numpy()
            for n, p in trainable_parameters(classifier).items()
        }
        starts.append(Adapter(classifier.spec, arrays))
    locals = [client(classifier, k, records=4 + k, start=s) for k, s in enumerate(starts)]
    everyone = {k: np.arange(4 + k) for k in range(3)}
    (chunk,) = Records(locals, torch.device("cpu")).chunks(everyone, 100)
    trained, fixed = Values(classifier.spec.shapes, starts), Values({}, starts)
    with (
        only(classifier, WHOLE),
        grouped_gradients(classifier, trained, fixed, frozenset()) as store,
    ):
        store.refresh()
        norms = store.gradients(chunk).norms()
    ours = torch.stack([norms[name] for name in sorted(norms)]).norm(dim=0)

    assert len(ours) == 15
    for k, start, stop in chunk.segments:
        load_adapter(classifier, starts[k])
        torch.testing.assert_close(
            ours[start:stop], _opacus_norms(classifier, locals[k].examples), rtol=1e-5, atol=0
        )


def _opacus_norms(classifier: Classifier, data: Examples) -> Tensor:
    model = GradSampleModule(classifier, loss_reduction="sum")
    model.train()
    try:
        features, mask = collate(data.features)
        loss = functional.cross_entropy(
            model(features.requires_grad_(), mask), data.labels, reduction="sum"
        )
        loss.backward()
        samples = [vars(p)["grad_sample"].flatten(1) for p in model.parameters() if p.requires_grad]
        norms: Tensor = torch.cat(samples, dim=1).norm(dim=1)
        return norms
    finally:
        model.to_standard_module()
        classifier.eval()
        for p in classifier.parameters():
            p.grad = None
            vars(p).pop("grad_sample", None)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_noise_has_the_planned_scale_for_each_client(
    classifier: Sequences, clipping: Clipping
) -> None:
    sigmas, norm, data = (0.6, 2.5, 7.0), 0.4, examples(11)
    training = msgspec.structs.replace(SGD, batch_size=11)
    start = read_adapter(classifier)
    noises: list[list[Tensor]] = [[], [], []]
    for seed in range(16):
        options: dict[str, Any] = {
            "data": data, "start": start, "training": training, "clipping": clipping,
            "clipping_norm": norm,
        }  # fmt: skip
        noisy = [
            client(classifier, 10 * seed + k, noise_multiplier=sigma, **options)
            for k, sigma in enumerate(sigmas)
        ]
        (silent,) = train_private_cohort([client(classifier, noise_multiplier=1e-30, **options)])
        signal = change(noisy[0], silent)
        for k, (local, outcome) in enumerate(zip(noisy, train_private_cohort(noisy), strict=True)):
            assert local.private is not None
            scale = gradient_sigma(local.private.plan, 11) * norm / 11
            noises[k].append((signal - change(local, outcome)) / scale)

    for of in noises:
        noise = torch.cat(of).numpy()
        assert stats.kstest(noise, "norm").pvalue > 1e-3
        for wrong in (1.5, 1 / 1.5):
            assert stats.kstest(noise * wrong, "norm").pvalue < 1e-6


def test_no_client_shares_noise_with_another_or_with_itself_a_round_later(
    classifier: Sequences,
) -> None:
    # As a run has it: no seed, keys from the operating system.
    def fresh() -> Local:
        one = client(classifier, data=data, start=start, noise_multiplier=50.0, training=training)
        assert one.private is not None
        return dataclasses.replace(one, private=dataclasses.replace(one.private, randomness=None))

    data, start = examples(11), read_adapter(classifier)
    training = msgspec.structs.replace(SGD, batch_size=11)
    locals = [fresh() for _ in range(4)]
    rounds = [train_private_cohort(locals), train_private_cohort([fresh() for _ in range(4)])]
    changes = [change(locals[0], outcome) for outcomes in rounds for outcome in outcomes]

    correlation = torch.corrcoef(torch.stack(changes)) - torch.eye(8)
    assert len(changes[0]) == 81
    assert float(correlation.abs().max()) < 0.65  # almost 6 standard deviations
    for i, one in enumerate(changes):
        for other in changes[:i]:
            assert int((one == other).sum()) <= 1  # two float32 of fresh noise meet in 4e-5 of runs


def test_an_empty_batch_is_a_step_of_noise_alone(classifier: Sequences) -> None:
    # q = 1/1000: these draw no record, and the model is never called.
    empty = [i for i in range(30) if not key(str(i)).sample(1000, 0.001)][:3]
    training = msgspec.structs.replace(SGD, batch_size=1)
    data, start = examples(1000), read_adapter(classifier)
    locals = [
        client(classifier, i, data=data, start=start, training=training, noise_multiplier=3.0)
        for i in empty
    ]
    classifier.run = lambda *_: pytest.fail("a record was drawn")  # type: ignore[method-assign]

    changes = [change(local, one) for local, one in zip(locals, _all(locals), strict=True)]

    assert len(changes) == 3
    assert stats.kstest(torch.cat(changes).numpy() / (3.0 * 0.5), "norm").pvalue > 0.01


def _all(locals: Sequence[Local]) -> list[Learned]:
    return [learned(outcome) for outcome in train_private_cohort(locals)]


def test_frozen_values_stay_each_clients_own_bit_for_bit(classifier: Sequences) -> None:
    part = Part(factors="B", ranks=(1,))
    rng = np.random.default_rng(0)
    starts = [
        Adapter(
            classifier.spec,
            {n: rng.normal(0, 0.3, s).astype(np.float32) for n, s in classifier.spec.tensors},
        )
        for _ in range(3)
    ]
    locals = [
        client(classifier, i, start=s, part=part, training=ADAMW, steps=3, mu=0.4)
        for i, s in enumerate(starts)
    ]

    for start, one in zip(starts, _all(locals), strict=True):
        outside = part.spread(classifier.spec, part.take(classifier.spec, one.after.arrays))
        before = part.spread(classifier.spec, part.take(classifier.spec, start.arrays))
        for name in classifier.spec.shapes:
            same = one.after.arrays[name] - outside[name] == start.arrays[name] - before[name]
            assert same.all()


# What goes wrong


def test_gradients_that_are_not_finite_count_as_0_and_only_for_their_client(
    classifier: Sequences, caplog: pytest.LogCaptureFixture
) -> None:
    bad = examples(9)
    for feature in bad.features:
        feature.fill_(torch.nan)
    options: dict[str, Any] = {"training": ADAMW, "steps": 2}

    with caplog.at_level(logging.WARNING):
        require_same(
            lambda: [
                client(classifier, 0, **options),
                client(classifier, 1, data=bad, **options),
                client(classifier, 2, **options),
            ]
        )

    assert [r.message for r in caplog.records if r.name == private.__name__] == [
        f"client-1: {NOISE_ALONE}"
    ]


def test_a_refused_client_leaves_the_others_alone(classifier: Sequences) -> None:
    balanced = msgspec.structs.replace(SGD, class_weights="balanced")

    def everyone() -> list[Local]:
        return [
            client(classifier, 0),
            client(classifier, 1, sample_rate=0.123),
            client(classifier, 2, training=balanced),
            client(classifier, 3, norm=float("nan")),
            client(classifier, 4, steps=21),
            client(classifier, 5, part=Part(ranks=(7,))),
            client(classifier, 6),
        ]

    together, _ = both(everyone)
    require_same(everyone)

    assert [type(one) for one in together] == [
        Learned, *(PrivacyError,) * 4, IncompatibleAdapter, Learned,
    ]  # fmt: skip
    wanted = ("samples records at rate", "balanced", "clipping norm above 0", "not within the plan")
    for outcome, message in zip(together[1:5], wanted, strict=True):
        assert message in str(outcome)


def test_a_client_whose_product_stays_of_rank_0_is_refused_by_itself(
    classifier: Sequences,
) -> None:
    start = read_adapter(classifier)
    zero = {n: 0 * a if n.endswith(LORA_B) else a for n, a in start.arrays.items()}

    together, alone = both(
        lambda: [
            client(classifier, 0, part=Part(factors="A"), start=start),
            client(classifier, 1, part=Part(factors="A"), start=Adapter(start.spec, zero)),
        ]
    )

    require_equal(together, alone)
    assert "has rank 0 after training" in str(together[1])


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_a_client_that_drew_less_noise_than_planned_is_refused_by_itself(
    classifier: Sequences, clipping: Clipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = Member.release

    def careless(self: Member, total: Tensor, inside: float) -> None:
        if self.place == 1:
            weaker = dataclasses.replace(self.round.plan, noise_multiplier=0.4)
            self.round = dataclasses.replace(self.round, plan=weaker)
            release(self, total, inside)
            self.round = dataclasses.replace(self.round, plan=planned)
        else:
            release(self, total, inside)

    locals = [client(classifier, i, steps=3, clipping=clipping) for i in range(3)]
    assert locals[1].private is not None
    planned: DpPlan = locals[1].private.plan
    monkeypatch.setattr(Member, "release", careless)

    first, second, third = train_private_cohort(locals)

    assert isinstance(first, Learned)
    assert isinstance(third, Learned)
    assert isinstance(second, PrivacyError)
    assert "the update is discarded" in str(second)


def test_a_step_that_was_not_taken_is_noticed(
    classifier: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Member, "release", lambda *_: None)

    (outcome,) = train_private_cohort([client(classifier, steps=2)])

    assert isinstance(outcome, PrivacyError)
    assert "ran []: the update is discarded" in str(outcome)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(
    classifier: Sequences, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    before, start = traces(classifier), flat(read_adapter(classifier))
    if fails:

        def refuse(*_: object) -> None:
            raise PrivacyError("refused by the test")

        monkeypatch.setattr(Records, "chunks", refuse)

    outcomes = train_private_cohort([client(classifier, i) for i in range(2)])

    assert [isinstance(one, PrivacyError) for one in outcomes] == [fails, fails]
    assert traces(classifier) == before
    assert torch.equal(flat(read_adapter(classifier)), start)


def test_a_base_that_changed_stops_every_client(classifier: Sequences) -> None:
    base: Any = classifier.base
    locals = [client(classifier, i) for i in range(2)]
    with torch.no_grad():
        base.layers[0].base.weight.add_(1)

    for outcome in train_private_cohort(locals):
        assert isinstance(outcome, AnabranchError)
        assert "the frozen base changed" in str(outcome)


# What cannot be batched


def test_reasons_are_given(classifier: Sequences) -> None:
    unknown = _with_own_layer()

    assert can_batch(client(classifier)) is None
    assert "not a private round" in str(can_batch(_public(classifier)))
    assert 'privacy.engine = "opacus"' in str(can_batch(client(classifier, engine="opacus")))
    assert "the layers of head.bias, head.weight" in str(can_batch(client(unknown)))


def test_what_cannot_be_batched_is_trained_alone(classifier: Sequences) -> None:
    require_same(
        lambda: [
            client(classifier, 0, engine="opacus"),
            client(classifier, 1),
            client(classifier, 2, engine="opacus", sample_rate=0.5),
        ]
    )


def _public(classifier: Sequences) -> Local:
    return dataclasses.replace(client(classifier), private=None)


class Own(torch.nn.Linear):
    """A layer that the kernels do not know."""


def _with_own_layer() -> Sequences:
    made = honest()
    own = Own(8, 3)
    made.head = own
    return made
