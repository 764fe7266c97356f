"""DP-SGD against references that clip one record at a time, with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from opacus.accountants import PRVAccountant
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from anabranch.client.privacy import Clipping, DpPlan, Spend
from anabranch.client.tuning import private
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples, collate
from anabranch.client.tuning.lora import adapt, trainable_parameters
from anabranch.client.tuning.private import fit_private, require_as_planned, require_trained
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import Lora, Training
from anabranch.protocols.errors import PrivacyError

WIDTH, INNER, LABELS = 5, 7, 3
SILENT = 1e-30  # a noise multiplier that adds nothing a float32 can hold
SGD = Training(optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=1000, local_steps=1)
CLIPPINGS: list[Clipping] = ["flat", "automatic"]


class Sequences(Classifier):
    """Two linear layers over tokens, then a masked mean: sequences (T, 5) of any length."""

    blocks = "layers"

    def __init__(self, norm: nn.Module | None = None) -> None:
        base = nn.Module()
        base.layers = nn.ModuleList([nn.Linear(WIDTH, INNER), nn.Linear(INNER, INNER + 1)])
        base.norm = norm or nn.LayerNorm(INNER + 1)
        super().__init__(base, width=INNER + 1, num_labels=LABELS, base_digest="b" * 64)

    @property
    def num_stages(self) -> int:
        return 3

    def stage_of(self, name: str) -> int:
        return int(name.split(".")[1]) if name.startswith("layers") else 2

    def encode(self, inputs: Sequence[str] | NDArray[np.float32]) -> list[Tensor]:
        raise NotImplementedError

    def run(self, h: Tensor, mask: Tensor | None, start: int, stop: int) -> Tensor:
        base: Any = self.base
        for stage in range(start, stop):
            if stage < 2:
                h = torch.tanh(base.layers[stage](h))
            else:
                assert mask is not None
                kept = mask.unsqueeze(-1).to(h.dtype)
                h = base.norm((h * kept).sum(1) / kept.sum(1))
        return h


def make(kind: type[Sequences] = Sequences, **options: Any) -> Sequences:
    torch.manual_seed(0)
    classifier = kind(**options)
    adapt(classifier, Lora(rank=2, alpha=4, targets=("layers.*",)), seed=1)
    with torch.no_grad():  # away from zero, so that every factor has a gradient
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return classifier


def examples(count: int = 11, seed: int = 2, scale: float = 1.0) -> Examples:
    torch.manual_seed(seed)
    lengths = [1 + (3 * i) % 7 for i in range(count)]
    features = [scale * torch.randn(length, WIDTH) for length in lengths]
    return Examples(features, torch.arange(count) % LABELS)


def plan(**changes: Any) -> DpPlan:
    values: dict[str, Any] = {
        "noise_multiplier": SILENT,
        "clipping": "flat",
        "clipping_norm": 0.5,
        "sample_rate": 1.0,
        "steps": 1,
        "delta": 1e-5,
        "epsilon": 1.0,
    }
    return DpPlan(**values | changes)


def values(classifier: Classifier) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainable_parameters(classifier).items()}


def moved(classifier: Classifier, before: dict[str, Tensor]) -> Tensor:
    return torch.cat([(p - before[n]).flatten() for n, p in values(classifier).items()])


def clipped_sum(
    classifier: Classifier,
    data: Examples,
    clipping: Clipping,
    norm: float,
    weights: Sequence[float] = (1.0,) * LABELS,
) -> Tensor:
    """Return Σ ḡ_i over all trainable values in the order of names: one record at a time."""
    parameters = list(trainable_parameters(classifier).values())
    total = torch.zeros(sum(p.numel() for p in parameters))
    for feature, label in zip(data.features, data.labels, strict=True):
        batch, mask = collate([feature])
        loss = functional.cross_entropy(classifier(batch, mask), label[None])
        gradients = torch.autograd.grad(weights[int(label)] * loss, parameters)
        g = torch.cat([gradient.flatten() for gradient in gradients])
        size = float(g.norm())
        total += g * (min(1.0, norm / size) if clipping == "flat" else norm / (size + 0.01))
    return total


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(classifier: Classifier, data: Examples, of: DpPlan, config: Training, **more: Any) -> Spend:
    options: dict[str, Any] = {"steps": 1, "step_offset": 0, "generator": seeded()} | more
    return fit_private(classifier, data, of, config, **options).spend


# Laws


@settings(max_examples=20, deadline=None)
@given(
    clipping=st.sampled_from(CLIPPINGS),
    norm=st.floats(0.01, 10),
    scale=st.floats(0.1, 1e4),
    weight=st.floats(0.1, 1e6),
)
def test_no_record_contributes_more_than_the_clipping_norm(
    clipping: Clipping, norm: float, scale: float, weight: float
) -> None:
    classifier = make()
    before = values(classifier)
    config = Training(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=1.0,
        class_weights=(weight,) * LABELS,
        batch_size=1,
    )

    run(
        classifier,
        examples(1, scale=scale),
        plan(noise_multiplier=1e-6, clipping=clipping, clipping_norm=norm),
        config,
    )

    assert float(moved(classifier, before).norm()) <= norm * (1 + 1e-3)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("norm", [0.05, 1.2, 50.0])  # all are clipped, some, none
@pytest.mark.parametrize("physical_batch", [1, 4, 64])
def test_clipped_sums_are_those_of_records_taken_one_at_a_time(
    clipping: Clipping, norm: float, physical_batch: int
) -> None:
    classifier, data = make(), examples()
    before, expected = values(classifier), clipped_sum(make(), data, clipping, norm) / len(data)

    run(
        classifier,
        data,
        plan(clipping=clipping, clipping_norm=norm),
        SGD,
        physical_batch=physical_batch,
    )

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_class_weights_are_inside_the_clipping(clipping: Clipping) -> None:
    classifier, data, weights = make(), examples(), (0.2, 1.0, 30.0)
    config = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=11, class_weights=weights
    )
    expected = clipped_sum(make(), data, clipping, 0.5, weights) / len(data)
    before = values(classifier)

    run(classifier, data, plan(clipping=clipping), config)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("base", "kind", "model"),
    [
        ("mlp", "tabular-classification", {"hidden": (6, 5)}),
        ("vit", "image-classification", {"width": 24, "depth": 2, "heads": 3}),
        ("bert", "text-classification", {"max_tokens": 16}),
        ("distilbert", "text-classification", {"max_tokens": 16}),
    ],
)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_real_bases_have_the_clipped_sums_of_records_taken_one_at_a_time(
    make_config: Callable[..., Any],
    encoders: dict[str, Any],
    texts: list[str],
    base: str,
    kind: str,
    model: dict[str, Any],
    clipping: Clipping,
) -> None:
    config = make_config(str(encoders.get(base, base)), kind, lora=_lora(base), **model)
    classifier = load_classifier(config)
    data = _encoded(classifier, kind, texts)
    with torch.no_grad():
        for parameter in trainable_parameters(classifier).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded()))
    before = values(classifier)
    expected = clipped_sum(classifier, data, clipping, 0.5) / len(data)
    digest = classifier.compute_base_digest()

    run(classifier, data, plan(clipping=clipping), SGD, physical_batch=4)

    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-3, atol=1e-5)
    assert classifier.compute_base_digest() == digest


# The noise


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_noise_has_standard_deviation_sigma_times_the_clipping_norm(clipping: Clipping) -> None:
    data, sigma, norm = examples(), 2.5, 0.4
    of = plan(noise_multiplier=sigma, clipping=clipping, clipping_norm=norm)
    signal = clipped_sum(make(), data, clipping, norm)
    noises = []
    for seed in range(20):
        classifier = make()
        before = values(classifier)
        run(classifier, data, of, SGD, physical_batch=2, generator=seeded(seed))
        noises.append(-moved(classifier, before) * len(data) - signal)

    noise = torch.cat(noises).numpy() / (sigma * norm)
    assert stats.kstest(noise, "norm").pvalue > 0.01
    for wrong in (1.5, 1 / 1.5):
        assert stats.kstest(noise * wrong, "norm").pvalue < 1e-6


def test_noise_does_not_depend_on_the_physical_batch() -> None:
    results = []
    for physical_batch in (1, 3, 64):
        classifier = make()
        before = values(classifier)
        run(classifier, examples(), plan(noise_multiplier=3.0), SGD, physical_batch=physical_batch)
        results.append(moved(classifier, before))

    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-6)


def test_sites_and_rounds_do_not_share_noise() -> None:
    # Clients built in the same second would share a stream seeded with the time.
    noises = []
    for _ in range(2):
        classifier = make()
        before = values(classifier)
        run(classifier, examples(), plan(noise_multiplier=50.0), SGD, generator=None)
        noises.append(moved(classifier, before).numpy())

    assert (
        abs(np.corrcoef(noises[0], noises[1])[0, 1]) < 0.75
    )  # 7 standard deviations; the same noise has 1


def test_empty_batches_take_a_step_of_noise() -> None:
    classifier, data = make(), examples(1000)
    calls: list[int] = []
    classifier.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    config = Training(optimizer="sgd", learning_rate=1.0, batch_size=1)
    before = values(classifier)

    spend = run(
        classifier,
        data,
        plan(noise_multiplier=1.0, sample_rate=0.001, steps=4),
        config,
        steps=4,
        generator=seeded(12),
    )

    assert len(calls) < 4  # at least one of the four batches was empty
    assert spend.steps == 4
    assert float(moved(classifier, before).std()) == pytest.approx(0.5 * 3.5, rel=0.5)


# One logical step


def test_physical_batches_are_bounded_and_count_as_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accountants: list[PRVAccountant] = []

    class Remembered(PRVAccountant):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            accountants.append(self)

    monkeypatch.setattr(private, "PRVAccountant", Remembered)
    classifier, rows = make(), []
    classifier.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    spend = run(
        classifier,
        examples(),
        plan(noise_multiplier=1.5, steps=2),
        SGD,
        steps=2,
        physical_batch=4,
    )

    assert rows == [4, 4, 3] * 2
    assert accountants[0].history == [(1.5, 1.0, 2)]
    assert spend == Spend(noise_multiplier=1.5, sample_rate=1.0, steps=2)


def test_the_sum_is_divided_by_the_expected_batch_whatever_came() -> None:
    data, config = examples(), Training(optimizer="sgd", learning_rate=1.0, batch_size=4)
    classifier, rows = make(), []
    classifier.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    chosen = Randomness.reproducible(seeded()).sample(11, 4 / 11)
    expected = clipped_sum(make(), data.take(chosen), "flat", 0.5) / 4
    before = values(classifier)

    run(classifier, data, plan(sample_rate=4 / 11), config)

    assert rows == [len(chosen)] != [4]
    torch.testing.assert_close(moved(classifier, before), -expected, rtol=1e-4, atol=1e-6)


# Optimisers and schedule


def test_the_head_has_its_own_learning_rate() -> None:
    config = Training(optimizer="sgd", learning_rate=1.0, head_learning_rate=0.25, batch_size=11)
    slow, fast = make(), make()
    before = values(slow)

    run(slow, examples(), plan(), config)
    run(fast, examples(), plan(), SGD)

    for name, start in before.items():
        rate = 0.25 if name.startswith("head.") else 1.0
        torch.testing.assert_close(values(slow)[name] - start, rate * (values(fast)[name] - start))


def test_the_schedule_runs_over_the_whole_run_not_the_round() -> None:
    config = Training(
        optimizer="sgd", momentum=0.0, learning_rate=1.0, batch_size=11, schedule="linear"
    )
    first, last = make(), make()
    before = values(first)

    run(first, examples(), plan(steps=8), config)
    run(last, examples(), plan(steps=8), config, step_offset=6)

    torch.testing.assert_close(moved(last, before), 0.25 * moved(first, before))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_private_training_learns_what_the_records_say(optimizer: str) -> None:
    classifier = make()
    data = examples(300)
    targets = [int(f.mean(0)[:LABELS].argmax()) for f in data.features]
    data = Examples(data.features, torch.tensor(targets))
    config = Training(
        optimizer=optimizer,  # type: ignore[arg-type]
        learning_rate=0.02 if optimizer == "adamw" else 1.0,
        batch_size=100,
    )
    of = plan(noise_multiplier=1.0, clipping_norm=1.0, sample_rate=1 / 3, steps=60)
    batch, mask = collate(data.features)

    def loss() -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(classifier(batch, mask), data.labels))

    before = loss()
    run(classifier, data, of, config, steps=60)

    assert loss() < 0.8 * before


def test_the_same_generator_gives_the_same_adapter() -> None:
    a, b = make(), make()
    of = plan(noise_multiplier=2.0, sample_rate=4 / 11, steps=3)
    config = Training(batch_size=4)

    run(a, examples(), of, config, steps=3)
    run(b, examples(), of, config, steps=3)

    assert all(
        torch.equal(x, y) for x, y in zip(values(a).values(), values(b).values(), strict=True)
    )


# What is left behind


def traces(classifier: nn.Module) -> dict[str, Any]:
    """Return everything that hooks could leave on modules and parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = {
        name: (module.training, sorted(vars(module)), *(len(getattr(module, h)) for h in hooks))
        for name, module in classifier.named_modules()
    }
    parameters = {
        name: (sorted(vars(p)), p.grad is None, p.requires_grad)
        for name, p in classifier.named_parameters()
    }
    return modules | parameters


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_opacus_stays_behind(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    classifier = make()
    before, start = traces(classifier), values(classifier)

    if fails:
        monkeypatch.setattr(private, "require_as_planned", _refuse)
        with pytest.raises(PrivacyError, match="refused by the test"):
            run(classifier, examples(), plan(), SGD)
        monkeypatch.undo()
        assert not moved(classifier, start).any()
    else:
        run(classifier, examples(), plan(), SGD)

    assert traces(classifier) == before
    assert type(classifier) is Sequences
    run(classifier, examples(), plan(), SGD)  # and it can be trained again


# Refusals


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

    monkeypatch.setattr(private, "PRVAccountant", Other)
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
        (Silenced, "every record's gradient was zero"),
    ],
)
def test_models_that_cannot_be_trained_privately_are_refused(
    kind: type[Sequences], message: str
) -> None:
    classifier = make(kind)
    before, start = traces(classifier), values(classifier)

    with pytest.raises(PrivacyError, match=message):
        run(classifier, examples(), plan(noise_multiplier=1.0), SGD)

    assert traces(classifier) == before
    assert not moved(classifier, start).any()


