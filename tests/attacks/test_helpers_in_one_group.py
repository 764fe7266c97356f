"""Attack: form the groups so that the coordinator's helpers are all in the victim's.

The partition is a hash of the adverts. A helper that advertises last can try as many keys as it
likes until the groups suit it; among 24 members in groups of eight its two friends are in one
group with the victim every ninth time. Half a group's majority then falls short.

Why it fails: a group's threshold holds against all helpers of the whole cohort at once, and a
group that they could outnumber is refused.
"""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from anabranch.protocols.errors import ConfigError, ProtocolError
from anabranch.protocols.secagg.graph import groups_of, shape_of
from anabranch.protocols.secagg.messages import Adverts
from anabranch.protocols.secagg.plan import Plan
from tests.protocols.secagg.rig import Cohort, names_of

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


def test_a_group_that_helpers_could_outnumber_is_no_plan() -> None:
    cohort = Cohort.of(24, group=4, colluding=0.2, values=1, counters=0)
    cohort.run()

    assert cohort.aggregation.stage == "aborted"
    message = "all of a group of 4 members could be among the 4 of 24 that may collude"
    assert message in cohort.aggregation.reason
    adverts = [cohort.seen.adverts[name] for name in cohort.terms.members]
    with pytest.raises(ConfigError, match=message):
        Plan(cohort.terms, adverts)


def test_members_refuse_adverts_for_which_no_threshold_is_sound() -> None:
    """Of six, 2 · 4 > 6 + 1; of the five that are shown, 2 · 3 = 5 + 1."""
    cohort = Cohort.of(6, threshold=0.5, colluding=0.25)
    cohort.until("share")
    request = cohort.aggregation.requests()["site-0000"]
    assert isinstance(request, Adverts)
    fewer = msgspec.structs.replace(request, adverts=request.adverts[:5])

    with pytest.raises(ProtocolError, match="does not keep a member's two secrets apart"):
        cohort.members["site-0000"].answer(fewer)
