from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from anabranch.client.local import Learned, Local
from anabranch.client.refusals import FAILED, Tells
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import merge, trainable_parameters, unmerge
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import (
    AnabranchError,
    DataError,
    IncompatibleAdapter,
    ModelError,
    RunError,
)
from anabranch.protocols.part import Part
from anabranch.protocols.tables import Lora, Training
from anabranch.simulations.cohort.engine import DIGEST_EVERY, CohortEngine
from anabranch.simulations.cohort.grouped import CONVOLUTIONS
from tests.client.tuning.conftest import encoders, make_config  # noqa: F401 - fixtures
from tests.simulations.cohort.cohort_rig import (
    TOTAL_STEPS,
    Client,
    cohort,
    conditioned,
    one_by_one,
    require_equal,
    scattered,
    start,
    tables_and_images,
    texts,
)


def trainings(optimizer: str, rates: list[float]) -> st.SearchStrategy[Training]:
    return st.builds(
        Training,
        optimizer=st.just(optimizer),
        learning_rate=st.sampled_from(rates),
        head_learning_rate=st.none() | st.sampled_from(rates),
        weight_decay=st.sampled_from([0.0, 0.1]),
        momentum=st.sampled_from([0.0, 0.5, 0.9]),
        batch_size=st.integers(1, 5),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        warmup=st.sampled_from([0.0, 0.3]),
        max_grad_norm=st.sampled_from([None, 0.3, 1.0]),
        class_weights=st.sampled_from(["none", "balanced", (0.5, 1.0, 3.0)]),
    )


# AdamW moves a value by its learning rate even where the gradient is hardly more than rounding.
TRAININGS = trainings("sgd", [0.003, 0.01, 0.03]) | trainings("adamw", [1e-4, 5e-4])
RANKS = st.sampled_from([None, (0,), (0, 1)])
PARTS = st.just(WHOLE) | st.builds(
    Part, factors=st.sampled_from(["A", "B", "both"]), ranks=RANKS, dense=st.booleans()
)
CLIENTS = st.lists(
    st.builds(
        Client,
        seed=st.integers(0, 99),
        records=st.integers(1, 9),
        steps=st.integers(1, 7),
        training=TRAININGS,
        mu=st.sampled_from([0.0, 0.0, 0.3]),
        part=PARTS,
        kept=st.none() | st.just(Part(factors="none")),
        first_step=st.integers(0, TOTAL_STEPS - 7),
    ),
    min_size=1,
    max_size=5,
)
BATCHED = ["logistic", "mlp", "mlp-lora", "vit", "vit-all", *["bert", "bert-full"], "distilbert"]
KEPT_HEAD = Part(factors="none")


@pytest.fixture(scope="module")
def classifiers(make_config: Any, encoders: dict[str, Path]) -> dict[str, Classifier]:  # noqa: F811
    return tables_and_images(make_config) | texts(make_config, encoders)


@pytest.fixture(autouse=True)
def untouched(classifiers: dict[str, Classifier]) -> Iterator[None]:
    """Fail if a test leaves anything behind on a classifier."""
    yield
    for name, classifier in classifiers.items():
        for module in classifier.modules():
            assert "forward" not in vars(module), name
        for parameter in trainable_parameters(classifier).values():
            assert parameter.requires_grad


@pytest.mark.parametrize("name", BATCHED)
@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(clients=CLIENTS, dense=st.booleans())
def test_a_cohort_learns_what_its_clients_learn_alone(
    classifiers: dict[str, Classifier], name: str, clients: list[Client], dense: bool
) -> None:
    classifier = classifiers[name]
    text = "bert" in name
    if classifier.spec.rank == 0:
        clients = [dataclasses.replace(client, part=WHOLE) for client in clients]
    form = ("ragged" if text else "dense") if dense else "list"
    locals = cohort(classifier, clients, form)
    engine = CohortEngine()
    got, expected = engine.train(locals), one_by_one(locals)
    try:
        require_equal(got, expected)
    except AssertionError:
        require_equal(got, expected, conditioned(locals, expected))
    assert not engine.reasons


