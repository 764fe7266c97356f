"""Attack: every member trains another part of the adapter, so that the sum adds nothing up.

What only one member trained stands in the sum as it is: everybody else's zeros are added to it. The
coordinator says who trains which rank indices and which factor, so it could give its victim one of
its own, or one that all members train who help it: they take their part off. With B = 0, as in a
first round, what is learned of A is exactly zero: members that train A hide nothing of one that
trains B, though their vectors are of one length.

Why it fails: every member counts who trained each rank, and wants `minimum` of them beside all who
may collude.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.given import InMemory
from anabranch.client.sums.participant import Participant
from anabranch.client.sums.terms import agreement_of, require_company, vector_of
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.fixed_point import read_counters
from anabranch.protocols.secagg.graph import company_of
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Invite, Request
from anabranch.protocols.secagg.plan import Group
from anabranch.protocols.secagg.ring import Ring
from anabranch.protocols.secagg.terms import Terms
from anabranch.protocols.spec import AdapterSpec
from tests.secure_cases import carried, invite_of, secured
from tests.simulations.rig import adapter, config

NAMES = ("aarhus", "bergen", "cork", "delft", "esbjerg")
VICTIM = "cork"
SPEC = AdapterSpec(  # a square layer: A and B have as many values
    base="0" * 64,
    tokenizer="",
    rank=2,
    alpha=4.0,
    targets=("layer",),
    tensors=(("layer.lora_A.weight", (2, 4)), ("layer.lora_B.weight", (4, 2))),
)
MODEL = adapter(0.5, SPEC)
MIXED = secured(config(method="ffa", mixed_ranks=True))
PLAIN = secured(config(method="ffa"))


class Sums:
    """Sites that were told to train different parts, and a coordinator that sums them."""

    def __init__(self, run: Any, parts: dict[str, Part], records: int = 10) -> None:
        self.run, self.parts = run, parts
        self.sites = {n: Participant(n, Ed25519PrivateKey.generate(), InMemory()) for n in parts}
        for number, (name, one) in enumerate(self.sites.items()):
            part, learned = parts[name], number % 5
            arrays = {n: np.full(s, learned, np.float32) for n, s in part.shapes(SPEC).items()}
            one.keep(self.told(name), MODEL, Delta(SPEC, arrays, records, part=part, steps=1))

    def told(self, name: str) -> Assignment:
        return Assignment(run="toy-1", round=1, config=self.run, part=self.parts[name])

    def invite(self, **changes: Any) -> Invite:
        ranks = {name: part.ranks for name, part in self.parts.items() if part.ranks is not None}
        told = {"ranks": ranks or msgspec.UNSET} | changes
        return invite_of(self.told(next(iter(self.sites))), self.sites, MODEL, **told)

    def carried(self, invite: Invite, without: dict[str, str], until: str = "done") -> Aggregation:
        """Carry a sum as far as `until`; `without`: who is said to have dropped out, and where."""

        def answer(name: str, request: Request) -> Answer | None:
            if without.get(name) == request.stage:
                return None
            return self.sites[name].answer(self.told(name), request, NO_LIMITS, vector_of)

        return carried(invite, answer, until)


def ranks_of(**own: tuple[int, ...]) -> dict[str, Part]:
    """Return parts of one factor: all train rank 0, but who has its `own`."""
    return {name: Part(factors="B", ranks=own.get(name, (0,))) for name in NAMES}


def many(*own: int) -> dict[str, Part]:
    """Return parts of twenty members: those of these numbers train rank 1, the others rank 0."""
    return {f"s{i:02d}": Part(factors="B", ranks=(1 if i in own else 0,)) for i in range(20)}


def refusing(sums: Sums, invite: Invite) -> list[str]:
    """Return who refuses an invitation."""
    found = []
    for name, one in sums.sites.items():
        try:
            one.answer(sums.told(name), invite, NO_LIMITS, vector_of)
        except ProtocolError:
            found.append(name)
    return found


def mean_of(sums: Sums) -> Delta:
    """Return what a coordinator makes of the sum of these sites, which nobody refuses."""
    terms = sums.invite().terms
    vectors = [
        vector_of(one.kept.delta, sums.told(name), terms, len(sums.sites))
        for name, one in sums.sites.items()
        if one.kept is not None
    ]
    total = np.add.reduce(vectors, dtype=vectors[0].dtype)
    return contribution.mean_of(
        total, terms, SPEC, Part(factors="B"), normalize_steps=False, by_rank=True
    )


def test_what_one_alone_trained_would_stand_in_the_sum() -> None:
    """The attack itself, on vectors without masks: one is read out of the sum of five."""
    mean = mean_of(Sums(MIXED, ranks_of(cork=(1,))))

    # Aarhus, bergen, … learned 0, 1, … in every value; cork, the third, learned 2.
    np.testing.assert_allclose(mean.arrays["layer.lora_B.weight"][:, 1], 2.0, atol=1e-4)


def test_what_helpers_trained_too_would_be_taken_off_the_sum() -> None:
    """The attack with two helpers of twenty: what they learned, they know."""
    mean = mean_of(Sums(MIXED, many(7, 18, 19)))

    of_three = mean.arrays["layer.lora_B.weight"][:, 1] * 3
    np.testing.assert_allclose(of_three - (18 % 5 + 19 % 5), 7 % 5, atol=1e-3)


@pytest.mark.parametrize("others", [2, 3])
def test_a_rank_that_few_beside_all_helpers_train_is_summed_with_nobody(others: int) -> None:
    """Of twenty two may collude, and the minimum is three: four of a rank are too few."""
    sums = Sums(MIXED, many(7, *range(20 - others, 20)))

    assert refusing(sums, sums.invite()) == list(sums.sites)
    text = rf"{others + 1} members trained rank 1, 5 are needed, 2 of whom may collude"
    with pytest.raises(ProtocolError, match=text):
        require_company(sums.invite().terms, SPEC.rank, tuple(sums.sites))


def test_a_rank_that_few_beside_all_helpers_are_left_of_is_opened_by_nobody() -> None:
    """Five of rank 1 are invited; then all but the victim and the helpers are said to be lost."""
    sums = Sums(MIXED, many(1, 2, 7, 18, 19))
    lost = dict.fromkeys(("s01", "s02"), "mask")

    at_agree = sums.carried(sums.invite(), lost, until="agree")

    for name, request in at_agree.requests().items():
        with pytest.raises(ProtocolError, match="3 members trained rank 1, 5 are needed"):
            sums.sites[name].answer(sums.told(name), request, NO_LIMITS, vector_of)


def test_what_all_have_trained_is_in_as_much_company_as_the_sum() -> None:
    """Four members of whom one may collude: three are enough for a sum, and for all its ranks."""
    run = secured(config(method="ffa", mixed_ranks=True), colluding=0.25)
    names = ("aarhus", "bergen", "cork", "delft")
    sums = Sums(run, dict.fromkeys(names, Part(factors="B", ranks=(0,))))

    done = sums.carried(sums.invite(), {"bergen": "mask"})

    assert [one.members for one in done.sums] == [("aarhus", "cork", "delft")]


def test_in_a_sparse_graph_few_may_leave_a_rank_out() -> None:
    """Of 200 members in groups of neighbours, 19 honest ones may be all that a sum is of.

    Were 17 of these to leave a rank out, two would stand behind it.
    """
    names = tuple(f"s{i:03d}" for i in range(200))
    company = company_of(200, 200, minimum=3, share=2 / 3, colluding=0.1, grouped=False)
    group = Group(names, company.shape, company.needed, company.honest, {})
    assert company.honest == 19

    def told(leaving: int) -> Terms:
        ranks: dict[str, tuple[int, ...]] = dict.fromkeys(names[:leaving], (0,))
        plain = Sums(MIXED, ranks_of()).invite().terms
        return msgspec.structs.replace(plain, members=names, ranks=ranks)

    require_company(told(16), SPEC.rank, names, group)
    require_company(told(200), SPEC.rank, names, group)
    for leaving in (17, 199):
        with pytest.raises(ProtocolError, match=rf"{200 - leaving} members trained rank 1, 184"):
            require_company(told(leaving), SPEC.rank, names, group)


@pytest.mark.parametrize("records", [10, 20])
def test_with_uniform_weights_the_counters_of_ranks_say_what_the_terms_say(records: int) -> None:
    """By records, two ranks' counters differ by what those weigh who leave one of them out."""
    uniform = msgspec.structs.replace(MIXED.federation, weighting="uniform")
    counted = []
    for run in (msgspec.structs.replace(MIXED, federation=uniform), MIXED):
        sums = Sums(run, ranks_of(aarhus=(0, 1), bergen=(0, 1), delft=(0, 1)), records)
        done = sums.carried(sums.invite(), {})
        terms, total = done.terms, done.sums[0].total
        found = read_counters(total[terms.values :], Ring(terms.ring), len(terms.members))
        counted.append([counter / contribution.WEIGHT_UNIT for counter in found[-SPEC.rank :]])

    plain, weighed = counted
    assert plain == [3 * 1 + 2 * 2, 3 * 1]
    assert weighed == [records * one for one in plain]


