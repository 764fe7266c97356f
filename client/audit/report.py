"""What an audit says: structs for audit.json, text for people, and the verdict.

An audit FAILS if one of its tests does. Levels of the tests add up to FALSE_ALARM, so an honest
run is called dishonest with a chance of at most that (union bound, whatever the dependence).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from anabranch.client.audit.checks import Check
from anabranch.client.audit.evidence import Claim, Guessed
from anabranch.client.audit.guesses import reach

FALSE_ALARM = 0.01
TESTS = 15  # of one mechanism, at most
CONFIDENCE = 0.95
NOT_COVERED = (
    "A low lower bound proves nothing: it is what this attack found, and the theorem is what "
    "protects. A high one, or a test that fails, proves that the claim does not hold."
)
REPLAYED = (
    "The mechanism was run again for this audit, with the recorded configuration. Nothing of it "
    "is released and no privacy ledger is charged."
)


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test: fails if p_value < level."""

    name: str
    passed: bool
    p_value: float
    level: float
    found: str
    expected: str


class Bound(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The empirical lower bound on ε from guesses about canaries."""

    epsilon_lower: float
    confidence: float
    reach: float  # the largest bound that m canaries could have proved at this δ
    canaries: int  # m
    guessed: int  # r, the choice that says most
    correct: int  # v
    replays: int
    score: str


class MembershipRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The membership test on the final adapter; None: too few non-members for 1 % FPR."""

    members: int
    non_members: int
    auc: float
    tpr_at_1_percent_fpr: float | None
    tpr_low: float | None
    tpr_high: float | None
    epsilon_lower: float
    pairs: int
    note: str


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The audit of one guarantee: one site's records, or the clients of the run."""

    subject: str
    unit: str  # "record" or "client"
    epsilon: float  # claimed
    delta: float
    noise_multiplier: float
    sample_rate: float
    steps: int
    threat_model: str
    bound: Bound
    checks: tuple[Row, ...]
    membership: MembershipRow | None = None
    membership_left_out: str | None = None

    @property
    def passed(self) -> bool:
        """Return whether every test passed."""
        return all(row.passed for row in self.checks)


class Report(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """RUN/audit.json."""

    run: str
    config: str  # digest
    passed: bool
    false_alarm: float  # chance, at most, that an honest run fails
    seed: int | None  # of coins and directions; None: from the operating system
    parts: tuple[Part, ...]
    replayed: str = REPLAYED
    limits: str = NOT_COVERED


def level_for(mechanisms: int) -> float:
    """Return the level of every test, known before any of them."""
    return FALSE_ALARM / (TESTS * mechanisms)


def part_of(
    subject: str,
    unit: str,
    claim: Claim,
    guessed: Guessed,
    checks: Sequence[Check],
    *,
    replays: int,
    score: str,
    threat_model: str,
    level: float,
) -> Part:
    """Return the report on one guarantee, every test at `level`, before any membership test."""
    return Part(
        subject=subject,
        unit=unit,
        epsilon=claim.epsilon,
        delta=claim.delta,
        noise_multiplier=claim.sigma,
        sample_rate=claim.sample_rate,
        steps=claim.steps,
        threat_model=threat_model,
        bound=Bound(
            epsilon_lower=guessed.epsilon_lower,
            confidence=CONFIDENCE,
            reach=reach(guessed.best.canaries, claim.delta),
            canaries=guessed.best.canaries,
            guessed=guessed.best.guessed,
            correct=guessed.best.correct,
            replays=replays,
            score=score,
        ),
        checks=rows(checks, level),
    )


def rows(checks: Sequence[Check], level: float) -> tuple[Row, ...]:
    """Return the checks as they are reported, each at `level`."""
    return tuple(
        Row(
            name=check.name,
            passed=check.p_value >= level,
            p_value=check.p_value,
            level=level,
            found=check.found,
            expected=check.expected,
        )
        for check in checks
    )


def text(report: Report) -> str:
    """Return the report for people."""
    lines = [f"audit of {report.run}: {_verdict(report.passed)}", ""]
    for part in report.parts:
        lines += [*_part(part), ""]
    lines += [
        f"An honest run fails with a chance of at most {report.false_alarm:.0%}. {report.limits}",
        report.replayed,
    ]
    return "\n".join(lines)


def _part(part: Part) -> list[str]:
    bound = part.bound
    lines = [
        f"{part.subject}: {_verdict(part.passed)}",
        f"  claimed        ε = {part.epsilon:.3f}, δ = {part.delta:.2g} per {part.unit} "
        f"(σ = {part.noise_multiplier:.3f}, q = {part.sample_rate:.4f}, {part.steps} steps)",
        f"  lower bound    ε >= {bound.epsilon_lower:.3f} ({bound.confidence:.0%} confidence): "
        f"m = {bound.canaries}, r = {bound.guessed}, v = {bound.correct}, "
        f"replays = {bound.replays}; could prove at most {bound.reach:.3f}",
        f"  score          {bound.score}",
        f"  threat model   {part.threat_model}",
        *_rows(part.checks),
    ]
    return lines + _membership(part)


def _membership(part: Part) -> list[str]:
    one = part.membership
    if one is None:
        return [f"  membership     {part.membership_left_out}"] if part.membership_left_out else []
    tpr = (
        "not measurable"
        if one.tpr_at_1_percent_fpr is None
        else f"{one.tpr_at_1_percent_fpr:.3f} [{one.tpr_low:.3f}, {one.tpr_high:.3f}]"
    )
    return [
        f"  membership     AUC {one.auc:.3f}, TPR at 1 % FPR {tpr}, ε >= {one.epsilon_lower:.3f} "
        f"({one.members} members, {one.non_members} non-members, {one.pairs} pairs)",
        *([f"                 {one.note}"] if one.note else []),
    ]


def _rows(found: Sequence[Row]) -> list[str]:
    width = max(len(row.name) for row in found)
    return [
        f"  {_verdict(row.passed)}  {row.name.ljust(width)}  p = {row.p_value:<8.2g} "
        f"{row.found}; expected {row.expected}"
        for row in found
    ]


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"
