"""What a secure sum is of: the terms that fit a delta, and the vector that goes into it.

Site and coordinator compute the same from the same configuration; terms that differ are refused.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from numpy.typing import NDArray

from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter, Delta
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import DataError, ProtocolError
from anabranch.protocols.messages import Assignment, Trained
from anabranch.protocols.part import Part
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.agreed_noise import contribute_noised, noise_of, values_of
from anabranch.protocols.secagg.fixed_point import OutOfRange, ring_for
from anabranch.protocols.secagg.graph import Company, colluders
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import Adverts, Delivery, Request, Survivors
from anabranch.protocols.secagg.noise import ring_limit
from anabranch.protocols.secagg.plan import Group
from anabranch.protocols.secagg.ring import RingBits
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec, shown
from anabranch.protocols.tables import SecureAggregation

AGREEMENT = b"anabranch secagg agreement 1\0"

log = logging.getLogger(__name__)

# By identity: a simulated cohort trains from one adapter, whose frame is hashed once.
_digests: WeakKeyDictionary[Adapter, str] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """A trained delta that waits for its sum."""

    assignment: Assignment  # without `signed`
    model: str  # SHA-256 of the frame that it was trained from
    delta: Delta


def hidden(trained: Trained, config: RunConfig) -> Trained:
    """Return a report without what only a sum may show: records, loss, and steps.

    In a private run the steps are fixed by run.toml, and what is accounted for needs them.
    """
    steps = trained.steps if config.privacy is not None else 0
    return msgspec.structs.replace(trained, num_examples=0, steps=steps, loss=None)


def vector_of(delta: Delta, assignment: Assignment, terms: Terms, advertised: int) -> NDArray[Any]:
    """Return a delta as a member's vector of the ring, before it is masked.

    Where the members of a sum make its privacy noise, this one's share is in it; `advertised`:
    members whose keys arrived. Raises DataError for values beyond the terms' range, ProtocolError
    for terms that do not fit, and what contribute_noised raises. What is raised is sent, so no
    value is in it: those are logged.
    """
    config, federation = assignment.config, assignment.config.federation
    noise = noise_of(config, values_of(delta.spec))
    if noise is not None and config.secure_aggregation is not None:
        secure, random = config.secure_aggregation, secrets.token_bytes
        return contribute_noised(delta, terms, noise, secure, advertised=advertised, random=random)
    try:
        return contribution.contribute(
            delta,
            terms,
            summed(delta.part),
            weighting=federation.weighting,
            normalize_steps=federation.normalize_steps,
            by_rank=federation.mixed_ranks,
            random=secrets.token_bytes,
        )
    except OutOfRange as error:
        log.warning("round %d: %s (%s)", assignment.round, error, error.detail)
        text = f"round {assignment.round}: {error}; the site's log says more"
        raise DataError(text) from None


def grid_of_sum(
    config: RunConfig, secure: SecureAggregation, spec: AdapterSpec, members: int
) -> tuple[RingBits, float]:
    """Return (ring, limit) of the terms of a sum of so many members; ConfigError: none holds it."""
    noise = noise_of(config, values_of(spec))
    if noise is None:
        return ring_for(members, secure.value_bits, secure.ring).bits, secure.range
    ring, limit = ring_limit(noise, members, secure)
    return ring.bits, limit


def summed(part: Part) -> Part:
    """Return what a sum of deltas of this part is of: the same tensors, all ranks."""
    return Part(factors=part.factors, dense=part.dense)


def agreement_of(config: RunConfig, part: Part) -> str:
    """Return what Terms.config says of sums of this part: the digest of the configuration.

    Of less than whole adapters it is SHA-256(AGREEMENT ‖ that digest ‖ the part's JSON): deltas of
    two parts may have as many values, and those of one be zeros, as everybody knows.
    """
    digest, common = config.digest(), summed(part)
    if common.whole:
        return digest
    told = bytes.fromhex(digest) + msgspec.json.encode(common, order="sorted")
    return hashlib.sha256(AGREEMENT + told).hexdigest()


def require_company(
    terms: Terms, rank: int, names: Collection[str], group: Group | None = None
) -> None:
    """Raise ProtocolError if few_trained says that a sum among `names` would show too much."""
    few = few_trained(terms, rank, names, group)
    if few:
        raise ProtocolError(f"round {terms.round}: {few}")


def few_trained(
    terms: Terms, rank: int, names: Collection[str], group: Group | Company | None = None
) -> str:
    """Return "" if each rank was trained by enough of `names`, by all, or by none; else what is so.

    `rank`: of the adapter; `group`: whose sum it is, once that is known. Enough are `minimum` + c:
    all c that may collude may have trained the rank of one member, and take their part off the
    sum. On a sparse graph a sum may come apart into parts of group.honest honest members, so
    fewer may leave a rank out: `minimum` of any such part must have trained it.

    Every member looks at all ranks, not at its own alone: the sum is opened also without those
    who refuse. Who says it trained what it did not counts as colluding.
    """
    told = _ranks(terms)
    if not told:
        return ""
    whole = sum(one not in told for one in names)
    some = Counter(index for one in names for index in set(told.get(one, ())))
    c = colluders(len(terms.members), terms.colluding)
    needed = terms.minimum + c
    if group is not None and not group.shape.complete:
        needed = max(needed, len(names) - group.honest + terms.minimum)
    for index in range(rank):
        trained = whole + some[index]
        if 0 < trained < min(needed, len(names)):
            return (
                f"{trained} members trained rank {index}, {needed} are needed, {c} of whom may "
                "collude: the sum would show what each of them learned"
            )
    return ""


def require_going_on(member: Member, rank: int, request: Request) -> None:
    """Raise ProtocolError, as require_company does, for what a stage tells of who is left.

    Before a masked vector leaves, so that the update is still free for another attempt. On a
    complete graph a delivery tells of all who are left; on a sparse one of neighbours alone.
    """
    terms = member.terms
    if not _ranks(terms) or not isinstance(request, Adverts | Delivery | Survivors):
        return
    group = member.group
    names = group.names
    if isinstance(request, Survivors):
        names = request.names
    elif isinstance(request, Delivery) and group.shape.complete:
        names = (*request.sealed, member.name)
    require_company(terms, rank, names, group)


def require_told(terms: Terms, part: Part, name: str) -> None:
    """Raise ProtocolError unless the terms say that `name` trained this part's ranks."""
    if _ranks(terms).get(name) != part.ranks:
        raise ProtocolError(
            f"terms of round {terms.round}: {name} trained other ranks than they say"
        )


def _ranks(terms: Terms) -> dict[str, tuple[int, ...]]:
    """Return who trained some ranks alone, and which."""
    return {} if isinstance(terms.ranks, msgspec.UnsetType) else terms.ranks


def digest_of(adapter: Adapter) -> str:
    """Return the SHA-256 of the adapter's frame, by which the terms of a sum name the model."""
    known = _digests.get(adapter)
    if known is None:
        known = _digests[adapter] = wire.digest(wire.encode(adapter))
    return known


def require_terms(terms: Terms, assignment: Assignment, kept: Kept | None, name: str) -> Kept:
    """Return the delta kept; raise ProtocolError unless the terms are of it."""
    plain = msgspec.structs.replace(assignment, signed=None)
    if kept is None or kept.assignment != plain:
        raise ProtocolError(
            f"round {assignment.round}: {name} keeps no delta of this round, part and "
            "configuration: it has not trained it, or its process was started anew since"
        )
    config, delta = assignment.config, kept.delta
    secure = config.secure_aggregation
    if secure is None:
        raise ProtocolError(f"run {shown(assignment.run)} has no [secure_aggregation]")
    by_rank = config.federation.mixed_ranks
    ring, limit = grid_of_sum(config, secure, delta.spec, len(terms.members))
    values, counters = contribution.sizes(delta.spec, summed(delta.part), by_rank=by_rank)
    for what, expected, got in (
        ("run", assignment.run, terms.run),
        ("round", assignment.round, terms.round),
        ("configuration and part", agreement_of(config, delta.part), terms.config),
        ("model", kept.model, terms.model),
        ("minimum", secure.minimum, terms.minimum),
        ("threshold", secure.threshold, terms.threshold),
        ("colluding", secure.colluding, terms.colluding),
        ("ring", ring, terms.ring),
        ("range", limit, terms.limit),
        ("group", secure.group, terms.group),
        ("values", values, terms.values),
        ("counters", counters, terms.counters),
    ):
        if expected != got:
            raise ProtocolError(
                f"terms of round {assignment.round}: {what} {shown(str(got))}, and what {name} "
                f"trained has {expected}: nothing is summed on these terms"
            )
    if secure.keystream not in ("fastest", terms.keystream):
        raise ProtocolError(
            f"terms of round {assignment.round}: keystream {terms.keystream}, and the "
            f"configuration asks for {secure.keystream}"
        )
    require_told(terms, delta.part, name)
    require_company(terms, delta.spec.rank, terms.members)
    return kept
