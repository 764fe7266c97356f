"""Attack: play a round again, with other dropouts, and take the difference of the two sums.

Known as the multi-round or differencing attack (Kairouz et al. 2021, arXiv:1912.04977, section
4.2); with a second reveal in the same round it opens updates directly (Bonawitz et al. 2017).

Why it fails: keys are fresh in every sum, signed for its terms, and everything is derived from
the context. A member answers each stage once, and after its reveal no secrets are left. (That one
round is not summed twice under two sets of terms is the business of who calls `Member`.)
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.protocols.errors import ProtocolError
from anabranch.protocols.secagg.member import Answer, Member
from anabranch.protocols.secagg.messages import Request
from tests.attacks.lying import Spy, agree, reveal
from tests.protocols.secagg.rig import Cohort, snapshot


class Forgets(Member):
    """Takes any number of survivor sets, and keeps its secrets."""

    def answer(self, request: Request, contribute: Any = None) -> Answer:
        kept = self._secrets
        if request.stage == "agree":
            self._next = "agree"
        answer = super().answer(request, contribute)
        self._secrets = kept
        return answer


def with_two_survivor_sets(kind: type[Member]) -> tuple[Cohort, str]:
    cohort = Cohort.of(5)
    cohort.kind = kind
    cohort.until("agree")
    names = cohort.terms.members
    victim = names[-1]
    for survivors in (names, names[:-1]):
        signatures = agree(cohort, survivors, survivors)
        reveal(cohort, survivors, signatures)
    return cohort, victim


def combined_reveals(cohort: Cohort) -> None:
    """Put both reveals of everybody together, as the coordinator would."""
    merged: dict[str, Any] = {}
    for name, one in cohort.seen.reveals:
        before = merged.get(name, one)
        merged[name] = msgspec.structs.replace(
            one, seeds=before.seeds | one.seeds, keys=before.keys | one.keys
        )
    cohort.seen.reveals = list(merged.items())


def test_a_second_survivor_set_would_open_an_update() -> None:
    cohort, victim = with_two_survivor_sets(Forgets)
    combined_reveals(cohort)

    found = Spy(cohort).unmasked(victim)
    assert found is not None
    assert np.array_equal(found, cohort.vectors[victim])


def test_a_second_survivor_set_is_refused_and_changes_nothing() -> None:
    cohort, victim = with_two_survivor_sets(Member)

    assert len(cohort.seen.reveals) == 5
    assert Spy(cohort).unmasked(victim) is None
    for name in cohort.terms.members[:-1]:
        with pytest.raises(ProtocolError, match="out of turn: this member is at stage 'done'"):
            raise cohort.errors[name]


def test_no_request_of_the_sum_is_answered_twice_but_for_the_last_one() -> None:
    cohort = Cohort.of(3)
    sent: list[Request] = []

    def note(name: str, request: Request) -> Request:
        if name == "site-0000":
            sent.append(request)
        return request

    cohort.asking = note
    cohort.run()
    member = cohort.members["site-0000"]
    last = [reveal for name, reveal in cohort.seen.reveals if name == "site-0000"]
    before = snapshot(member)
    for request in sent[:-1]:
        with pytest.raises(ProtocolError, match="out of turn"):
            member.answer(request, lambda: cohort.vectors["site-0000"])
    assert member._secrets is None
    assert [member.answer(sent[-1]).reply] == last
    assert snapshot(member) == before


def again(first: Cohort, **changes: Any) -> Cohort:
    """Return a later sum of the same members, up to the share stage."""
    later = Cohort.of(len(first.terms.members), **changes)
    later.random = lambda name: first.random(f"later {name}")
    later.until("share")
    return later


def test_adverts_of_the_same_terms_make_new_members_refuse() -> None:
    """A member started anew has fresh keys: its old advert is not its own any more."""
    first = Cohort.of(4)
    first.until("share")
    request = first.aggregation.requests()["site-0000"]
    later = again(first)

    assert later.ask("site-0000", request) is None
    assert "adverts: that of site-0000 is not the one it sent" in str(later.errors["site-0000"])


def test_old_adverts_of_the_others_and_their_old_boxes_open_nothing() -> None:
    """Same terms, the victim anew among three that are not there: replayed."""
    first = Cohort.of(4)
    first.until("mask")
    delivery = first.aggregation.requests()["site-0000"]
    later = again(first)
    fresh = later.aggregation.requests()["site-0000"]
    old = first.aggregation._planned.adverts
    adverts = (fresh.adverts[0], *(old[name] for name in first.terms.members[1:]))  # type: ignore[union-attr]
    assert later.ask("site-0000", msgspec.structs.replace(fresh, adverts=adverts)) is not None

    assert later.ask("site-0000", delivery) is None
    assert "not sealed by it for this member and this sum" in str(later.errors["site-0000"])


@pytest.mark.parametrize(
    "changes", [{"instance": "f1" * 32}, {"round": 2}, {"run": "heart-2"}], ids=str
)
def test_messages_of_another_sum_are_refused(changes: dict[str, Any]) -> None:
    first = Cohort.of(4)
    first.until("share")
    later = again(first, **changes)
    old = first.aggregation.requests()["site-0000"]
    named = msgspec.structs.replace(old, instance=later.terms.instance)
    mixed = msgspec.structs.replace(
        named,
        adverts=(
            later.seen.adverts["site-0000"],
            *named.adverts[1:],  # type: ignore[union-attr]
        ),
    )
    expected = "is of sum" if "instance" in changes else "is not the one it sent"
    for request, message in (
        (old, expected),
        (named, "is not the one it sent"),
        (mixed, "keys of 'site-0001': not signed with its key"),
    ):
        assert later.ask("site-0000", request) is None
        assert message in str(later.errors["site-0000"])