def test_a_trained_batchnorm_is_refused() -> None:
    classifier = FrozenNorm()
    adapt(classifier, Lora(rank=2, targets=("layers.*",), modules_to_save=("norm",)), seed=0)

    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        run(classifier, examples(), plan(), SGD)


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    data = examples()
    data.features[3][0, 0] = torch.nan

    with pytest.raises(PrivacyError, match="is not finite after private training"):
        run(make(), data, plan(), SGD)


def test_an_adapter_that_did_not_move_is_refused() -> None:
    config = Training(optimizer="sgd", learning_rate=1e-30, batch_size=11)

    with pytest.raises(PrivacyError, match="did not change in private training"):
        run(make(), examples(), plan(), config)


def test_a_product_of_rank_zero_is_refused() -> None:
    a, b = "layer.lora_A.weight", "layer.lora_B.weight"
    before = {a: torch.ones(2, 5), b: torch.ones(7, 2)}
    after = {a: torch.eye(2, 5), b: torch.zeros(7, 2)}

    with pytest.raises(PrivacyError, match="B · A of layer has rank 0"):
        require_trained(after, before, gradients=True)


def _refuse(*_: object) -> None:
    raise PrivacyError("refused by the test")


def _lora(base: str) -> Lora:
    targets = {"mlp": ("hidden.*",), "bert": ("query", "value"), "distilbert": ("q_lin", "lin1")}
    return Lora(rank=2, alpha=4, targets=targets.get(base, ("*",)))


def _encoded(classifier: Classifier, kind: str, texts: list[str]) -> Examples:
    rng = np.random.default_rng(0)
    if kind == "text-classification":
        inputs = classifier.encode(texts)
    elif kind == "image-classification":
        inputs = classifier.encode(rng.random((9, 1, 8, 8), dtype=np.float32))
    else:
        inputs = classifier.encode(rng.random((9, 5), dtype=np.float32))
    features = [classifier.prefix(*collate([x]))[0] for x in inputs]
    return Examples(features, torch.arange(9) % LABELS)
