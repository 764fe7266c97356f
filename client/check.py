"""`anabranch site check`: will my records do for this run, and what would it cost them?

Reads the site's file and the run's configuration; loads no model, trains and sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anabranch.client.data.contract import Violation, check, describe
from anabranch.client.data.read import Table, read_table
from anabranch.client.data.records import Records, fingerprint, split, to_records
from anabranch.client.files import read_run
from anabranch.client.privacy import DpPlan, plan_for, plan_together
from anabranch.protocols.config import RunConfig
from anabranch.protocols.secagg.agreed_noise import noise_of

VALUES = 1_000_000  # of an adapter that is not looked at: they hardly change the noise


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What `site check` found."""

    source: str
    rows: int
    violations: tuple[Violation, ...]
    explanation: str  # the violations in words
    counts: dict[str, int]  # records per label; empty if the contract is broken
    fingerprint: str  # of what the model would see; the ledger knows rows by all their cells
    plan: DpPlan | None  # None: the run is not private, or the contract is broken

    @property
    def ok(self) -> bool:
        """Return whether the contract holds."""
        return not self.violations

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for --json; never the content of a cell."""
        plan = self.plan
        return {
            "ok": self.ok,
            "source": self.source,
            "rows": self.rows,
            "violations": [
                {"column": v.column, "rule": v.rule, "rows": list(v.rows), "message": v.message}
                for v in self.violations
            ],
            "labels": self.counts,
            "fingerprint": self.fingerprint,
            "privacy": None
            if plan is None
            else {
                "epsilon": plan.epsilon,
                "delta": plan.delta,
                "noise_multiplier": plan.noise_multiplier,
                "sample_rate": plan.sample_rate,
                "steps": plan.steps,
            },
        }

    def text(self) -> str:
        """Return the finding in words."""
        if not self.ok:
            return self.explanation
        lines = [f"{self.source}: {self.rows} records keep the data contract"]
        lines += [f"  {count:6d}  {label}" for label, count in self.counts.items()]
        lines.append(f"fingerprint {self.fingerprint[:16]}…")
        if self.plan is None:
            lines.append("privacy: this run is NOT private; its deltas can tell about records")
        else:
            p = self.plan
            lines.append(
                f"privacy: the whole run costs each record epsilon {p.epsilon:.2f} at delta "
                f"{p.delta:.1e} (sigma {p.noise_multiplier:.3f}, q {p.sample_rate:.4f}, "
                f"{p.steps} steps)"
            )
        return "\n".join(lines)


def check_data(data: Path, run: Path, *, show_values: bool = False) -> Checked:
    """Check `data` against run.toml. Raises ConfigError or DataError if a file cannot be read."""
    config = read_run(run)
    table = read_table(data)
    violations = tuple(check(table, config))
    if violations:
        return Checked(
            source=table.source,
            rows=table.rows,
            violations=violations,
            explanation=describe(violations, source=table.source, show_values=show_values),
            counts={},
            fingerprint="",
            plan=None,
        )
    return _kept(table, config)


def _kept(table: Table, config: RunConfig) -> Checked:
    records = to_records(table, config)
    train, _ = split(records, config.training.holdout, config.seed)
    return Checked(
        source=table.source,
        rows=table.rows,
        violations=(),
        explanation="",
        counts=_counts(records, config),
        fingerprint=fingerprint(train),
        plan=_plan(config, len(train)),
    )


def _plan(config: RunConfig, records: int) -> DpPlan | None:
    """Return what the run costs a record; with noise of a secure sum, for VALUES values."""
    if config.privacy is None:
        return None
    noise = noise_of(config, VALUES) if config.privacy.noise == "distributed" else None
    if noise is None:
        return plan_for(config.privacy, config.training, config.federation.rounds, records)
    return plan_together(noise, config.privacy, config.training.batch_size, records)


def _counts(records: Records, config: RunConfig) -> dict[str, int]:
    labels = config.task.labels
    counts = records.label_counts(len(labels)).tolist()
    return dict(zip(labels, counts, strict=True))
