"""A private round of a site: plan, reserve, train, settle.

Nothing of a round may leave before it is settled, and no reservation is settled twice: at most
one result of it is ever released. How a round that was cut off goes on with the reservation that
it has: answers.py. With adaptive clipping the norm goes on from
round to round; the site keeps it in clipping/<run>.json. Only noised values decide it, so it is
as safe to keep as the delta that was sent; without the file it begins again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from anabranch.client.ledger import Limit
from anabranch.client.personal import checked_run
from anabranch.client.privacy import LARGEST_EPSILON, DpPlan, Spend, plan_for, plan_together
from anabranch.client.site_file import Budget
from anabranch.client.tuning.distributed import Unnoised
from anabranch.client.tuning.private import PrivateFit
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ModelError, PrivacyError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.spend import Unit
from anabranch.protocols.tables import Engine, Positive, Privacy


class Clipping(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """clipping/<run>.json: the norm after the last round."""

    clipping_norm: Positive


@dataclass(frozen=True, kw_only=True, eq=False)
class PrivateRound:
    """A private round that has been reserved: what it may spend, and from which C it goes on."""

    plan: DpPlan
    engine: Engine
    clipping_norm: float | None  # None: the plan's
    randomness: Randomness | None  # None: a new key from the operating system
    entry: int  # of the ledger
    rows: Sequence[bytes]
    run: str
    ledger: Books


class Cost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a trained round has to settle before anything of it leaves."""

    entry: int  # of the ledger
    spend: Spend  # by training
    delta: float  # δ at which ε is reported


class Books(Protocol):
    """What a private round needs of a ledger (ledger.py; a simulated one in simulations/)."""

    def reserve(
        self,
        rows: Sequence[bytes],
        run: str,
        round_number: int,
        spend: Spend,
        limits: Sequence[Limit] = (),
    ) -> int:
        """Write down what training is about to spend, or raise PrivacyError."""

    def settle(self, entry: int, spend: Spend) -> str:
        """Write down that a round is over; return the head of the chain."""

    def spent(self, rows: Sequence[bytes], delta: float, unit: Unit = "record") -> float:
        """Return the largest ε at `delta` that one of these rows, or the client, has spent."""


def open_round(
    assignment: Assignment,
    rows: Sequence[bytes],
    *,
    folder: Path,
    ledger: Books,
    budget: Budget | None,
    randomness: Randomness | None = None,
    spec: AdapterSpec | None = None,
) -> PrivateRound:
    """Plan a private round and reserve what it spends: a crash from here on counts as spent.

    `spec` is needed where the noise is added in a secure sum. `rows` are the identities of the
    examples; `randomness` is for tests and simulations, whoever knows it knows the noise. Raises
    PrivacyError, before anything is trained, if the run's budget, or the site's, would be exceeded
    or the ledger cannot be trusted.
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
    plan = _plan(config, privacy, spec, len(rows))
    norm = _clipping_norm(folder, assignment.run) if plan.clipping == "adaptive" else None
    entry = ledger.reserve(
        rows, assignment.run, assignment.round, plan.spend(steps), limits(privacy, plan, budget)
    )
    return PrivateRound(
        plan=plan,
        engine=privacy.engine,
        clipping_norm=norm,
        randomness=randomness,
        entry=entry,
        rows=rows,
        run=assignment.run,
        ledger=ledger,
    )


def _plan(config: RunConfig, privacy: Privacy, spec: AdapterSpec | None, records: int) -> DpPlan:
    if privacy.noise == "local":
        return plan_for(privacy, config.training, config.federation.rounds, records)
    if spec is None:
        raise PrivacyError("noise of a secure sum is planned for an adapter, and none is given")
    noise = noise_of(config, values_of(spec))
    assert noise is not None  # RunConfig requires [secure_aggregation] with it
    return plan_together(noise, privacy, config.training.batch_size, records)


def close_round(
    round: PrivateRound, done: PrivateFit | Unnoised
) -> tuple[Cost, dict[str, Any], dict[str, bytes]]:
    """Return what is to be settled, what the report says, and the files that change with it.

    Files are path in the site's folder -> bytes. Nothing is written here.
    """
    plan = round.plan
    changes = {}
    if plan.clipping == "adaptive" and isinstance(done, PrivateFit):
        after = msgspec.json.encode(Clipping(clipping_norm=done.clipping_norm))
        changes[_clipping_name(round.run)] = after
    said = {
        "delta": plan.delta,
        "noise_multiplier": plan.noise_multiplier,
        "sample_rate": plan.sample_rate,
        "engine": done.engine,
    }
    return Cost(entry=round.entry, spend=done.spend, delta=plan.delta), said, changes


def settle(round: PrivateRound, cost: Cost) -> dict[str, Any]:
    """Settle a round that was trained; return what the report says of it."""
    head = round.ledger.settle(cost.entry, cost.spend)
    return {"epsilon": round.ledger.spent(round.rows, cost.delta), "ledger": head}


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
    file = folder / _clipping_name(run)
    if not file.exists():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Clipping).clipping_norm
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"clipping/{file.name} cannot be read ({error}): restore it, or delete it to begin "
            "again with privacy.clipping_norm"
        ) from None


def _clipping_name(run: str) -> str:
    return f"clipping/{checked_run(run)}.json"