def test_clients_of_many_micro_cohorts_learn_what_they_learn_alone(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.simulations.cohort.planner.ROWS", 24)
    settings = Training(batch_size=4, optimizer="sgd", learning_rate=0.05)
    clients = [
        Client(seed=i, records=1 + i % 7, steps=1 + i % 5, training=settings) for i in range(23)
    ]
    locals = cohort(classifiers["mlp"], clients, "dense") + cohort(classifiers["vit"], clients)
    require_equal(CohortEngine().train(locals), one_by_one(locals))


def test_more_steps_than_a_block_holds(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.simulations.cohort.batches.BLOCK", 4)
    clients = [Client(seed=i, records=4 + i, steps=3 + 5 * i) for i in range(3)]
    for name in ("mlp", "bert"):
        locals = cohort(classifiers[name], clients)
        require_equal(CohortEngine().train(locals), one_by_one(locals))


def test_one_step_of_sgd_by_hand(make_config: Any) -> None:  # noqa: F811
    # Two clients of one record each, logistic regression, z = W x + b with W = b = 0.
    # Three equal logits: p = 1/3 each, dz = p - y, dW = dz xᵀ, db = dz.
    config = make_config("logistic", "tabular-classification", lora=Lora(rank=0))
    classifier = load_classifier(config)
    zero = start(classifier, 0).only(Part())
    zero = dataclasses.replace(zero, arrays={n: 0 * a for n, a in zero.arrays.items()})
    settings = Training(optimizer="sgd", momentum=0.0, batch_size=1, max_grad_norm=None)
    clients = [
        Client(
            seed=0, records=1, steps=1, training=msgspec.structs.replace(settings, learning_rate=r)
        )
        for r in (0.3, 0.6)
    ]
    locals = [dataclasses.replace(local, start=zero) for local in cohort(classifier, clients)]
    learned = CohortEngine().train(locals)
    for local, rate, one in zip(locals, (0.3, 0.6), learned, strict=True):
        x = local.examples.features[0].numpy()
        dz = np.full(3, 1 / 3) - np.eye(3)[int(local.examples.labels[0])]
        assert isinstance(one, Learned)
        np.testing.assert_allclose(one.after.arrays["head.bias"], -rate * dz, atol=1e-6)
        np.testing.assert_allclose(
            one.after.arrays["head.weight"], -rate * np.outer(dz, x), atol=1e-6
        )
        assert one.loss == pytest.approx(np.log(3), abs=1e-6)


def test_what_is_not_in_the_part_is_the_same_bit_for_bit(
    classifiers: dict[str, Classifier],
) -> None:
    settings = Training(optimizer="adamw", weight_decay=0.1, batch_size=3)
    clients = [
        Client(seed=i, training=settings, part=Part(factors="B", ranks=ranks, dense=dense))
        for i, (ranks, dense) in enumerate([((0,), False), ((1, 2), True), (None, False)])
    ]
    for local, learned in zip(
        locals := cohort(classifiers["mlp-lora"], clients),
        CohortEngine().train(locals),
        strict=True,
    ):
        assert isinstance(learned, Learned)
        delta = learned.after.minus(local.start, num_examples=1)
        outside = delta.arrays.keys() - set(local.part.names(delta.spec))
        assert outside
        for name in outside:
            np.testing.assert_array_equal(delta.arrays[name], 0)
        for name, mask in local.part.mask(delta.spec).items():
            np.testing.assert_array_equal(delta.arrays[name][~mask], 0)
            assert (delta.arrays[name][mask] != 0).any()


def test_a_diverging_client_is_its_own_error(classifiers: dict[str, Classifier]) -> None:
    wild = Training(optimizer="sgd", learning_rate=1e30, max_grad_norm=None, batch_size=3)
    clients = [Client(seed=i, steps=5) for i in range(4)]
    clients[2] = dataclasses.replace(clients[2], training=wild)
    for name in ("mlp", "vit-all", "bert"):
        locals = cohort(classifiers[name], clients)
        learned, alone = CohortEngine().train(locals), one_by_one(locals)
        error = learned[2]
        assert isinstance(error, RunError)
        assert isinstance(alone[2], RunError)
        assert "of 5: lower training.learning_rate (now 1e+30) or set max_grad_norm" in str(error)
        assert str(error).partition("at step")[2] == str(alone[2]).partition("at step")[2]
        keep = [0, 1, 3]
        require_equal([learned[i] for i in keep], [alone[i] for i in keep])


def test_what_leaves_of_a_diverging_client_is_up_to_its_run(
    classifiers: dict[str, Classifier],
) -> None:
    wild = Training(optimizer="sgd", learning_rate=1e30, max_grad_norm=None, batch_size=3)
    clients = [*(Client(seed=i, steps=5, training=wild) for i in range(3)), Client(seed=3)]
    tells: list[Tells] = ["nothing", "sentence", "all", "all"]
    for name in ("mlp", "vit-all", "bert"):
        alike = zip(cohort(classifiers[name], clients), tells, strict=True)
        locals = [dataclasses.replace(one, tells=telling) for one, telling in alike]
        for zeros, sentence, told, fine in (CohortEngine().train(locals), one_by_one(locals)):
            assert isinstance(zeros, Learned)
            assert (zeros.after, zeros.steps, zeros.loss) == (locals[0].start, 5, None)
            assert type(sentence) is RunError
            assert str(sentence) == FAILED
            assert "of 5: lower training.learning_rate" in str(told)
            assert isinstance(fine, Learned)


def test_a_diverging_client_changes_nobody_whose_texts_are_packed_with_its_own(
    classifiers: dict[str, Classifier],
) -> None:
    """Its values come first: padding, and products with 0, must not take them up."""
    wild = Training(optimizer="sgd", learning_rate=1e30, max_grad_norm=None, batch_size=3)
    clients = [Client(seed=0, steps=7, training=wild)]
    clients += [Client(seed=i, steps=7 - i) for i in range(1, 5)]
    for name in ("bert", "bert-full"):
        locals = cohort(classifiers[name], clients, "ragged")
        learned, alone = CohortEngine().train(locals), one_by_one(locals)
        assert type(learned[0]) is type(alone[0])
        assert isinstance(learned[0], AnabranchError)
        require_equal(learned[1:], alone[1:])


def test_values_that_are_not_finite_after_the_last_step_are_refused(
    classifiers: dict[str, Classifier],
) -> None:
    wild = Training(optimizer="sgd", learning_rate=3e38, max_grad_norm=None, batch_size=3)
    locals = cohort(
        classifiers["mlp"], [Client(seed=0, steps=1), Client(seed=1, steps=1, training=wild)]
    )
    for feature in locals[1].examples.features:
        feature.mul_(1e4)
    fine, refused = CohortEngine().train(locals)
    assert isinstance(fine, Learned)
    assert isinstance(refused, IncompatibleAdapter)
    assert "NaN or infinite" in str(refused)


def test_no_steps_learn_nothing(classifiers: dict[str, Classifier]) -> None:
    locals = cohort(classifiers["mlp"], [Client(seed=0, steps=0), Client(seed=1, steps=2)])
    idle, busy = CohortEngine().train(locals)
    assert isinstance(idle, Learned)
    assert (idle.steps, idle.loss) == (0, None)
    assert idle.after is locals[0].start
    require_equal([idle, busy], one_by_one(locals), tolerance=1e-5)
    assert CohortEngine().train([]) == []


def test_errors_are_their_clients_alone(classifiers: dict[str, Classifier]) -> None:
    foreign = start(classifiers["logistic"], 0)
    base = cohort(classifiers["mlp-lora"], [Client(seed=i) for i in range(4)])
    locals = [
        dataclasses.replace(base[0], part=Part(ranks=(5,))),
        base[1],
        dataclasses.replace(base[2], start=foreign),
        dataclasses.replace(base[3], examples=base[3].examples.take([]), steps=1),
    ]
    rank, fine, spec, empty = CohortEngine().train(locals)
    assert isinstance(rank, IncompatibleAdapter)
    assert "ranks: expected different indices from 0 to 2" in str(rank)
    assert isinstance(spec, IncompatibleAdapter)
    assert isinstance(empty, DataError)
    assert "client-3: 1 steps, but no records to train on" in str(empty)
    require_equal([rank, fine, spec, empty], one_by_one(locals))


def test_convolutions_are_trained_one_client_at_a_time(
    classifiers: dict[str, Classifier], caplog: pytest.LogCaptureFixture
) -> None:
    locals = cohort(classifiers["cnn"], [Client(seed=i, steps=2) for i in range(3)], "dense")
    engine = CohortEngine()
    with caplog.at_level(logging.WARNING):
        learned = engine.train(locals)
    require_equal(learned, one_by_one(locals), tolerance=0)
    assert engine.reasons == {CONVOLUTIONS: 3}
    assert caplog.text.count(CONVOLUTIONS) == 1


def test_trained_embeddings_are_trained_one_client_at_a_time(
    make_config: Any,  # noqa: F811
) -> None:
    lora = Lora(rank=0, modules_to_save=("position",))
    model = {"image_size": 8, "channels": 1, "patch": 4, "width": 8, "depth": 1, "heads": 2}
    config = make_config("vit", "image-classification", lora=lora, **model)
    locals = cohort(scattered(load_classifier(config)), [Client(seed=0, steps=1)])
    engine = CohortEngine()
    require_equal(engine.train(locals), one_by_one(locals), tolerance=0)
    assert engine.reasons == {"cohorts do not know the layers of position.weight": 1}


def test_encoders_that_padding_may_change_are_trained_one_at_a_time(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anabranch.simulations.cohort.engine.PADDED_ALIKE", frozenset())
    engine = CohortEngine()
    engine.train(cohort(classifiers["distilbert"], [Client(seed=0, steps=1)]))
    (reason,) = engine.reasons
    assert reason == "padding may change what a text encoder of type 'distilbert' says of a record"


def test_a_module_that_mixes_records_is_trained_alone(make_config: Any) -> None:  # noqa: F811
    config = make_config("mlp", "tabular-classification", hidden=(5,), lora=Lora(rank=0))
    classifier = load_classifier(config)
    classifier.base.mixer = nn.BatchNorm1d(5, affine=False, track_running_stats=False)
    engine = CohortEngine()
    engine.train(cohort(classifier, [Client(seed=0, steps=1)]))
    assert engine.reasons == {"base.mixer is a BatchNorm1d: it mixes the records of a batch": 1}


def test_a_merged_classifier_is_refused(classifiers: dict[str, Classifier]) -> None:
    classifier = classifiers["mlp-lora"]
    merge(classifier)
    try:
        (error,) = CohortEngine().train(cohort(classifier, [Client(seed=0)]))
    finally:
        unmerge(classifier)
    assert isinstance(error, ModelError)
    assert "unmerge it first" in str(error)


def test_a_changed_base_is_an_error_of_all_its_clients(make_config: Any) -> None:  # noqa: F811
    lora = Lora(rank=2, targets=("hidden.*",))
    config = make_config("mlp", "tabular-classification", hidden=(5,), lora=lora)
    classifier = load_classifier(config)
    with torch.no_grad():
        classifier.get_parameter("base.hidden.0.base.weight").add_(1.0)
    for error in CohortEngine().train(cohort(classifier, [Client(seed=0), Client(seed=1)])):
        assert isinstance(error, ModelError)
        assert "the frozen base changed" in str(error)


@pytest.mark.parametrize("counted", [True, False])
def test_a_write_to_the_base_is_found_between_digests(
    make_config: Any,  # noqa: F811
    counted: bool,
) -> None:
    """One that torch counts at once, another at the latest when the digest is due."""
    lora = Lora(rank=2, targets=("hidden.*",))
    config = make_config("mlp", "tabular-classification", hidden=(5,), lora=lora)
    classifier, engine = load_classifier(config), CohortEngine()
    locals = cohort(classifier, [Client(seed=0, steps=1)])
    assert isinstance(engine.train(locals)[0], Learned)
    weight = classifier.get_parameter("base.hidden.0.base.weight")
    with torch.no_grad():
        (weight if counted else weight.data).add_(1.0)

    found = [engine.train(locals)[0] for _ in range(1 if counted else DIGEST_EVERY)]

    assert isinstance(found[-1], ModelError)


def test_a_layer_that_is_used_in_an_unknown_way_is_trained_alone(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = classifiers["mlp-lora"]
    locals = cohort(classifier, [Client(seed=0), Client(seed=1)])
    run = type(classifier).run

    def once_more(self: Classifier, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.base.get_submodule("hidden.0")(h[:1])
        return run(self, h, *rest)

    monkeypatch.setattr(type(classifier), "run", once_more)
    engine = CohortEngine()
    require_equal(engine.train(locals), one_by_one(locals), tolerance=0)
    ((reason, count),) = engine.reasons.items()
    assert count == 2
    assert "hidden.0.lora_A.weight was called on (1, " in reason


def test_a_layer_without_part_in_the_loss_is_trained_alone(
    classifiers: dict[str, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = classifiers["mlp-lora"]
    locals = cohort(classifier, [Client(seed=0), Client(seed=1)])

    def skip(self: Classifier, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.zeros(len(h), self.head.in_features)

    monkeypatch.setattr(type(classifier), "run", skip)
    engine = CohortEngine()
    require_equal(engine.train(locals), one_by_one(locals), tolerance=0)
    assert engine.reasons == {"hidden.0.lora_A.weight took no part in the loss": 2}


def test_the_classifier_keeps_its_own_values_and_has_no_gradients(
    classifiers: dict[str, Classifier],
) -> None:
    classifier = classifiers["vit-all"]
    before = {n: p.detach().clone() for n, p in trainable_parameters(classifier).items()}
    classifier.zero_grad(set_to_none=True)
    CohortEngine().train(cohort(classifier, [Client(seed=0), Client(seed=1)]))
    for name, parameter in trainable_parameters(classifier).items():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_results_do_not_depend_on_who_else_is_in_the_cohort(
    classifiers: dict[str, Classifier],
) -> None:
    clients = [Client(seed=i, records=3 + i, steps=2 + i) for i in range(5)]
    for name in ("mlp", "vit", "bert"):
        locals = cohort(classifiers[name], clients)
        together = CohortEngine().train(locals)
        shuffled: list[Local] = [locals[i] for i in (4, 1, 3)]
        require_equal(CohortEngine().train(shuffled), [together[i] for i in (4, 1, 3)])


def test_a_kept_head_starts_where_each_client_left_it(classifiers: dict[str, Classifier]) -> None:
    clients = [Client(seed=i, part=Part(dense=False), kept=KEPT_HEAD) for i in range(2)]
    locals = cohort(classifiers["vit"], clients)
    require_equal(CohortEngine().train(locals), one_by_one(locals))
    first, second = (local.start.arrays["head.weight"] for local in locals)
    assert not np.array_equal(first, second)
