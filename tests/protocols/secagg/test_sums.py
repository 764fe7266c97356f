"""The unmasked sum is the plain integer sum, bit for bit, or the sum is given up."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg import terms
from anabranch.protocols.secagg.graph import quorum
from anabranch.protocols.secagg.masks import KEYSTREAMS, Expander, Keystream
from anabranch.protocols.secagg.member import Limits
from anabranch.protocols.secagg.messages import STAGES, Agreement, Request, Stage
from anabranch.protocols.secagg.ring import RINGS, RingBits
from tests.protocols.secagg.rig import Cohort, expected_survivors, names_of

two_thirds = 2 / 3


def threshold_of(n: int, share: float) -> int:
    return quorum(n, share)


@pytest.mark.parametrize("share", [0.5, two_thirds], ids=["half", "two-thirds"])
@pytest.mark.parametrize("n", range(2, 41))
def test_the_sum_is_exact_with_as_many_dropouts_as_the_threshold_allows(
    n: int, share: float
) -> None:
    """One falls silent at every stage in turn, until only t are left."""
    may_go = n - threshold_of(n, share)
    silent = {f"site-{3 * i % n:04d}": STAGES[(n + i) % 5] for i in range(may_go)}
    cohort = Cohort.of(n, seed=n, threshold=share, ring=RINGS[n % 4])
    cohort.run(silent)

    cohort.require_exact()
    (one,) = cohort.aggregation.sums
    assert one.members == expected_survivors(cohort.terms.members, silent)
    assert not cohort.errors
    cohort.seen.require_apart(cohort.thresholds)


@st.composite
def dropouts(draw: st.DrawFn, most: int = 16) -> tuple[int, float, dict[str, Stage]]:
    """Draw a cohort, and who falls silent at which stage, so that t of the advertised stay."""
    n = draw(st.integers(2, most))
    share = draw(st.sampled_from([0.5, two_thirds, 0.9]))
    names = draw(st.permutations(names_of(n)))
    early = draw(st.integers(0, n - 2))  # do not advertise: the sum is of the others
    left = n - early
    late = draw(st.integers(0, left - threshold_of(left, share)))
    silent: dict[str, Stage] = dict.fromkeys(names[:early], "advertise")
    for name in names[early : early + late]:
        silent[name] = draw(st.sampled_from(STAGES[1:]))
    return n, share, silent


@given(drawn=dropouts(), bits=st.sampled_from(RINGS), keystream=st.sampled_from(KEYSTREAMS))
@settings(max_examples=40)
def test_the_sum_is_exact_with_random_dropouts_at_random_stages(
    drawn: tuple[int, float, dict[str, Stage]], bits: RingBits, keystream: Keystream
) -> None:
    n, share, silent = drawn
    cohort = Cohort.of(n, seed=n, threshold=share, ring=bits, keystream=keystream)
    cohort.run(silent)

    cohort.require_exact()
    assert cohort.aggregation.sums[0].members == expected_survivors(cohort.terms.members, silent)
    assert cohort.aggregation.dropped == silent
    cohort.seen.require_apart(cohort.thresholds)


@given(n=st.integers(2, 14), share=st.sampled_from([0.5, two_thirds]), data=st.data())
@settings(max_examples=40)
def test_with_one_fewer_than_the_threshold_the_sum_is_given_up_and_nothing_is_opened(
    n: int, share: float, data: st.DataObject
) -> None:
    gone = data.draw(st.permutations(names_of(n)))[: n - threshold_of(n, share) + 1]
    silent: dict[str, Stage] = {name: data.draw(st.sampled_from(STAGES[1:]), name) for name in gone}
    cohort = Cohort.of(n, seed=n, threshold=share)
    asked = set()

    def note(name: str, request: Request) -> Request:
        asked.add(type(request))
        return request

    cohort.asking = note
    cohort.run(silent)

    assert cohort.aggregation.stage == "aborted"
    assert "needed" in cohort.aggregation.reason
    assert cohort.aggregation.sums == ()
    if "reveal" not in silent.values():  # nobody was ever asked to reveal anything
        assert Agreement not in asked
        assert cohort.seen.reveals == []
    thresholds = cohort.thresholds
    for owner in thresholds:  # fewer than t shares of anything: no mask of anybody can come off
        for kind in ("seeds", "keys"):
            assert len(cohort.seen.holders(kind, owner)) < thresholds[owner]


def test_the_reason_of_an_abort_says_how_many_were_there_and_how_many_were_needed() -> None:
    cohort = Cohort.of(6, threshold=two_thirds)
    cohort.run({"site-0001": "mask", "site-0003": "share"})

    assert cohort.aggregation.stage == "aborted"
    assert cohort.aggregation.reason == "4 of 6 members sent masked updates, 5 are needed"
    assert cohort.aggregation.dropped == {"site-0001": "mask", "site-0003": "share"}


@pytest.mark.parametrize("bits", RINGS)
def test_values_wrap_around_as_integers_do(bits: RingBits) -> None:
    """Every member adds the largest element of the ring, which is −1."""
    cohort = Cohort.of(7, ring=bits)
    for vector in cohort.vectors.values():
        vector[:] = (1 << bits) - 1
    cohort.run({"site-0002": "mask"})

    cohort.require_exact()
    total = cohort.aggregation.sums[0].total.tolist()
    assert {value % (1 << bits) for value in total} == {(1 << bits) - 6}


@pytest.mark.parametrize("values", [1, 65_535, 65_536, 300_001])
def test_vectors_of_any_length_are_summed(values: int) -> None:
    """Around the borders of a chunk of keystream, too."""
    cohort = Cohort.of(3, values=values, counters=0, ring=32)
    cohort.run({"site-0000": "mask"})

    cohort.require_exact()


@given(data=st.data(), n=st.integers(6, 30), group=st.integers(3, 6))
@settings(max_examples=15)
def test_every_group_has_an_exact_sum_of_its_own_and_loses_it_alone(
    data: st.DataObject, n: int, group: int
) -> None:
    cohort = Cohort.of(n, seed=n, threshold=0.5, group=group)
    gone = data.draw(st.sets(st.sampled_from(names_of(n)), max_size=n // 3))
    silent: dict[str, Stage] = {
        name: data.draw(st.sampled_from(STAGES[1:]), name) for name in sorted(gone)
    }
    cohort.run(silent)

    plan = cohort.plan
    alive = [one for one in plan.groups if len(set(one.names) - gone) >= one.needed]
    if not alive:
        assert cohort.aggregation.stage == "aborted"
        return
    cohort.require_exact()
    found = {one.members for one in cohort.aggregation.sums}
    assert found == {
        tuple(name for name in one.names if silent.get(name) in (None, "agree", "reveal"))
        for one in alive
    }
    cohort.seen.require_apart(cohort.thresholds)


def sparse(n: int, threshold: float, seed: int = 0) -> None:
    """Ten in a hundred fall silent, at random stages."""
    cohort = Cohort.of(n, seed=n, threshold=threshold, values=3, counters=0, ring=24)
    rng = Random(seed)
    gone = rng.sample(names_of(n), n // 10)
    silent = {name: rng.choice(STAGES) for name in gone[5:]} | dict(zip(gone, STAGES, strict=False))
    cohort.run(silent)

    (group,) = cohort.plan.groups
    assert not group.shape.complete
    assert group.shape.holders < len(group.names) / 2
    assert set(silent.values()) == set(STAGES)
    cohort.require_exact()
    assert cohort.aggregation.sums[0].members == expected_survivors(names_of(n), silent)
    cohort.seen.require_apart(cohort.thresholds)
    assert not cohort.errors


@pytest.fixture
def verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify every signature once, and not again for each of the members that read it."""
    verify, good = terms._require_signature, set()

    def remember(
        name: str, signature: str, signed: bytes, keys: Mapping[str, str], what: str
    ) -> None:
        one = (name, signature, signed, keys.get(name))
        if one not in good:
            verify(name, signature, signed, keys, what)
            good.add(one)

    monkeypatch.setattr(terms, "_require_signature", remember)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("verified_once")
