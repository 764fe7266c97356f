"""The client-level audit: honest coordinators pass, seeded bugs are caught by the named net."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from anabranch.client.audit.evidence import canary_guesses
from anabranch.client.audit.report import TESTS, level_for
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.server.aggregation import private
from anabranch.server.aggregation.private import ClippedSum
from anabranch.server.client_audit import audit_clients, client_checks, client_part
from anabranch.server.client_privacy import PoissonCohorts
from anabranch.server.evaluation import initial_adapter
from tests.client.audit.audit_rig import SEEDS, Seed, fix_keys
from tests.runs import table_run

LEVEL = level_for(1)


@cache
def config(clipping: str = "fixed", epsilon: float = 8.0) -> RunConfig:
    return table_run(
        ("rounds = 2", 'rounds = 12\ncohort = 60\nweighting = "uniform"'),
        extra=f"\n[client_privacy]\npopulation = 300\nepsilon = {epsilon}\n"
        f'clipping = "{clipping}"\n',
    )


@cache
def first() -> Adapter:
    return initial_adapter(config())


def failed(seed: int, clipping: str = "fixed") -> set[str]:
    rng = np.random.default_rng(seed)
    try:
        claim, replays = audit_clients(config(clipping), first(), canaries=146, rng=rng)
    except PrivacyError:
        return {"refused"}
    checks = client_checks(claim, replays, rng, LEVEL)
    assert len(checks) <= TESTS
    return {check.name for check in checks if check.p_value < LEVEL}


@pytest.mark.parametrize("clipping", ["fixed", "adaptive"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_honest_coordinator_passes_below_its_claim(
    seed: int, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_keys(monkeypatch, seed)
    rng = np.random.default_rng(seed)

    claim, replays = audit_clients(config(clipping), first(), canaries=146, rng=rng)
    part = client_part(claim, replays, client_checks(claim, replays, rng, LEVEL), LEVEL)

    assert part.passed
    assert part.bound.epsilon_lower <= part.epsilon
    assert (part.unit, part.bound.canaries, part.steps) == ("client", 146, 12)


def noise_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Randomness, "normal", lambda self, count: np.zeros(count))


def noise_not_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw honest noise for the rule's own check, and lose nearly all of it afterwards."""
    honest = private._gaussians
    monkeypatch.setattr(private, "_gaussians", lambda normal, n: 1e-4 * honest(normal, n))


def sigma_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = private._gaussians
    monkeypatch.setattr(private, "_gaussians", lambda normal, n: 0.5 * honest(normal, n))


def clipping_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: ClippedSum, delta: Delta) -> None:
        for name, total in self.arrays.items():
            total += delta.arrays[name].astype(np.float64)

    monkeypatch.setattr(ClippedSum, "add", add)


def cohorts_of_a_fixed_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)

    def draw(self: PoissonCohorts, connected: Sequence[str]) -> list[str]:
        size = round(0.2 * len(connected))
        return [connected[i] for i in rng.choice(len(connected), size, replace=False)]

    monkeypatch.setattr(PoissonCohorts, "draw", draw)


def one_noise_for_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Randomness.normal
    monkeypatch.setattr(
        Randomness, "normal", lambda self, count: honest(Randomness(b"0" * 32), count)
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("bug", "net"),
    [
        (noise_off, "refused"),
        (noise_not_added, "noise level"),
        (sigma_halved, "noise level"),
        (clipping_off, "clipping"),
        (cohorts_of_a_fixed_size, "batch sizes"),
        (one_noise_for_all_rounds, "noise shared across rounds"),
    ],
)
def test_a_seeded_bug_is_caught_by_its_net(
    bug: Seed, net: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_keys(monkeypatch, seed)
    bug(monkeypatch)

    assert net in failed(seed)


def test_without_noise_the_canary_clients_refute_the_claim(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fix_keys(monkeypatch, 0)
    noise_not_added(monkeypatch)

    claim, replays = audit_clients(
        config(epsilon=2.0), first(), canaries=292, rng=np.random.default_rng(0)
    )

    assert canary_guesses(replays, claim).epsilon_lower > claim.epsilon


def test_a_run_without_a_client_level_claim_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no client-level claim"):
        audit_clients(table_run(), first(), canaries=10, rng=np.random.default_rng(0))
