"""What private training refuses, and that a refusal changes nothing."""

from __future__ import annotations

import pytest
import torch
from opacus.accountants import PRVAccountant
from torch import Tensor, nn

from anabranch.client.privacy import Spend
from anabranch.client.tuning import private
from anabranch.client.tuning.active import Active
from anabranch.client.tuning.lora import adapt
from anabranch.client.tuning.private import require_as_planned, require_trained
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.tables import Engine, Lora, Training
from tests.client.tuning.private_rig import (
    ENGINES,
    INNER,
    LABELS,
    SGD,
    Sequences,
    examples,
    make,
    moved,
    plan,
    run,
    traces,
    values,
)


@pytest.mark.parametrize(
    "ran",
    [
        [],
        [(1.0, 0.5, 9)],
        [(1.0, 0.5, 11)],
        [(1.81, 0.5, 10)],
        [(1.0, 1 / 3, 10)],
        [(1.0, 0.5, 5), (2.0, 0.5, 5)],
    ],
)
def test_what_ran_must_equal_the_plan(ran: list[tuple[float, float, int]]) -> None:
    planned = Spend(noise_multiplier=1.0, sample_rate=0.5, steps=10)
    require_as_planned([(1.0, 0.5, 10)], planned)

    with pytest.raises(PrivacyError, match=r"planned \(σ, q, steps\) = \[\(1\.0, 0\.5, 10\)\]"):
        require_as_planned(ran, planned)


def test_a_fit_that_ran_otherwise_returns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(PRVAccountant):  # type: ignore[misc]
        def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
            super().step(noise_multiplier=1.81 * noise_multiplier, sample_rate=sample_rate)

    monkeypatch.setattr(private, "new_accountant", Other)
    classifier = make()
    before = values(classifier)

    with pytest.raises(PrivacyError, match="the update is discarded"):
        run(classifier, examples(), plan(noise_multiplier=1.0), SGD)

    assert not moved(classifier, before).any()


def test_a_plan_for_other_data_is_refused() -> None:
    with pytest.raises(PrivacyError, match="make the plan for the records it is used on"):
        run(make(), examples(), plan(sample_rate=4 / 12), Training(batch_size=4))


@pytest.mark.parametrize(("steps", "offset"), [(0, 0), (2, 9), (11, 0), (1, -1)])
def test_steps_outside_the_plan_are_refused(steps: int, offset: int) -> None:
    with pytest.raises(PrivacyError, match="not within the plan's 10"):
        run(make(), examples(), plan(steps=10), SGD, steps=steps, step_offset=offset)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clipping_norm_that_bounds_nothing_is_refused(norm: float) -> None:
    with pytest.raises(PrivacyError, match="expected a clipping norm above 0"):
        run(make(), examples(), plan(), SGD, clipping_norm=norm)


def test_class_weights_from_the_labels_are_refused() -> None:
    config = Training(batch_size=11, class_weights="balanced")
    with pytest.raises(PrivacyError, match="computed from the labels"):
        run(make(), examples(), plan(), config)


class FrozenNorm(Sequences):
    def __init__(self) -> None:
        super().__init__(norm=nn.BatchNorm1d(INNER + 1))


class TrainedBuffer(Sequences):
    """A trained module with a buffer, which Opacus refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.head.register_buffer("count", torch.zeros(1))


class Detached(Sequences):
    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return super().forward(h, mask).detach()


class HeadOnly(Sequences):
    """The adapter takes no part in the output: only the head would be trained."""

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        logits: Tensor = self.head(h.mean(1).repeat(1, 2)[:, : INNER + 1])
        return logits


class Flattened(Sequences):
    """The batch axis is merged with another: Opacus would take tokens for records."""

    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        first, second = self.base.layers  # type: ignore[misc]
        tokens = second(first(h.flatten(0, 1))).reshape(*h.shape[:2], -1)
        logits: Tensor = self.head(tokens.mean(1))
        return logits


class Silenced(Sequences):
    def forward(self, h: Tensor, mask: Tensor | None) -> Tensor:
        return 0 * super().forward(h, mask)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FrozenNorm, "norm is a BatchNorm1d: it mixes the records"),
        (TrainedBuffer, "Opacus has no per-record gradients .*buffers"),
        (Detached, "no trainable tensor takes part"),
        (HeadOnly, r"shape \(2, 5\) has per-record gradients of shape None"),
        (Flattened, r"per-record gradients of shape \(77, .* the model moves the batch axis"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_models_that_cannot_be_trained_privately_are_refused(
    kind: type[Sequences], message: str, engine: Engine
) -> None:
    classifier = make(kind)
    before, start = traces(classifier), values(classifier)

    with pytest.raises(PrivacyError, match=message):
        run(classifier, examples(), plan(noise_multiplier=1.0), SGD, engine=engine)

    assert traces(classifier) == before
    assert not moved(classifier, start).any()


def test_a_trained_batchnorm_is_refused() -> None:
    classifier = FrozenNorm()
    adapt(classifier, Lora(rank=2, targets=("layers.*",), modules_to_save=("norm",)), seed=0)

    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        run(classifier, examples(), plan(), SGD)


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    config = Training(
        optimizer="sgd", learning_rate=3e38, class_weights=(1e3,) * LABELS, batch_size=11
    )

    with pytest.raises(PrivacyError, match="is not finite after private training"):
        run(make(), examples(), plan(clipping_norm=1e4), config)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_all_zero_are_published_as_noise_and_the_site_is_told(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = make(Silenced)
    start = values(classifier)

    run(classifier, examples(), plan(noise_multiplier=1.0), SGD, engine=engine)

    assert moved(classifier, start).all()
    assert "every record's gradient was zero" in caplog.text


def test_records_of_which_none_has_a_finite_gradient_are_no_reason_to_refuse(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = examples()
    for feature in data.features:
        feature.fill_(torch.nan)

    run(make(), data, plan(noise_multiplier=1.0), SGD)

    assert "every record's gradient was zero" in caplog.text


def test_an_adapter_that_did_not_move_is_refused() -> None:
    config = Training(optimizer="sgd", learning_rate=1e-30, batch_size=11)

    with pytest.raises(PrivacyError, match="did not change in private training"):
        run(make(), examples(), plan(), config)


def test_a_product_of_rank_zero_is_refused() -> None:
    a, b = "layer.lora_A.weight", "layer.lora_B.weight"
    before = {a: torch.ones(2, 5), b: torch.ones(7, 2)}
    after = {a: torch.eye(2, 5), b: torch.zeros(7, 2)}
    trained = {name: nn.Parameter(value) for name, value in after.items()}

    with pytest.raises(PrivacyError, match="B · A of layer has rank 0"):
        require_trained(Active(trained, before, {}), after)
