"""Attack: every member trains another part of the adapter, so that the sum adds nothing up.

What only one member trained stands in the sum as it is: everybody else's zeros are added to it. The
coordinator says who trains which rank indices and which factor, so it could give its victim one of
its own. With B = 0, as in a first round, what is learned of A is exactly zero: members that
train A hide nothing of one that trains B, though their vectors are of one length.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anabranch.client.flower import NO_LIMITS
from anabranch.client.sums.participant import InMemory, Participant
from anabranch.client.sums.terms import agreement_of, vector_of
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Invite, Request
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

    def __init__(self, run: Any, parts: dict[str, Part]) -> None:
        self.run, self.parts = run, parts
        self.sites = {n: Participant(n, Ed25519PrivateKey.generate(), InMemory()) for n in parts}
        for number, (name, one) in enumerate(self.sites.items()):
            part = parts[name]
            arrays = {n: np.full(s, number, np.float32) for n, s in part.shapes(SPEC).items()}
            one.keep(self.told(name), MODEL, Delta(SPEC, arrays, 10, part=part, steps=1))

    def told(self, name: str) -> Assignment:
        return Assignment(run="toy-1", round=1, config=self.run, part=self.parts[name])

    def invite(self, **changes: Any) -> Invite:
        ranks = {name: part.ranks for name, part in self.parts.items() if part.ranks is not None}
        told = {"ranks": ranks or msgspec.UNSET} | changes
        return invite_of(self.told(NAMES[0]), self.sites, MODEL, **told)

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


def refusing(sums: Sums, invite: Invite) -> list[str]:
    """Return who refuses an invitation."""
    found = []
    for name, one in sums.sites.items():
        try:
            one.answer(sums.told(name), invite, NO_LIMITS, vector_of)
        except ProtocolError:
            found.append(name)
    return found


def test_what_one_alone_trained_would_stand_in_the_sum() -> None:
    """The attack itself, on vectors without masks: one is read out of the sum of five."""
    sums = Sums(MIXED, ranks_of(cork=(1,)))
    terms = sums.invite().terms
    vectors = [
        vector_of(one.kept.delta, sums.told(name), terms, 5)
        for name, one in sums.sites.items()
        if one.kept is not None
    ]
    total = np.add.reduce(vectors, dtype=vectors[0].dtype)

    mean = contribution.mean_of(
        total, terms, SPEC, Part(factors="B"), normalize_steps=False, by_rank=True
    )

    # Aarhus, bergen, … learned 0, 1, … in every value; cork, the third, learned 2.
    np.testing.assert_allclose(mean.arrays["layer.lora_B.weight"][:, 1], 2.0, atol=1e-4)


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