@pytest.mark.parametrize(
    "others",
    [{}, {"bergen": (1,)}, {"bergen": (0, 1)}],
    ids=["alone", "with one other", "with one of all ranks"],
)
def test_a_rank_that_few_train_is_summed_with_nobody(others: dict[str, tuple[int, ...]]) -> None:
    sums = Sums(MIXED, ranks_of(cork=(1,), **others))

    assert refusing(sums, sums.invite()) == list(NAMES)


@pytest.mark.parametrize("gone", ["aarhus", "cork"])
def test_a_rank_that_few_are_left_of_is_opened_by_nobody(gone: str) -> None:
    sums = Sums(MIXED, ranks_of(aarhus=(0, 1), bergen=(0, 1), cork=(1,)))
    at_agree = sums.carried(sums.invite(), {gone: "mask"}, until="agree")

    for name, request in at_agree.requests().items():  # also those that train rank 0 alone
        with pytest.raises(ProtocolError, match="2 members trained rank 1, 3 are needed"):
            sums.sites[name].answer(sums.told(name), request, NO_LIMITS, vector_of)


@pytest.mark.parametrize(
    ("lost", "until"), [("advertise", "share"), ("share", "mask")], ids=["no keys", "no shares"]
)
def test_a_rank_that_few_are_left_of_is_refused_while_the_update_may_be_summed_again(
    lost: str, until: str
) -> None:
    """A member that masks has given its update away, and could be in no other attempt."""
    sums = Sums(MIXED, ranks_of(aarhus=(0, 1), bergen=(0, 1), cork=(1,)))

    too_few = sums.carried(sums.invite(), {"cork": lost}, until=until)

    for name, request in too_few.requests().items():
        for _ in range(2):  # also if it is asked once more
            with pytest.raises(ProtocolError, match="2 members trained rank 1, 3 are needed"):
                sums.sites[name].answer(sums.told(name), request, NO_LIMITS, vector_of)
    again = sums.carried(sums.invite(instance="cd" * 32), {})
    assert [one.members for one in again.sums] == [NAMES]


