"""What a coordinator that lies can make of everything it was ever sent.

`Spy` knows what `Cohort.seen` holds, and all that colluding members know. It opens whatever can
be opened: every secret of which it has shares enough, every masked vector whose masks it then
knows, and every sum of vectors whose masks with each other cancel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.masks import Expander
from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import Agreement, Delivery, Request, Survivors
from anabranch.protocols.secagg.plan import Group, Plan, length
from anabranch.protocols.secagg.shamir import combine
from tests.protocols.secagg.rig import Cohort

Kind = str  # "seeds" or "keys"


@dataclass
class Spy:
    """A coordinator after a sum, and its friends among the members."""

    cohort: Cohort
    colluding: frozenset[str] = frozenset()
    leaked: dict[str, tuple[bytes, bytes, dict[str, tuple[bytes, bytes]]]] = field(
        default_factory=dict
    )  # colluder -> seed, masking key, the shares it holds

    @cached_property
    def plan(self) -> Plan:
        """Return the plan of those whose adverts were seen."""
        return self.cohort.plan

    def collude(self, names: Iterable[str]) -> None:
        """Let these members tell all they know; before they reveal, and drop it."""
        self.colluding |= frozenset(names)
        for name in self.colluding:
            known = self.cohort.members[name]._secrets
            assert known is not None
            self.leaked[name] = known.seed, known.masking, dict(known.held)

    def secret(self, owner: str, kind: Kind) -> bytes | None:
        """Return a member's seed or masking key, if there are shares enough of it."""
        place = ("seeds", "keys").index(kind)
        if owner in self.leaked:
            return self.leaked[owner][:2][place]
        group = self.plan.group_of(owner)
        revealed = dict(self.cohort.seen.reveals)
        shares = {}
        for index, holder in enumerate(group.holders(owner)):
            if holder in revealed and owner in getattr(revealed[holder], kind):
                shares[index] = getattr(revealed[holder], kind)[owner]
            elif holder in self.leaked and owner in self.leaked[holder][2]:
                shares[index] = self.leaked[holder][2][owner][place]
        if len(shares) < group.shape.threshold:
            return None
        return combine(dict(list(shares.items())[: group.shape.threshold]))

    def unmasked(self, victim: str) -> NDArray[Any] | None:
        """Return the victim's vector, if all its masks are known."""
        if victim not in self.cohort.seen.masked or self.secret(victim, "seeds") is None:
            return None
        if self.open_pairs(victim):
            return None
        plan, terms = self.plan, self.cohort.terms
        count = length(terms)
        vector = plan.ring.unpack(self.cohort.seen.masked[victim], count).copy()
        expander = Expander(terms.keystream, plan.ring, count)
        seed = self.secret(victim, "seeds")
        assert seed is not None
        expander.subtract(keys.self_key(seed, plan.context, victim), vector)
        for peer in self.cohort.seen.delivered[victim]:
            key = self._pair(victim, peer)
            (expander.subtract if victim < peer else expander.add)(key, vector)
        return vector

    def open_pairs(self, name: str) -> set[str]:
        """Return with whom this member's vector has a mask that is not known."""
        if self.secret(name, "keys") is not None:
            return set()
        return {
            peer for peer in self.cohort.seen.delivered[name] if self.secret(peer, "keys") is None
        }

    def sums(self) -> list[frozenset[str]]:
        """Return the smallest sets of honest members whose sum can be computed."""
        seen = self.cohort.seen
        pairs = {name: self.open_pairs(name) for name in seen.masked if name not in self.colluding}
        found, left = [], set(pairs)
        while left:
            members, edge = set(), {left.pop()}
            while edge:  # all that hang together by masks that are not known
                members |= edge
                edge = {peer for name in edge for peer in pairs.get(name, ())} - members
            left -= members
            closed = all(name in pairs for name in members) and all(
                name in pairs[peer] for name in members for peer in pairs[name]
            )
            if closed and all(self.secret(name, "seeds") is not None for name in members):
                found.append(frozenset(members))
        return found

    def _pair(self, victim: str, peer: str) -> bytes:
        plan = self.plan
        private, other = self.secret(peer, "keys"), victim
        if private is None:
            private, other = self.secret(victim, "keys"), peer
        assert private is not None
        public = bytes.fromhex(plan.adverts[other].masking)
        return keys.mask_key(private, public, plan.context, victim, peer)


def only(request: Request, names: Iterable[str]) -> Delivery:
    """Return a delivery without the boxes of all others."""
    assert isinstance(request, Delivery)
    wanted = set(names)
    sealed = {name: box for name, box in request.sealed.items() if name in wanted}
    return Delivery(instance=request.instance, sealed=sealed)


def agree(cohort: Cohort, names: Iterable[str], survivors: Iterable[str]) -> dict[str, str]:
    """Ask these members to sign a survivor set; return the signatures of those who do."""
    request = Survivors(instance=cohort.terms.instance, names=tuple(sorted(survivors)))
    answers = {name: cohort.ask(name, request) for name in names}
    return {name: one.reply.signature for name, one in answers.items() if one is not None}  # type: ignore[union-attr]


def reveal(cohort: Cohort, names: Iterable[str], signatures: dict[str, str]) -> None:
    """Ask these members to reveal, showing them these signatures."""
    for name in names:
        cohort.ask(name, Agreement(instance=cohort.terms.instance, signatures=signatures))


def group_of(member: Member) -> Group:
    """Return the group that a member reckons it is in."""
    assert member._plan is not None
    return member._plan.group_of(member.name)
