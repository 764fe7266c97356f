"""A private round of a site: plan, reserve, train, settle.

Nothing of a round may leave before it is settled. With adaptive clipping the norm goes on from
round to round; the site keeps it in clipping/<run>.json. Only noised values decide it, so it is
as safe to keep as the delta that was sent; without the file it begins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from anabranch.client.ledger import Ledger, Limit
from anabranch.client.personal import checked_run
from anabranch.client.privacy import LARGEST_EPSILON, DpPlan, plan_for
from anabranch.client.site_file import Budget
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.examples import Examples
from anabranch.client.tuning.private import fit_private
from anabranch.protocols.errors import ModelError, PrivacyError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.tables import Positive, Privacy
from anabranch.storage.files import write_atomic


class Clipping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """clipping/<run>.json: the norm after the last round."""

    clipping_norm: Positive


def train_privately(
    assignment: Assignment,
    classifier: Classifier,
    examples: Examples,
    rows: Sequence[bytes],
    *,
    folder: Path,
    ledger: Ledger,
    budget: Budget | None,
) -> dict[str, Any]:
    """Train one round in place and return what the report says of it. A crash counts as spent.

    `rows` are the identities of the examples. Raises PrivacyError, before anything is trained,
    if the run's budget, or the site's, would be exceeded or the ledger cannot be trusted.
    """
    config = assignment.config
    privacy, steps = config.privacy, config.training.local_steps
    assert privacy is not None  # a site asks only then
    assert steps is not None  # RunConfig requires it with privacy
    if assignment.round > config.federation.rounds:
        raise PrivacyError(
            f"round {assignment.round} is beyond the {config.federation.rounds} of the run's plan: "
            "nothing is reserved, and nothing is trained"
        )
    plan = plan_for(privacy, config.training, config.federation.rounds, len(examples))
    norm = _clipping_norm(folder, assignment.run) if plan.clipping == "adaptive" else None
    entry = ledger.reserve(
        rows, assignment.run, assignment.round, plan.spend(steps), limits(privacy, plan, budget)
    )
    done = fit_private(
        classifier,
        examples,
        plan,
        config.training,
        steps=steps,
        step_offset=(assignment.round - 1) * steps,
        proximal_mu=config.federation.proximal_mu,
        part=assignment.part,
        kept=config.kept,
        engine=privacy.engine,
        clipping_norm=norm,
    )
    head = ledger.settle(entry, done.spend)
    if plan.clipping == "adaptive":
        after = msgspec.json.encode(Clipping(clipping_norm=done.clipping_norm))
        write_atomic(_clipping_file(folder, assignment.run), after)
    return {
        "steps": steps,
        "epsilon": ledger.spent(rows, plan.delta),
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "engine": done.engine,
        "ledger": head,
    }


def limits(privacy: Privacy, plan: DpPlan, budget: Budget | None) -> list[Limit]:
    """Return what a round of the run must keep: the run's budget, the site's, and sense."""
    run = Limit(
        epsilon=privacy.epsilon, delta=plan.delta, over="run", name="the run's [privacy] budget"
    )
    sense = Limit(  # it could not be reported, and would promise nothing
        epsilon=LARGEST_EPSILON,
        delta=plan.delta,
        over="row",
        name="the largest epsilon that counts",
    )
    return [run, sense] if budget is None else [run, budget.limit, sense]


def _clipping_norm(folder: Path, run: str) -> float | None:
    """Return where adaptive clipping goes on; None in the first round."""
    file = _clipping_file(folder, run)
    if not file.exists():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Clipping).clipping_norm
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"clipping/{file.name} cannot be read ({error}): restore it, or delete it to begin "
            "again with privacy.clipping_norm"
        ) from None


def _clipping_file(folder: Path, run: str) -> Path:
    return folder / "clipping" / f"{checked_run(run)}.json"