def test_with_enough_company_a_rank_is_summed() -> None:
    own = {"aarhus": (0, 1), "bergen": (0, 1), "cork": (0, 1), "delft": (0, 1)}
    sums = Sums(MIXED, ranks_of(**own))

    done = sums.carried(sums.invite(), {"bergen": "mask"})

    assert [one.members for one in done.sums] == [("aarhus", "cork", "delft", "esbjerg")]


def test_nobody_takes_another_word_for_what_it_trained() -> None:
    sums = Sums(MIXED, ranks_of(cork=(1,)))
    one, both = dict.fromkeys(NAMES, (0,)), dict.fromkeys(NAMES, (0, 1))

    assert refusing(sums, sums.invite(ranks=one)) == [VICTIM]
    assert refusing(sums, sums.invite(ranks=both)) == list(NAMES)
    assert refusing(sums, sums.invite(ranks=msgspec.UNSET)) == list(NAMES)


def test_a_sum_is_of_one_factor() -> None:
    parts = {name: Part(factors="B" if name == VICTIM else "A") for name in NAMES}
    sums = Sums(PLAIN, parts)
    other = agreement_of(PLAIN, Part(factors="B"))

    assert refusing(sums, sums.invite()) == [VICTIM]
    assert refusing(sums, sums.invite(config=other)) == [n for n in NAMES if n != VICTIM]
