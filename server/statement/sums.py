"""What a run with secure aggregation says of itself: what the coordinator saw, what is assumed.

It is said beside the guarantees, of private runs and of others. What is promised and how:
docs/secure-aggregation.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anabranch.protocols.config import RunConfig
from anabranch.server.statement.disclosures import clients_evaluate, noised_by_members


@dataclass(frozen=True, kw_only=True)
class Sums:
    """The sums of a run, and what the coordinator saw beside them."""

    minimum: int  # updates in an opened sum, at least
    threshold: float  # share of a sum's members that must be in it, more than
    colluding: float  # share of a round's members that may collude, at most
    group: int | None  # members of a group, at least; None: one sum a round
    noised: bool  # the members make the noise: all weigh the same
    weighted: bool  # by records: the terms tell the heaviest weight
    by_rank: bool  # sites train different ranks
    spent: bool  # sites tell what they spent on their records
    evaluated: bool  # sites tell metrics of their held-out records
    simulated: bool = False

    @classmethod
    def of(cls, config: RunConfig, *, simulated: bool) -> Sums | None:
        """Return what the tables of a run say; None: it has no [secure_aggregation]."""
        secure = config.secure_aggregation
        if secure is None:
            return None
        noised = noised_by_members(config)
        return cls(
            minimum=secure.minimum,
            threshold=secure.threshold,
            colluding=secure.colluding,
            group=secure.group,
            noised=noised,
            weighted=config.federation.weighting == "examples" and not noised,
            by_rank=config.federation.mixed_ranks,
            spent=config.privacy is not None,
            evaluated=clients_evaluate(config),
            simulated=simulated,
        )

    @property
    def told(self) -> tuple[str, ...]:
        """Return what the coordinator saw of each single site."""
        found = [
            "the numbers of training and held-out records, and the highest rank, that it said "
            "before round 1",
            "when it takes part, how long it trains, at which stage of a sum it is lost, and why",
        ]
        if self.spent:
            found.append("its ε, δ, σ, q, steps, engine and ledger head")
        if self.evaluated:
            found.append("metrics on its held-out records")
        return tuple(found)


def paragraphs(sums: Sums) -> list[str]:
    """Return what was seen, and on what that rests."""
    return [_saw(sums), _assumed(sums)]


def as_json(sums: Sums) -> dict[str, Any]:
    """Return the same for summary.json."""
    return {
        "coordinator_saw": "sums of updates",
        "of_single_sites": list(sums.told),
        "minimum": sums.minimum,
        "threshold": sums.threshold,
        "colluding": sums.colluding,
        "group": sums.group,
    }


def _saw(sums: Sums) -> str:
    per = "round" if sums.group is None else "group"
    said = (
        f"Secure aggregation: the coordinator saw sums of updates, and no update. A {per}'s sum "
        f"was opened only if at least {sums.minimum} sites, and more than {sums.threshold:.4g} of "
        "its members, those that trained in time and sent keys, are in it."
    )
    if sums.group is not None:
        said += (
            f" Groups are drawn at random in every round, of at least {sums.group} members if "
            "there are so many; the coordinator saw the sum of each, and its members' names."
        )
    if sums.noised:
        said += " In it all members weigh the same, and their records are not counted."
    else:
        ranks = ", and of their weights on each rank," if sums.by_rank else ""
        said += f" With it the sums of their records, weights and steps{ranks} are opened."
    said += f" Of a single site the coordinator saw {'; '.join(sums.told)}."
    said += " Members of a sum are told each other's names"
    if sums.by_rank:
        return f"{said}, and the heaviest of their weights, by records and ranks."
    return f"{said}{', and the largest of their numbers of records' if sums.weighted else ''}."


def _assumed(sums: Sums) -> str:
    said = (
        "Assumed: the names and keys of the roster are those of real sites, by the word of its "
        "author: of the run, or of the coordinator itself where no run was proposed and signed. "
        f"At most ⌊{sums.colluding:.4g}·n⌋ of a round's n members tell the coordinator all they "
        "know, and so take their own updates out of the sum. X25519, Ed25519, AES-256 or ChaCha20, "
        "and Shamir shares hold. "
    )
    said += (
        "What a sum says is bounded by the privacy noise in it, as stated above."
        if sums.noised or sums.spent
        else "What a sum says is bounded by nothing: one of few updates says much about each."
    )
    if sums.simulated:
        said += (
            " In this simulation one program played all parties: nothing was hidden from it, and "
            "what is said here is said of a federation that carries out the same configuration."
        )
    return said
