"""Attack: ask for the shares of the living and of the dead, with one name in both lists.

Seen in Flower's SecAgg+ (1.42.0): its clients take both lists from the server and answer both, so
t of them give away both secrets of one peer, and its update is open.

Why it fails: there are no two lists. A member derives both halves of its answer from the one
survivor set that it signed: of every peer it reveals one share of one secret.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.member import Answer, Member
from anabranch.protocols.secagg.messages import Agreement, Reveal, Survivors
from tests.attacks.lying import Spy, agree, reveal
from tests.protocols.secagg.rig import Cohort


class TakesLists(Member):
    """Reveals what two lists of the coordinator say, as Flower's clients do."""

    active: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()

    def _reveal(self, request: Agreement) -> Answer:
        held = self._own.held
        return Answer(
            Reveal(
                instance=self.terms.instance,
                seeds={name: held[name][0] for name in self.active if name in held},
                keys={name: held[name][1] for name in self.dead if name in held},
            )
        )


def test_overlapping_lists_would_open_an_update() -> None:
    cohort = Cohort.of(5)
    cohort.kind = TakesLists
    cohort.until("reveal")
    victim, *others = cohort.terms.members
    for member in cohort.members.values():
        assert isinstance(member, TakesLists)
        member.active, member.dead = (victim,), (victim,)
    reveal(cohort, others, {})

    found = Spy(cohort).unmasked(victim)
    assert found is not None
    assert np.array_equal(found, cohort.vectors[victim])


@given(data=st.data())
def test_whatever_survivor_set_is_signed_no_peer_is_in_both_halves_of_a_reveal(
    data: st.DataObject,
) -> None:
    cohort = Cohort.of(6)
    cohort.until("agree", {"site-0005": "mask"})
    names = cohort.terms.members
    survivors = data.draw(st.sets(st.sampled_from(names[:5]), min_size=4).map(sorted))
    signatures = agree(cohort, survivors, survivors)
    reveal(cohort, survivors, signatures)

    assert len(cohort.seen.reveals) == len(survivors)
    for _, one in cohort.seen.reveals:
        assert one.seeds.keys() == set(survivors)
        assert one.keys.keys() == set(names) - set(survivors)
    cohort.seen.require_apart(cohort.thresholds)


@pytest.mark.parametrize("kind", [Survivors, Agreement])
@pytest.mark.parametrize("extra", ["dead", "active", "dropped", "names2"])
def test_a_second_list_is_no_part_of_any_message(kind: type[msgspec.Struct], extra: str) -> None:
    cohort = Cohort.of(3)
    cohort.until("agree" if kind is Survivors else "reveal")
    request = cohort.aggregation.requests()["site-0000"]
    value = msgspec.json.decode(msgspec.json.encode(request)) | {extra: ["site-0001"]}

    with pytest.raises(msgspec.ValidationError, match=f"unknown field `{extra}`"):
        msgspec.json.decode(msgspec.json.encode(value), type=kind)


@pytest.mark.parametrize("names", [("b", "a"), ("a", "a")])
def test_a_survivor_set_has_one_form(names: tuple[str, ...]) -> None:
    with pytest.raises(ProtocolError, match="survivors: expected names in ascending order"):
        Survivors(instance="e0" * 32, names=names)
