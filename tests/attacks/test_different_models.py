"""Attack: send the members different models, and read one member's update out of the sum.

Pasquini, Francati, Ateniese 2022, "Eluding Secure Aggregation in Federated Learning via Model
Inconsistency" (doi:10.1145/3548606.3560557): all but the victim get a model whose gradients
vanish, so that the sum is the victim's update.

Why it fails: the digest of the model is in the terms, as those of configuration and roster are.
Adverts are signed for the terms, and masks are derived from them: members with other terms refuse
each other's adverts, and if they did not, their masks would not cancel.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from anabranch.protocols.secagg import coordinator, keys, member
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.masks import Expander
from anabranch.protocols.secagg.member import Answer, Member
from anabranch.protocols.secagg.messages import Adverts, Invite, Request
from anabranch.protocols.secagg.terms import require_signed
from tests.protocols.secagg.rig import Cohort, integers, plain_sum

OTHER = "1d" * 32
CHANGES = [
    {"model": OTHER},
    {"config": OTHER},
    {"round": 7},
    {"values": 6, "counters": 0},
    {"limit": 2.0},
    {"weight": 1},
    {"threshold": 0.75},
    {"minimum": 3},
    {"keystream": "chacha20"},
    {"members": ("site-0000", "site-0001", "site-0002")},
]


def with_other_terms(victim: str, changes: dict[str, Any], **hooks: Any) -> Cohort:
    """Invite one member of four to other terms than the rest."""
    cohort = Cohort.of(4)

    def lie(name: str, request: Request) -> Request:
        if name == victim and isinstance(request, Invite):
            return msgspec.structs.replace(
                request, terms=msgspec.structs.replace(request.terms, **changes)
            )
        return request

    cohort.asking = lie
    for hook, value in hooks.items():
        setattr(cohort, hook, value)
    return cohort


@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: next(iter(changes)))
def test_members_with_different_terms_refuse_each_others_keys(changes: dict[str, Any]) -> None:
    cohort = with_other_terms("site-0000", changes)
    requests = cohort.aggregation.requests()
    adverts = []
    for name, request in requests.items():
        answer = cohort.ask(name, cohort.asking(name, request))  # type: ignore[arg-type]
        assert answer is not None
        adverts.append(answer.reply)
    together = Adverts(instance=cohort.terms.instance, adverts=tuple(adverts))  # type: ignore[arg-type]

    for name in cohort.terms.members:
        assert cohort.ask(name, together) is None
        refused = str(cohort.errors[name])
        assert "not signed with its key" in refused or "is not in the terms" in refused
    assert cohort.seen.shares == {}


class Careless(Member):
    """Asks for no signature of its own terms."""

    def answer(self, request: Request, contribute: Any = None) -> Answer:
        with pytest.MonkeyPatch.context() as patch:
            name = f"{Member.__module__}.require_signed"
            patch.setattr(name, lambda *arguments: None)
            return super().answer(request, contribute)


class Unbound(Careless):
    """Derives its keys from nothing that the coordinator could lie about."""

    def answer(self, request: Request, contribute: Any = None) -> Answer:
        with pytest.MonkeyPatch.context() as patch:
            name = "anabranch.protocols.secagg.plan.context_of"
            patch.setattr(name, lambda terms, adverts: bytes(32))
            return super().answer(request, contribute)


def lied_to(kind: type[Member], monkeypatch: pytest.MonkeyPatch) -> Cohort:
    """The victim trains another model; all others send zeros."""
    cohort = with_other_terms("site-0000", {"model": OTHER}, kind=kind)
    monkeypatch.setattr(f"{Aggregation.__module__}.require_signed", lambda *arguments: None)
    if kind is Unbound:
        monkeypatch.setattr(
            "anabranch.protocols.secagg.plan.context_of", lambda terms, adverts: bytes(32)
        )
    for name, vector in cohort.vectors.items():
        if name != "site-0000":
            vector[:] = 0
    cohort.run()
    return cohort


def test_without_the_binding_the_sum_would_be_the_victims_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort = lied_to(Unbound, monkeypatch)

    (one,) = cohort.aggregation.sums
    assert np.array_equal(one.total, cohort.vectors["site-0000"])


def test_members_that_check_no_signature_cannot_open_each_others_boxes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cohort = lied_to(Careless, monkeypatch)

    assert cohort.aggregation.stage == "aborted"
    assert "not sealed by it for this member and this sum" in str(cohort.errors["site-0000"])
    assert cohort.seen.masked == {}


class Deaf(Careless):
    """Takes any box, too: an empty share is in it."""

    def answer(self, request: Request, contribute: Any = None) -> Answer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("anabranch.protocols.secagg.keys.unseal", lambda *arguments: (b"", b""))
            return super().answer(request, contribute)


def test_and_if_they_took_any_box_their_masks_would_not_cancel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All is open here, the members' own masks too, but those that two members share."""
    cohort = with_other_terms("site-0000", {"model": OTHER}, kind=Deaf)
    monkeypatch.setattr(f"{Aggregation.__module__}.require_signed", lambda *arguments: None)
    cohort.until("agree")
    total = cohort.aggregation._parts[0].total.copy()
    plan = cohort.aggregation._planned
    expander = Expander(cohort.terms.keystream, plan.ring, len(total))
    for name, one in cohort.members.items():
        assert one._secrets is not None
        own = one._planned.context  # each with its own
        expander.subtract(keys.self_key(one._secrets.seed, own, name), total)

    assert integers(total, 32) != plain_sum(cohort.vectors, cohort.terms.members, 32)
    assert not set(integers(total, 32)) & set(plain_sum(cohort.vectors, cohort.terms.members, 32))


def test_the_check_of_signatures_is_the_one_that_was_left_out() -> None:
    """`Careless` takes away a function of this name from the module it is used in."""
    for module in (member, coordinator):
        assert vars(module)["require_signed"] is require_signed
