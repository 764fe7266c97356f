"""Attack: any combination of lies about who is there, with helpers among the members.

Hypothesis plays the coordinator: it delivers other boxes to every member, has other survivor sets
signed by different members, shows signatures as it likes, leaves members out, and has helpers that
tell all they know and sign everything. `Spy` then opens what can be opened.

What must hold (Bonawitz et al. 2017, theorem 6.5): no sum of fewer than `needed` − c honest
members, and of no member both secrets. A naive member shows that the search finds something.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.secagg.member import Member
from anabranch.protocols.secagg.messages import Agreement, Survivors
from tests.attacks.lying import Spy, agree, only
from tests.attacks.test_shrinking_the_cohort import SignsAll
from tests.protocols.secagg.rig import Cohort

# n, colluding share of the terms, threshold, helpers
CASES = [
    (3, 0.0, 0.5, 0),
    (4, 0.0, 0.5, 0),
    (4, 0.25, 0.7, 1),
    (5, 0.0, 0.5, 0),
    (5, 0.2, 2 / 3, 1),
    (6, 0.17, 2 / 3, 1),
    (7, 0.29, 0.65, 2),
]


Kind = Callable[..., Member]


def lied_to(rng: Random, case: tuple[int, float, float, int], kind: Kind) -> Spy:
    """Play a coordinator that decides everything by chance."""
    n, colluding, threshold, helpers = case
    cohort = Cohort.of(n, colluding=colluding, threshold=threshold, values=1, counters=0)
    cohort.kind = kind
    cohort.until("mask")
    names = cohort.terms.members
    helping, honest = names[:helpers], names[helpers:]

    def some() -> tuple[str, ...]:
        share = rng.choice((0.3, 0.6, 0.9))
        return tuple(name for name in names if rng.random() < share)

    for name, request in cohort.aggregation.requests().items():
        cohort.ask(name, only(request, some() if name in honest else names))
    sets = [some(), some()]
    signatures: list[dict[str, str]] = [{}, {}]
    chosen = {name: rng.randrange(2) for name in honest}
    for name in honest:
        signatures[chosen[name]] |= agree(cohort, [name], sets[chosen[name]])
    spy = Spy(cohort)
    spy.collude(helping)
    for name in helping:
        for survivors, signed in zip(sets, signatures, strict=True):
            cohort.members[name]._next = "agree"  # a helper signs all it is shown
            signed |= agree(cohort, [name], survivors)
    for name in honest:
        if cohort.members[name].stage == "reveal":
            shown = signatures[chosen[name]]
            cohort.ask(name, Agreement(instance=cohort.terms.instance, signatures=shown))
    return spy


def fewest(spy: Spy) -> int:
    """Return how many honest members are in the smallest sum that can be opened."""
    return min((len(one) for one in spy.sums()), default=len(spy.cohort.terms.members))


@given(rng=st.randoms(use_true_random=False), case=st.sampled_from(CASES))
@settings(max_examples=200)
def test_no_coordinator_opens_a_sum_of_fewer_than_the_threshold_less_its_helpers(
    rng: Random, case: tuple[int, float, float, int]
) -> None:
    spy = lied_to(rng, case, Member)

    (group,) = spy.plan.groups
    assert fewest(spy) >= group.needed - case[3]
    spy.cohort.seen.require_apart(spy.cohort.thresholds, spy.colluding)
    for name in spy.cohort.terms.members[case[3] :]:
        assert spy.unmasked(name) is None


def test_the_same_search_finds_how_to_open_a_naive_members_update() -> None:
    for seed in range(2000):
        spy = lied_to(Random(seed), CASES[0], SignsAll)
        if fewest(spy) == 1:
            (victim,) = min(spy.sums(), key=len)
            found = spy.unmasked(victim)
            assert found is not None
            assert np.array_equal(found, spy.cohort.vectors[victim])
            return
    pytest.fail("2000 random coordinators did not open a naive member's update")


def test_survivors_that_nobody_can_be_are_refused() -> None:
    cohort = Cohort.of(3)
    cohort.until("agree")
    request = Survivors(instance=cohort.terms.instance, names=("site-0000", "site-0001", "zoe"))

    assert cohort.ask("site-0000", request) is None
    assert "'zoe' is not in this sum" in str(cohort.errors["site-0000"])
