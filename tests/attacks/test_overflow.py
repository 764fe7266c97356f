"""Attack: a client adds values so large that the sum of all wraps around.

The usual poisoning by scale (Bagdasaryan et al. 2020, arXiv:1807.00459), under the veil of a
secure sum, where nobody can look at one update.

What holds: honest members cannot overflow the sum, whatever their updates are: the grid leaves
room for all of them at their limit, and refuses values beyond it before anything is encoded. A
malicious member can add any vector of the ring. It spoils the sum in the places where it does so,
it learns nothing by it, and all else in the sum stays exact. Nobody can tell from the values; a
sum of weights that all members together cannot have is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from anabranch.protocols.adapter import WHOLE, Delta
from anabranch.protocols.errors import DataError, ProtocolError
from anabranch.protocols.secagg.contribution import contribute, mean_of, sizes
from anabranch.protocols.secagg.fixed_point import Grid, digits, slots
from anabranch.protocols.secagg.plan import length
from anabranch.protocols.secagg.ring import RINGS, Ring, RingBits
from anabranch.protocols.secagg.terms import Terms
from tests.attacks.lying import Spy
from tests.protocols.rig import SPEC
from tests.protocols.secagg.rig import (
    Cohort,
    integers,
    names_of,
    plain_sum,
    random_of,
    roster_of,
    terms_of,
)


def sum_at_the_limit(ring: Ring, members: int, grid: Grid) -> float:
    """Return what comes out when all members add the limit."""
    total = ring.zeros(1)
    for number in range(members):
        total = total + grid.encode(np.array([grid.limit]), 1.0, random_of(str(number)))
    return float(grid.decode(total)[0])


@pytest.mark.parametrize("bits", RINGS)
def test_a_grid_made_for_fewer_members_would_wrap_around(bits: RingBits) -> None:
    ring = Ring(bits)
    if bits == 64:  # its grid has at most 2^32 levels: it would take 2^31 members
        assert sum_at_the_limit(ring, 4, Grid(ring, 1, 3.0)) == pytest.approx(12.0)
        return

    assert sum_at_the_limit(ring, 4, Grid(ring, 1, 3.0)) < 0


@pytest.mark.parametrize("bits", RINGS)
@given(members=st.integers(1, 300), sign=st.sampled_from([-1.0, 1.0]))
def test_the_sum_of_honest_members_at_their_limit_does_not(
    bits: RingBits, members: int, sign: float
) -> None:
    ring = Ring(bits)
    grid = Grid(ring, members, 3.0)
    one = grid.encode(np.array([sign * 3.0]), 1.0, random_of("one"))
    total = (one.astype(object) * members % (1 << bits)).astype(np.uint64).astype(ring.dtype)

    assert float(grid.decode(total)[0]) == pytest.approx(
        sign * 3.0 * members, abs=members * grid.step
    )


@pytest.mark.parametrize("value", [3.01, -4.0, 1e30, np.inf, -np.inf, np.nan])
def test_an_honest_member_refuses_to_encode_what_is_beyond_its_limit(value: float) -> None:
    grid = Grid(Ring(32), 10, 3.0)
    with pytest.raises(DataError, match=r"(secure_aggregation.range = ±3|not finite)"):
        grid.encode(np.array([0.0, value]), 1.0, random_of("x"))


def test_a_malicious_member_spoils_what_it_adds_to_and_nothing_else() -> None:
    cohort = Cohort.of(5, values=4, counters=0)
    liar, *honest = cohort.terms.members
    expected = plain_sum(cohort.vectors, honest, 32)
    cohort.vectors[liar][:] = [0, (1 << 32) - 1, 0, 1 << 31]
    cohort.until("reveal")
    spy = Spy(cohort)
    spy.collude([liar])
    cohort.run()

    cohort.require_exact()
    total = integers(cohort.aggregation.sums[0].total, 32)
    assert [total[0], total[2]] == [expected[0], expected[2]]
    assert total[1] == (expected[1] - 1) % (1 << 32)
    assert total[3] == (expected[3] + (1 << 31)) % (1 << 32)
    assert all(spy.unmasked(name) is None for name in honest)


def delta_of(value: float) -> Delta:
    arrays = {name: np.full(shape, value, np.float32) for name, shape in SPEC.tensors}
    return Delta(SPEC, arrays, 7, steps=3)


def sum_of(total: NDArray[Any], terms: Terms) -> Delta:
    return mean_of(total, terms, SPEC, WHOLE, normalize_steps=False, by_rank=False)


@given(data=st.data(), added=st.integers(0, (1 << 24) - 1))
def test_a_weight_that_members_cannot_have_together_is_refused(
    data: st.DataObject, added: int
) -> None:
    """Three honest members, and one that adds to a digit of the sum of weights."""
    names = names_of(4)
    values, counters = sizes(SPEC, WHOLE, by_rank=False)
    terms = terms_of(
        names, roster_of(names), ring=24, weight=7 * 1024, values=values, counters=counters
    )
    how: dict[str, Any] = {"weighting": "examples", "normalize_steps": False, "by_rank": False}
    vectors = [
        contribute(delta_of(value), terms, WHOLE, random=random_of(str(value)), **how)
        for value in (0.1, 0.2, 0.3)
    ]
    total = vectors[0] + vectors[1] + vectors[2]
    mean = sum_of(total, terms)
    assert mean.num_examples == 21
    assert mean.arrays["head.bias"] == pytest.approx(0.2, abs=1e-5)

    per_counter = slots(Ring(24), 4)
    place = values + per_counter + data.draw(st.integers(0, per_counter - 1))
    digit = added << (digits(4, Ring(24)) * (place - values - per_counter))
    spoiled = total.copy()
    spoiled[place] += np.uint32(added)
    weight = 21 * 1024 + digit
    if int(total[place]) + added < 1 << 24 and weight > 28 * 1024:
        with pytest.raises(ProtocolError, match="no updates add up to that"):
            sum_of(spoiled, terms)


def test_a_weight_taken_away_is_refused() -> None:
    names = names_of(2)
    values, counters = sizes(SPEC, WHOLE, by_rank=False)
    terms = terms_of(names, roster_of(names), values=values, counters=counters)
    with pytest.raises(ProtocolError, match="the sum has weight 0 of 0 records"):
        sum_of(Ring(32).zeros(length(terms)), terms)
