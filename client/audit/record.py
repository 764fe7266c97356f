"""The record-level audit of a run: its sites, one after another.

A run folder holds run.toml, summary.json, checkpoints/ and, of a simulation, sites/<name>/. A
site that audits itself has its own records and the same run.toml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from anabranch.client.audit.canaries import Seen
from anabranch.client.audit.checks import Check
from anabranch.client.audit.evidence import (
    Claim,
    Guessed,
    canary_guesses,
    mechanism_checks,
    shared_by_clients,
)
from anabranch.client.audit.membership import (
    Floats,
    Membership,
    compare,
    losses,
    membership_epsilon,
    membership_p_value,
)
from anabranch.client.audit.replay import Parts, Replay, Subject, replay, replays_of, twins
from anabranch.client.audit.report import MembershipRow, Part, part_of
from anabranch.client.data.records import Records, load_records, split
from anabranch.client.models import MODELS
from anabranch.client.privacy import epsilon_of, plan_for
from anabranch.client.site_file import read_site
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.clipping import count_noise, gradient_noise
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.lora import load_adapter, read_adapter
from anabranch.client.tuning.training import predict
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, PrivacyError
from anabranch.protocols.tables import Device

SCORE = "Σ over steps of ⟨v_i, noisy gradient⟩; v_i the canary's direction"
THREAT_MODEL = (
    "sees every noisy step, knows all other records and the canaries' gradients, not who is drawn"
)
FEW_NON_MEMBERS = "fewer than 100 non-members: 1 % FPR cannot be measured"

Progress = Callable[[], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteFound:
    """One site of a run: where its records are, on what they are trained, and what it said."""

    name: str
    data: Path
    device: Device = "cpu"
    max_rank: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteResult:
    """What was found at one site, before levels are shared out."""

    subject: Subject
    claim: Claim
    replays: tuple[Replay, ...]
    guessed: Guessed
    checks: tuple[Check, ...]
    membership: Membership | None
    membership_left_out: str | None


def find_sites(run: Path, names: Sequence[str], data: Path | None) -> list[SiteFound]:
    """Return the sites to audit: those of the run folder, or one with records of its own.

    Raises ConfigError if there are none, or one of `names` is not there.
    """
    if data is not None:
        if len(names) > 1:
            raise ConfigError("--data is one site's records: give at most one --site")
        return [SiteFound(name=names[0] if names else "this site", data=data)]
    folders = {path.parent.name: path.parent for path in sorted(run.glob("sites/*/site.toml"))}
    if not folders:
        raise ConfigError(
            f"{run}: no sites/<name>/site.toml, so the records are not here. A site audits itself "
            "with --data FILE"
        )
    missing = sorted(set(names) - folders.keys())
    if missing:
        raise ConfigError(f"--site {missing[0]}: expected one of {', '.join(folders)}")
    return [_site(folders[name]) for name in (names or folders)]


def _site(folder: Path) -> SiteFound:
    file = read_site(folder)
    return SiteFound(
        name=file.name,
        data=(folder / file.data).resolve(),
        device=file.device,
        max_rank=file.max_rank,
    )


def audit_site(
    site: SiteFound,
    config: RunConfig,
    parts: Parts,
    *,
    canaries: int,
    rng: np.random.Generator,
    level: float,
    final: Adapter | None,
    recorded: Mapping[str, Any],
    non_members: Path | None = None,
    on_replay: Progress = lambda: None,
) -> SiteResult:
    """Replay one site's private training, and test it; `final` is the run's last adapter.

    `level` is that of each test: no p-value has to be smaller.

    Raises PrivacyError if the run is not private, DataError if the records break the contract.
    """
    if config.privacy is None:
        raise PrivacyError("this run has no [privacy]: there is no record-level claim to audit")
    if config.privacy.noise == "distributed":
        raise PrivacyError(
            'privacy.noise = "distributed": what a site sends has its noise from all members of a '
            "secure sum, and one site's replay would have a part of it: there is no audit of it"
        )
    train, held = split(load_records(site.data, config), config.training.holdout, config.seed)
    classifier = MODELS.classifier(config, site.device)
    start = read_adapter(load_classifier(config, device=site.device))
    features = MODELS.cache(config).prepare(classifier, train.inputs)
    subject = Subject(
        site=site.name,
        config=config,
        classifier=classifier,
        start=start,
        examples=Examples(features, torch.from_numpy(train.labels)),
        plan=plan_for(config.privacy, config.training, config.federation.rounds, len(train)),
        parts=parts,
    )
    done, pair = _replays(subject, canaries, rng, on_replay)
    claim = claim_of(subject)
    others = held if non_members is None else load_records(non_members, config)
    membership, left_out = _membership(subject, train, others, final, config, rng)
    return SiteResult(
        subject=subject,
        claim=claim,
        replays=tuple(done),
        guessed=canary_guesses(done, claim),
        checks=(
            *_recorded(subject, recorded),
            *mechanism_checks(done, claim, rng, level),
            *shared_by_clients(*pair),
        ),
        membership=membership,
        membership_left_out=left_out,
    )


def _replays(
    subject: Subject, canaries: int, rng: np.random.Generator, on_replay: Progress
) -> tuple[list[Replay], tuple[Seen, Seen]]:
    done = []
    try:
        for count in replays_of(subject, canaries):
            done.append(replay(subject, count, rng))
            on_replay()
        return done, twins(subject, rng)
    except PrivacyError as error:
        raise PrivacyError(
            f"{subject.site}: training was refused in a replay: {error}. The audit FAILS "
            "if the run itself was not refused: records are silent in a replay, so that noise "
            "moves the adapter, and where nothing moves there is no noise"
        ) from error


def claim_of(subject: Subject) -> Claim:
    """Return what the run's configuration promises of this site's records."""
    plan, sigma = subject.plan, subject.plan.noise_multiplier
    if plan.clipping == "adaptive":  # a part of σ pays for the count of clipped records
        expected_batch = plan.sample_rate * len(subject.examples)
        sigma = gradient_noise(sigma, count_noise(sigma, expected_batch))
    return Claim(
        epsilon=plan.epsilon,
        delta=plan.delta,
        sigma=sigma,
        sample_rate=plan.sample_rate,
        steps=plan.steps,
    )


def checks_of(result: SiteResult) -> list[Check]:
    """Return all tests of a site: guesses, membership, mechanism."""
    claim, guessed = result.claim, result.guessed
    found = [
        Check(
            name="canaries",
            p_value=guessed.p_value,
            found=f"{guessed.best.correct} of {guessed.best.guessed} guesses right",
            expected=f"what ε = {claim.epsilon:.3f} allows",
        )
    ]
    if result.membership is not None:
        pairs = result.membership.pairs
        found.append(
            Check(
                name="membership",
                p_value=membership_p_value(pairs, claim.epsilon, claim.delta),
                found=f"AUC {result.membership.auc:.3f}, {pairs[0].canaries} pairs",
                expected=f"what ε = {claim.epsilon:.3f} allows",
            )
        )
    return [*found, *result.checks]


def report_of(result: SiteResult, level: float) -> Part:
    """Return a site's part of the report, every test at `level`."""
    part = part_of(
        result.subject.site,
        "record",
        result.claim,
        result.guessed,
        checks_of(result),
        replays=len(result.replays),
        score=SCORE,
        threat_model=THREAT_MODEL,
        level=level,
    )
    return msgspec.structs.replace(
        part,
        membership=_membership_row(result),
        membership_left_out=result.membership_left_out,
    )


