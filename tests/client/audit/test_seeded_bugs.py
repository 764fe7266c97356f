"""Real bugs seeded into the product: each is caught by the net that docs/audit.md names.

Nets: "refused" is plan-versus-run, the product's own check of what ran; "ledger" is the site's;
all others are tests of the audit. Coins, directions and keys are fixed: nothing here flakes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anabranch.client import local, private_round
from anabranch.client.audit.evidence import canary_guesses
from anabranch.client.audit.record import claim_of
from anabranch.client.privacy import DpPlan, plan_for
from anabranch.client.site import Site
from anabranch.client.tuning.private import fit_private
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.tables import Privacy, Training
from anabranch.server.evaluation import initial_adapter
from tests.client.audit import audit_rig as rig
from tests.client.audit.audit_rig import SEEDS, Seed, fix_keys, subject
from tests.runs import table_run, write_site, write_table

CAUGHT: list[tuple[Seed, set[str]]] = [
    (rig.noise_off, {"refused"}),
    (rig.noise_faint, {"noise level"}),
    (rig.one_tensor_without_noise, {"noise per tensor"}),
    (rig.sigma_halved, {"noise level"}),
    (rig.one_stream, {"noise shared across clients", "noise shared across rounds"}),
    (rig.shuffled, {"batch sizes", "participation"}),
    (rig.drawn_twice_as_often, {"sampling rate"}),
    (rig.clipping_off, {"clipping"}),
    (rig.one_step_too_many, {"refused"}),
    (rig.mean_of_the_batch, {"noise and batch"}),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_an_honest_run_passes_and_its_empirical_epsilon_is_below_the_claim(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_keys(monkeypatch, seed)
    of = subject()

    assert rig.failed(of, seed) == set()
    assert canary_guesses(rig.replays(of, seed), claim_of(of)).epsilon_lower <= of.plan.epsilon


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("bug", "nets"), CAUGHT, ids=[bug.__name__ for bug, _ in CAUGHT])
def test_a_seeded_bug_is_caught_by_its_nets(
    bug: Seed, nets: set[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fix_keys(monkeypatch, seed)
    bug(monkeypatch)

    assert nets <= rig.failed(subject(), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_noise_the_canaries_refute_the_claim(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of guesses alone sees it, with enough canaries and a small δ."""
    fix_keys(monkeypatch, seed)
    rig.noise_faint(monkeypatch)
    of = subject(epsilon=2.0, more="delta = 1e-6")

    found = canary_guesses(rig.replays(of, seed, canaries=438), claim_of(of))

    assert found.epsilon_lower > of.plan.epsilon


@pytest.mark.parametrize("seed", SEEDS)
def test_a_skipped_empty_batch_is_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One record of 60 is expected in a batch: more than a third of the batches are empty."""
    fix_keys(monkeypatch, seed)
    rig.empty_batches_skipped(monkeypatch)
    of = subject(batch=1)

    with pytest.raises(PrivacyError, match="planned"):
        fit_private(
            of.classifier, of.examples, of.plan, of.config.training, steps=20, step_offset=0
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fresh_accountant_per_round_is_stopped_by_the_ledger(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise for one round in each of four: the ledger refuses a round, and nothing is sent."""
    config = table_run(
        ("batch_size = 8", "batch_size = 8\nlocal_steps = 5"),
        ("rounds = 2", "rounds = 4"),
        ("seed = 3", f"seed = {seed}"),
        extra="\n[privacy]\nepsilon = 4.0\n",
    )
    site = Site(write_site(tmp_path / "a", "a", write_table(tmp_path / "a.csv", seed=seed)))
    first = initial_adapter(config)
    monkeypatch.setattr(private_round, "plan_for", _for_one_round)
    monkeypatch.setattr(local, "fit_private", _of_one_round)

    trained, _ = site.train(Assignment(run="r", round=1, config=config), first)

    assert trained.epsilon is not None
    assert trained.epsilon <= 4.0
    with pytest.raises(PrivacyError, match="epsilon"):
        site.train(Assignment(run="r", round=2, config=config), first)


def _for_one_round(privacy: Privacy, training: Training, rounds: int, count: int) -> DpPlan:
    return plan_for(privacy, training, 1, count)


def _of_one_round(*arguments: object, **options: object) -> object:
    """Start every round from step 0, as a fresh engine does."""
    return fit_private(*arguments, **options | {"step_offset": 0})  # type: ignore[arg-type]


def test_the_audit_leaves_the_adapter_and_the_hooks_as_they_were() -> None:
    of = subject()
    before = {name: p.detach().clone() for name, p in of.classifier.named_parameters()}

    rig.replays(of, 0, canaries=5)

    after = dict(of.classifier.named_parameters())
    assert all(np.array_equal(before[name], after[name].detach()) for name in before)
