"""A site's part in secure sums whose members make the privacy noise together.

    record level   train: reserve ─► settle ─► kept ─► mask: noised        the first attempt is paid
    client level   train ─► kept ─► mask: reserve ─► settle ─► noised      a row for every attempt

What costs privacy is a masked vector that leaves: once others have the secrets, a sum with it may
be opened, whether this site was asked to help or not. So every attempt to sum a round is charged by
itself, before its vector leaves; of the record level the first one with the training. A round
that was charged and never opened stays charged.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from anabranch.client.ledger import Limit
from anabranch.client.privacy import DpPlan, plan_together
from anabranch.client.private_round import Books, limits
from anabranch.client.site_file import Budget
from anabranch.protocols.adapter import Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.agreed_noise import contribute_noised, noise_of, values_of
from anabranch.protocols.secagg.noise import DistributedNoise
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.spend import Spend


class Rounds(Protocol):
    """Where a site writes down which attempt of each round of a run it masked last."""

    def read(self) -> dict[int, str]:
        """Return round -> Terms.instance."""

    def write(self, opened: dict[int, str]) -> None:
        """Keep it; it is durable when this returns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisedSum:
    """What a site needs to contribute to the noised sums of one run."""

    noise: DistributedNoise
    books: Books  # its privacy ledger
    rows: Sequence[bytes]  # identities of its training records
    budget: Budget | None  # the site's own; of records alone
    masked: Rounds
    random: Callable[[int], bytes] = secrets.token_bytes

    def vector(
        self, delta: Delta, assignment: Assignment, terms: Terms, advertised: int
    ) -> NDArray[Any]:
        """Return the noised vector of one attempt, which may then be masked and sent, once.

        `advertised`: members whose keys arrived, this one's among them. What it costs is in the
        ledger when this returns. Raises PrivacyError if it would exceed a budget, ProtocolError for
        terms that are not the run's; the site is then no part of the sum.
        """
        secure = assignment.config.secure_aggregation
        assert secure is not None  # noise_of said so
        found = contribute_noised(
            delta, terms, self.noise, secure, advertised=advertised, random=self.random
        )
        self.charge(assignment, terms.instance)
        return found

    def charge(self, assignment: Assignment, instance: str) -> None:
        """Write down what this attempt costs; of records the first one is paid."""
        before, number = self.masked.read(), assignment.round
        paid = self.noise.unit == "record" and number not in before
        self.masked.write(before | {number: instance})
        if not paid:
            spend, limited = charged(assignment.config, self.noise, len(self.rows), self.budget)
            entry = self.books.reserve(self.rows, assignment.run, number, spend, limited)
            self.books.settle(entry, spend)


def noised_sum(
    config: RunConfig,
    spec: AdapterSpec,
    *,
    books: Books,
    rows: Sequence[bytes],
    budget: Budget | None,
    masked: Rounds,
) -> NoisedSum | None:
    """Return how a site contributes to the sums of a run; None: they are not noised."""
    noise = noise_of(config, values_of(spec))
    if noise is None:
        return None
    return NoisedSum(noise=noise, books=books, rows=rows, budget=budget, masked=masked)


def charged(
    config: RunConfig, noise: DistributedNoise, records: int, budget: Budget | None
) -> tuple[Spend, list[Limit]]:
    """Return what one noised contribution spends, and what it must keep."""
    if noise.unit == "client":
        assert config.client_privacy is not None  # noise_of said so
        run = Limit(
            epsilon=config.client_privacy.epsilon,
            delta=noise.delta,
            over="run",
            name="the run's [client_privacy] budget",
        )
        return noise.spend(), [run]
    assert config.privacy is not None
    plan: DpPlan = plan_together(noise, config.privacy, config.training.batch_size, records)
    return plan.spend(1), limits(config.privacy, plan, budget)
