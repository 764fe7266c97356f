"""Attack: the coordinator tells members different survivor sets, and collects both secrets.

Bonawitz et al. 2017 (doi:10.1145/3133956.3133982, section 6.2) add the consistency round against
it; Bell et al. 2020 (doi:10.1145/3372297.3417885, section 4) ask for the signatures of neighbours.

Why it fails: a member reveals only when `needed` members of its group signed the set that it
signed itself, and two sets cannot both have so many: 2 needed > n + c. Signatures of neighbours
alone are not enough on a sparse graph, as the second test shows: a victim can be given neighbours
who signed its set, while everybody else signs another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anabranch.protocols.secagg.member import Answer, Member
from anabranch.protocols.secagg.messages import Agreement, Reveal
from tests.attacks.lying import Spy, agree, only, reveal
from tests.protocols.secagg.rig import Cohort


class AsksNobody(Member):
    """Reveals without a look at the signatures."""

    def _reveal(self, request: Agreement) -> Answer:
        held, survivors = self._own.held, set(self._survivors)
        seeds = {name: pair[0] for name, pair in held.items() if name in survivors}
        private = {name: pair[1] for name, pair in held.items() if name not in survivors}
        return Answer(Reveal(instance=self.terms.instance, seeds=seeds, keys=private))


class AsksNeighbours(AsksNobody):
    """Is content when t of the holders of its own shares signed."""

    def _reveal(self, request: Agreement) -> Answer:
        around = {self.name, *self.group.peers[self.name]} & set(self._survivors)
        if len(around & request.signatures.keys()) < self.group.shape.threshold:
            return Answer(Reveal(instance=self.terms.instance, seeds={}, keys={}))
        return super()._reveal(request)


def against_a_sparse_graph(kind: Callable[..., Member]) -> tuple[Cohort, str]:
    """130 members, none of whom helps: one victim, t − 1 of its neighbours, and the others."""
    cohort = Cohort.of(130, values=3, counters=0)
    cohort.kind = kind
    cohort.until("mask")
    (group,) = cohort.plan.groups
    everybody = cohort.terms.members
    victim = everybody[0]
    neighbours = group.peers[victim]
    near = set(neighbours[: group.shape.threshold - 1])
    for name, request in cohort.aggregation.requests().items():
        assert cohort.ask(name, only(request, near) if name == victim else request)
    first = {victim, *near}
    others = [name for name in everybody if name not in first]
    signed = agree(cohort, first, set(everybody) - (set(neighbours) - near))
    reveal(cohort, first, signed)
    reveal(cohort, others, agree(cohort, others, set(everybody) - near))
    return cohort, victim


@pytest.mark.parametrize("kind", [AsksNeighbours])
def test_signatures_of_neighbours_would_open_one_members_update_on_a_sparse_graph(
    kind: Callable[..., Member],
) -> None:
    cohort, victim = against_a_sparse_graph(kind)

    found = Spy(cohort).unmasked(victim)
    assert found is not None
    assert np.array_equal(found, cohort.vectors[victim])


def test_on_a_sparse_graph_two_survivor_sets_open_nothing() -> None:
    cohort, victim = against_a_sparse_graph(Member)

    spy = Spy(cohort)
    assert spy.unmasked(victim) is None
    assert all(len(one) > 65 for one in spy.sums())
    with pytest.raises(
        type(cohort.errors[victim]), match=r"1\d of 130 members signed the survivor set, and 66"
    ):
        raise cohort.errors[victim]


def against_a_complete_graph(kind: Callable[..., Member], **terms: Any) -> tuple[Cohort, str]:
    """Five members, the last of whom helps: two are told that the victim is there, two not."""
    cohort = Cohort.of(5, **terms)
    cohort.kind = kind
    cohort.until("agree")
    victim, friend, *others, helper = cohort.terms.members
    spy = Spy(cohort)
    spy.collude([helper])
    there = {victim, friend, helper, others[0]}
    gone = {friend, *others, helper}
    first = agree(cohort, [victim, friend], there)
    second = agree(cohort, others, gone)
    own = cohort.members[helper]
    for names, signed in ((there, first), (gone, second)):  # the helper signs both
        own._next = "agree"
        signed |= agree(cohort, [helper], names)
    reveal(cohort, [victim, friend], first)
    reveal(cohort, others, second)
    keys = [spy.secret(victim, kind) is not None for kind in ("seeds", "keys")]
    found = spy.unmasked(victim)
    assert all(keys) == (found is not None)
    return cohort, "" if found is None else victim


def test_one_helper_more_than_agreed_would_open_an_update() -> None:
    """The assumption is needed: these terms promise nothing against a colluding member."""
    _, opened = against_a_complete_graph(Member, threshold=0.5, colluding=0.0)

    assert opened


@pytest.mark.parametrize("kind", [Member, AsksNobody])
def test_on_a_complete_graph_the_helpers_that_were_agreed_on_open_nothing(
    kind: Callable[..., Member],
) -> None:
    """t = 4 of 5 holds against one helper, by counting alone; the signatures come on top."""
    cohort, opened = against_a_complete_graph(kind, threshold=2 / 3, colluding=0.2)

    assert not opened
    if kind is Member:
        assert len(cohort.errors) == 4
        with pytest.raises(type(cohort.errors["site-0000"]), match="members signed the survivor"):
            raise cohort.errors["site-0000"]


def test_a_second_survivor_set_is_refused_and_a_signature_of_another_set_does_not_count() -> None:
    cohort = Cohort.of(4)
    cohort.until("agree")
    one, *others = cohort.terms.members
    agree(cohort, [one], cohort.terms.members)
    agree(cohort, [one], cohort.terms.members[:3])
    assert "out of turn" in str(cohort.errors.pop(one))

    signed = agree(cohort, others[:2], cohort.terms.members[:3])
    reveal(cohort, [one], signed | dict.fromkeys([one, others[2]], "0" * 128))
    assert "not signed with its key" in str(cohort.errors[one])
    assert cohort.seen.reveals == []