def final_adapter(run: Path) -> Adapter | None:
    """Return the run's last checkpoint, None if it has none."""
    found = sorted(run.glob("checkpoints/round-*.adapter"))
    if not found:
        return None
    return wire.decode_adapter(found[-1].read_bytes())


def _recorded(subject: Subject, recorded: Mapping[str, Any]) -> list[Check]:
    """Check, without chance, that the site reported no less than its rounds cost."""
    row = recorded.get("sites", {}).get(subject.site, {})
    epsilon, delta, rounds = (row.get(name) for name in ("epsilon", "delta", "rounds"))
    if epsilon is None or delta is None or not rounds:
        return []
    steps = rounds * (subject.config.training.local_steps or 0)
    cost = epsilon_of([subject.plan.spend(steps)], delta)
    return [
        Check(
            name="recorded ε",
            p_value=float(epsilon >= cost * (1 - 1e-6)),
            found=f"{epsilon:.3f} at δ = {delta:.2g}",
            expected=f"at least {cost:.3f}, which {steps} steps of the plan cost",
        )
    ]


def _membership(
    subject: Subject,
    train: Records,
    others: Records,
    final: Adapter | None,
    config: RunConfig,
    rng: np.random.Generator,
) -> tuple[Membership | None, str | None]:
    """Return the membership test, or why there is none."""
    if config.kept is not None:
        return None, "left out: a part of the model stays at the site and is in no checkpoint"
    if final is None:
        return None, "left out: the run folder has no checkpoint"
    if len(others) == 0:
        return None, "left out: no held-out records; set training.holdout or give --non-members"
    inside, outside = (
        _scores(subject.classifier, subject.start, final, records, config)
        for records in (train, others)
    )
    return compare((inside, train.labels), (outside, others.labels), rng), None


def _scores(
    classifier: Classifier, start: Adapter, final: Adapter, records: Records, config: RunConfig
) -> Floats:
    features = MODELS.cache(config).prepare(classifier, records.inputs)
    values = []
    for adapter in (start, final):
        load_adapter(classifier, adapter)
        values.append(losses(predict(classifier, features), records.labels))
    return values[0] - values[1]


def _membership_row(result: SiteResult) -> MembershipRow | None:
    one = result.membership
    if one is None:
        return None
    return MembershipRow(
        members=one.members,
        non_members=one.non_members,
        auc=one.auc,
        tpr_at_1_percent_fpr=one.tpr,
        tpr_low=one.tpr_low,
        tpr_high=one.tpr_high,
        epsilon_lower=membership_epsilon(one.pairs, result.claim.delta),
        pairs=one.pairs[0].canaries,
        note=FEW_NON_MEMBERS if one.tpr is None else "",
    )
