"""Attack: a member seals boxes that some holders cannot open, so that these drop out.

Each victim refuses before it masks, and the sum is opened without it: one member chooses which
honest ones are left out, round after round, and is in every sum itself. Or it lies about the boxes
of others.

What is done: a victim says whose boxes do not open, and the coordinator writes it down (`accused`
in `secure_dropout` and `secure_sum`), for people to act on. Nobody is left out for it: who accuses
may lie, and two liars would then choose who is in the next sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from anabranch.client.flower import NO_LIMITS, pack_refused
from anabranch.client.sums.stages import unpack_reply
from anabranch.protocols.errors import BadBoxes, RunError
from anabranch.protocols.messages import Assignment, Refused
from anabranch.protocols.secagg.member import Answer, Limits
from anabranch.protocols.secagg.messages import Request, Shares
from tests.protocols.secagg.rig import Cohort
from tests.secure_cases import MANY, SummingToy, secured, toys
from tests.simulations.federation import Federation
from tests.simulations.rig import config


def spoilt(answer: Answer, victims: set[str]) -> Answer:
    """Return shares whose boxes for the victims hold nothing."""
    shares = answer.reply
    assert isinstance(shares, Shares)
    sealed = {to: bytes(len(box)) if to in victims else box for to, box in shares.sealed.items()}
    return Answer(msgspec.structs.replace(shares, sealed=sealed))


@dataclass
class Spoiler(SummingToy):
    """A member that seals nothing for its victims."""

    victims: set[str] = field(default_factory=set)

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        answer = super().secure(assignment, request, limits)
        return spoilt(answer, self.victims) if isinstance(answer.reply, Shares) else answer


@dataclass
class Slanderer(SummingToy):
    """A member that says it cannot open boxes that are good."""

    slandered: tuple[str, ...] = ()
    only: int | None = None  # the round in which it does; None: in all

    def secure(
        self, assignment: Assignment, request: Request, limits: Limits = NO_LIMITS
    ) -> Answer:
        if request.stage == "mask" and self.only in (None, assignment.round):
            raise BadBoxes("delivery: I cannot open them", self.slandered)
        return super().secure(assignment, request, limits)


def rounds_of(changed: SummingToy, **secure: Any) -> tuple[Federation, list[SummingToy]]:
    sites = [changed if one.name == changed.name else one for one in toys(MANY)]
    run = secured(config(rounds=2), **secure)
    return Federation(sites, run=run), sites


def cohort_of(count: int, spoiler: str, victims: set[str], **terms: Any) -> Cohort:
    cohort = Cohort.of(count, threshold=0.6, **terms)

    def spoil(name: str, answer: Answer) -> Answer:
        wrong = name == spoiler and isinstance(answer.reply, Shares)
        return spoilt(answer, victims) if wrong else answer

    cohort.answering = spoil
    return cohort


def test_the_victims_drop_out_and_say_whose_box_it_was() -> None:
    victims = {"site-0000", "site-0001", "site-0002"}
    cohort = cohort_of(10, "site-0009", victims)

    cohort.run()

    cohort.require_exact()
    assert set(cohort.aggregation.dropped) == set(cohort.errors) == victims
    for error in cohort.errors.values():
        assert isinstance(error, BadBoxes)
        assert error.senders == ("site-0009",)
        assert str(error) == (
            "delivery: share of site-0009: not sealed by it for this member and this sum, so the "
            "update is not masked"
        )


def test_all_whose_boxes_do_not_open_are_named() -> None:
    cohort = Cohort.of(6)
    bad = [f"site-000{i}" for i in range(1, 6)]

    def empty(name: str, answer: Answer) -> Answer:
        wrong = name in bad and isinstance(answer.reply, Shares)
        return spoilt(answer, {"site-0000"}) if wrong else answer

    cohort.answering = empty
    cohort.run()

    error = cohort.errors["site-0000"]
    assert isinstance(error, BadBoxes)
    assert error.senders == tuple(bad)
    assert "site-0001, site-0002, site-0003 and 2 more" in str(error)


def test_only_whose_box_it_was_delivered_can_be_accused_and_only_then() -> None:
    cohort = Cohort.of(6)
    cohort.until("share")
    assert cohort.aggregation.accuse("site-0000", ("site-0001",)) == ()
    cohort.step({"site-0005"})
    accuse = cohort.aggregation.accuse

    assert accuse("site-0000", ("site-0000", "site-0005", "zoe", "site-0001")) == ("site-0001",)
    assert accuse("site-0005", ("site-0001",)) == ()  # it dropped out before
    assert accuse("zoe", ("site-0001",)) == ()
    assert cohort.aggregation.accused == {"site-0001": {"site-0000"}}


def test_who_spoils_boxes_is_named_and_the_sum_opens_without_the_victims() -> None:
    victims = {"site-0", "site-1"}
    federation, _ = rounds_of(Spoiler("site-7", MANY["site-7"], victims=victims))

    for report in federation.run().history:
        assert set(report.failed) == victims
        assert set(report.trained) == MANY.keys() - victims
    told = federation.events.of("secure_dropout")
    assert [(one["site"], one["stage"], one["accused"]) for one in told] == [
        ("site-0", "mask", ["site-7"]),
        ("site-1", "mask", ["site-7"]),
    ] * 2
    for one in federation.events.of("secure_sum"):
        assert one["accused"] == {"site-7": ["site-0", "site-1"]}
        assert set(one["survivors"]) == MANY.keys() - victims


def test_a_liar_gets_nobody_out_but_itself() -> None:
    others = tuple(sorted(MANY.keys() - {"site-3"}))
    federation, _ = rounds_of(Slanderer("site-3", MANY["site-3"], slandered=(*others, "zoe")))

    for report in federation.run().history:
        assert list(report.failed) == ["site-3"]
        assert set(report.trained) == set(others)
    told = federation.events.of("secure_dropout")
    assert [one["accused"] for one in told] == [list(others)] * 2  # and nobody who is not there


def test_two_liars_do_not_change_who_is_in_later_rounds() -> None:
    """c = 0. They accuse all but one in round 1: if it counted, they would be alone with it."""
    honest = tuple(f"site-{i}" for i in range(1, 6))
    liars = {"site-6", "site-7"}
    sites = [
        Slanderer(one.name, one.num_examples, slandered=honest, only=1)
        if one.name in liars
        else one
        for one in toys(MANY)
    ]
    run = secured(config(rounds=3), threshold=0.5, colluding=0.0, minimum=3)
    federation = Federation(sites, run=run)

    first, *later = federation.run().history

    assert set(first.failed) == liars
    assert [(sorted(one.trained), dict(one.failed)) for one in later] == [(sorted(MANY), {})] * 2
    told, *others = federation.events.of("secure_sum")
    assert told["accused"] == dict.fromkeys(honest, sorted(liars))
    assert [one["survivors"] for one in others] == [sorted(MANY)] * 2


def test_a_sum_that_was_lost_to_bad_boxes_says_whose_they_were() -> None:
    spoiler = Spoiler("site-7", MANY["site-7"], victims={"site-0", "site-1"})
    federation, _ = rounds_of(spoiler, minimum=7)

    with pytest.raises(RunError, match="round 1: the secure sum of 8 sites was not opened") as e:
        federation.run()

    assert "site-0: lost at 'mask': protocol: delivery: share of site-7: not sealed" in str(e.value)
    told = federation.events.of("secure_dropout")
    assert [one["accused"] for one in told] == [["site-7"]] * 2


def test_an_accusation_is_a_field_of_the_refusal_and_is_left_out_elsewhere() -> None:
    plain = Refused(site="cork", reason="data", message="no")
    assert msgspec.json.encode(plain) == b'{"site":"cork","reason":"data","message":"no"}'
    accusing = Refused(site="cork", reason="protocol", message="no", accused=("delft",))

    assert unpack_reply(pack_refused(accusing), "mask") == accusing
