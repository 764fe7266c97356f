"""Attack: make the sum so small that it is one victim's update.

Known since Bonawitz et al. 2017 (section 6): the server decides who dropped out. Pasquini et al.
2022 (doi:10.1145/3548606.3560557) get the same by other means, see test_different_models.py.

Five ways: terms with few members or a low minimum, few adverts, few boxes delivered, few
survivors, and to the victim other dropouts than to the rest, so that the masks it shares with
those who stay are not in its vector at all.

Why it fails: every one of these numbers has a floor that the member computes by itself, from the
adverts (graph.py) and from its own limits; and it signs no survivor whose shares it does not hold.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from anabranch.protocols.errors import PolicyError, ProtocolError
from anabranch.protocols.secagg.member import Answer, Limits, Member
from anabranch.protocols.secagg.messages import Agreed, Invite, Survivors
from anabranch.protocols.secagg.terms import survivor_bytes
from tests.attacks.lying import Spy, agree, only, reveal
from tests.protocols.secagg.rig import Cohort, key_of, names_of, roster_of, terms_of


class SignsAll(Member):
    """Signs every survivor set."""

    def _agree(self, request: Survivors) -> Answer:
        self._survivors = request.names
        signed = survivor_bytes(self._planned.context, request.names)
        signature = self._key.sign(signed).hex()
        return Answer(Agreed(instance=self.terms.instance, signature=signature))


def told_of_other_dropouts(n: int, kind: type[Member]) -> tuple[Cohort, str]:
    """The victim is told that only t − 1 others shared; then they drop out, and the rest stay."""
    cohort = Cohort.of(n)
    cohort.kind = kind
    cohort.until("mask")
    victim, *others = cohort.terms.members
    threshold = cohort.plan.groups[0].shape.threshold
    near, far = others[: threshold - 1], others[threshold - 1 :]
    for name, request in cohort.aggregation.requests().items():
        assert cohort.ask(name, only(request, near) if name == victim else request)
    survivors = [victim, *far]
    while len(survivors) < threshold:
        survivors.append(near.pop())
    signed = agree(cohort, survivors, survivors)
    reveal(cohort, signed, signed)
    return cohort, victim


@pytest.mark.parametrize("n", [3, 5, 7])
def test_other_dropouts_for_the_victim_would_open_its_update(n: int) -> None:
    """With n = 2t − 1 those near and those far are enough, each."""
    cohort, victim = told_of_other_dropouts(n, SignsAll)

    found = Spy(cohort).unmasked(victim)
    assert found is not None
    assert np.array_equal(found, cohort.vectors[victim])


@pytest.mark.parametrize("n", [3, 4, 5, 6, 7, 8])
def test_a_member_signs_no_survivor_whom_it_was_told_had_dropped_out(n: int) -> None:
    cohort, victim = told_of_other_dropouts(n, Member)

    assert Spy(cohort).unmasked(victim) is None
    assert Spy(cohort).sums() == []
    with pytest.raises(ProtocolError, match="was said to have dropped out before"):
        raise cohort.errors[victim]


def test_terms_below_the_members_own_minimum_are_refused() -> None:
    names = names_of(3)
    roster = roster_of(names)
    for members, minimum in ((names[:2], 4), (names, 2)):
        terms = terms_of(members, roster, minimum=minimum)
        invite = Invite(terms=terms, roster=roster)
        with pytest.raises(PolicyError, match="takes part in sums of 3 or more"):
            Member(names[0], key_of(names[0]), invite, limits=Limits(minimum=3))


def test_terms_that_hold_against_fewer_colluders_than_the_member_asks_for_are_refused() -> None:
    names = names_of(9)
    roster = roster_of(names)
    terms = terms_of(names, roster, colluding=0.1)
    invite = Invite(terms=terms, roster=roster)
    with pytest.raises(PolicyError, match=r"against 0\.1 of the members.*asks for 0\.3"):
        Member(names[0], key_of(names[0]), invite, limits=Limits(colluding=0.3))


def test_too_few_adverts_are_refused() -> None:
    cohort = Cohort.of(6, minimum=4)
    cohort.until("share")
    name = "site-0000"
    request = cohort.aggregation.requests()[name]
    for count in (1, 2, 3):
        few = msgspec.structs.replace(request, adverts=request.adverts[:count])  # type: ignore[union-attr]
        assert cohort.ask(name, few) is None
        assert "are needed" in str(cohort.errors[name]) or "2 members or more" in str(
            cohort.errors[name]
        )
    assert cohort.members[name].stage == "share"
    cohort.run()
    cohort.require_exact()  # what was refused has changed nothing


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_boxes_are_refused(count: int) -> None:
    """With itself a member counts `count` + 1, of which 4 of 6 are needed."""
    cohort = Cohort.of(6)
    cohort.until("mask")
    name, *others = cohort.terms.members
    request = cohort.aggregation.requests()[name]

    assert cohort.ask(name, only(request, others[:count])) is None
    assert f"{count + 1} of 6 members around site-0000 have shared" in str(cohort.errors[name])
    assert cohort.ask(name, only(request, others[:3])) is not None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_too_few_survivors_are_not_signed(count: int) -> None:
    cohort = Cohort.of(6)
    cohort.until("agree")
    name = "site-0000"

    assert agree(cohort, [name], cohort.terms.members[:count]) == {}
    assert f"{count} of 6 members" in str(cohort.errors[name])
    assert agree(cohort, [name], cohort.terms.members[1:]) == {}
    assert "site-0000 is not among them" in str(cohort.errors[name])


def test_fewer_survivors_than_the_minimum_are_not_signed() -> None:
    """Four of six are enough for every threshold, and not for these terms."""
    cohort = Cohort.of(6, minimum=5)
    cohort.until("agree")
    name = "site-0000"

    assert agree(cohort, [name], cohort.terms.members[:4]) == {}
    assert "4 of 6 members are left, and 5 are needed" in str(cohort.errors[name])
    assert agree(cohort, [name], cohort.terms.members[:5]) != {}


def test_without_the_agreement_of_enough_members_nothing_is_revealed() -> None:
    cohort = Cohort.of(5)
    cohort.until("agree")
    signed = agree(cohort, cohort.terms.members, cohort.terms.members)
    reveal(cohort, ["site-0000"], dict(list(signed.items())[:2]))

    assert "2 of 5 members signed the survivor set, and 3 are needed" in str(
        cohort.errors["site-0000"]
    )
    assert cohort.seen.reveals == []
