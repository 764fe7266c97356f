"""Who masks with whom, who holds whose shares, how many must stay: from terms and adverts alone.

Members and coordinator compute it by themselves, and get the same.

    n members of a group    M invited    c = ⌊colluding M⌋, all of whom may be in one group
    needed = max(minimum, min(n, max(⌊threshold n⌋, ⌊(n + c) / 2⌋) + 1))
             with minimum + c in place of minimum if there are groups

So many must be in a sum, and so many must sign who is in it. Two survivor sets of one group
would need n + c signatures or fewer: there is one. Signatures of neighbours alone are not enough
in a sparse graph (tests/attacks/test_equivocating_survivors.py). Whoever chooses the last advert
can try many partitions into groups: hence c is that of all groups, and `minimum` others are
needed in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from anabranch.protocols.secagg.fixed_point import slots
from anabranch.protocols.secagg.graph import Shape, company_of, groups_of, neighbours
from anabranch.protocols.secagg.ring import Ring
from anabranch.protocols.secagg.terms import Advert, Terms, context_of


@dataclass(frozen=True)
class Group:
    """Members whose updates are added to one sum."""

    names: tuple[str, ...]  # ascending
    shape: Shape
    needed: int  # of them must be in the sum, and must sign it
    honest: int  # so many who do not collude are in every sum of it that can be opened
    peers: dict[str, tuple[str, ...]]  # member -> with whom it shares a mask, ascending

    def holders(self, name: str) -> tuple[str, ...]:
        """Return who holds shares of a member's secrets, itself included, ascending.

        The holder at place i has the share at x = i + 1.
        """
        return tuple(sorted((*self.peers[name], name)))


class Plan:
    """A sum among those who advertised; ConfigError if no threshold is sound for so many."""

    def __init__(self, terms: Terms, adverts: Sequence[Advert]) -> None:
        self.terms, self.context = terms, context_of(terms, adverts)
        self.adverts = {advert.name: advert for advert in adverts}
        names = tuple(self.adverts)
        parts = [names] if terms.group is None else groups_of(names, self.context, terms.group)
        self.groups = tuple(self._group(tuple(part)) for part in parts)

    def group_of(self, name: str) -> Group:
        """Return the group that a member is in."""
        return next(group for group in self.groups if name in group.peers)

    @cached_property
    def ring(self) -> Ring:
        """Return the ring of the sum."""
        return Ring(self.terms.ring)

    def _group(self, names: tuple[str, ...]) -> Group:
        terms = self.terms
        company = company_of(
            len(names),
            len(terms.members),
            minimum=terms.minimum,
            share=terms.threshold,
            colluding=terms.colluding,
            grouped=terms.group is not None,
        )
        peers = neighbours(names, self.context, company.shape)
        return Group(names, company.shape, company.needed, company.honest, peers)


def length(terms: Terms) -> int:
    """Return how many ring values a vector has: the update's, then the counters'."""
    return terms.values + terms.counters * slots(Ring(terms.ring), len(terms.members))
