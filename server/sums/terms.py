"""The terms of a round's secure sum: what the coordinator proposes, and every member checks.

Sites compute the same from the same configuration (client/sums/terms.py), and refuse terms that
differ.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import msgspec

from anabranch.client.sums.terms import (
    agreement_of,
    digest_of,
    few_trained,
    grid_of_sum,
    summed,
)
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import ConfigError, RunError
from anabranch.protocols.messages import Trained
from anabranch.protocols.part import Part
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.protocols.secagg.graph import smallest_company
from anabranch.protocols.secagg.masks import fastest
from anabranch.protocols.secagg.terms import Peer as RosterPeer
from anabranch.protocols.secagg.terms import Roster, Terms
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import SecureAggregation
from anabranch.server.aggregation.robust import least
from anabranch.server.flower import Peer, Question


class FewTrained(RunError):
    """Too few of those who are there have trained a rank: every member would refuse the sum."""


def roster_of(peers: Mapping[str, Peer]) -> Roster:
    """Return the roster of a run without a proposal: those that are here."""
    keys = {name: peer.peer_key for name, peer in peers.items()}
    return Roster.of(RosterPeer(name=name, key=key) for name, key in keys.items() if key)


def part_of(question: Question[Trained]) -> Part:
    """Return what the sum is of: what all were told to train, with all ranks."""
    return summed(next(iter(question.parts.values())))


def require_possible(
    config: RunConfig, secure: SecureAggregation, spec: AdapterSpec, members: int
) -> None:
    """Raise ConfigError, before anybody trains, if no sum of so many sites could be opened.

    No ring would hold it, no threshold be sound, or the groups be too few for the robust rule.
    That fewer than `minimum` are there is said when they have trained: some may come back.
    """
    if members < secure.minimum:
        return
    grid_of_sum(config, secure, spec, members)
    if secure.group is None or config.robust is None:
        smallest_company(members, secure)
        return
    groups, need = max(members // secure.group, 1), max(least(config.robust), 2)
    if groups < need:
        raise ConfigError(
            f"secure_aggregation.group: {members} sites make {groups} groups of {secure.group}, "
            f'and robust.rule = "{config.robust.rule}" compares {need} or more: {need} groups are '
            f"{need * secure.group} sites. Ask more sites, make groups smaller, or lower "
            "robust.byzantine"
        )
    smallest_company(members, secure)


def terms_of(
    config: RunConfig,
    secure: SecureAggregation,
    question: Question[Trained],
    adapter: Adapter,
    members: Sequence[str],
    roster: Roster,
    run: str,
) -> Terms:
    """Return the terms of a new sum of what `members` have trained from `adapter`.

    Raises RunError for a member that trains some of the ranks, in a run without mixed ranks, and
    FewTrained for a rank that too few of the members have trained.
    """
    by_rank, weighting = config.federation.mixed_ranks, config.federation.weighting
    parts = {name: question.parts[name] for name in members}
    low = [name for name, part in parts.items() if part.ranks is not None]
    if low and not by_rank:
        raise RunError(
            f"round {question.round}: {low[0]} trains some of the ranks, and a sum of all "
            "needs federation.mixed_ranks = true, or lora.rank lowered to its max_rank"
        )

    def heaviest(name: str) -> int:
        """Return the weight of a site that has as many records as it has described."""
        weight = contribution.weight_of(question.peers[name].num_examples, weighting)
        if not by_rank:
            return weight
        rank, ranks = adapter.spec.rank, parts[name].ranks
        return contribution.heaviest(weight, rank, rank if ranks is None else len(ranks))

    values, counters = contribution.sizes(adapter.spec, part_of(question), by_rank=by_rank)
    ring, limit = grid_of_sum(config, secure, adapter.spec, len(members))
    noised = noise_of(config, values_of(adapter.spec)) is not None
    terms = Terms(
        run=run,
        round=question.round,
        instance=secrets.token_hex(32),
        config=agreement_of(config, part_of(question)),
        model=digest_of(adapter),
        roster=roster.digest,
        members=tuple(members),
        minimum=secure.minimum,
        threshold=secure.threshold,
        colluding=secure.colluding,
        ring=ring,
        limit=limit,
        # Noised, all count the same, and nobody's records are told.
        weight=contribution.WEIGHT_UNIT if noised else max(map(heaviest, members)),
        values=values,
        counters=counters,
        keystream=fastest() if secure.keystream == "fastest" else secure.keystream,
        group=secure.group,
        ranks={name: part.ranks for name, part in parts.items() if part.ranks is not None}
        or msgspec.UNSET,
    )
    try:
        company = smallest_company(len(members), secure) if low else None
    except ConfigError as error:
        raise FewTrained(f"round {question.round}: {error}") from None
    few = few_trained(terms, adapter.spec.rank, members, company)
    if few:
        raise FewTrained(
            f"round {question.round}: {few}. Too few sites of a high rank have trained in time, so "
            "nothing is summed: ask more sites, give them more time "
            "(federation.deadline_s), or lower lora.rank to what all of them can train"
        )
    return terms