def test_the_sum_of_200_on_a_sparse_graph_is_exact_with_one_in_ten_gone(seed: int) -> None:
    sparse(200, two_thirds, seed)


@pytest.mark.slow
@pytest.mark.usefixtures("verified_once")
def test_the_sum_of_1000_on_a_sparse_graph_is_exact_with_one_in_ten_gone() -> None:
    sparse(1000, two_thirds)


def test_a_member_takes_part_in_no_sum_below_its_own_floor() -> None:
    for limits, message in (
        (Limits(minimum=5), "sums of 2 updates may be opened.*of 5 or more"),
        (Limits(threshold=0.75), "a share of 0.5 of the members.*asks for 0.75"),
    ):
        cohort = Cohort.of(6)
        cohort.limits = limits
        cohort.run()

        assert cohort.aggregation.stage == "aborted"
        assert len(cohort.errors) == 6
        for error in cohort.errors.values():
            with pytest.raises(type(error), match=message):
                raise error


def test_masks_are_taken_off_once_whatever_cuts_it_short(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = Cohort.of(4)
    cohort.until("reveal")
    aggregation, taken = cohort.aggregation, 0
    for name, request in aggregation.requests().items():
        answer = cohort.ask(name, request)
        assert answer is not None
        aggregation.take(name, answer.reply, answer.data)

    def subtract(self: Expander, key: bytes, vector: object) -> None:
        nonlocal taken
        taken += 1
        if taken == 2:
            raise MemoryError

    monkeypatch.setattr(Expander, "subtract", subtract)
    with pytest.raises(MemoryError):
        aggregation.close()

    assert (aggregation.stage, aggregation.sums) == ("aborted", ())
    assert aggregation.reason == "taking the masks off was cut short"
    with pytest.raises(ProtocolError):
        aggregation.close()
    assert taken == 2
