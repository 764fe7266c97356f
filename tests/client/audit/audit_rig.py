"""A small private run to audit, and the bugs that are seeded into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor

from anabranch.client.audit.checks import Check
from anabranch.client.audit.evidence import (
    Claim,
    canary_guesses,
    mechanism_checks,
    shared_by_clients,
)
from anabranch.client.audit.record import claim_of
from anabranch.client.audit.replay import Replay, Subject, replay, replays_of, twins
from anabranch.client.audit.report import TESTS, level_for
from anabranch.client.privacy import plan_for
from anabranch.client.tuning import noisy
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import read_adapter
from anabranch.client.tuning.noisy import PrivateStep
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols import randomness
from anabranch.protocols.adapter import WHOLE
from anabranch.protocols.errors import PrivacyError
from tests.runs import table_run

RECORDS, BATCH, LOCAL, ROUNDS = 60, 12, 5, 4
SEEDS = range(5)
LEVEL = level_for(1)

Seed = Callable[[pytest.MonkeyPatch], None]


@cache
def subject(
    batch: int = BATCH, clipping: str = "flat", epsilon: float = 4.0, more: str = ""
) -> Subject:
    config = table_run(
        ("batch_size = 8", f"batch_size = {batch}\nlocal_steps = {LOCAL}"),
        ("rounds = 2", f"rounds = {ROUNDS}"),
        extra=f'\n[privacy]\nepsilon = {epsilon}\nclipping = "{clipping}"\n{more}\n',
    )
    assert config.privacy is not None
    classifier = load_classifier(config)
    rng = np.random.default_rng(0)
    features = list(torch.from_numpy(rng.normal(size=(RECORDS, 2)).astype(np.float32)))
    return Subject(
        site="here",
        config=config,
        classifier=classifier,
        start=read_adapter(classifier),
        examples=Examples(features, torch.arange(RECORDS) % 2),
        plan=plan_for(config.privacy, config.training, ROUNDS, RECORDS),
        parts=lambda spec, number: WHOLE,
    )


def fix_keys(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Let the operating system's entropy come from a seed: fits still have different keys."""
    keys = np.random.default_rng([seed, 99])
    monkeypatch.setattr(randomness, "secrets", SimpleNamespace(token_bytes=keys.bytes))


def replays(of: Subject, seed: int, canaries: int = 146) -> list[Replay]:
    rng = np.random.default_rng(seed)
    return [replay(of, count, rng) for count in replays_of(of, canaries)]


def tests_of(found: list[Replay], claim: Claim, seed: int) -> dict[str, Check]:
    guessed = canary_guesses(found, claim)
    canaries = Check(name="canaries", p_value=guessed.p_value, found="", expected="")
    rng = np.random.default_rng([seed, 1])
    checks = [canaries, *mechanism_checks(found, claim, rng, LEVEL)]
    assert len(checks) + 3 <= TESTS  # membership, recorded ε, noise shared across clients
    return {check.name: check for check in checks}


def failed(of: Subject, seed: int) -> set[str]:
    """Return the names of the tests that an audit of `of` fails."""
    try:
        found = replays(of, seed)
        across = shared_by_clients(*twins(of, np.random.default_rng(seed)))
    except PrivacyError:  # plan-versus-run: the product itself refuses
        return {"refused"}
    return refuted(tests_of(found, claim_of(of), seed) | {check.name: check for check in across})


def refuted(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if check.p_value < LEVEL}


def noise_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def perturb(self: PrivateStep, total: Tensor, sigma: float) -> float:
        return sigma

    monkeypatch.setattr(PrivateStep, "_perturb", perturb)


def noise_faint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one part in 10 000 of the noise: just enough for everything to move."""
    honest = Randomness.normal
    monkeypatch.setattr(Randomness, "normal", lambda self, count: 1e-4 * honest(self, count))


def one_tensor_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the noise of the first tensor out: two of 73 values."""
    honest = PrivateStep._perturb

    def perturb(self: PrivateStep, total: Tensor, sigma: float) -> float:
        slot = self._flat.slots[0]
        before = total[slot.start : slot.stop].clone()
        honest(self, total, sigma)
        total[slot.start : slot.stop] = before + 1e-4
        return sigma

    monkeypatch.setattr(PrivateStep, "_perturb", perturb)


def sigma_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Randomness.normal
    monkeypatch.setattr(Randomness, "normal", lambda self, count: 0.5 * honest(self, count))


def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every client and round the same stream, as a seed made of the clock does."""
    monkeypatch.setattr(Randomness, "fresh", classmethod(lambda cls: cls(b"0" * 32)))


def shuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go through shuffled records in batches of a fixed size, accounted for as Poisson."""
    queues: WeakKeyDictionary[Randomness, list[int]] = WeakKeyDictionary()

    def sample(self: Randomness, count: int, rate: float) -> list[int]:
        queue = queues.setdefault(self, [])
        size = round(rate * count)
        if len(queue) < size:
            queue[:] = [int(i) for i in np.argsort(self.uniform(count))]
        batch, queue[:] = queue[:size], queue[size:]
        return sorted(batch)

    monkeypatch.setattr(Randomness, "sample", sample)


def clipping_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(clipping: str, norms: Tensor, bound: float) -> Tensor:
        return torch.ones_like(norms)

    monkeypatch.setattr(noisy, "clipping_factors", ones)


def mean_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide sum and noise by the batch that came, not by q n."""
    honest = PrivateStep.__call__

    def step(self: PrivateStep, batch: Examples, canaries: Tensor | None = None) -> bool:
        came = len(batch) + (0 if canaries is None else len(canaries))
        self._expected_batch = float(max(came, 1))
        return honest(self, batch, canaries)

    monkeypatch.setattr(PrivateStep, "__call__", step)


def drawn_twice_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Randomness.sample
    monkeypatch.setattr(
        Randomness, "sample", lambda self, count, rate: honest(self, count, min(1.0, 2 * rate))
    )


def empty_batches_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PrivateStep.__call__

    def step(self: PrivateStep, batch: Examples, canaries: Any = None) -> bool:
        return bool(len(batch)) and honest(self, batch, canaries)

    monkeypatch.setattr(PrivateStep, "__call__", step)


def one_step_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.client.tuning import private

    honest = private._run

    def run(
        step: Any, trained: Any, examples: Any, plan: Any, config: Any, steps: range, *a: Any
    ) -> bool:
        return honest(step, trained, examples, plan, config, range(steps.start, steps.stop + 1), *a)

    monkeypatch.setattr(private, "_run", run)
