"""Attack: form the groups so that the coordinator's helpers are all in the victim's.

The partition is a hash of the adverts. A helper that advertises last can try as many keys as it
likes until the groups suit it; among 24 members in groups of eight its two friends are in one
group with the victim every ninth time. Half a group's majority then falls short.

Why it fails: a group's threshold holds against all helpers of the whole cohort at once, and a
group that they could outnumber is refused.
"""

from __future__ import annotations

import hashlib
import secrets

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.secagg import keys
from anabranch.protocols.secagg.graph import (
    COMPLETE_UP_TO,
    colluders,
    company_of,
    groups_of,
    shape_of,
)
from anabranch.protocols.secagg.messages import Adverts, Stage
from anabranch.protocols.secagg.plan import Plan
from anabranch.protocols.secagg.terms import Advert, advertise, context_of
from tests.protocols.secagg.rig import Cohort, key_of, names_of

NAMES = names_of(24)
VICTIM, HELPERS = NAMES[0], set(NAMES[-2:])


def test_helpers_come_into_one_group_after_a_few_tries() -> None:
    tries = 0
    while True:
        seed = hashlib.sha256(tries.to_bytes(4)).digest()
        tries += 1
        group = next(one for one in groups_of(NAMES, seed, 8) if VICTIM in one)
        if set(group) >= HELPERS:
            break
    naive = shape_of(8, 0.5, 0.1)  # what eight members would do by themselves: no helper among 8

    assert tries < 100
    assert 2 * naive.threshold <= 8 + len(HELPERS)  # two survivor sets get their signatures


@pytest.mark.parametrize("colluding", [0.0, 0.05, 0.1, 0.2])
def test_every_group_holds_against_all_helpers_of_the_cohort(colluding: float) -> None:
    cohort = Cohort.of(24, group=8, colluding=colluding, values=1, counters=0)
    cohort.run()
    helpers = int(colluding * 24)

    cohort.require_exact()
    assert len(cohort.aggregation.sums) == 3
    for group in cohort.plan.groups:
        assert 2 * group.shape.threshold > len(group.names) + helpers
        assert 2 * group.needed > len(group.names) + helpers


def test_a_group_that_helpers_could_fill_is_no_plan() -> None:
    cohort = Cohort.of(24, group=4, colluding=0.2, values=1, counters=0)
    cohort.run()

    assert cohort.aggregation.stage == "aborted"
    message = "a group of 4 is too small. Set group to 6 or more"
    assert message in cohort.aggregation.reason
    adverts = [cohort.seen.adverts[name] for name in cohort.terms.members]
    with pytest.raises(ConfigError, match=message):
        Plan(cohort.terms, adverts)


def ground(cohort: Cohort, helpers: set[str], size: int) -> dict[str, Advert]:
    """Return all adverts, the last helper's with keys that bring all helpers into one group."""
    cohort.until("share")
    adverts, last = dict(cohort.seen.adverts), max(helpers)
    while True:
        sealing, masking = (keys.public_of(secrets.token_bytes(32)) for _ in range(2))
        adverts[last] = advertise(last, sealing, masking, cohort.terms.digest, key_of(last))
        context = context_of(cohort.terms, adverts.values())
        if any(helpers <= set(one) for one in groups_of(tuple(adverts), context, size)):
            return adverts


def test_no_group_is_of_helpers_and_one_other() -> None:
    """Of 20 two may collude: groups of three are one victim and both, of four two victims."""
    three, four, five = (
        Cohort.of(20, group=size, minimum=3, threshold=0.6667, colluding=0.1, values=1, counters=0)
        for size in (3, 4, 5)
    )
    helpers = set(names_of(20)[-2:])
    adverts = ground(five, helpers, 5)

    for cohort, other in ((three, 3), (four, 4)):
        cohort.run()
        assert f"a group of {other} is too small. Set group to 5 or more" in (
            cohort.aggregation.reason
        )
    member = five.members[VICTIM]
    member.answer(Adverts(instance=five.terms.instance, adverts=tuple(adverts.values())))
    (theirs,) = [
        one for one in Plan(five.terms, list(adverts.values())).groups if helpers <= set(one.names)
    ]
    assert theirs.needed - len(helpers) == theirs.honest == 3


def test_every_member_refuses_a_group_of_helpers_and_one_other() -> None:
    """What a coordinator that does not look makes of such terms."""
    cohort = Cohort.of(20, group=3, minimum=3, threshold=0.6667, colluding=0.1)
    cohort.step()
    adverts = tuple(cohort.seen.adverts[name] for name in cohort.terms.members)
    request = Adverts(instance=cohort.terms.instance, adverts=adverts)

    for member in cohort.members.values():
        with pytest.raises(ProtocolError, match=r"a group of 3 is too small\. Set group to 5"):
            member.answer(request)


@settings(max_examples=300)
@given(
    invited=st.integers(2, 400),
    share=st.floats(0.5, 0.99),
    colluding=st.floats(0, 0.49),
    minimum=st.integers(2, 9),
    data=st.data(),
)
def test_in_no_sum_that_can_be_opened_is_one_alone(
    invited: int, share: float, colluding: float, minimum: int, data: st.DataObject
) -> None:
    members = data.draw(st.integers(2, invited))
    grouped = data.draw(st.booleans())
    c = colluders(invited, colluding)
    try:
        company = company_of(
            members, invited, minimum=minimum, share=share, colluding=colluding, grouped=grouped
        )
    except ConfigError:
        small = members < (minimum + c if grouped else c + 2)
        assert small or members > COMPLETE_UP_TO  # of a sparse one there may be no graph
        return
    shape, needed = company.shape, company.needed
    assert 2 * min(needed, members) > members + c
    assert 2 * shape.threshold > shape.holders + c or not shape.complete
    assert company.honest >= 2
    assert needed - c >= company.honest
    if grouped:
        assert minimum <= needed - c
        assert needed <= members


def test_helpers_are_counted_of_all_who_were_invited() -> None:
    """Of 20 five may collude. Eight adverts arrive, theirs among them; two of the eight are lost.

    Of eight two would be counted, six opened a sum, and five of these took their own updates off.
    """
    cohort = Cohort.of(20, minimum=3, threshold=0.6667, colluding=0.25)
    names = cohort.terms.members
    lost: dict[str, Stage] = dict.fromkeys(names[3:15], "advertise")
    lost[names[1]] = lost[names[2]] = "mask"
    cohort.run(lost)

    assert cohort.aggregation.stage == "aborted"
    assert cohort.aggregation.reason == "6 of 8 members sent masked updates, 7 are needed"


def test_members_refuse_adverts_of_helpers_and_one_other() -> None:
    """Of twelve three may collude, and four are shown; of five, more than (5 + 3) / 2 must stay."""
    cohort = Cohort.of(12, threshold=0.5, colluding=0.25)
    cohort.until("share")
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    four, five = (
        msgspec.structs.replace(request, adverts=(request.adverts[0], *request.adverts[-n:]))
        for n in (3, 4)
    )

    with pytest.raises(ProtocolError, match="3 of the 12 invited may collude: 5 are needed"):
        cohort.members["site-0000"].answer(four)
    cohort.members["site-0000"].answer(five)
    group = cohort.members["site-0000"].group
    assert (group.shape.threshold, group.needed, group.honest) == (5, 5, 2)
